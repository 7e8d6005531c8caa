"""Values on the command line are what was typed, for keys that hold text; others are parsed."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from detectron2.config import LazyCall as L
from dynamic_dino.config import ConfigError, apply_overrides
from helpers.seeds import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf


def read(
    file: str | Path,
    image_root: str | Path | None = None,
    extra: Sequence[str] = (),
    names: str | Sequence[str] = "",
    count: str | int = "all",
    weights: str | None = "here",
    shares: Sequence[float] | None = None,
):
    pass


def recipe():
    return OmegaConf.create(
        dict(
            data=dict(source="data", images=None, extra=[], shares=None, unknown=None),
            dataset=L(read)(
                file="${data.source}:train",
                image_root="${data.images}",
                extra="${data.extra}",
                shares="${data.shares}",
                names="coco",
                count="all",
                weights="here",
            ),
            train=dict(output_dir="output", seed=0, best_metric="val/AP", trainable=None),
            optimizer=dict(lr=0.1, enabled=True, betas=[0.9, 0.98]),
        ),
        flags={"allow_objects": True},
    )


CFG = recipe()
PRINTABLE = st.characters(exclude_categories=["C"])
GRAMMAR = st.sampled_from(list(" ,[]{}()=:#%$\\\"'.*?&|;/-+~@!<>019aeé鲈"))
TEXTS = (st.text(PRINTABLE) | st.text(GRAMMAR)).filter(lambda t: t != "???")


@example("/data/a b, c=[1]/x.json")
@example("C:\\Users\\me\\новая папка\\")
@example("null")
@example("1e5")
@example("007")
@example("{a:1}")
@example("\\${HOME}/${b")
@settings(deadline=None, max_examples=examples(40))
@given(TEXTS)
def test_a_text_comes_back_as_typed(text):
    for key in ("data.source", "data.images", "dataset.image_root", "train.output_dir"):
        section, _, name = key.partition(".")
        before = OmegaConf.to_container(CFG[section], resolve=False)
        apply_overrides(CFG, [f"{key}={text}"])
        assert OmegaConf.select(CFG, key) == text, key
        kept = OmegaConf.create(
            yaml.unsafe_load(yaml.dump(OmegaConf.to_container(CFG[section], resolve=False))),
            flags={"allow_objects": True},
        )
        assert OmegaConf.select(kept, name) == text, "as the run's config.yaml has it"
        if key == "data.source":
            assert CFG.dataset.file == f"{text}:train"
        CFG[section] = before


@settings(deadline=None, max_examples=examples(40))
@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_lists_of_texts(items):
    """Those with a comma, spaces around them or a quote at the front are quoted."""
    typed = [
        '"' + text.replace('"', r"\"") + '"' if re.search(r"^['\"]|,|^\s|\s$|^$", text) else text
        for text in (item.replace("\\", "/") for item in items)
    ]
    apply_overrides(CFG, [f"data.extra=[{','.join(typed)}]"])
    assert list(CFG.dataset.extra) == [item.replace("\\", "/") for item in items]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.lr=1e-3", 0.001),
        ("optimizer.enabled=False", False),
        ("optimizer.betas=[0.8, 0.9]", [0.8, 0.9]),
        ("data.shares=[2,1]", [2, 1]),
        ("data.shares=null", None),
        ("data.extra=[]", []),
        ("data.extra=[1e5, null,a b]", ["1e5", "null", "a b"]),
        ("data.extra=[${data.source},x]", ["data", "x"]),
        ("data.images=${data.source}", "data"),
        ("dataset.names=[a,b=c]", ["a", "b=c"]),
        ("dataset.names=a,b", "a,b"),
        ("dataset.count=40", 40),
        ("dataset.count=040", "040"),
        ("dataset.weights=null", None),
        ("train.best_metric=null", None),
        ("train.output_dir=", ""),
        ("train.trainable=[decoder.[01]*,b]", ["decoder.[01]*", "b"]),
        ("data.unknown=x", "x"),
    ],
)
def test_other_types(override, value):
    cfg = apply_overrides(recipe(), [override])
    assert OmegaConf.select(cfg, override.partition("=")[0]) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.unknown=a b, c=[1", """quote it: 'data.unknown="a b, c=[1"'"""),
        ('data.unknown=a"b\\', "quote it: "),
        ("optimizer.betas=[a=b,c", "can't be parsed"),
        ("train.output_dir=???", "'???' stands for a value that is missing"),
        ("optimizer.lr=a b=[", "can't be parsed"),
    ],
)
def test_what_the_grammar_cant_read(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        apply_overrides(recipe(), [override])
    if "quote it: " in str(caught.value):  # what it says to type is taken, and is the text
        [typed] = shlex.split(str(caught.value).partition("quote it: ")[2])
        key, _, text = override.partition("=")
        assert OmegaConf.select(apply_overrides(recipe(), [typed]), key) == text
