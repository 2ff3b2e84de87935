"""The local page over a folder of runs, for `storylab ui`."""
