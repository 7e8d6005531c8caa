import pytest
import torch
from dynamic_dino.modeling.losses import Denoising, box_iou, cxcywh_to_xyxy
from dynamic_dino.modeling.losses.denoising import ClassDenoising
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.modeling.vocabulary import ClassVocabulary

QUERIES = 13


def test_layout(draw):
    text, targets = draw.text(3), draw.targets(2, 0, 3)
    dn = Denoising(draw.dim, num_queries=20)(targets, text, QUERIES)
    assert dn.groups == 20 // (2 * 3) == 3
    slots = 3 * 2 * 3
    assert dn.content.shape == (3, slots, draw.dim)
    assert dn.boxes.shape == (3, slots, 4)
    assert dn.attention_mask.shape == (slots + QUERIES, slots + QUERIES)
    positives, negatives = [0, 1, 2], [-1] * 3
    assert dn.target_index[2].tolist() == (positives + negatives) * 3
    assert dn.target_index[0].tolist() == ([0, 1, -1] + negatives) * 3
    assert dn.valid[0].tolist() == [True, True, False] * 6
    assert not dn.valid[1].any() and (dn.target_index[1] == -1).all()


@pytest.mark.parametrize("count", [1, 4, 9])
def test_attention_mask(draw, count):
    """Compared pair by pair with what it means."""
    text, targets = draw.text(2), draw.targets(count, 1)
    dn = Denoising(draw.dim, num_queries=20)(targets, text, QUERIES)
    slots = dn.boxes.shape[1]
    group = [slot // (2 * count) for slot in range(slots)] + [None] * QUERIES
    for row in range(slots + QUERIES):
        for column in range(slots + QUERIES):
            sees = group[column] is None or group[row] == group[column]
            assert dn.attention_mask[row, column].item() == (not sees)
    assert not dn.attention_mask.all(-1).any()  # a query that sees nothing would become NaN


def test_more_objects_than_wanted_queries_still_make_one_group(draw):
    dn = Denoising(draw.dim, num_queries=4)(draw.targets(7), draw.text(1), QUERIES)
    assert dn.groups == 1 and dn.boxes.shape == (1, 14, 4)


def test_no_objects_give_no_queries_but_gradients(draw):
    """So that a rank whose batch is empty exchanges gradients with the others."""
    denoising = Denoising(draw.dim)
    dn = denoising(draw.targets(0, 0), draw.text(2), QUERIES)
    assert dn.content.shape == (2, 0, draw.dim) and dn.boxes.shape == (2, 0, 4)
    assert dn.attention_mask.shape == (QUERIES, QUERIES) and not dn.attention_mask.any()
    dn.content.sum().backward()
    assert (denoising.content.weight.grad == 0).all() and (denoising.content.bias.grad == 0).all()


def test_boxes_lie_in_the_image_and_corners_move_as_far_as_promised(draw):
    text, targets = draw.text(2), draw.targets(5, 3)
    noise = 0.6  # small enough that corners never pass each other
    dn = Denoising(draw.dim, num_queries=400, box_noise=noise)(targets, text, QUERIES)
    assert (dn.boxes[..., 2:] > 0).all()
    corners = cxcywh_to_xyxy(dn.boxes)
    size = 5
    far = []
    for image, slot in torch.nonzero(dn.valid).tolist():
        box = targets[image].boxes[slot % size]
        true = cxcywh_to_xyxy(box)
        moved = (corners[image, slot] - true).abs() / (noise * box[2:].repeat(2) / 2)
        at_border = (corners[image, slot] <= 1e-6) | (corners[image, slot] >= 1 - 1e-6)
        negative = slot // size % 2 == 1
        assert (dn.target_index[image, slot] == -1) == negative
        assert (moved <= (2 if negative else 1) + 1e-3).all()
        if negative:
            assert (moved >= 1 - 1e-3)[~at_border].all()
        far.append((negative, moved[~at_border]))
    positives = torch.cat([moved for negative, moved in far if not negative])
    assert positives.min() < 0.2 and positives.max() > 0.8


def test_full_noise_keeps_boxes_valid_and_positives_closer(draw):
    text, targets = draw.text(1), draw.targets(8)
    dn = Denoising(draw.dim, num_queries=1600)(targets, text, QUERIES)
    assert (dn.boxes >= 0).all() and (dn.boxes <= 1).all()
    assert (dn.boxes[..., 2:] >= Denoising.min_size).all()
    index = torch.arange(dn.boxes.shape[1]) % 8
    iou = box_iou(cxcywh_to_xyxy(dn.boxes[0]), cxcywh_to_xyxy(targets[0].boxes[index]))
    positive = dn.target_index[0] >= 0
    assert iou[positive].mean() > iou[~positive].mean() + 0.1


def test_content_is_the_projected_mean_of_the_phrase(draw):
    text, targets = draw.text(2), draw.targets(3, 1)
    denoising = Denoising(draw.dim, num_queries=12, label_noise=0.0)
    dn = denoising(targets, text, QUERIES)
    for image, slot in torch.nonzero(dn.valid).tolist():
        tokens = text.phrase_map[image, targets[image].labels[slot % 3]] > 0
        expected = denoising.content(text.tokens[image, tokens].mean(0))
        torch.testing.assert_close(dn.content[image, slot], expected)
    assert (dn.content[~dn.valid] == 0).all()


def test_label_noise_shows_another_phrase_of_the_same_prompt(draw):
    text, targets = draw.text(1), draw.targets(4)
    text.phrase_map[0, -1] = 0  # this prompt has one phrase less than the longest of the batch
    targets[0].labels.clamp_(max=draw.phrases - 2)
    denoising = Denoising(draw.dim, num_queries=8000, label_noise=0.5)
    dn = denoising(targets, text, QUERIES)
    phrases = denoising.content(text.phrase_map[0] @ text.tokens[0])
    shown = torch.cdist(dn.content[0], phrases).argmin(-1)
    labels = targets[0].labels[torch.arange(dn.content.shape[1]) % 4]
    assert (shown < draw.phrases - 1).all()
    flipped = shown != labels
    assert abs(flipped.float().mean() - 0.25) < 0.04  # 8 standard deviations
    assert set(shown[flipped & (labels == labels[0])].tolist()) == set(range(draw.phrases - 1)) - {
        int(labels[0])
    }


def test_a_prompt_of_one_phrase_has_nothing_to_flip_to(draw):
    draw.phrases = 1
    text, targets = draw.text(1), draw.targets(3)
    denoising = Denoising(draw.dim, label_noise=2.0)
    dn = denoising(targets, text, QUERIES)
    expected = denoising.content(text.phrase_map[0, 0] @ text.tokens[0])
    torch.testing.assert_close(dn.content[0], expected.expand_as(dn.content[0]))


def test_randomness_repeats_with_the_seed(draw):
    text, targets = draw.text(2), draw.targets(3, 2)
    denoising = Denoising(draw.dim)
    state = torch.get_rng_state()
    first = denoising(targets, text, QUERIES)
    other = denoising(targets, text, QUERIES)
    torch.set_rng_state(state)
    again = denoising(targets, text, QUERIES)
    assert torch.equal(first.boxes, again.boxes) and torch.equal(first.content, again.content)
    assert not torch.equal(first.boxes, other.boxes)


def test_works_under_autocast_with_half_precision_text(draw):
    text, targets = draw.text(1), draw.targets(2)
    text.tokens = text.tokens.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        dn = Denoising(draw.dim)(targets, text, QUERIES)
    assert dn.boxes.dtype == torch.float32 and dn.content.isfinite().all()


def test_classes_have_embeddings(draw):
    """A prompt's phrases are some of the classes, in another order."""
    names = [f"class {i}" for i in range(9)]
    asked = [torch.randperm(9)[: draw.phrases].tolist() for _ in range(2)]
    prompts = [Prompt.from_phrases([names[i] for i in row]) for row in asked]
    text, targets = ClassVocabulary(names)(prompts), draw.targets(3, 2)
    denoising = ClassDenoising(9, draw.dim, num_queries=40, label_noise=0.0)
    dn = denoising(targets, text, QUERIES)
    assert dn.groups == 40 // (2 * 3)
    for image, slot in torch.nonzero(dn.valid).tolist():
        label = asked[image][targets[image].labels[slot % 3]]
        assert torch.equal(dn.content[image, slot], denoising.content.weight[label])
    assert (dn.content[~dn.valid] == 0).all()

    flipped = ClassDenoising(9, draw.dim, num_queries=400, label_noise=2.0)
    dn = flipped(targets, text, QUERIES)
    known = [flipped.content.weight[row] for row in asked]
    for image, slot in torch.nonzero(dn.valid).tolist():
        same = (known[image] == dn.content[image, slot]).all(1)
        assert same.sum() == 1 and not same[targets[image].labels[slot % 3]]

    none = denoising(draw.targets(0, 0), text, QUERIES)
    none.content.sum().backward()
    assert none.content.shape == (2, 0, draw.dim) and (denoising.content.weight.grad == 0).all()
