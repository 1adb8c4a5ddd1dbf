"""Fitting kernel families from tables of measured kernels, and the families that ship."""
