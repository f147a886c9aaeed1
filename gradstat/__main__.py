"""``python -m gradstat``: the same as the command ``gradstat``."""

import sys

from gradstat.cli import main

if __name__ == "__main__":
    sys.exit(main())
