"""Checks before the first step. Each module here holds one, as ``CHECK``."""
