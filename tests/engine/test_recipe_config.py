"""Wrong recipes and overrides: each gets one error that names the nearest right thing."""

import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import pytest
from dynamic_dino.config import TRAIN_DEFAULTS, ConfigError, build, load_config, require
from dynamic_dino.kinds import of_wrong_kind
from dynamic_dino.ranges import RANGES, out_of_range
from helpers.seeds import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

GOOD = """
from detectron2.config import LazyCall as L
from torch.optim import AdamW
optimizer = L(AdamW)(lr=0.1)
model = dict(hidden=3)
dataloader = dict(train=dict(total_batch_size=8))
train = dict(max_iter=7, epochs_of_mine=2, ema=dict(enabled=True))
"""


@pytest.fixture
def write(tmp_path):
    def write(text=GOOD, name="good.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_defaults_and_overrides(write):
    cfg = load_config(write(), ["train.max_iter=1e1", "model.hidden=4", "train.trainable=[a.*,b]"])
    assert (
        cfg.train.max_iter == 10 and cfg.model.hidden == 4 and cfg.train.trainable == ["a.*", "b"]
    )
    assert cfg.train.ema == {"enabled": True, "decay": TRAIN_DEFAULTS["ema"]["decay"]}
    assert cfg.train.log_period == TRAIN_DEFAULTS["log_period"] and cfg.train.epochs_of_mine == 2


def test_parameters_of_the_callable_can_be_set(write):
    cfg = load_config(write(), ["optimizer.betas=[0.8,0.9]"])
    assert cfg.optimizer.betas == [0.8, 0.9]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_iters=3", "unknown config key 'train.max_iters'; did you mean train.max_iter?"),
        ("max_iter=3", "did you mean train.max_iter?"),
        ("trian.ema.decay=0.1", "did you mean train.ema.decay?"),
        ("model.hiden=3", "did you mean model.hidden?"),
        ("betas=[0.8,0.9]", "did you mean optimizer.betas?"),
        ("optimizer.weight_decoy=3", "unknown config key 'optimizer.weight_decoy'"),
        ("train.max_iter", "not of the form key=value"),
        ("--resume", "flags such as --resume stand before"),
        (
            "train.ema={dekay:0.9}",
            "unknown config key 'train.ema.dekay'; did you mean train.ema.de",
        ),
        ("train.max_iter={a:1}", "unknown config key 'train.max_iter.a'"),
        ("optimizer={lr:0.2,betta:1}", "unknown config key 'optimizer.betta'"),
        ("train.checkpointer=null", "train.checkpointer is a section, it can't be set to 'null'"),
        ("train.ema=true", "train.ema is a section.*train.ema.enabled, train.ema.decay"),
        ("train.max_iter=many", "train.max_iter needs a number.*'many'"),
        ("train.ema.enabled=yes_please", "train.ema.enabled needs true or false"),
        ("train.max_iter=[1", "can't be parsed"),
    ],
)
def test_wrong_override(write, override, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        load_config(write(), [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_iter=-5", "train.max_iter needs a whole number of at least 1, not '-5'"),
        ("train.max_iter=0", "train.max_iter needs a whole number of at least 1"),
        ("train.max_iter=1.5", "train.max_iter needs a whole number"),
        ("train.max_iter=[1]", "train.max_iter needs a number (as 7), not '[1]'"),
        ("train.max_iter=null", "train.max_iter needs a number (as 7), not 'null'"),
        ("train.max_iter=${nothing}", "train.max_iter=${nothing}: .*nothing"),
        ("train.seed=-1", "train.seed needs a whole number from 0 to 4"),
        ("train.log_period=0", "train.log_period needs a whole number of at least 1"),
        ("train.num_threads=many", "train.num_threads needs a whole number .* or null"),
        ("train.checkpointer.max_to_keep=0", "train.checkpointer.max_to_keep needs .* or null"),
        ("train.clip_grad.max_norm=nan", "train.clip_grad.max_norm needs a number above 0"),
        ("train.ema.decay=2", "train.ema.decay needs a number from 0 to 1"),
        ("train.ema.enabled=1", "train.ema.enabled needs true or false"),
        ("train.amp.dtype=int8", "train.amp.dtype needs bfloat16 or float16, not 'int8'"),
        ("optimizer.lr=-1", "optimizer.lr needs a number from 0"),
        ("optimizer.betas=5", "optimizer.betas needs 2 values, each a number from 0 to 1"),
        (
            "optimizer._target_=nope.nope",
            "optimizer._target_ names 'nope.nope', which can't be imported",
        ),
        ("optimizer={_target_:os.sep}", "optimizer names 'os.sep', which .* nothing to call"),
        ("dataloader.train.total_batch_size=1.5", "total_batch_size needs a whole number"),
        ("../x=1", "../x"),
    ],
)
def test_out_of_range(write, override, message):
    pattern = re.sub(r"[?()\[\]${}]", r"\\\g<0>", message)
    with pytest.raises(ConfigError, match=pattern) as error:
        load_config(write(), [override])
    assert "\n" not in str(error.value)


def fails(error: type[Exception] | None, part=None):
    if error:
        raise error("what is wrong")
    return part


def test_what_can_not_be_built_names_its_node():
    def node(inner: dict) -> dict:
        return {"_target_": fails, "error": None, "part": {"_target_": fails, **inner}}

    assert build(node({"error": None, "part": {"rate": 1}}), "model") == {"rate": 1}
    for error in (ValueError, FileNotFoundError):
        with pytest.raises(ConfigError, match="^model.part: what is wrong$"):
            build(node({"error": error}), "model")
    for inner in ({"error": None, "width": 3}, {}):  # a key too many, one too few
        with pytest.raises(ConfigError, match="^model.part: .*argument"):
            build(node(inner), "model")
    with pytest.raises(ConfigError, match="^optimizer: .*argument"):
        build({"_target_": "os.system", "lr": 0.1}, "optimizer")
    for error in (TypeError, RuntimeError):  # of the code itself
        with pytest.raises(error, match="^what is wrong$"):
            build(node({"error": error}), "model")
    with pytest.raises(ConfigError, match="^what is wrong$"):  # says where by itself
        build(node({"error": ConfigError}), "model")


def test_a_recipe_is_held_to_the_ranges_too(write):
    with pytest.raises(ConfigError, match="train.max_iter needs a whole number"):
        load_config(write(GOOD.replace("max_iter=7", "max_iter=-7")))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=4,
)


