"""A text classification set that every installation has: of which part of SciPy or PyTorch is this
the first paragraph of a docstring?

Nothing is downloaded, and nothing is run: the files are parsed. The set is that of the versions of
both libraries that are installed, which a result names.
"""

from __future__ import annotations

import ast
import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path

CLASSES = (
    *("scipy.stats", "scipy.optimize", "scipy.signal", "scipy.sparse", "scipy.interpolate"),
    *("scipy.io", "scipy.linalg", "scipy.special", "scipy.spatial", "scipy.integrate"),
    *("torch.distributed", "torch.nn", "torch.ao", "torch.fx", "torch.onnx", "torch.cuda"),
    *("torch.distributions", "torch.optim", "torch.export", "torch.autograd"),
)
WORDS = range(4, 41)  # of a paragraph


def read(seed: int = 0, most: int = 120) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(training texts, test texts), each with the number of its class.

    No file of a library has texts in both: neighbours in a file often say nearly the same. What
    stands in two classes is in neither; of a class there are at most `most` and `most` / 2 texts.
    """
    rng = random.Random(seed)
    owners: dict[str, set[str]] = {}
    files: dict[str, dict[Path, list[str]]] = {}
    for name in CLASSES:
        files[name] = {file: list(paragraphs(file)) for file in python_files(name)}
        for texts in files[name].values():
            for text in texts:
                owners.setdefault(text, set()).add(name)
    train, test = [], []
    for number, name in enumerate(CLASSES):
        order = sorted(files[name])
        rng.shuffle(order)
        seen: set[str] = set()
        split: list[list[str]] = [[], []]
        for i, file in enumerate(order):
            new = [t for t in files[name][file] if len(owners[t]) == 1 and t not in seen]
            seen.update(new)
            split[i % 3 == 2] += new
        for part, texts, limit in ((train, split[0], most), (test, split[1], most // 2)):
            rng.shuffle(texts)
            part += [(text, number) for text in texts[:limit]]
    return train, test


def python_files(module: str) -> list[Path]:
    """The files of a package of a library, without tests; nothing is imported but the library's
    own package, whose place is asked for.

    Raises:
        FileNotFoundError: the library is not installed.
    """
    library, _, part = module.partition(".")
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{library} is not installed: pip install {library}")
    folder = Path(spec.submodule_search_locations[0]) / part
    return [
        file
        for file in sorted(folder.rglob("*.py"))
        if not any(piece.startswith("test") for piece in file.relative_to(folder).parts)
    ]


def paragraphs(file: Path) -> Iterator[str]:
    """The first paragraph of each docstring of a function or class, if it is a sentence or two."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if len(text.split()) in WORDS:
                yield text
