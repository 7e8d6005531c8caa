"""Parameter groups: learning rates by name pattern, no weight decay on norms and biases."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from omegaconf import DictConfig, ListConfig
from torch import nn

from ..config import ConfigError, accepts, build, nearest

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.LocalResponseNorm)
_BIASES = ("bias", "b1", "b2")  # b1, b2: the stacked biases of experts, which are matrices


def match_parameters(model: nn.Module, pattern: str, key: str) -> set[str]:
    """The names of the parameters that an fnmatch pattern selects (``*`` matches dots too).

    Raises `ConfigError` where it selects none, with `key`, of the recipe, and the nearest names.
    """
    names = [name for name, _ in model.named_parameters()]
    matched = {name for name in names if fnmatchcase(name, pattern)}
    if not matched:
        literal = pattern.strip("*.")
        # Compare with the names' prefixes too: patterns mostly name a module.
        parts = {name: None for name in names}
        for name in names:
            words = name.split(".")
            parts.update({".".join(words[:i]) + ".*": None for i in range(1, len(words))})
        near = nearest(literal, parts, 3) or names[:3]
        raise ConfigError(
            f"{key}: pattern {pattern!r} matches no parameter of {type(model).__name__}; "
            f"the nearest names are {', '.join(near)}"
        )
    return matched


def get_param_groups(
    model: nn.Module,
    base_lr: float,
    lr_factors: Mapping[str, float] | None = None,
    no_weight_decay_norm: bool = True,
) -> list[dict]:
    """Groups the trainable parameters for a torch optimizer.

    Args:
        base_lr: the optimizer's learning rate.
        lr_factors: {fnmatch pattern: factor}; a parameter's rate is ``base_lr * factor`` of the
            last pattern that matches its name, so special cases stand after general ones.
        no_weight_decay_norm: whether norms, biases and other vectors and scalars don't decay.

    Raises `ConfigError` where a pattern matches no parameter, or nothing is trainable.
    """
    factors: dict[str, float] = {}
    key = "optimizer.params.lr_factors"
    for pattern, factor in (lr_factors or {}).items():
        factors.update(dict.fromkeys(match_parameters(model, pattern, key), float(factor)))

    groups: dict[tuple[float, bool], dict] = {}
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            factor = factors.get(f"{module_name}.{leaf}" if module_name else leaf, 1.0)
            plain = isinstance(module, _NORMS) or parameter.ndim <= 1 or leaf in _BIASES
            decays = not (no_weight_decay_norm and plain)
            group = groups.setdefault((factor, decays), {"params": [], "lr": base_lr * factor})
            group["params"].append(parameter)
            if not decays:
                group["weight_decay"] = 0.0
    if not groups:
        raise ConfigError("no parameter is trainable; check train.trainable and the model's config")
    return list(groups.values())


def build_optimizer(node: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Instantiates the recipe's ``optimizer``, whose ``params`` get the model and the base rate. On
    CUDA, PyTorch's own are fused, a few kernels a step, unless the recipe says ``fused``."""
    # Plain tuples (betas): the optimizer keeps its options in checkpoints.
    options = {k: tuple(v) if isinstance(v, ListConfig) else v for k, v in node.items()}
    params = {"base_lr": node.lr, **options.pop("params"), "model": model}
    groups = build(params, "optimizer.params")
    if not options.keys() & {"fused", "foreach", "differentiable"} and _can_be_fused(node, groups):
        options["fused"] = True
    return build({**options, "params": groups}, "optimizer")


def _can_be_fused(node: DictConfig, groups: list[dict]) -> bool:
    target = node["_target_"]
    name = target if isinstance(target, str) else getattr(target, "__module__", "")
    return (
        name.startswith("torch.optim")
        and accepts(node, "fused")
        and all(p.is_cuda and p.is_floating_point() for group in groups for p in group["params"])
    )
