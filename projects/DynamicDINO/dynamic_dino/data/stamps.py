"""The former name of the command ``python -m dynamic_dino.data.synthetic.stamps``."""

from .synthetic.stamps.cli import main

if __name__ == "__main__":
    main()
