"""Which numbers the keys of a recipe may have: found out before anything is built, since some of
what is built takes any number and does nothing with it, or fails at the end of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple


class Range(NamedTuple):
    """`said` completes "KEY needs ...", `holds` whether a value is in it."""

    said: str
    holds: Callable[[Any], bool]


def whole(low: int, high: float = math.inf) -> Range:
    """Whole numbers, 1e3 among them; of each end that is given, that one is in it."""
    said = f"from {low} to {high:g}" if high < math.inf else f"of at least {low}"
    return Range(
        f"a whole number {said}",
        lambda v: _number(v) and v == v // 1 and low <= v <= high,
    )


def number(low: float, high: float = math.inf, *, above: bool = False) -> Range:
    """Numbers, NaN never; `above`: not `low` itself."""
    said = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
    return Range(
        f"a number above {low:g}" if above else f"a number {said}",
        lambda v: _number(v) and low <= v <= high and not (above and v == low),
    )


def several(count: int, of: Range) -> Range:
    return Range(
        f"{count} values, each {of.said}",
        lambda v: _is_list(v) and len(v) == count and all(map(of.holds, v)),
    )


def either(*ranges: Range) -> Range:
    return Range(" or ".join(r.said for r in ranges), lambda v: any(r.holds(v) for r in ranges))


def below(high: float) -> Range:
    """Numbers from 0 on, not `high` itself."""
    return Range(f"a number from 0 to below {high:g}", lambda v: _number(v) and 0 <= v < high)


NONE = Range("null", lambda v: v is None)
FLAG = Range("true or false", lambda v: isinstance(v, bool))
TEXT = Range("a text", lambda v: isinstance(v, str))
PATTERNS = Range(
    "a list of patterns", lambda v: _is_list(v) and all(isinstance(item, str) for item in v)
)
COUNT = whole(1)
SIDE = whole(1, 100_000)  # pixels
SIZE = either(SIDE, several(2, SIDE), NONE)

# fnmatch pattern on dotted keys -> range; the first that matches.
RANGES: dict[str, Range] = {
    "train.max_iter": COUNT,
    "train.accumulate": COUNT,
    "train.seed": whole(0, 2**32 - 1),  # numpy's
    "train.num_threads": either(COUNT, NONE),
    "train.eval_period": whole(0),
    "train.eval_first": FLAG,
    "train.log_period": COUNT,
    "train.best_metric": either(TEXT, NONE),
    "train.trainable": either(PATTERNS, NONE),
    "train.init_except": PATTERNS,
    "train.amp.dtype": Range("bfloat16 or float16", lambda v: v in ("bfloat16", "float16")),
    "train.*.enabled": FLAG,
    "train.clip_grad.max_norm": number(0, above=True),
    "train.clip_grad.norm_type": number(0, above=True),
    "train.ema.decay": number(0, 1),
    "train.ddp.bucket_cap_mb": either(number(0, above=True), NONE),
    "train.ddp.*": FLAG,
    "train.adaptive_experts.*": COUNT,
    "train.checkpointer.period": COUNT,
    "train.checkpointer.max_to_keep": either(COUNT, NONE),
    "optimizer.lr": number(0, 1e6),
    "optimizer.weight_decay": number(0, 1e6),
    "optimizer.betas": several(2, number(0, 1)),
    "lr_multiplier.warmup_factor": number(0, 1e6),
    "inference.size": SIZE,
    "model.canvas": either(COUNT, NONE),
    "model.decoder.num_layers": COUNT,
    "model.*.num_layers": whole(0),
    "model.size_divisor": COUNT,
    "model.max_phrases": either(COUNT, NONE),
    "model.max_detections": COUNT,
    "model.chunk_batch": COUNT,
    "model.*.dropout": number(0, 1),
    "model.*.drop_path": below(1),
    "model.*.embed_dim": COUNT,
    "model.*.value_dim": either(COUNT, NONE),
    "model.*.levels": COUNT,
    "model.*.temperature": number(0, above=True),
    "model.*.scene_temperature": number(0, above=True),
    "model.*.focal_alpha": number(0, 1),
    "model.*.label_noise": number(0, 1),
    "model.*.base_size": number(0, 1),
    "model.query_selection.num_queries": COUNT,
    "model.text_encoder.max_tokens": COUNT,
    "model.*.dim": COUNT,
    "model.*.hidden": whole(0),  # 0: no FFN
    "model.*.heads": COUNT,
    "model.*.points": COUNT,
    "model.*.num_experts": COUNT,
    "model.*.top_k": COUNT,
    "dataloader.*.total_batch_size": COUNT,
    "dataloader.*.batch_size": COUNT,
    "dataloader.*.num_workers": whole(0),
    "dataloader.*.pin_memory": FLAG,
    "dataloader.*.prefetch_factor": either(COUNT, NONE),
    "dataloader.*.max_phrases": either(COUNT, NONE),
    "dataloader.*.min_phrases": either(COUNT, NONE),
    "dataloader.*.mapper.size": SIZE,
    "dataloader.*.flip": number(0, 1),
    "dataloader.*.phrase_prompts": number(0, 1),
    "dataloader.*.phrase_dropout": number(0, 1),
    "dataloader.*.max_dets": either(COUNT, NONE),
}


def out_of_range(values: Mapping[str, Any]) -> str | None:
    """What is wrong with the first of a recipe's values, dotted key -> value, that is none of its
    range; None where all are. Texts that refer to other keys ("${data.size}") aren't looked at."""
    for key, value in values.items():
        range_ = next((r for pattern, r in RANGES.items() if fnmatchcase(key, pattern)), None)
        refers = isinstance(value, str) and "${" in value
        if range_ is not None and not refers and not range_.holds(value):
            return f"{key} needs {range_.said}, not {str(value)[:80]!r}"
    return None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