@settings(max_examples=examples(50), deadline=None)
@given(st.sampled_from([*RANGES]), anything)
def test_any_value_is_in_its_range_or_named(pattern, value):
    key = pattern.replace("*", "of_mine")
    wrong = out_of_range({"other": 3, key: value})
    if wrong is None:
        assert value is None or isinstance(value, bool | int | float | str | list)
        assert not (isinstance(value, int | float) and value < 0) and value == value
    else:
        assert wrong.startswith(f"{key} needs ") and len(wrong) < 300


def kinds(
    a: int = 1,
    b: float | None = 0.5,
    c: bool = False,
    d: str | Sequence[str] = "x",
    e: Literal["image", "chunk"] = "image",
    f: tuple[float, float] = (0.9, 0.98),
    g: Mapping[str, float] | None = None,
    h: Sequence[Sequence[int]] = (),
    i: nn.Module | None = None,
    j: int = None,
    k: Callable = len,
    m=3,
):
    pass


STRICT = ConfigDict(strict=True, allow_inf_nan=False)
HINTS = typing.get_type_hints(kinds)
JUDGES = {name: TypeAdapter(HINTS[name], config=STRICT) for name in "abcdefgh"}


@settings(max_examples=examples(80), deadline=None)
@given(st.sampled_from("abcdefgh"), anything)
def test_any_value_is_of_its_kind_or_named(name, value):
    """As pydantic judges it."""
    given = tuple(value) if name == "f" and isinstance(value, list) else value
    try:
        JUDGES[name].validate_python(given)
    except ValidationError:
        wrong = of_wrong_kind({"a": [{"_target_": kinds, name: value}]})
        assert wrong.startswith(f"a.0.{name} needs ") and len(wrong) < 300
    else:
        assert of_wrong_kind({"a": [{"_target_": kinds, name: value}]}) is None


def test_kinds_that_are_not_known_are_not_judged():
    def wrong(**values):
        return of_wrong_kind({"_target_": kinds, **values})

    assert not wrong(i={"_target_": "x.y"}, j=None, k="len", m=[1, {"a": "b"}], a="${other}", n=3)
    assert not wrong(i=nn.Identity(), b=np.float32(3))
    assert wrong(i=3) == "i needs a Module, {_target_:...} or null, not '3'"
    assert wrong(a=1.5) == "a needs a whole number, not '1.5'"
    assert of_wrong_kind({"_target_": "nowhere.at_all", "a": 1.5}) is None


def test_overrides_that_nothing_reads_are_refused(write):
    """LazyConfig exports helpers too; a node that others interpolate is none."""
    helpers = """
balance = dict(weight=0.1)
model = dict(hidden=3, losses=[balance], files="${data.files}")
data = dict(files="${paths.here}/x.json", seed=3)
paths = dict(here="here")
"""
    path = write(GOOD + helpers)
    cfg = load_config(path, ["data.seed=4", "model.losses.0.weight=0.2"])
    assert set(cfg) == {"optimizer", "model", "dataloader", "train", "data", "paths"}
    assert (cfg.model.files, cfg.data.seed) == ("here/x.json", 4)
    assert cfg.model.losses == [{"weight": 0.2}]
    with pytest.raises(ConfigError, match=r"'balance.weight'; did you mean model.losses.0.weight"):
        load_config(path, ["balance.weight=0.2"])


def test_misspelt_key_in_the_file(write):
    path = write(GOOD.replace("max_iter", "max_itre"))
    with pytest.raises(ConfigError, match=r"good.py: unknown.*'train.max_itre'.*train.max_iter\?"):
        load_config(path)


def test_missing_file_names_near_ones(write):
    path = write(name="pretrain/nano_dense.py")
    with pytest.raises(ConfigError, match="did you mean .*pretrain/nano_dense.py"):
        load_config(path.with_name("nano_dens.py"))
    with pytest.raises(ConfigError, match="did you mean .*pretrain/nano_dense.py"):
        load_config(path.parents[1] / "pretain" / "nano_dense.py")
    with pytest.raises(ConfigError, match="does not exist; in .* there are: .*nano_dense.py"):
        load_config(path.with_name("zzz.py"))


def test_missing_node(write):
    with pytest.raises(ConfigError, match="has no `model`.*defines: train"):
        load_config(write("train = dict(max_iter=3)"))
    cfg = load_config(write())
    with pytest.raises(ConfigError, match="no `lr_multiplier`"):
        require(cfg, "optimizer", "lr_multiplier")
