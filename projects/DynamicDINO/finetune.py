#!/usr/bin/env python
"""Fine-tunes a detector on your own data; see --help and `dynamic_dino.finetune`."""

import sys

from dynamic_dino.finetune.cli import main

if __name__ == "__main__":
    sys.exit(main())
