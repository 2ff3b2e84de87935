"""Recompute from the record of runs, data sets and experiments everything that can be recomputed."""
