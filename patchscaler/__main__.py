"""``python -m patchscaler``."""

import sys

from patchscaler.cli import main

if __name__ == "__main__":
    sys.exit(main())
