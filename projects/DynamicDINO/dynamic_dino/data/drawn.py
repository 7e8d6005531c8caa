"""The former name of the command ``python -m dynamic_dino.data.synthetic.drawn``."""

from .synthetic.drawn import main

if __name__ == "__main__":
    main()
