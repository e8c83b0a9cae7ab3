"""Token states that are kept: in memory or in a folder, found again by text."""
