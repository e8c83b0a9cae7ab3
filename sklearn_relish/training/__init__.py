"""Fitting on token states: heads, ridges, their weights, the layer, intervals."""
