"""What the pages tell people to type works.

Commands are parsed by the parsers of their programs, and their recipes loaded with the overrides,
without running them. Python is run, in a folder with a photo and a small data set. A block that can
be neither has a comment before it, ``<!-- not run: why -->``.
"""

import argparse
import ast
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from dynamic_dino.config import load_config
from dynamic_dino.data.synthetic.drawn import write_drawn_dataset
from dynamic_dino.serving.video import VideoWriter
from helpers.documentation import ROOT, blocks

# What stands for a name of the reader's own, and what takes its place here.
PLACEHOLDERS = {
    "CONFIG": "configs/pretrain/nano_drawn.py",
    "RECIPE": "configs/pretrain/nano_drawn.py",
}
LAUNCHERS = ("torchrun", "srun")
CONSOLE_SCRIPTS = {
    "dynamic-dino": "dynamic_dino.cli",
    "dynamic-dino-train": "dynamic_dino.engine.cli",
    "dynamic-dino-predict": "dynamic_dino.serving.predict",
    "dynamic-dino-finetune": "dynamic_dino.finetune.cli",
}
# Not the project's: their arguments aren't looked at.
OTHERS = (
    "curl",
    "echo",
    "export",
    "source",
    "pip",
    "git",
    "cd",
    "apt",
    "pre-commit",
    "gh",
    "hf",
    "deactivate",
)


class Parsed(BaseException):
    """Ends a program once its arguments are parsed."""


@pytest.fixture
def parse_only(monkeypatch):
    """Programs end where they have read their arguments; training, where it has read its recipe."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self, *arguments):
        options = parse(self, *arguments)
        if "eval_only" in options:
            return options
        raise Parsed(options)

    def launch(main, options):
        raise Parsed(options)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr("dynamic_dino.engine.cli.launch", launch)


def commands(code: str) -> list[list[str]]:
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check(words: list[str], monkeypatch) -> None:
    """Parses a command; raises what is wrong with it."""
    words = [PLACEHOLDERS.get(word, word) for word in words]
    while "=" in words[0]:  # a variable of the environment
        variable, _, value = words.pop(0).partition("=")
        if variable == "PYTHONPATH":
            monkeypatch.syspath_prepend(value)
    if words[0] in OTHERS:
        return
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in words[1:] if "=" not in word} <= {*targets}, words
        return
    if words[0] in LAUNCHERS:
        words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
    elif words[0] in CONSOLE_SCRIPTS:
        words = ["-m", CONSOLE_SCRIPTS[words[0]], *words[1:]]
    else:
        assert words[0] in ("python", "python3"), f"unknown program: {words[0]}"
        words = words[1:]
    module = words[0] == "-m"
    name, arguments = words[module], words[module + 1 :]
    if module and name in ("pytest", "pip", "venv", "http.server"):
        return
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(Parsed) as stopped:
        if module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            monkeypatch.syspath_prepend(str(Path(name).resolve().parent))
            runpy.run_path(name, run_name="__main__")
    options = vars(stopped.value.args[0])
    recipe = str(options.get("config_file") or "")
    if "eval_only" not in options and recipe.endswith(".py"):
        load_config(recipe, options.get("overrides") or ())


@pytest.mark.parametrize("block", blocks("bash", "sh", "console"), ids=str)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_commands_are_understood(block, parse_only, monkeypatch):
    if block.marker:
        return
    monkeypatch.chdir(ROOT)
    for words in commands(block.code):
        check(words, monkeypatch)


def test_every_way_to_ship_has_a_page_with_a_command_that_is_looked_at():
    pages = {block.page.stem for block in blocks("bash") if not block.marker}
    assert pages >= {"detect", "export", "install", "label", "page", "serve", "video"}


def test_a_wrong_command_is_found(parse_only, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    train = ["python", "projects/DynamicDINO/train_net.py", "--config-file", "CONFIG"]
    check([*train, "optimizer.lr=1e-4"], monkeypatch)
    with pytest.raises(SystemExit):
        check([*train, "optimiser.lr=1e-4"], monkeypatch)
    assert "optimizer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        check(["python", "projects/DynamicDINO/predict.py", "a.jpg", "--txt", "cup"], monkeypatch)
    with pytest.raises(AssertionError):
        check(["make", "tests"], monkeypatch)
    with pytest.raises(AssertionError):
        check(["dynamicdino", "photo.jpg"], monkeypatch)


@pytest.fixture
def readers_folder(tmp_path, monkeypatch):
    """A folder with the files that the pages take for granted."""
    drawn = write_drawn_dataset(tmp_path, num_images=2, size=64)
    shutil.copy(drawn, tmp_path / "train.json")
    shutil.copytree(tmp_path / "drawn/train", tmp_path / "images")
    shutil.copy(tmp_path / "images/000001.png", tmp_path / "photo.jpg")
    with VideoWriter(tmp_path / "clip.mp4") as clip:
        for seconds in (0, 0.1):
            clip.write(np.zeros((48, 64, 3), np.uint8), seconds)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def operands() -> dict:
    """What kernels/README.md calls its operators with."""
    t, d, h, e = 6, 16, 8, 4
    shapes = torch.tensor([[4, 4], [2, 2]])
    return dict(
        x=torch.randn(t, d),
        router=torch.randn(e, d),
        w1=torch.randn(e, h, d),
        b1=torch.randn(e, h),
        w2=torch.randn(e, d, h),
        b2=torch.randn(e, d),
        weight=torch.ones(d),
        bias=torch.zeros(d),
        eps=1e-5,
        value=torch.randn(1, 20, 2, 8),
        shapes=shapes,
        locations=torch.rand(1, 5, 2, 2, 3, 2),
        weights=torch.full((1, 5, 2, 2, 3), 1 / 6),
    )


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_runs(block, readers_folder):
    compiled = compile(block.code, str(block), "exec")
    if block.marker:  # what it imports is there, at least
        imports = [
            n for n in ast.parse(block.code).body if isinstance(n, ast.Import | ast.ImportFrom)
        ]
        exec(compile(ast.Module(imports, []), str(block), "exec"), {})
    elif "from ..common" in block.code:
        run_as_recipe(block.code, readers_folder)
    else:
        exec(compiled, operands() if "dynamic_dino_kernels" in block.code else {})


def run_as_recipe(code: str, folder: Path) -> None:
    """Lines of a recipe, behind the names of a small one that they change."""
    for name in ("common", "pretrain"):
        (folder / "configs" / name).parent.mkdir(exist_ok=True)
        (folder / "configs" / name).symlink_to(ROOT / "configs" / name)
    recipe = folder / "configs/moe_tuning/page.py"
    recipe.parent.mkdir()
    names = "dataloader, inference, lr_multiplier, model, optimizer, train"
    recipe.write_text(f"from ..pretrain.nano_drawn import {names}\n{code}")
    cfg = load_config(recipe)
    assert instantiate(cfg.model.decoder.layer.ffn).router is not None
