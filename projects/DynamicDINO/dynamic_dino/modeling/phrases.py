"""`Phrases`: what each detection of an `Instances` is called."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch


class Phrases(tuple):
    """The phrase of each detection, indexed as tensors are: by a slice, a mask, a list of indices,
    or a tensor or array of them. So ``detections[detections.scores > 0.5]`` works on the
    `Instances` that hold it, and ``Instances.cat`` keeps it what it is.

    A tuple, since Detectron2 makes plain lists of lists that it joins. It equals a list of the
    same phrases, and JSON writes it as one.
    """

    __slots__ = ()

    @staticmethod
    def cat(parts: Iterable[Phrases]) -> Phrases:
        """Those of several results, one after the other; what Detectron2's ``Instances.cat`` calls
        of a field that is neither a tensor nor a list."""
        return Phrases(chain.from_iterable(parts))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int):
            return super().__getitem__(index)
        if isinstance(index, slice):
            return Phrases(super().__getitem__(index))
        chosen = torch.arange(len(self))[index].tolist()  # PyTorch knows what an index is
        if isinstance(chosen, int):
            return super().__getitem__(chosen)
        return Phrases(super(Phrases, self).__getitem__(i) for i in chosen)

    def __eq__(self, other: object) -> bool:
        return tuple.__eq__(self, tuple(other)) if isinstance(other, list | tuple) else False

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__

    def __repr__(self) -> str:
        return repr(list(self))
