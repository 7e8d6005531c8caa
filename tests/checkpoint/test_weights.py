"""Checkpoints are loaded whole, or refused with an error that names the file."""

import copy
from pathlib import Path

import pytest
import torch
from dynamic_dino.checkpoint.__main__ import main
from dynamic_dino.checkpoint.files import read_state_dict
from dynamic_dino.checkpoint.weights import FROZEN_ENCODERS, export_weights, load_checkpoint
from dynamic_dino.files import PACKAGE, sha256_of_file
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.routers import SoftmaxRouter
from helpers.seeds import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

RECIPE = Path(__file__).parents[2] / "configs/pretrain/nano_drawn.py"


class Tower(nn.Module):
    def __init__(self, frozen: bool):
        super().__init__()
        self.body, self.frozen, self.pretrained = nn.Linear(4, 4), frozen, True


class Model(nn.Module):
    """The parts of a detector that a checkpoint sees."""

    def __init__(self, frozen: bool = True, hidden: int = 8, experts: int = 0):
        super().__init__()
        self.backbone, self.text_encoder = Tower(frozen), Tower(frozen)
        self.text_encoder.proj = nn.Linear(4, 4)
        self.norm = nn.BatchNorm2d(3)
        if experts:
            self.ffn = MoEFeedForward(4, hidden, SoftmaxRouter(4, experts))
        else:
            self.ffn = nn.ModuleDict(
                {"linear1": nn.Linear(4, hidden), "linear2": nn.Linear(hidden, 4)}
            )


@pytest.fixture
def model():
    model = Model()
    model.norm(torch.randn(2, 3, 4, 4))  # moves its statistics and its counter
    return model


def same_state(a: nn.Module, b: nn.Module, prefixes: tuple[str, ...] = ("",)) -> bool:
    a, b = a.state_dict(), b.state_dict()
    names = [n for n in a if n.startswith(prefixes)]
    return bool(names) and all(torch.equal(a[n], b[n]) for n in names)


def test_export_and_load(model, tmp_path):
    path = tmp_path / "new" / "folder" / "weights.safetensors"
    export_weights(model, path)
    stored = load_file(path)
    assert not any(name.startswith(FROZEN_ENCODERS) for name in stored)
    assert {"text_encoder.proj.weight", "norm.running_mean", "ffn.linear1.bias"} <= set(stored)
    kinds = {name: value.dtype for name, value in stored.items()}
    assert kinds.pop("norm.num_batches_tracked") == torch.int64
    assert set(kinds.values()) == {torch.float16}

    other = Model()
    towers = copy.deepcopy(other.backbone)
    load_checkpoint(other, str(path))
    for name, value in other.state_dict().items():
        if name in stored:
            assert value.dtype in (torch.float32, torch.int64)
            assert torch.equal(value, model.state_dict()[name].to(kinds.get(name)).to(value.dtype))
    assert same_state(other.backbone, towers), "a frozen tower keeps its own weights"


def test_nano_ships_without_its_towers(nano, tmp_path):
    path = tmp_path / "nano.safetensors"
    export_weights(nano, path)
    assert path.stat().st_size < 24e6
    other = copy.deepcopy(nano)
    for parameter in other.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    load_checkpoint(other, path)
    for name, parameter in nano.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), parameter, rtol=1e-3, atol=1e-6)


def test_export_command(nano, tmp_path, capsys):
    torch.save({"model": nano.state_dict(), "iteration": 5}, tmp_path / "model_final.pth")
    out = tmp_path / "shipped.safetensors"
    main(["export", "--config-file", str(RECIPE), str(tmp_path / "model_final.pth"), str(out)])
    assert f"{out.stat().st_size / 2**20:.1f} MiB" in capsys.readouterr().out
    stored, state = load_file(out), nano.state_dict()
    assert stored.keys() == {n for n in state if not n.startswith(FROZEN_ENCODERS)}
    assert all(torch.equal(v, state[n].to(v.dtype)) for n, v in stored.items())


