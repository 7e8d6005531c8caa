"""Config files: load, override, check. Every mistake is reported with the nearest right name.

The recipe is a Detectron2 LazyConfig with the nodes of `NODES`, and nodes that these interpolate,
such as ``data`` for ``${data.train_json}``. What else a file defines is no part of the config, so
that no override of it is accepted and does nothing.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import os
import re
import runpy
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import DictConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException

from . import renamed
from .files import configs_folder, write_text
from .kinds import of_wrong_kind
from .ranges import out_of_range
from .trust import Loader, UntrustedError, require_known_targets
from .values import CALLABLE, read_value

NODES = ("model", "optimizer", "lr_multiplier", "dataloader", "train", "inference")
INTERPOLATION = re.compile(r"\$\{(\w+)[.}\[]")  # ${data.train_json} -> data

# Every key of `train` that the engine reads; configs/common/train.py takes its values from here.
TRAIN_DEFAULTS: dict[str, Any] = {
    "output_dir": "output",
    "init_checkpoint": "",  # weights to start from; dense ones become experts in an MoE model
    "init_except": (),  # fnmatch patterns on what stays as initialised, such as "decoder.*.ffn.*"
    "seed": 0,
    "device": "auto",  # "cuda", "cpu" or "auto"
    "max_iter": 90000,
    "accumulate": 1,  # a process's batch goes through the model in so many equal parts, one by one
    "num_threads": None,  # CPU threads of torch; None keeps torch's own choice
    "amp": {"enabled": True, "dtype": "bfloat16"},  # or "float16" (CUDA only)
    "clip_grad": {"enabled": True, "max_norm": 0.1, "norm_type": 2.0},
    "ema": {"enabled": False, "decay": 0.9998},
    # of DistributedDataParallel; None: PyTorch's default
    "ddp": {
        "broadcast_buffers": False,
        "find_unused_parameters": False,
        "static_graph": False,
        "gradient_as_bucket_view": False,
        "bucket_cap_mb": None,
        "fp16_compression": False,
    },
    # DynMoE: experts come and go every `period` iterations, by the choices in the last `window`
    "adaptive_experts": {"enabled": False, "period": 200, "window": 200},
    "checkpointer": {"period": 5000, "max_to_keep": 3},
    "eval_period": 5000,  # 0: only after the last iteration
    "eval_first": False,  # score the model that training starts from as well
    "log_period": 20,
    "best_metric": None,  # e.g. "val/AP"
    "trainable": None,  # fnmatch patterns on parameter names; None: as the model was built
}

# What those take that are None, or a list that may be empty; see `read_value`
TRAIN_TYPES: dict[str, Any] = {
    "train.best_metric": str | None,
    "train.ddp.bucket_cap_mb": float | None,
    "train.init_except": Sequence[str],
    "train.trainable": Sequence[str] | None,
}


class ConfigError(ValueError):
    """The recipe or its overrides are wrong; the message says where and what to write instead."""


@contextmanager
def input_errors(key: str = "") -> Iterator[None]:
    """Turns a ValueError or FileNotFoundError into `ConfigError`, which the commands print without
    a traceback: while things are built, a value or a file of the recipe is wrong, not the code.
    key: the recipe's, which the error then names."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"{key}: {error}" if key else str(error)) from error


def build(node: Any, key: str) -> Any:
    """What a node of the recipe describes, by Detectron2's `instantiate`; key: the node's, "model".

    Raises `ConfigError`, which names the innermost node in which it happened, for a ValueError, a
    file that isn't there, and for a target that doesn't take the node's keys.
    """
    if not (isinstance(node, Mapping) and "_target_" in node):
        return instantiate(node)
    parts = {name: build(part, f"{key}.{name}") for name, part in node.items()}
    try:
        with input_errors(key):
            return instantiate(parts)
    except TypeError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if frame.f_globals["__name__"] != instantiate.__module__:
            raise  # within the target: its code is wrong, or can't tell what is wrong
        raise ConfigError(f"{key}: {error}") from error


