"""What trainers store beside the weights, read without importing or calling anything.

A .pth file is a pickle: it names classes, which whoever reads it would import and call. Here the
weights alone are wanted. Where a file names a class of plain data (settings, numbers, dates,
paths), a stand-in takes its place, which takes all arguments and keeps the items of dictionaries
and lists. torch refuses every other name, and to call anything but what it knows and the stand-ins.
"""

from __future__ import annotations

import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

import torch


class Nothing:
    """Stands for an object of which nothing is wanted."""

    def __new__(cls, *arguments: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class Items:
    """Stands for a kind of dictionary, which may hold the weights: becomes an ordinary one, of the
    one type of which torch takes attributes too."""

    def __new__(cls, *arguments: Any) -> Any:
        return OrderedDict()


class Entries:
    """Stands for a kind of list, and becomes one."""

    def __new__(cls, *arguments: Any) -> Any:
        return []


# Names (fnmatch) -> stand-in; the first that matches. No name here is of something that runs code
# which an argument brings, such as builtins.eval or numpy.testing's functions: those are refused,
# though a stand-in would do nothing.
STAND_INS: dict[str, type] = {
    "collections.defaultdict": Items,
    "*.CfgNode": Items,  # yacs, fvcore, Detectron2
    "*.ConfigDict": Items,  # mmengine, mmcv, ml_collections
    "addict.addict.Dict": Items,
    "easydict.EasyDict": Items,
    "munch.Munch": Items,
    "collections.deque": Entries,
    "argparse.Namespace": Nothing,
    "types.SimpleNamespace": Nothing,
    "copyreg._reconstructor": Nothing,  # makes an empty object of a class that is listed itself
    "numpy.ndarray": Nothing,
    "numpy.dtype": Nothing,
    "numpy.dtypes.*DType": Nothing,
    "numpy.core.multiarray.scalar": Nothing,  # numpy 1
    "numpy.core.multiarray._reconstruct": Nothing,
    "numpy._core.multiarray.scalar": Nothing,
    "numpy._core.multiarray._reconstruct": Nothing,
    "pathlib.*Path": Nothing,
    "datetime.*": Nothing,
    "decimal.Decimal": Nothing,
    "fractions.Fraction": Nothing,
    "uuid.UUID": Nothing,
    "mmengine.logging.history_buffer.HistoryBuffer": Nothing,
    "mmengine.config.config.Config": Nothing,
    "builtins.getattr": Nothing,  # a HistoryBuffer names its methods so
    "omegaconf.dictconfig.DictConfig": Nothing,
    "omegaconf.listconfig.ListConfig": Nothing,
    "omegaconf.base.*Metadata": Nothing,
    "omegaconf.nodes.*Node": Nothing,
    "typing.Any": Nothing,
    **{
        f"builtins.{kind}": Nothing
        for kind in "bool bytes complex dict float frozenset int list object set slice str tuple "
        "range".split()
    },
}


@contextmanager
def plain_data_allowed(path: Path) -> Iterator[None]:
    """While it lasts, ``torch.load(path, weights_only=True)`` reads plain data too."""
    found = {}
    for name in _names_in(path):
        stand_in = next((s for pattern, s in STAND_INS.items() if fnmatchcase(name, pattern)), None)
        if stand_in is not None and not name.startswith("torch."):
            found[name] = stand_in
    with torch.serialization.safe_globals([(s, name) for name, s in found.items()]):
        yield


def _names_in(path: Path) -> set[str]:
    """All that the pickle names, or as much as can be read: what is wrong with it, torch says."""
    names: set[str] = set()
    with suppress(ValueError, OSError, IndexError, zipfile.BadZipFile):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for entry in archive.namelist():
                    if entry.endswith("/data.pkl"):
                        with archive.open(entry) as file:
                            _add_names(file, names)
        else:
            with path.open("rb") as file:
                for _ in range(4):  # magic number, version, machine, the object
                    _add_names(file, names)
    return names


def _add_names(file: IO[bytes], names: set[str]) -> None:
    for code, argument, _ in pickletools.genops(file):
        if code.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            # torch.save writes the names of Python 2, and pickle and torch read them so
            module, name = NAME_MAPPING.get((module, name), (module, name))
            names.add(f"{IMPORT_MAPPING.get(module, module)}.{name}")
