"""What other trainers store beside the weights is read where it is plain data, and never run."""

import argparse
import builtins
import collections
import datetime
import importlib
import operator
import os
import pathlib
import pickle
import runpy
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from dynamic_dino.checkpoint import read_state_dict
from dynamic_dino.checkpoint.plain_data import STAND_INS, Entries, Items, Nothing
from helpers.seeds import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

FUNCTION_SCOPED = [HealthCheck.function_scoped_fixture]
WEIGHTS = {"a": torch.arange(3.0), "b.c": torch.ones(2, 2)}

leaves = st.one_of(
    st.none(),
    st.integers(),
    st.text(max_size=3),
    st.floats().map(np.float64),
    st.integers(-99, 99).map(np.int32),
    st.booleans().map(np.bool_),
    st.lists(st.floats(width=32), max_size=3).map(lambda v: np.array(v, np.float32)),
    st.lists(st.text(max_size=2), max_size=2).map(lambda v: np.array(v, object)),
    st.datetimes(),
    st.timedeltas(),
    st.just(datetime.timezone.utc),
    st.text("ab", min_size=1).map(pathlib.Path),
    st.just(pathlib.PureWindowsPath("C:/a b")),
    st.decimals(allow_nan=False),
    st.uuids(),
    st.complex_numbers(),
    st.frozensets(st.integers(), max_size=2),
    st.just(range(3)),
    st.binary(max_size=3),
)


def containers(inner):
    items = st.dictionaries(st.sampled_from("xyz"), inner, max_size=3)
    lists = st.lists(inner, max_size=3)
    return st.one_of(
        lists,
        lists.map(tuple),
        items,
        lists.map(lambda v: collections.deque(v, maxlen=5)),
        items.map(collections.OrderedDict),
        items.map(lambda d: collections.defaultdict(list, d)),
        items.map(lambda d: argparse.Namespace(**d)),
        items.map(lambda d: types.SimpleNamespace(**d)),
    )


@settings(max_examples=examples(60), deadline=None, suppress_health_check=FUNCTION_SCOPED)
@given(
    beside=st.recursive(leaves, containers, max_leaves=6),
    wrap=st.sampled_from([dict, collections.OrderedDict]),
    zipped=st.booleans(),
)
def test_plain_data_beside_the_weights(tmp_path, beside, wrap, zipped):
    path = tmp_path / "model.pth"
    content = {"args": beside, "model": wrap(WEIGHTS), "epoch": beside}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    state = read_state_dict(path)
    assert list(state) == list(WEIGHTS) and all(torch.equal(state[k], WEIGHTS[k]) for k in state)


class HistoryBuffer:
    """As mmengine's: arrays, and the names of its own methods."""

    def __init__(self):
        self.log, self.methods = np.ones(3), {"mean": HistoryBuffer.mean}

    def mean(self):
        pass


def test_settings_of_other_packages(tmp_path, monkeypatch):
    """Those that aren't installed too: nothing of them is imported."""
    module = types.ModuleType("mmengine.logging.history_buffer")
    monkeypatch.setattr(HistoryBuffer, "__module__", module.__name__)
    module.HistoryBuffer = HistoryBuffer
    beside = {
        "message_hub": {"log_scalars": {"loss": HistoryBuffer()}},
        "cfg": CfgNode({"MODEL": CfgNode({"X": [1]})}),
        "omega": OmegaConf.create({"a": [1, {"b": None}], "c": "${a}"}),
        "meta": collections.defaultdict(dict, {"seed": np.int64(3)}),
    }
    with monkeypatch.context() as there:
        for name in ("mmengine", "mmengine.logging", module.__name__):
            there.setitem(sys.modules, name, module)
        weights = collections.defaultdict(float, WEIGHTS)
        torch.save({"state_dict": weights, **beside}, tmp_path / "epoch_12.pth")
    assert list(read_state_dict(tmp_path / "epoch_12.pth")) == list(WEIGHTS)


class Runs:
    """Is unpickled by a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


MARK = "open({!r}, 'w').close()"
CODE = {
    builtins.eval: lambda mark: (MARK.format(mark),),
    builtins.exec: lambda mark: (MARK.format(mark),),
    builtins.open: lambda mark: (mark, "w"),
    builtins.__import__: lambda mark: ("this",),
    os.system: lambda mark: (f"touch {mark}",),
    subprocess.Popen: lambda mark: (["touch", mark],),
    importlib.import_module: lambda mark: ("this",),
    runpy.run_path: lambda mark: (mark,),
    pathlib.Path.touch: lambda mark: (pathlib.Path(mark),),
    operator.methodcaller: lambda mark: ("touch",),
    pickle.loads: lambda mark: (pickle.dumps(Runs(os.system, f"touch {mark}")),),
    np.testing.run_module_suite if hasattr(np.testing, "run_module_suite") else np.load: (
        lambda mark: (mark,)
    ),
    argparse.FileType("w").__class__: lambda mark: (mark,),
}


@settings(max_examples=examples(40), deadline=None, suppress_health_check=FUNCTION_SCOPED)
@given(data=st.data(), function=st.sampled_from(list(CODE)), zipped=st.booleans())
def test_code_is_refused_and_not_run(tmp_path, data, function, zipped):
    mark = tmp_path / "mark"
    evil = Runs(function, *CODE[function](str(mark)))
    wrap = data.draw(
        st.sampled_from(
            [
                lambda e: e,
                lambda e: [e],
                lambda e: argparse.Namespace(x=e),
                lambda e: collections.defaultdict(list, x=e),
                lambda e: collections.deque([e]),
                lambda e: np.array([e, 1], object),
                lambda e: Runs(getattr, e, "x"),
            ]
        )
    )
    path = tmp_path / "model.pth"
    torch.save({"model": WEIGHTS, "x": wrap(evil)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="besides weights, which could run code") as error:
        read_state_dict(path)
    message = str(error.value)
    named = "a call of a method" if function is pathlib.Path.touch else function.__name__
    assert named in message and str(path) in message
    assert "\n" not in message and "torch.save(" in message, "the remedy, in one line"
    assert not mark.exists()


def test_what_stand_ins_give_is_not_called(tmp_path):
    assert set(STAND_INS.values()) == {Nothing, Items, Entries}
    with (tmp_path / "x.pth").open("wb") as file:
        calls = b"\x80\x02cbuiltins\ngetattr\ncargparse\nNamespace\nX\x03\x00\x00\x00mro\x86R)R."
        for part in (pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2)):
            file.write(part)
        file.write(pickle.dumps({"little_endian": True}, 2) + calls + pickle.dumps([], 2))
    with pytest.raises(ValueError, match="could run code"):
        read_state_dict(tmp_path / "x.pth")


class Own:
    pass


def test_a_class_of_ones_own_is_named(tmp_path):
    torch.save({"model": WEIGHTS, "cfg": Own()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"holds \S*\bOwn besides weights"):
        read_state_dict(tmp_path / "x.pth")
