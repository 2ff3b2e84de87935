"""The figures as Vega-Lite: one specification each for the page and for the pictures of the log."""
