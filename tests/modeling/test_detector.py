"""The whole detector: training steps, prompts in chunks, padding, cached features, autocast."""

from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.structures import Instances
from dynamic_dino.data.synthetic.drawn import NAMES
from dynamic_dino.modeling.backbone import Backbone
from dynamic_dino.modeling.detector import OpenVocabularyDetector
from dynamic_dino.modeling.losses.boxes import cxcywh_to_xyxy
from dynamic_dino.modeling.preprocess import canvas_size, targets_of
from dynamic_dino.modeling.prompt import Prompt
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.routers import SoftmaxRouter
from dynamic_dino.serving.inference import Detector
from torch.utils._python_dispatch import TorchDispatchMode


def loss_names(layers: int = 3) -> set[str]:
    suffixes = ["", *(f"_{i}" for i in range(layers - 1))]
    suffixes = [*suffixes, *(f"_dn{s}" for s in suffixes), "_selection"]
    return {f"loss_{term}{s}" for term in ("class", "bbox", "giou") for s in suffixes}


def train_step(model, batch, seed: int = 0):
    torch.manual_seed(seed)  # denoising queries, stochastic depth
    model.zero_grad()
    losses = model(batch)
    losses.pop("routings", None)
    sum(v for k, v in losses.items() if k.startswith("loss")).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    missing = [n for n, g in gradients.items() if g is None]
    assert not missing, f"no gradient: {missing}"
    assert all(v.isfinite() for v in losses.values())
    assert all(g.isfinite().all() for g in gradients.values())
    return {k: v.detach() for k, v in losses.items()}, gradients


def with_experts(config, num_experts: int):
    node = config.model.decoder.copy()
    dense = node.layer.ffn
    node.layer.ffn = L(MoEFeedForward)(
        dim=dense.dim,
        hidden=dense.hidden,
        router=L(SoftmaxRouter)(
            dim=dense.dim,
            num_experts=num_experts,
            gate="straight_through",  # the detection loss reaches all weights
        ),
    )
    return instantiate(node)


