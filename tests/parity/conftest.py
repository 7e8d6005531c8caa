from helpers.twins import _twins, gdino, twins  # noqa: F401
