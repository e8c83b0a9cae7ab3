"""Tables and targets: rows to texts, `y` to numbers."""
