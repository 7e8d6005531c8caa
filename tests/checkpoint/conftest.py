from helpers.nano import _nano, nano, nano_config  # noqa: F401
from helpers.twins import _twins, gdino, twins  # noqa: F401
