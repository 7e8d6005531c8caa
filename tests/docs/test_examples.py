"""What pages, help and docstrings tell people to ask for is known to be found."""

import re

from dynamic_dino.files import PACKAGE
from dynamic_dino.serving import predict
from dynamic_dino.serving.shipped import EXAMPLE_NAMES
from helpers.documentation import PAGES, PROJECT

NAMES = r"(?:[a-z ]+\. ?)+"
# a command's text; a call with a list of names; a quoted prompt of several names
ASKED = re.compile(
    rf'--text "({NAMES})"|\.(?:jpg|png)", \[([^\]]*)\]|["\']((?:[a-z ]+\. )+[a-z ]+\.)["\']'
)


def asked(text: str) -> set[str]:
    names = set()
    for line in text.splitlines():
        if "raccoon" in line:  # of a detector of one's own, tuned on photos of them
            continue
        for match in ASKED.finditer(line):
            found = next(group for group in match.groups() if group is not None)
            names |= {name.strip(" \"'") for name in re.split(r"[.,]", found)} - {""}
    return names


def test_only_examples_that_work():
    texts = {path: path.read_text(encoding="utf-8") for path in [*PAGES, *PACKAGE.rglob("*.py")]}
    texts[PROJECT / "predict.py"] = predict.parser().format_help()
    others = {str(path): asked(text) - {*EXAMPLE_NAMES} for path, text in texts.items()}
    assert not {path: names for path, names in others.items() if names}
    assert any(asked(text) for text in texts.values())


def test_prompts_are_found():
    text = 'predict.py a.jpg --text "red panda."\nd("a.jpg", ["mug", "cup"])\n"a horse. cow."'
    assert asked(text) == {"red panda", "mug", "cup", "a horse", "cow"}
