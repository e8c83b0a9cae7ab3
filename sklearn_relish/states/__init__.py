"""Storage of token states by text: in memory or in a folder."""
