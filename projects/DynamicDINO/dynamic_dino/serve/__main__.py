"""``python -m dynamic_dino.serve``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
