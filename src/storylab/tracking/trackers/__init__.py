"""One module for each tracker; its process imports it alone. See :data:`storylab.tracking.TRACKERS`."""
