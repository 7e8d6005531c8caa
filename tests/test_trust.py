"""A config.yaml calls nothing but what recipes are made of."""

from pathlib import Path

import pytest
import yaml
from detectron2.config import instantiate
from dynamic_dino.config import ConfigError, flat, load_config, save_config
from dynamic_dino.files import configs_folder
from dynamic_dino.trust import TRUST, UntrustedError, require_known

EVIL = [
    "os.system",
    "builtins.eval",
    "posixpath.join",
    "subprocess.run",
    "torch.hub.load",
    "torch.load",
    "torch.nn.modules.module.torch.load",
    "torch.nn.functional.warnings.warn",
    "torch.nn.Module.apply",
    "pathlib.Path.write_text",
    "pathlib.os.system",
    "dynamic_dino.config.runpy.run_path",
    "dynamic_dino.config.load_config",
    "dynamic_dino.modeling.text.re.compile",
    "dynamic_dino.data.convert.convert_dataset",
    "dynamic_dino.files.write_text",
    "dynamic_dino.moe",
    "torch",
    "",
    ".",
]


@pytest.mark.parametrize("name", EVIL)
def test_what_no_recipe_needs_is_refused(tmp_path, name):
    path, made = tmp_path / "config.yaml", tmp_path / "made"
    node = {"_target_": name, "command": f"touch {made}"}
    text = yaml.safe_dump({"model": {"layers": [node]}, "dataloader": {}})
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"{path} is not trusted: it calls .*{TRUST}="):
        load_config(path)
    assert load_config(path, to_build=False).model.layers[0]["_target_"] == name


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch MADE']",
        "!!python/object/new:os.system ['touch MADE']",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/object/apply:torch.nn.modules.module.torch.hub.load ['MADE']",
    ],
)
def test_tags_of_yaml_are_as_little_trusted(tmp_path, tag):
    path, made = tmp_path / "config.yaml", tmp_path / "made"
    path.write_text(f"model: {tag.replace('MADE', str(made))}\ndataloader: {{}}\n")
    with pytest.raises(ConfigError, match="is not trusted: it calls"):
        load_config(path, to_build=False)
    assert not made.exists()


def test_whoever_trusts_a_module_says_so(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text("model: {_target_: fractions.Fraction, numerator: 3}\ndataloader: {}\n")
    with pytest.raises(ConfigError, match=f"{TRUST}=fractions$"):
        load_config(path)
    monkeypatch.setenv(TRUST, "other, fractions")
    assert instantiate(load_config(path).model) == 3
    with pytest.raises(UntrustedError):
        require_known("fractions2.Fraction")


def test_a_config_is_read_as_it_was_written(tmp_path):
    cfg = load_config(configs_folder() / "pretrain/nano_drawn.py")
    cfg.train.of_mine = Path("a/b")
    save_config(cfg, tmp_path / "config.yaml")
    assert flat(load_config(tmp_path / "config.yaml")) == flat(cfg)


@pytest.mark.parametrize("content", ["", "3", "[1]", "a: [", "\tmodel: 3", "{[]: 1}"])
def test_what_is_no_config_is_one_error(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match="config.yaml"):
        load_config(path)