def use_every_token(model):
    """Queries in any order are the same set: each memory token becomes one, all of one content.

    Two tokens that score almost the same may change places with rounding, which would give both
    queries another content.
    """
    tokens = sum((model.canvas // s) ** 2 for s in model.backbone.strides)
    model.query_selection.num_queries = tokens
    content = model.query_selection.content
    content.weight.data = content.weight.data[:1].expand(tokens, -1).clone()
    model.max_detections = 10**6
    return model.eval()


def assert_same_detections(one, other, score: float = 1e-5, box: float = 1e-4):
    """Each detection of one is found in the other: phrase, score, box in parts of the image."""
    assert one.image_size == other.image_size and len(one) == len(other) > 0
    h, w = one.image_size
    assert (one.scores.diff() <= 0).all() and (other.scores.diff() <= 0).all()
    for i in one.pred_classes.unique():
        pairs = []
        for detections in (one, other):
            chosen = detections.pred_classes == i
            boxes = detections.pred_boxes.tensor[chosen] / (torch.tensor([w, h, w, h]) * box)
            pairs.append(torch.cat([boxes, detections.scores[chosen, None] / score], 1))
        apart = (pairs[0][:, None] - pairs[1]).abs().amax(-1)
        assert apart.shape[0] == apart.shape[1]
        assert apart.amin(0).max() <= 1 and apart.amin(1).max() <= 1


class CountImages:
    def __init__(self, backbone):
        self.batches = []
        backbone.register_forward_hook(lambda module, args, out: self.batches.append(len(args[0])))


# Training ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("objects", [True, False])
def test_training_step(nano, draw, objects):
    losses, gradients = train_step(nano.train(), [draw(objects=objects) for _ in range(3)])
    assert losses.keys() == loss_names()
    boxes = [v for k, v in losses.items() if "class" not in k]
    assert all((v > 0) == objects for v in boxes)
    # Keys' biases shift all scores alike, so their gradient is zero up to rounding.
    still = [n for n, g in gradients.items() if not g.any() and not n.endswith("k_proj.bias")]
    if objects:
        assert not still


def test_objects_of_other_batches_divide_the_losses(nano, draw):
    nano.train()
    nano.denoising = None
    batch, other = [draw() for _ in range(2)], [draw() for _ in range(2)]
    torch.manual_seed(3)  # the same dropout twice
    losses = nano(batch)
    torch.manual_seed(3)
    mine, all_of_them = nano.mean_objects([batch]), nano.mean_objects([batch, other])
    assert all_of_them == sum(len(sample["instances"]) for sample in batch + other) / 2
    for name, loss in nano(batch, objects=all_of_them).items():
        if name.startswith("loss"):
            torch.testing.assert_close(loss, losses[name] * mine / all_of_them)


def test_mixed_batch_of_images_with_and_without_objects(nano, draw):
    losses, _ = train_step(nano.train(), [draw(), draw(objects=False)])
    assert losses.keys() == loss_names()


def test_bf16_autocast(nano, draw):
    batch = [draw() for _ in range(2)]
    exact, _ = train_step(nano.train(), batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = train_step(nano, batch)
        assert all(v.dtype == torch.float32 for v in rounded.values())
    total = sum(exact.values())
    assert abs(sum(rounded.values()) - total) < 0.1 * total


def test_frozen_towers_stay_as_they_are(nano, draw):
    before = {k: v.clone() for k, v in nano.backbone.state_dict().items()}
    train_step(nano.train(), [draw()])
    assert not nano.backbone.body.training and not nano.text_encoder.body.training
    assert all(torch.equal(v, before[k]) for k, v in nano.backbone.state_dict().items())
    assert all(p.grad is None for p in nano.backbone.parameters())
    assert all(p.grad is None for p in nano.text_encoder.body.parameters())


@pytest.mark.parametrize("experts", [0, 8])
def test_gradient_checkpointing(nano_config, nano, draw, experts):
    if experts:
        nano.decoder = with_experts(nano_config, experts)
    for layer in nano.enhancer.layers:
        layer.fusion.drop_path.drop_prob = 0.5
    batch = [draw() for _ in range(3)]
    losses, gradients = train_step(nano.train(), batch)
    nano.enhancer.grad_checkpointing = nano.decoder.grad_checkpointing = True
    ran = []
    for layer in (nano.enhancer.layers[0], nano.decoder.layers[0]):
        layer.register_forward_pre_hook(lambda *_: ran.append(1))
    losses_again, gradients_again = train_step(nano, batch)
    assert len(ran) == 4, "each layer should run forward, and again in the backward pass"
    torch.testing.assert_close(losses_again, losses)
    torch.testing.assert_close(gradients_again, gradients, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_boxes_are_refined_layer_by_layer(nano, draw):
    last = nano.decoder.box_head.layers[-1]
    last.weight.zero_()
    step = last.bias.copy_(torch.tensor([0.3, -0.2, 0.5, 0.1]))
    sample = draw()
    inputs = (*nano.eval().image_features([sample]), nano.text_encoder([sample["prompt"]]))
    output = nano.decode(*inputs)
    before = output.selection.boxes
    for layer in output.layers:
        torch.testing.assert_close(layer.boxes.logit() - before.logit(), step.expand(1, 100, 4))
        before = layer.boxes
    # Each layer also looks from where the last one moved the boxes.
    step.neg_()
    away = nano.decode(*inputs)
    torch.testing.assert_close(away.layers[0].logits, output.layers[0].logits)
    assert (away.layers[1].logits - output.layers[1].logits).abs().max() > 1e-3


@torch.no_grad()
def test_denoising_queries_are_not_seen(nano_config, nano, draw):
    """The answers that they hold leak neither into the matching queries nor into the routing."""
    nano.decoder = with_experts(nano_config, 4)
    batch = [draw() for _ in range(2)]
    inputs = (*nano.eval().image_features(batch), nano.text_encoder([s["prompt"] for s in batch]))
    targets = targets_of(batch, nano.device)
    without, output = nano.decode(*inputs), nano.decode(*inputs, targets)
    assert output.denoising.content.shape[1] > 0 and without.denoising is None
    assert output.denoising_layers[0].boxes.shape == output.denoising.boxes.shape
    for a, b in zip(output.layers, without.layers, strict=True):
        torch.testing.assert_close(a.logits, b.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a.boxes, b.boxes, atol=1e-4, rtol=1e-4)
    for a, b in zip(output.routings, without.routings, strict=True):
        torch.testing.assert_close(a.probs, b.probs, atol=1e-4, rtol=1e-4)
    for image, target in enumerate(targets):
        h, w = batch[image]["image_size"]
        absolute = cxcywh_to_xyxy(target.boxes) * torch.tensor([w, h, w, h])
        torch.testing.assert_close(absolute, batch[image]["instances"].gt_boxes.tensor)


def test_without_criterion_there_is_no_training(nano, draw):
    nano.criterion = None
    with pytest.raises(ValueError, match="without a criterion"):
        nano.train()([draw()])


def test_linear_attention_stays_in_fp32():
    """EfficientViT sums k^T v over all cells, which overflows fp16."""

    class Dtypes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.of = {"aten.convolution.default": set(), "aten.bmm.default": set()}

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if (seen := self.of.get(str(function))) is not None:
                seen.update(a.dtype for a in args[:2])
            return function(*args, **(kwargs or {}))

    backbone = Backbone("efficientvit_b0.r224_in1k").eval()
    images = torch.randn(1, 3, 64, 64)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.no_grad(), torch.autocast("cpu", dtype), Dtypes() as dtypes:
            backbone(images)
        assert dtypes.of["aten.convolution.default"] == {dtype}
        assert dtypes.of["aten.bmm.default"] == {torch.float32}


# Prompts in chunks -------------------------------------------------------------------------------
@torch.no_grad()
def test_pieces_together_equal_pieces_one_by_one(nano, draw):
    model = use_every_token(nano)
    batch = [draw(11), draw(3), draw(8)]
    model.max_phrases, model.chunk_batch = 4, 1
    backbone = CountImages(model.backbone)
    alone = model(batch)
    model.chunk_batch = 5
    together = model(batch)
    assert backbone.batches == [3, 3], "the backbone runs once per image"
    for one, other, sample in zip(alone, together, batch, strict=True):
        found = one["instances"]
        assert_same_detections(found, other["instances"])
        names = sample["prompt"].phrases
        assert found.phrases == [names[i] for i in found.pred_classes]
        assert found.pred_classes.unique().tolist() == list(range(len(names)))


def test_max_detections_is_a_default_and_no_limit(nano):
    detector = Detector(nano, 64, threshold=0.0)
    nano.max_detections, image = 9, np.zeros((48, 64, 3), np.uint8)
    for most in (None, 5):  # whole, and in chunks
        nano.max_phrases = most
        count = nano.query_selection.num_queries * len(NAMES)
        for asked, found in ((None, 9), (7, 7), (15, 15), (np.int64(10**6), count)):
            found_scores = detector(image, NAMES, max_detections=asked).scores
            assert len(found_scores) == found and (found_scores.diff() <= 0).all()
    assert nano.max_detections == 9
    for wrong in (0, -3, 2.5, True, "9"):
        with pytest.raises(ValueError, match="model.max_detections must be a whole number"):
            OpenVocabularyDetector(*[None] * 5, max_detections=wrong)


@torch.no_grad()
def test_pieces_are_merged_by_score(nano, draw):
    """A long prompt finds the best of what its chunks find as prompts of their own."""
    model = use_every_token(nano)
    sample = draw(10)
    names = sample["prompt"].phrases
    scores, phrases, boxes = [], [], []
    for part in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9]):
        [found] = model([{**sample, "prompt": sample["prompt"].select(part)}])
        scores.append(found["instances"].scores)
        phrases += [names[part[i]] for i in found["instances"].pred_classes.tolist()]
        boxes.append(found["instances"].pred_boxes.tensor)
    scores, boxes = torch.cat(scores), torch.cat(boxes)

    model.max_phrases, model.max_detections = 4, 60
    [merged] = model([sample])
    merged = merged["instances"]
    torch.testing.assert_close(merged.scores, scores.sort(descending=True).values[:60])
    for score, phrase, box in zip(merged.scores, merged.phrases, merged.pred_boxes, strict=True):
        same = ((scores - score).abs() < 1e-5) & ((boxes - box).abs() < 0.01).all(1)
        assert phrase in [phrases[i] for i in same.nonzero()[:, 0]]


@pytest.mark.slow
@torch.no_grad()
def test_1203_names_in_chunks_equal_one_chunk_at_a_time(nano, draw):
    """LVIS: 31 chunks of 40 names, those of several images at once, and no cap per image."""
    nano.canvas = 64  # quicker
    model = use_every_token(nano)
    model.max_phrases, model.max_detections_per, model.chunk_batch = 40, "chunk", 8
    model.text_encoder._run_frozen = model.text_encoder._run  # many phrases at once
    names = [f"thing {i}" for i in range(1203)]
    prompt = Prompt.from_phrases(names)
    samples = [draw(4) | {"prompt": prompt, "image_size": (64, 64)} for _ in range(2)]
    for sample in samples:
        sample["image"] = sample["image"][:, 30:94, 30:94]
    together = [result["instances"] for result in model(samples)]
    for sample, found in zip(samples, together, strict=True):
        alone = []
        for first in range(0, 1203, 40):
            part = list(range(first, min(first + 40, 1203)))
            [result] = model([sample | {"prompt": prompt.select(part)}])
            result["instances"].remove("phrases")
            result["instances"].pred_classes += first
            alone.append(result["instances"])
        alone = Instances.cat(alone)
        assert len(found) == len(alone) == 1203 * model.query_selection.num_queries
        assert found.phrases == [names[i] for i in found.pred_classes]
        found.remove("phrases")
        by_name = [d[d.scores.argsort()] for d in (found, alone)]
        by_name = [d[d.pred_classes.argsort(stable=True)] for d in by_name]
        assert torch.equal(*(d.pred_classes for d in by_name))
        torch.testing.assert_close(*(d.scores for d in by_name), atol=1e-5, rtol=0)
        some = torch.randint(1203, (5,))
        alone = alone[alone.scores.argsort(descending=True, stable=True)]
        chosen = [d[torch.isin(d.pred_classes, some)] for d in (found, alone)]
        assert_same_detections(*chosen)

    model.max_detections = 50
    [capped] = model(samples[:1])
    assert len(capped["instances"]) == 31 * 50


@torch.no_grad()
def test_score_is_the_mean_probability_of_the_phrase(nano, draw):
    sample = draw(5)
    nano.eval()
    with torch.autocast("cpu", torch.bfloat16):
        [found] = nano([sample])
        output = nano.decode(*nano.image_features([sample]), nano.text_encoder([sample["prompt"]]))
    last = output.layers[-1]
    probability = last.logits[0].sigmoid()  # pooled: one token per phrase
    assert last.logits.dtype == torch.float32
    best = probability.flatten().sort(descending=True).values[:100]
    torch.testing.assert_close(found["instances"].scores, best, rtol=1e-6, atol=0)


@torch.no_grad()
def test_routings_of_all_chunks(nano_config, nano, draw):
    nano.decoder, nano.max_phrases, nano.chunk_batch = with_experts(nano_config, 4), 4, 2
    first, second = nano.eval()([draw(10), draw(4)])  # 3 + 1 chunks of 100 queries
    assert "routings" not in second
    assert [r.expert_ids.shape for r in first["routings"]] == [(400, 2)] * 3
    nano.return_routings = False
    assert "routings" not in nano([draw(4)])[0]


# Images ------------------------------------------------------------------------------------------
@torch.no_grad()
def test_result_does_not_depend_on_the_batch(nano, draw):
    model = use_every_token(nano)
    batch = [draw(7), draw(2), draw(5), draw(5)]
    together = model(batch)
    for sample, found in zip(batch, together, strict=True):
        [alone] = model([sample])
        assert_same_detections(found["instances"], alone["instances"], score=1e-4)


@torch.no_grad()
def test_sentences_of_one_image_share_its_features(nano, draw, monkeypatch):
    """As a worker's batch has them: the backbone sees each image once, and finds the same."""
    model = use_every_token(nano)
    first, second = draw(5), draw(5)
    shown = [first, second, first]
    batch = [sample | {"prompt": draw(5)["prompt"]} for sample in shown]
    apart = [sample | {"image": sample["image"].clone()} for sample in batch]
    looked, extract = [], model.extract_features
    monkeypatch.setattr(
        model, "extract_features", lambda images: looked.append(len(images)) or extract(images)
    )
    batch = ForkingPickler.loads(ForkingPickler.dumps(batch))
    for ours, theirs in zip(model(batch), model(apart), strict=True):
        assert_same_detections(ours["instances"], theirs["instances"], score=1e-4)
    assert looked == [2, 3]


@torch.no_grad()
def test_cached_features_equal_the_image(nano, draw):
    model = use_every_token(nano)
    samples = [draw(4), draw(4)]
    cached = []
    for sample in samples:
        features = model.extract_features([sample["image"]])
        features = {name: x[0].half() for name, x in features.items()}
        cached.append({k: v for k, v in sample.items() if k != "image"} | {"features": features})
    backbone = CountImages(model.backbone)
    from_cache = model(cached)
    assert not backbone.batches
    # The cache rounds to fp16, and that is all.
    model.backbone.register_forward_hook(
        lambda module, args, features: {k: v.half().float() for k, v in features.items()}
    )
    from_images = model(samples)
    for one, other in zip(from_cache, from_images, strict=True):
        assert_same_detections(one["instances"], other["instances"])


@torch.no_grad()
def test_boxes_are_scaled_to_the_original(nano, draw):
    nano.eval()
    sample = draw(3, scale=(3, 2))
    (h, w), image_size = (sample["height"], sample["width"]), sample["image_size"]
    [large] = nano([sample])
    [small] = nano([{**sample, "height": image_size[0], "width": image_size[1]}])
    large, small = large["instances"], small["instances"]
    boxes = large.pred_boxes.tensor
    assert large.image_size == (h, w) and torch.equal(large.scores, small.scores)
    torch.testing.assert_close(boxes, small.pred_boxes.tensor * torch.tensor([2, 3, 2, 3]))
    assert (boxes >= 0).all() and (boxes <= torch.tensor([w, h, w, h])).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.std(0).min() > 1
    # and relative to the content, not to the padded canvas
    output = nano.decode(*nano.image_features([sample]), nano.text_encoder([sample["prompt"]]))
    score, index = output.layers[-1].logits[0].amax(-1).max(0)
    expected = cxcywh_to_xyxy(output.layers[-1].boxes[0, index]) * torch.tensor([w, h, w, h])
    torch.testing.assert_close(boxes[0], expected.clamp(min=0).minimum(torch.tensor([w, h, w, h])))


@torch.no_grad()
def test_padding_is_not_looked_at(nano, draw):
    """Whatever stands beside the image on the canvas, as far as P5's cells are all padding."""
    model = use_every_token(nano)
    sample = draw(4)
    sample["image"], sample["image_size"] = sample["image"][:, :64, :96], (64, 96)
    features, masks = model.image_features([sample])
    assert {k: m.sum().item() for k, m in masks.items()} == {"p3": 96, "p4": 24, "p5": 6}
    assert masks["p3"][0, :8, :12].all()
    text = model.text_encoder([sample["prompt"]])
    clean = model.enhancer(features, masks, text)[0]
    noisy = {k: torch.where(masks[k][:, None], x, torch.randn_like(x)) for k, x in features.items()}
    dirty = model.enhancer(noisy, masks, text)[0]
    # Attention leaves it out; convolutions of the cross-scale fusion reach one cell far.
    torch.testing.assert_close(dirty.scene, clean.scene)
    assert clean.valid_ratios[0].tolist() == [[0.75, 0.5]] * 3
    queries, _ = model.query_selection(clean, text)
    usable = queries.boxes[0, :126]
    assert ((usable > 0) & (usable < 1)).all()


def test_canvas(nano, draw):
    sample = draw()
    with pytest.raises(ValueError, match=r"160 x \d+ pixels doesn't fit the canvas of 128.*canvas"):
        nano.eval()([sample, {**sample, "image": torch.zeros(3, 160, 96), "image_size": (160, 96)}])
    assert canvas_size([(100, 20)], nano.canvas, nano.size_divisor) == (128, 128)
    assert canvas_size([(100, 20), (33, 64)], None, nano.size_divisor) == (128, 64)


def test_features_of_another_canvas(nano, draw):
    sample = draw()
    features = {f"p{n}": torch.zeros(c, 160 >> n, 160 >> n) for n, c in ((3, 40), (4, 112))}
    sample["features"] = {**features, "p5": torch.zeros(320, 5, 5)}
    with pytest.raises(ValueError, match="features p3 are 20 x 20.* 128 x 128 pixels 16 x 16"):
        nano.eval()([sample])


def test_training_refuses_a_caption_over_the_token_limit(nano, draw, monkeypatch):
    batch = [draw(), {**draw(), "caption": "a red circle on noise", "file_name": "second.png"}]
    train_step(nano.train(), batch)
    monkeypatch.setattr(nano.text_encoder, "max_tokens", 5)
    monkeypatch.setattr(nano.text_encoder, "count_tokens", lambda prompt: len(prompt.text.split()))
    train_step(nano, batch)  # five words
    batch[1]["caption"] += " again"
    with pytest.raises(ValueError, match="'second.png' has 6 tokens, but at most 5 fit"):
        nano(batch)


def test_the_query_of_a_detection_is_its_row_in_the_routings(nano, nano_config, draw):
    """Of the tokens that the last layer routed, a detection's own has its score and its box: also
    where prompts are split and several images share a decoder batch."""
    model = nano.eval()
    model.decoder = with_experts(nano_config, 4).eval()
    model.max_phrases, model.chunk_batch, model.max_detections = 4, 3, 50
    samples, seen = [draw(phrases=n) for n in (9, 3, 6)], []  # 3 + 1 + 2 chunks
    decode = model.decode
    model.decode = lambda *a: seen.append(decode(*a)) or seen[-1]
    with torch.no_grad():
        results = model(samples)
    assert [len(output.layers[-1].boxes) for output in seen] == [3, 3]
    boxes = torch.cat([output.layers[-1].boxes.flatten(0, 1) for output in seen])
    ids = torch.cat([output.routings[-1].expert_ids for output in seen])
    assert torch.equal(results[0]["routings"][-1].expert_ids, ids)
    queries, first = len(boxes) // 6, (0, 3, 4, 6)
    for i, (sample, result) in enumerate(zip(samples, results, strict=True)):
        found = result["instances"]
        chunk = found.pred_classes // 4
        assert torch.equal(found.queries // queries, first[i] + chunk)
        h, w = sample["height"], sample["width"]
        corners = cxcywh_to_xyxy(boxes[found.queries]).clamp(0, 1) * torch.tensor([w, h, w, h])
        torch.testing.assert_close(found.pred_boxes.tensor, corners)
        for k in range(len(found)):
            row = seen[int(found.queries[k]) // (3 * queries)]
            local = int(found.queries[k]) % (3 * queries)
            probability = row.layers[-1].logits.sigmoid().flatten(0, 1)[local]
            phrase = row.text.phrase_map[local // queries, int(found.pred_classes[k]) % 4]
            torch.testing.assert_close(found.scores[k], probability @ phrase)
