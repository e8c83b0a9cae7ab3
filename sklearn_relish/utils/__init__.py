"""What several packages need: devices, files, locks, messages, versions."""
