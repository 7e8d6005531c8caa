"""Wrong recipes and overrides: each gets one error that names the nearest right thing."""

import pytest
from dynamic_dino.config import TRAIN_DEFAULTS, ConfigError, load_config, require

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
        ("train.ema=true", "train.ema is a section.*train.ema.enabled, train.ema.decay"),
        ("train.max_iter=many", "train.max_iter needs a number.*'many'"),
        ("train.ema.enabled=yes_please", "train.ema.enabled needs true or false"),
        ("train.max_iter=[1", "can't be parsed"),
    ],
)
def test_wrong_override(write, override, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        load_config(write(), [override])


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