def test_models_that_are_not_frozen_are_stored_whole(tmp_path):
    model, other = Model(frozen=False), Model(frozen=False)
    path = tmp_path / "weights.safetensors"
    export_weights(model, path)
    assert load_file(path).keys() == model.state_dict().keys()
    load_checkpoint(other, path)
    torch.testing.assert_close(
        dict(other.state_dict()), dict(model.state_dict()), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "iteration": 7}])
def test_pth_of_the_trainer(model, tmp_path, wrap):
    path = tmp_path / "model_final.pth"
    torch.save(wrap(model.state_dict()), path)
    other = Model()
    load_checkpoint(other, path)
    assert same_state(model, other), "with its towers, to the bit"


def test_mixture_of_experts(tmp_path):
    source, path = Model(experts=4), tmp_path / "moe.pth"
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    torch.save(source.state_dict(), path)
    other = Model(experts=4)
    load_checkpoint(other, path)
    assert same_state(source, other)
    with pytest.raises(ValueError, match=r"(?s)moe.pth is of another architecture.*experts.w1"):
        load_checkpoint(Model(experts=8), path)
    with pytest.raises(ValueError, match=r"moe.pth .* 4 missing keys \(ffn.linear1.*5 unexpected"):
        load_checkpoint(Model(), path)


def test_another_architecture(model, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    with pytest.raises(ValueError, match=r"(?s)weights.pth is of another .*ffn.linear1.weight"):
        load_checkpoint(Model(hidden=16), path)
    with pytest.raises(ValueError, match="weights.pth .* 8 hidden units, this model's FFN 16"):
        load_checkpoint(Model(hidden=16, experts=4), path)

    state = model.state_dict()
    del state["text_encoder.proj.bias"]
    torch.save(state | {"head.weight": torch.zeros(3)}, path)
    message = r"weights.pth .*1 missing keys \(text_encoder.proj.bias\); 1 unexpected.*head.weight"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(Model(), path)


@pytest.mark.parametrize("wider", [{"hidden": 16}, {"hidden": 16, "experts": 4}])
def test_what_is_skipped_stays_as_it_was(model, tmp_path, wider):
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    other = Model(**wider)
    ffn = copy.deepcopy(other.ffn)
    load_checkpoint(other, path, skip=["ffn.*"])
    assert same_state(other.ffn, ffn)
    assert same_state(other, model, ("backbone", "text_encoder", "norm"))
    with pytest.raises(ValueError, match="nothing of the model matches 'fnn.*'"):
        load_checkpoint(Model(**wider), path, skip=["ffn.*", "fnn.*"])


def test_a_run_that_trains_its_towers_starts_from_a_shipped_checkpoint(model, tmp_path):
    """The towers start from what they bring; of the result, only those that didn't train are left
    out, whether the config that it is read with freezes them or not."""
    path = tmp_path / "shipped.safetensors"
    export_weights(model, path)
    other = Model()
    other.backbone.frozen = False
    towers = copy.deepcopy(other.backbone)
    load_checkpoint(other, path)
    assert same_state(other.backbone, towers)

    nn.init.normal_(other.backbone.body.weight)  # it trains
    path, trained = tmp_path / "trained.safetensors", tmp_path / "model_final.pth"
    export_weights(other, path)
    stored = set(load_file(path))
    assert "backbone.body.weight" in stored and "text_encoder.body.weight" not in stored
    torch.save(other.state_dict(), trained)
    frozen = Model()
    frozen.text_encoder.load_state_dict(other.text_encoder.state_dict())
    load_checkpoint(frozen, trained)
    export_weights(frozen, path)
    assert set(load_file(path)) == stored, "it would come back without what it learnt"


def test_random_towers_are_never_kept(model, tmp_path):
    """A frozen tower that brings no weights is stored, and asked for, like everything else."""
    path = tmp_path / "weights.safetensors"
    export_weights(model, path)
    other = Model()
    other.backbone.pretrained = False
    with pytest.raises(ValueError, match="has no weights for backbone.body.* has no others"):
        load_checkpoint(other, path)
    export_weights(other, path)
    missing = other.state_dict().keys() - load_file(path).keys()
    assert missing == {"text_encoder.body.weight", "text_encoder.body.bias"}


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors", "folder"])
def test_missing_file(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=f"checkpoint .*{name} doesn't exist"):
        load_checkpoint(Model(), tmp_path / name)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated(model, tmp_path, suffix, share):
    """As an interrupted download leaves it; the model stays as it was."""
    path = tmp_path / f"part{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(dict(model.state_dict()), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    other = Model()
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match=f"checkpoint .*part{suffix} is (corrupt|empty)"):
        load_checkpoint(other, path)
    assert same_state(other, before)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, bytes]:
    """A checkpoint of each kind, as we write it."""
    folder, model = tmp_path_factory.mktemp("written"), Model(frozen=False)
    export_weights(model, folder / "a.safetensors")
    torch.save({"model": model.half().state_dict(), "iteration": 3}, folder / "a.pth")
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([".safetensors", ".pth"]), st.floats(0, 1), st.integers(0, 7))
def test_a_flipped_bit_is_found_or_changes_nothing(written, tmp_path, suffix, place, bit):
    file = tmp_path / f"weights{suffix}"
    content = bytearray(written[suffix])
    file.write_bytes(content)
    right = read_state_dict(file)
    content[int(place * (len(content) - 1))] ^= 1 << bit
    file.write_bytes(content)
    model = Model()
    try:
        load_checkpoint(model, file)
    except ValueError as error:
        assert str(file) in str(error)
    else:
        assert all(torch.equal(model.state_dict()[k], v.float()) for k, v in right.items())


