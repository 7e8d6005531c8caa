"""What is trained: named patterns, the mode of frozen modules, and a table of the counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..config import ConfigError
from .optim import match_parameters


def set_trainable(model: nn.Module, patterns: Iterable[str] | None) -> None:
    """Freezes every parameter that no pattern selects; None leaves the model as it was built.

    A parameter that the model itself froze stays frozen even where a pattern selects it. Raises
    `ConfigError` for a pattern that matches nothing, with the nearest names, or that leaves nothing
    to train.
    """
    if patterns is None:
        return
    patterns = list(patterns)
    chosen = set().union(
        *(match_parameters(model, pattern, "train.trainable") for pattern in patterns)
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in chosen)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            f"train.trainable={patterns} selects only parameters that the model freezes itself; "
            "nothing would be trained"
        )


def set_train_mode(model: nn.Module) -> None:
    """``model.train()``, but wholly frozen modules stay in eval mode: no dropout in a frozen
    encoder, and its BatchNorm statistics don't move."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def parameter_table(counts: Mapping[str, int]) -> str:
    """The counts of `count_parameters`, and how many are frozen, in millions."""
    counts = {**counts, "frozen": counts["total"] - counts["trainable"]}
    width = max(map(len, counts))
    rows = [f"  {name:<{width}}  {count / 1e6:10.3f} M" for name, count in counts.items()]
    return "parameters\n" + "\n".join(rows)
