import numpy as np
import pytest
from dynamic_dino.data.prompts import PromptSampler, caption_phrases, evaluation_prompt

NAMES = [f"thing {i}" for i in range(30)]


def test_prompt_is_the_positives_and_distinct_negatives(rng):
    sampler = PromptSampler(NAMES, 12)
    for _ in range(200):
        positives = rng.choice(30, size=rng.integers(0, 10), replace=False).tolist()
        chosen = sampler(positives, positives, rng)
        assert len(chosen) == len(set(chosen)) == 12
        assert set(positives) <= set(chosen)


def test_no_negative_is_present_or_akin(rng):
    related = [[] for _ in NAMES]
    related[3], related[10] = [4, 5], [11]
    sampler = PromptSampler(NAMES, 30, near_synonyms=related)
    for _ in range(50):
        # 3 has a box, 10 is a crowd or was cropped away; 4 names 3 as its kin by symmetry
        assert set(sampler([3], [3, 10], rng)) == set(range(30)) - {4, 5, 10, 11}
        assert 3 not in sampler([4], [4], rng)


def test_ids_may_be_numpy_but_never_text(rng):
    sampler = PromptSampler(NAMES, 30)
    chosen = sampler(np.array([3, 7]), np.array([3, 7, 8]), rng)
    assert sorted(chosen) == sorted(set(range(30)) - {8})  # each positive once
    assert all(type(i) is int for i in chosen)
    assert sorted(sampler(["3"], ["3", "8"], rng)) == sorted(set(range(30)) - {8})


def test_equal_names_are_never_negatives_of_each_other(rng):
    sampler = PromptSampler(["cat", "dog", "Cat"], 3)
    assert set(sampler([0], [0], rng)) == {0, 1}


def test_novel_names_are_no_negatives(rng):
    sampler = PromptSampler(NAMES, 30, never_negative=[0, 29])
    assert set(sampler([1], [1], rng)) == set(range(1, 29))
    assert 29 in sampler([29], [29], rng)


def test_too_many_positives_are_thinned_at_random(rng):
    sampler = PromptSampler(NAMES, 4)
    prompts = [sampler(range(20), range(20), rng) for _ in range(100)]
    assert all(len(set(p)) == 4 and set(p) <= set(range(20)) for p in prompts)
    assert len({i for p in prompts for i in p}) == 20


def test_order_tells_nothing_and_length_varies(rng):
    sampler = PromptSampler(NAMES, 8, min_phrases=2)
    prompts = [sampler([5], [5], rng) for _ in range(400)]
    assert {len(p) for p in prompts} == set(range(2, 9))
    assert {p.index(5) for p in prompts} == set(range(8))
    negatives = {i for p in prompts for i in p} - {5}
    assert negatives == set(range(30)) - {5}


def test_a_pure_function_of_the_generator(rng):
    seed = int(rng.integers(1 << 30))
    sampler = PromptSampler(NAMES, 8, min_phrases=2)
    draws = [sampler([1, 2], [1, 2], np.random.default_rng(seed)) for _ in range(2)]
    assert draws[0] == draws[1]
    others = {tuple(sampler([1, 2], [1, 2], np.random.default_rng(seed + i))) for i in range(20)}
    assert len(others) > 15


def test_evaluation_prompts_depend_on_the_image_only():
    sampler = PromptSampler(NAMES, 30, near_synonyms=[[1], [0]] + [[] for _ in NAMES[2:]])
    prompts = [evaluation_prompt(sampler, [0, 9], 10, image) for image in range(50)]
    assert prompts == [evaluation_prompt(sampler, [9, 0, 0], 10, image) for image in range(50)]
    assert all(len(p) == 10 and {0, 9} <= set(p) and 1 not in p for p in prompts)
    assert len({tuple(p) for p in prompts}) == 50
    assert len(evaluation_prompt(sampler, range(2, 20), 10, "photo_1")) == 18


@pytest.mark.parametrize("sizes", [(0, None), (5, 6), (5, 0)])
def test_impossible_lengths(sizes):
    with pytest.raises(ValueError, match="min_phrases"):
        PromptSampler(NAMES, sizes[0], min_phrases=sizes[1])


def test_a_class_of_another_data_set(rng):
    with pytest.raises(ValueError, match="category_id 30 .* 30 classes"):
        PromptSampler(NAMES, 5)([30], [30], rng)


CAPTION = "A man in red and a dog watch two Dogs and the  man near a lake."


def span(text, start=0):
    at = CAPTION.index(text, start)
    return [at, at + len(text)]


SPANS = [
    [span("man in red")],
    [span("a dog")],
    [span("two Dogs")],
    [span("the  man")],
    [span("a lake")],
]


def test_phrases_of_a_caption_in_random_order(rng):
    orders = set()
    for _ in range(100):
        phrases = caption_phrases(CAPTION, SPANS, range(5), 0.0, rng)
        assert sorted(phrases) == ["a dog", "a lake", "man in red", "the man", "two Dogs"]
        assert {text: said for text, said in phrases.items() if text == "the man"} == {
            "the man": [3]
        }
        orders.add(tuple(phrases))
    assert len(orders) > 40


def test_only_phrases_with_a_box_are_asked_for(rng):
    assert set(caption_phrases(CAPTION, SPANS, [4, 1, 1], 0.0, rng)) == {"a dog", "a lake"}
    assert caption_phrases(CAPTION, SPANS, [], 0.5, rng) == {}


def test_phrases_that_may_mean_the_same_object_are_left_out_together(rng):
    seen = set()
    for _ in range(300):
        kept = frozenset(caption_phrases(CAPTION, SPANS, range(5), 0.5, rng))
        assert kept
        assert ("man in red" in kept) == ("the man" in kept)
        assert ("a dog" in kept) == ("two Dogs" in kept)
        seen.add(kept)
    assert len(seen) == 7  # every choice of the three groups but none at all


def test_words_connect_over_a_third_phrase(rng):
    caption = "red car. car door. door handle. tree"
    spans = [[[0, 7]], [[9, 17]], [[19, 30]], [[32, 36]]]
    seen = {frozenset(caption_phrases(caption, spans, range(4), 0.5, rng)) for _ in range(100)}
    three = {"red car", "car door", "door handle"}
    assert seen == {frozenset(three), frozenset({"tree"}), frozenset(three | {"tree"})}


def test_same_words_are_one_phrase_and_several_spans_give_one(rng):
    caption = "a cat, A  cat and the animal, !"
    spans = [[[0, 5]], [[7, 13]], [[18, 28], [0, 5]], [[30, 31]]]
    said = [caption_phrases(caption, spans, range(4), 0.0, rng) for _ in range(60)]
    assert {
        tuple(sorted(s.items())) for s in map(lambda d: {k: tuple(v) for k, v in d.items()}, said)
    } == {
        (("a cat", (0, 1)), ("the animal", (2,))),
        (("a cat", (0, 1, 2)),),
    }