def test_checksums_beside_a_file(model, tmp_path):
    for path in (tmp_path / "a.safetensors", tmp_path / "b.pth"):
        save = save_file if path.suffix == ".safetensors" else torch.save
        save(dict(model.state_dict()), path)
        right = f"{'0' * 64}  other\n{sha256_of_file(path)} *{path.name}"
        (tmp_path / "SHA256SUMS").write_text(right)
        load_checkpoint(Model(), path)
        (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {path.name}\n")
        with pytest.raises(ValueError, match=f"{path.name} has another checksum than .*SHA256SUMS"):
            load_checkpoint(Model(), path)


def test_the_shipped_weights_have_checksums():
    folder = PACKAGE / "weights"
    listed = {line.split()[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ffn.linear1.weight", torch.ones(8, 4, dtype=torch.int8), "holds int8, where.* float32"),
        ("norm.num_batches_tracked", torch.tensor(2.5), "holds float32, where .* int64"),
        ("norm.running_var", torch.tensor([1, torch.nan, torch.inf]), "2 of the 3 numbers of"),
        ("ffn.linear2.bias", torch.full((4,), -torch.inf).bfloat16(), "4 of the 4 numbers of"),
    ],
)
def test_other_kinds_of_numbers_are_named(model, tmp_path, name, value, message):
    path = tmp_path / "odd.safetensors"
    save_file({**model.state_dict(), name: value}, path)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(Model(), path)
    assert name in str(error.value) and str(path) in str(error.value)


def test_what_fp16_cannot_hold_is_not_exported(model, tmp_path):
    model.norm.running_var.fill_(1e6)
    with pytest.raises(ValueError, match=r"half precision: 3 of the 3 numbers of norm.running_var"):
        export_weights(model, tmp_path / "a.safetensors")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><title>404 Not Found</title>" * 9, "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "run git lfs pull"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "a server's error"),
        (b"Entry not found", "is a text, 'Entry not found'"),
        (b"root:x:0:0:root:/root:/bin/bash\n", "is a text"),
        (b"\0" * 500, "is corrupt or incomplete"),
        (b"\x80\x02cos\nsystem\n.", "is corrupt|which could run code"),
    ],
)
def test_not_a_checkpoint(tmp_path, suffix, content, said):
    """Torch's own words on some of them are to load the file by the way that runs code."""
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"file{suffix} .*{said}") as error:
        load_checkpoint(Model(), path)
    if "could run code" not in str(error.value):
        assert "\n" not in str(error.value) and "weights_only" not in str(error.value)


@pytest.mark.parametrize("content", [[1, 2], {"model": 3}, {"best": "yes"}, {1: torch.ones(2)}])
def test_without_weights(tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match="other.pth holds no weights"):
        load_checkpoint(Model(), path)
