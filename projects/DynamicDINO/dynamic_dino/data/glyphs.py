"""The former name of the command ``python -m dynamic_dino.data.synthetic.glyphs``."""

from .synthetic.glyphs import main

if __name__ == "__main__":
    main()
