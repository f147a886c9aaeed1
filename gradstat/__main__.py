"""``python -m gradstat``: the same as the command ``gradstat``."""

import sys

from gradstat.cli import main

sys.exit(main())
