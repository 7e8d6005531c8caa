"""The Dockerfile, as far as it can be held without Docker."""

import re
import shlex
from pathlib import Path

from dynamic_dino import cli
from dynamic_dino.serve.cli import parser

ROOT = Path(__file__).parents[2]


def instructions() -> list[list[str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def test_what_is_copied_exists_and_nothing_else_comes_to_docker():
    copied = {
        source
        for name, *words in instructions()
        if name == "COPY" and not words[0].startswith("--from")
        for source in words[:-1]
    }
    assert copied and all((ROOT / source).exists() for source in copied)
    ignore = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert ignore[0] == "*"
    assert {line[1:] for line in ignore if line.startswith("!")} == copied


def test_image_serves_as_a_user_without_rights_and_with_extras_that_exist():
    last = {name: words for name, *words in instructions()}  # the last of each kind
    text = (ROOT / "Dockerfile").read_text()
    assert last["USER"] == re.findall(r"useradd .*--uid (\d+)", text) != ["0"]
    assert 'ENTRYPOINT ["dynamic-dino"]' in text
    command, *options = re.findall(r'"([^"]+)"', re.search(r"^CMD (\[.*\])$", text, re.M)[1])
    assert command in cli.PROGRAMS
    args = parser().parse_args(options)
    assert args.host == "0.0.0.0" and f"127.0.0.1:{args.port}/health" in text
    assert last["EXPOSE"] == [str(args.port)]
    extras = re.search(r"\.whl\)\[(.+?)\]", text)[1].split(",")
    setup = (ROOT / "setup.py").read_text()
    assert all(f'"{extra}": [' in setup for extra in extras)
