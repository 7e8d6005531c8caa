#!/usr/bin/env python
"""Fine-tunes a detector on your own data; see --help and `dynamic_dino.finetune`."""

import sys

from dynamic_dino.cli import finetune

if __name__ == "__main__":
    sys.exit(finetune())
