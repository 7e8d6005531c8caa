"""Names of a data set that a text encoder can't tell apart or doesn't know."""

import string
from collections import Counter
from pathlib import Path

from dynamic_dino.data import name_check
from dynamic_dino.data.check import TOKENIZER
from helpers.seeds import examples
from hypothesis import given, settings
from hypothesis import strategies as st


def found(*names: str, tokenizer: str = TOKENIZER) -> list[tuple[str, str]]:
    return [(p.kind, str(p)) for p in name_check.check_names(Path("a.json"), names, tokenizer)]


words = st.text(string.ascii_lowercase, min_size=1, max_size=8)


@settings(max_examples=examples(20), deadline=None)
@given(st.lists(words, min_size=2, max_size=4, unique=True), st.data())
def test_names_with_the_same_tokens_are_notes(names, data):
    assert not found(*names)
    name = data.draw(st.sampled_from(names))
    twin = data.draw(
        st.sampled_from([name.upper(), name[0] + "\u0302" + name[1:], name + "\u200b"])
    )
    [(kind, text)] = found(*names, twin)
    assert kind == "duplicate name" and f"names {name!r} and {twin!r} are the same" in text
    [(kind, text)] = found(*names, name)
    assert kind == "duplicate name" and f"name {name!r} occurs twice" in text


def test_names_in_other_scripts_are_notes(monkeypatch):
    monkeypatch.setattr(name_check, "TOGETHER", 2)
    kinds = Counter(kind for kind, _ in found("perch", "鲈", "茶杯", "blue 鳜"))
    assert kinds == {"unknown name": 2}
    assert [kind for kind, _ in found("鲈", "鳜")] == ["duplicate name", *["unknown name"] * 2]


def test_without_a_tokenizer_names_are_compared_by_letters():
    kinds = [kind for kind, _ in found("a", "A", "鲈", tokenizer="package:no_such_package/model")]
    assert kinds == ["duplicate name"]
