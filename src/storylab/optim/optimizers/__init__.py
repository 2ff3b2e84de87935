"""A module an optimizer: each has ``ENTRIES`` and imports torch only when it builds one."""