def without_downloads(model: DictConfig) -> DictConfig:
    """A copy of the `model` of a recipe whose backbone and text encoder start at random where their
    weights would have to be fetched; the tokenizer is then that of the package with MiniLM."""
    model = copy.deepcopy(model)
    if model.backbone.get("weights") == "timm":
        model.backbone.weights = None
    if not model.text_encoder.get("model", "package:").startswith("package:"):
        random = LazyConfig.load(str(configs_folder() / "common/models/edge_random.py")).model
        for key in ("model", "weights", "config"):
            model.text_encoder[key] = random.text_encoder[key]
    return model


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    model: str | Path | None = None,
    to_build: bool = True,
) -> DictConfig:
    """Loads a LazyConfig file, fills in `TRAIN_DEFAULTS` and applies ``key=value`` overrides.

    A path that ends in ``:NAME``, such as ``configs/himoe/dino.py:x16_top1``, is that of a variant:
    the recipe with the overrides of variants.py, and an output folder named after it.

    `model` is another recipe, whose detector, input size and last weights take the place of those
    of the file, before the overrides are applied.

    A recipe in Python is code. A .yaml may name what `trust` knows only, unless nothing is going to
    be built of it (`to_build`).

    Raises `ConfigError` for a missing file, an unknown key, a value of the wrong kind, or a .yaml
    that names unknown code.
    """
    path, variant = split_variant(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist{_near_files(path)}")
    cfg = LazyConfig.load(str(path)) if path.suffix == ".py" else _load_yaml(path, to_build)
    if missing := [node for node in ("model", "dataloader") if node not in cfg]:
        raise ConfigError(
            f"{path} has no `{missing[0]}`; a recipe defines model, optimizer, lr_multiplier, "
            f"dataloader and train (this file defines: {', '.join(map(str, cfg)) or 'nothing'})"
        )
    _drop_helpers(cfg)
    _check_train_keys(cfg.get("train", {}), path)
    cfg.train = OmegaConf.merge(TRAIN_DEFAULTS, cfg.get("train", {}))
    if variant:
        output = f"train.output_dir={cfg.train.output_dir}_{variant}"
        apply_overrides(cfg, [*_variant(path, variant), output])
    if model is not None:
        other = load_config(model)
        cfg.model, cfg.inference = other.model, other.inference
        cfg.train.init_checkpoint = f"{other.train.output_dir}/model_final.pth"
    return apply_overrides(cfg, overrides, to_build)


def variants(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """The variants of a folder of recipes, by its variants.py: "himoe/dino:x16_top1" -> what it is,
    and the overrides of the recipe himoe/dino.py that it stands for."""
    return runpy.run_path(str(folder / "variants.py"))["VARIANTS"]


def variants_table(folder: Path) -> str:
    """All variants as a Markdown table; those of several recipes are one line."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for key, (title, overrides) in variants(folder).items():
        recipe, _, name = key.partition(":")
        changes = ", ".join(f"`{override}`" for override in overrides)
        lines.setdefault((name, title, changes), []).append(f"`{recipe}.py`")
    text = "| variant | of | what it is | overrides |\n|---|---|---|---|\n"
    for (name, title, changes), recipes in lines.items():
        text += f"| `{name}` | {', '.join(recipes)} | {title} | {changes} |\n"
    return text


def split_variant(path: str | Path) -> tuple[Path, str]:
    """ "recipe.py:name" -> the recipe's path and the name, which is empty for a recipe itself."""
    recipe, _, name = str(path).rpartition(".py:")
    return (Path(f"{recipe}.py"), name) if recipe else (Path(path), "")


def _variants_folder(path: Path) -> Path | None:
    return next((f for f in path.absolute().parents if (f / "variants.py").is_file()), None)


def _variant(path: Path, name: str) -> list[str]:
    """Its overrides; the table is that of the nearest folder above the recipe that has one."""
    folder = _variants_folder(path)
    if folder is None:
        raise ConfigError(f"{path}:{name}: no folder above the recipe has a variants.py")
    table = variants(folder)
    recipe = path.absolute().relative_to(folder).with_suffix("").as_posix()
    if f"{recipe}:{name}" in table:
        return table[f"{recipe}:{name}"][1]
    names = [key.partition(":")[2] for key in table if key.startswith(f"{recipe}:")]
    hint = suggestion(name, names) or f"; it has {', '.join(names) or 'none'}"
    raise ConfigError(f"{path.name} has no variant {name!r}{hint}")


def apply_overrides(cfg: DictConfig, overrides: Sequence[str], to_build: bool = True) -> DictConfig:
    """Applies ``key=value`` strings in place. A key that holds text takes the value as typed, all
    others by hydra's grammar: see `read_value`. A key must exist in the recipe, or name a parameter
    of the callable whose node it is in (``optimizer.betas=[0.9,0.98]``). A callable with all its
    arguments (``model.backbone={_target_:my_module.MyBackbone,width:64}``) replaces a node.

    Raises `ConfigError`, also for a value that is out of its range or, where something is going to
    be built of it (what it names is imported for that), of another kind than its callable takes."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"override {override!r} is not of the form key=value, e.g. train.max_iter=100 "
                "(flags such as --resume stand before the overrides)"
            )
        try:
            _check_key(cfg, key)
            before = OmegaConf.select(cfg, key, throw_on_missing=False)
            new = read_value(cfg, key, value, TRAIN_TYPES.get(key))
            if value.startswith(CALLABLE):  # else the former callable's arguments stay
                OmegaConf.update(cfg, key, None, merge=False)
            elif isinstance(new, Mapping):
                _check_section(cfg, key, new)
            OmegaConf.update(cfg, key, new, merge=True)
            _check_value(key, before, OmegaConf.select(cfg, key), value)
        except (ValueError, OmegaConfBaseException) as error:
            if isinstance(error, ConfigError):
                raise
            reason = str(error).partition("\n")[0]
            raise ConfigError(reason if key in reason else f"{override}: {reason}") from None
    content = OmegaConf.to_container(cfg, resolve=False)
    if wrong := out_of_range(_flat(content)) or (of_wrong_kind(content) if to_build else None):
        raise ConfigError(wrong)
    return cfg


def _load_yaml(path: Path, to_build: bool) -> DictConfig:
    """As LazyConfig does, also where an older version of this package wrote the file; but it calls
    nothing unknown."""
    try:
        text = renamed.current(path.read_text(encoding="utf-8"))
        content = renamed.current_nodes(yaml.load(text, Loader))
        if to_build:
            require_known_targets(content)
    except UntrustedError as error:
        raise ConfigError(f"config file {path} is not trusted: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, TypeError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ConfigError(f"config file {path} is not valid YAML: {reason}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"config file {path} holds no sections: is it the config.yaml of a run?")
    return OmegaConf.create(content, flags={"allow_objects": True})


def save_config(cfg: DictConfig, path: Path) -> None:
    """What `load_config` reads again. LazyConfig's own writing is in the locale's encoding; it is
    left what YAML can't hold, such as lambdas."""
    content = OmegaConf.to_container(cfg, resolve=False, structured_config_mode=SCMode.INSTANTIATE)
    try:
        text = yaml.dump(_named(content), default_flow_style=None, allow_unicode=True, width=9999)
        yaml.unsafe_load(text)
    except Exception:  # of whatever type an object's way to YAML raises
        LazyConfig.save(cfg, str(path))
    else:
        write_text(path, text)


def flat(cfg: DictConfig) -> dict[str, Any]:
    """Dotted key -> value, of all that is no section; references stay as they are written, and
    callables are their import path."""
    return _flat(_named(OmegaConf.to_container(cfg, resolve=False)))


def _flat(content: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}

    def add(prefix: str, node: Any) -> None:
        if isinstance(node, list) and any(isinstance(item, dict) for item in node):
            node = dict(enumerate(node))
        if isinstance(node, dict) and node:
            for key, value in node.items():
                add(f"{prefix}.{key}" if prefix else str(key), value)
        else:
            values[prefix] = node

    add("", content)
    return values


def _named(content: Any) -> Any:
    """The same, with the callables of lazy nodes by their import path."""
    if isinstance(content, dict):
        target = content.get("_target_")
        names = {"_target_": _convert_target_to_string(target)} if callable(target) else {}
        return {key: _named(value) for key, value in content.items()} | names
    return [_named(item) for item in content] if isinstance(content, list) else content


def require(cfg: DictConfig, *keys: str) -> None:
    """Raises `ConfigError` unless every dotted key is in the recipe."""
    for key in keys:
        if OmegaConf.select(cfg, key) is None:
            raise ConfigError(
                f"the recipe has no `{key}`, which is needed here{suggestion(key, keys_of(cfg))}"
            )


def accepts(node: Mapping, name: str) -> bool:
    """Whether the callable of a lazy node takes a parameter called `name`."""
    target = node.get("_target_")
    target = locate(target) if isinstance(target, str) else target
    try:
        return name in inspect.signature(target).parameters
    except (TypeError, ValueError):  # not callable, or a builtin without a signature
        return False


def keys_of(cfg: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a config, sections and the sections in lists included."""
    if OmegaConf.is_config(cfg):
        cfg = OmegaConf.to_container(cfg, resolve=False)
    if isinstance(cfg, list):
        cfg = {i: value for i, value in enumerate(cfg) if isinstance(value, Mapping)}
    if not isinstance(cfg, Mapping):
        return []
    keys = []
    for key, value in cfg.items():
        if key != "_target_":
            keys += [f"{prefix}{key}", *keys_of(value, f"{prefix}{key}.")]
    return keys


def nearest(name: str, names: Iterable[str], count: int = 1) -> list[str]:
    """The most similar names, best first; may be empty."""
    return difflib.get_close_matches(name, list(names), n=count, cutoff=0.6)


def suggestion(name: str, names: Iterable[str]) -> str:
    """The end of an error message: "; did you mean ...?", or nothing where no name comes near."""
    near = nearest(name, names)
    return f"; did you mean {near[0]}?" if near else ""


def _drop_helpers(cfg: DictConfig) -> None:
    """Takes out the nodes that nothing reads, such as those that a recipe imports to build others
    of: LazyConfig exports every dict of a file."""
    content = OmegaConf.to_container(cfg, resolve=False)
    read, waiting = set(), set(NODES)
    while waiting:
        name = waiting.pop()
        read.add(name)
        waiting |= set(INTERPOLATION.findall(str(content.get(name)))) - read
    for name in [name for name in cfg if name not in read]:
        del cfg[name]


def _check_key(cfg: DictConfig, key: str) -> None:
    absent = object()
    if OmegaConf.select(cfg, key, default=absent, throw_on_missing=False) is not absent:
        return
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if isinstance(node, Mapping) and accepts(node, name):
        return
    known = keys_of(cfg)
    # A right name in the wrong section ("max_iter") resembles no full key, but ends one, or names a
    # parameter of another node.
    same_name = [k for k in known if k.rpartition(".")[2] == name]
    if not same_name:
        sections = {k: OmegaConf.select(cfg, k, throw_on_missing=False) for k in known}
        same_name = [
            f"{k}.{name}"
            for k, section in sections.items()
            if isinstance(section, Mapping) and accepts(section, name)
        ]
    near = nearest(key, same_name, 3) or same_name[:3] or nearest(key, known)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; see config.yaml of a run"
    raise ConfigError(f"unknown config key {key!r}{hint}")


def _check_section(cfg: DictConfig, key: str, new: Mapping) -> None:
    """The keys of a section that is given as a whole, ``train.ema={decay:0.9}``: those of `train`
    and of a callable are known, others, such as patterns on names, are free."""
    section = OmegaConf.select(cfg, key, throw_on_missing=False)
    known = f"{key}.".startswith("train.") or isinstance(section, Mapping) and "_target_" in section
    for name, value in new.items():
        if known:
            _check_key(cfg, f"{key}.{name}")
        if isinstance(value, Mapping):
            _check_section(cfg, f"{key}.{name}", value)


def _check_value(key: str, before: Any, after: Any, text: str) -> None:
    # Others may be left out, such as model.denoising; those of train are read.
    kinds = DictConfig if key.startswith("train.") else DictConfig | None
    if isinstance(before, DictConfig) and not isinstance(after, kinds):
        names = ", ".join(f"{key}.{name}" for name in before)
        raise ConfigError(f"{key} is a section, it can't be set to {text!r}; set one of {names}")
    if key.endswith("_target_") or (isinstance(after, DictConfig) and "_target_" in after):
        _check_target(key, after if isinstance(after, str) else after["_target_"])
    numbers = (int, float)
    expected = bool if isinstance(before, bool) else numbers if isinstance(before, numbers) else ()
    wrong = isinstance(after, str) or (isinstance(after, bool) and expected is numbers)
    if key.startswith("train.") and key not in TRAIN_TYPES and expected:
        wrong = not isinstance(after, expected) or wrong
    if expected and wrong:
        kind = "true or false" if expected is bool else "a number"
        raise ConfigError(f"{key} needs {kind} (as {before!r}), not {text!r}")


def _check_target(key: str, target: Any) -> None:
    try:
        found = locate(target) if isinstance(target, str) else target
    except Exception as error:  # of the module's own code too
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{key} names {target!r}, which can't be imported ({reason}); is its folder in "
            "PYTHONPATH?"
        ) from error
    if not callable(found):
        raise ConfigError(f"{key} names {target!r}, which is nothing to call")


def _check_train_keys(train: Mapping, path: Path) -> None:
    """A misspelt key would silently have no effect; but recipes may add keys of their own."""
    known = keys_of(TRAIN_DEFAULTS)
    for key in keys_of(train):
        if key not in known and (near := difflib.get_close_matches(key, known, 1, 0.8)):
            raise ConfigError(
                f"{path}: unknown config key 'train.{key}'; did you mean train.{near[0]}?"
            )


def _near_files(path: Path) -> str:
    """Config files that may be meant: same depth below the nearest folder that exists."""
    root = path.parent
    while not root.is_dir():
        root = root.parent
    depth = len(path.parent.relative_to(root).parts)
    found = {str(file): None for file in sorted(root.glob("*/" * depth + "*.py"))}
    by_name = {Path(file).name: file for file in found}
    if folder := _variants_folder(path):
        folder = folder if path.is_absolute() else Path(os.path.relpath(folder))
        for recipe, _, name in (key.partition(":") for key in variants(folder)):
            by_name[f"{Path(recipe).name}_{name}.py"] = f"{folder / recipe}.py:{name}"
    near = [by_name[name] for name in nearest(path.name, by_name)]
    if depth:  # a folder is wrong: the file's name alone says too little
        near = nearest(str(path), found) or near
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; in {root} there are: {', '.join([*found][:8])}" if found else ""
