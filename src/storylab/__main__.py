"""``python -m storylab``."""

import sys

from storylab.cli import main

sys.exit(main())
