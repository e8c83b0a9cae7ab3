"""Fitting on token states: heads, ridges, their weights, the choice of a layer, intervals."""
