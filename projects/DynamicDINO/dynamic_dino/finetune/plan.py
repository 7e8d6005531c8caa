"""What is tuned on a user's photos, and from which weights; for how long, `rule` says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ..checkpoint.transformers_config import detector_config, read_config
from ..config import ConfigError, apply_overrides, input_errors, load_config
from ..engine.setup import resolve_device
from ..files import configs_folder
from ..serving.inference import find_files, find_recipe
from ..serving.shipped import DEFAULT_DENSE, DEFAULT_MODEL, SHIPPED_MODELS
from ..sources import is_hub_spec, model_directory
from .rule import iterations_for

PUBLIC = "hf:IDEA-Research/grounding-dino-tiny"  # where there is a GPU
TITLES = {
    "tuned": "tuned",  # all but the frozen towers
    "x16": "x16-Top2",
    "control": "dense, same parts as x16 (control)",
}
# Recipes of own data: of the whole model, and of experts.
NANO = ("finetune/nano_custom.py", "moe_tuning/nano_x16_custom.py")
GDINO = ("finetune/gdino_tiny_custom.py", "moe_tuning/gdino_tiny_x16.py")


@dataclass(frozen=True)
class Start:
    """The detector that tuning starts from.

    name     as it was given: a shipped model, "hf:...", or the folder of a run
    weights  what ``train.init_checkpoint`` takes
    recipes  of own data, below configs/: dense, and with experts
    model    `model` and `inference` of its own recipe, which take the place of those of `recipes`
    """

    name: str
    weights: str
    recipes: tuple[str, str]
    model: DictConfig


def default_start(device: str) -> str:
    """By the machine; `device` is "cpu" or "cuda". On a CPU the default of `load_detector` if that
    is dense, else the default dense one."""
    if device == "cuda":
        return PUBLIC
    dense = not SHIPPED_MODELS[DEFAULT_MODEL].config.startswith("moe_tuning/")
    return DEFAULT_MODEL if dense else DEFAULT_DENSE


def find_start(name: str | None, device: str) -> Start:
    """The detector of that name; None: `default_start`.

    Raises `ConfigError` for a name that is none, with those that there are, and for public weights
    that can't be had.
    """
    name = name or default_start(device)
    if name in SHIPPED_MODELS:
        shipped = SHIPPED_MODELS[name]
        cfg = load_config(find_recipe(name))
        return Start(name, f"package:dynamic_dino/weights/{shipped.weights}", NANO, _model(cfg))
    if is_hub_spec(name):
        try:
            folder = model_directory(name)
            return Start(name, name, GDINO, detector_config(read_config(folder), folder))
        except (ValueError, OSError) as error:
            raise ConfigError(
                f"{error}. To tune the small model that is shipped instead: "
                f"--start {default_start('cpu')}"
            ) from error
    if Path(name).is_dir():
        with input_errors():
            config, weights = find_files(name, None)
        cfg = load_config(config)
        # Towers of nano come from packages, those of Grounding DINO from its checkpoint.
        nano = str(OmegaConf.select(cfg, "model.backbone.weights")).startswith("package:")
        return Start(name, str(weights), NANO if nano else GDINO, _model(cfg))
    raise ConfigError(
        f"--start {name}: choose one of {', '.join(SHIPPED_MODELS)}, public weights "
        "(hf:OWNER/NAME or hf:DIRECTORY), or the folder of a run"
    )


def _model(cfg: DictConfig) -> DictConfig:
    return OmegaConf.create(
        {"model": cfg.model, "inference": cfg.inference}, flags={"allow_objects": True}
    )


def recipe_for(
    start: Start,
    kind: str,
    data: str,
    output: Path,
    *,
    device: str = "auto",
    photos: int = 0,
    iterations: int | None = None,
    overrides: Sequence[str] = (),
) -> DictConfig:
    """The config of one training run, ready for `engine.train.do_train`.

    Args:
        kind: "tuned": all but the frozen towers trains. "x16": MoE-Tuning, each FFN of the decoder
            becomes 16 experts, and the parts train that the recipe names. "control": the dense
            detector with the same parts free.
        photos: training photos that show an object; the rule follows from them.
        iterations: instead of the rule's.
        overrides: ``key=value``, applied last.

    Raises `ConfigError` for an override that is wrong.
    """
    recipe = load_config(configs_folder() / start.recipes[kind != "tuned"])
    cfg = recipe.copy()
    frozen_text = cfg.model.text_encoder.get("frozen", False)
    cfg.model, cfg.inference = start.model.model.copy(), start.model.inference.copy()
    cfg.model.text_encoder.frozen = frozen_text
    if kind == "x16" and "router" not in cfg.model.decoder.layer.ffn:
        dense = cfg.model.decoder.layer.ffn
        cfg.model.decoder.layer.ffn = recipe.model.decoder.layer.ffn.copy()
        cfg.model.decoder.layer.ffn.update(dim=dense.dim, hidden=dense.hidden)
        cfg.model.decoder.layer.ffn.router.dim = dense.dim
        cfg.model.criterion.router_losses = recipe.model.criterion.router_losses
    if kind == "control":
        if "router" in cfg.model.decoder.layer.ffn:
            raise ConfigError(
                f"{start.name} has experts already, so no dense control can start from it: choose "
                f"a dense one with --start, such as {default_start('cpu')}"
            )
        cfg.train.trainable = [
            *(p for p in cfg.train.trainable if ".ffn." not in p),
            "decoder.layers.*.ffn.*",
        ]
    cfg.data.source = data
    cfg.train.update(
        init_checkpoint=start.weights,
        output_dir=str(output),
        device=resolve_device(device),
        eval_first=False,  # scored once for all runs
        eval_period=0,
        best_metric=None,
    )
    apply_overrides(cfg, [o for o in overrides if _decides_length(o)])
    batch = cfg.dataloader.train.total_batch_size
    cfg.train.max_iter = iterations or iterations_for(photos, batch)
    cfg.train.log_period = max(1, min(cfg.train.log_period, cfg.train.max_iter // 10))
    cfg.train.checkpointer.period = max(50, cfg.train.max_iter // 5)
    return apply_overrides(cfg, overrides)


def _decides_length(override: str) -> bool:
    return override.startswith("dataloader.train.total_batch_size=")


def caching_pays(cfg: DictConfig, photos: int) -> bool:
    """Whether features of the backbone are computed once, before training, instead of in each step:
    where they don't change, and each photo, with its mirror image, comes more than twice."""
    mapper = cfg.dataloader.train.mapper
    fixed = cfg.model.backbone.get("frozen", False) and not len(mapper.get("augmentations", ()))
    samples = cfg.train.max_iter * cfg.dataloader.train.total_batch_size
    one_size = isinstance(mapper.size, int) and mapper.size == cfg.model.get("canvas")
    return bool(fixed and one_size and mapper.get("features") is None and samples > 2 * photos)
