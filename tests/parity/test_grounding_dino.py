"""The full Grounding DINO variant against transformers, weight by weight and step by step."""

import copy

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from dynamic_dino.checkpoint.public import import_public
from dynamic_dino.moe.layer import MoEFeedForward
from dynamic_dino.moe.routers import SoftmaxRouter
from helpers.twins import as_transformers, clear_samples, random_samples, their_inputs, their_layers
from timm.layers import DropPath

CLOSE = dict(atol=1e-4, rtol=1e-4)
SIZES = (90, 101), (77, 120), (80, 88)


def encode(model, samples):
    features, masks = model.image_features(samples)
    return features, masks, model.text_encoder([s["prompt"] for s in samples])


@torch.no_grad()
def test_padded_batch(twins):
    """Images of several sizes and prompts of several lengths, all the way through."""
    model = as_transformers(twins.ours)
    samples = clear_samples(twins, *SIZES)
    inputs = their_inputs(samples, model)
    expected = twins.theirs(**inputs, output_hidden_states=True)

    maps, _ = twins.theirs.model.backbone(inputs["pixel_values"], inputs["pixel_mask"])
    found = model.extract_features([s["image"] for s in samples])
    features, masks, text = encode(model, samples)
    assert list(found) == ["p3", "p4", "p5"] and list(masks) == ["p3", "p4", "p5", "p6"]
    for (theirs, mask), name in zip(maps, found, strict=True):
        torch.testing.assert_close(found[name], theirs, **CLOSE)
        assert torch.equal(masks[name], mask) and not mask.all()
    real = text.mask
    start = expected.encoder_text_hidden_states[0]
    torch.testing.assert_close(text.tokens[real], start[real], **CLOSE)
    start = expected.encoder_vision_hidden_states[0]
    mine = torch.cat([x.flatten(2).transpose(1, 2) for x in features.values()], 1)
    torch.testing.assert_close(mine, start, **CLOSE)

    memory, text, _ = model.enhancer(features, masks, text)
    torch.testing.assert_close(
        memory.tokens[memory.mask], expected.encoder_last_hidden_state_vision[memory.mask], **CLOSE
    )
    theirs = expected.encoder_last_hidden_state_text
    torch.testing.assert_close(text.tokens[real], theirs[real], **CLOSE)
    queries, _ = model.query_selection(memory, text)
    torch.testing.assert_close(queries.boxes, expected.init_reference_points, **CLOSE)
    layers = model.decoder(queries, memory, text).layers
    for layer, (logits, boxes) in zip(layers, their_layers(twins, expected), strict=True):
        torch.testing.assert_close(layer.logits, logits, **CLOSE)
        torch.testing.assert_close(layer.boxes, boxes, **CLOSE)
    torch.testing.assert_close(layers[-1].boxes, expected.pred_boxes, **CLOSE)
    length = layers[-1].logits.shape[-1]
    torch.testing.assert_close(layers[-1].logits, expected.logits[..., :length], **CLOSE)
    assert expected.logits[..., length:].isneginf().all()


@torch.no_grad()
@pytest.mark.parametrize("phrases", [1, 40], ids=["one phrase", "long prompt"])
def test_one_image(twins, phrases):
    """With the settings of the recipes; a size that nothing divides."""
    samples = clear_samples(twins, (83, 107), phrases=(phrases,))
    expected = twins.theirs(**their_inputs(samples, twins.ours))
    output = twins.ours.decode(*encode(twins.ours, samples))
    length = output.text.tokens.shape[1]
    assert length > 100 or phrases == 1
    torch.testing.assert_close(output.layers[-1].logits, expected.logits[..., :length], **CLOSE)
    torch.testing.assert_close(output.layers[-1].boxes, expected.pred_boxes, **CLOSE)


@torch.no_grad()
def test_unusable_tokens_compete(twins):
    """Tokens near the border count as zeros, which can win; their boxes are the corner."""
    for norm in (twins.theirs.model.enc_output_norm, twins.ours.query_selection.norm):
        norm.bias.copy_(torch.linspace(-3, 3, len(norm.bias)))
    samples = clear_samples(twins, (96, 96))
    expected = twins.theirs(**their_inputs(samples, twins.ours))
    output = twins.ours.decode(*encode(twins.ours, samples))
    length = output.text.tokens.shape[1]
    torch.testing.assert_close(output.layers[-1].boxes, expected.pred_boxes, **CLOSE)
    torch.testing.assert_close(output.layers[-1].logits, expected.logits[..., :length], **CLOSE)
    chosen = (output.selection.boxes == 1).all(-1)
    assert torch.equal(chosen, (expected.init_reference_points == 1).all(-1))


@torch.no_grad()
def test_other_queries_are_selected_only_where_scores_tie(twins):
    """In float32, two tokens may change places whose scores are the same to rounding; in float64,
    none do."""
    samples = random_samples((203, 331), phrases=(9,))
    for dtype, tie in ((torch.float32, 1e-4), (torch.float64, 0.0)):
        ours, theirs = twins.ours.to(dtype), twins.theirs.to(dtype)
        inputs = their_inputs(samples, ours)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        expected = theirs(**inputs)
        queries, _ = ours.query_selection(*ours.enhancer(*encode(ours, samples))[:2])
        other = (queries.boxes - expected.init_reference_points).abs().amax(-1)[0] > 1e-3
        scores = expected.enc_outputs_class.amax(-1)[0].topk(len(other) + 1).values
        gaps = -scores.diff()
        nearest = torch.minimum(gaps, torch.cat([gaps[:1], gaps[:-1]]))
        assert (nearest[other] < tie).all()


@torch.no_grad()
def test_result_does_not_depend_on_the_batch(twins):
    """Neither on images nor on prompts beside it, as transformers' does."""
    samples = clear_samples(twins, (83, 107))
    samples += random_samples(*SIZES, (83, 107), phrases=(3, 30, 1, 2))
    features, masks, text = encode(twins.ours, samples)
    assert not masks["p3"][:3].all(-1).all()
    together = twins.ours.decode(features, masks, text).layers[-1]
    expected = twins.theirs(**their_inputs(samples[:1], twins.ours))
    length = twins.ours.text_encoder([samples[0]["prompt"]]).tokens.shape[1]
    torch.testing.assert_close(together.boxes[:1], expected.pred_boxes, **CLOSE)
    logits = expected.logits[..., :length]
    torch.testing.assert_close(together.logits[:1, :, :length], logits, **CLOSE)
    for i, sample in enumerate(samples[1:3], 1):
        alone = twins.ours.decode(*encode(twins.ours, [sample])).layers[-1]
        torch.testing.assert_close(together.boxes[i : i + 1], alone.boxes, **CLOSE)
    # The other way it does, so this says something.
    padded = as_transformers(twins.ours).decode(*encode(twins.ours, samples)).layers[-1]
    assert (padded.boxes[:1] - expected.pred_boxes).abs().max() > 1e-3


@torch.no_grad()
def test_detections_of_a_mixed_batch(twins):
    samples = random_samples(*SIZES)
    together = twins.ours(samples)
    for sample, found in zip(samples, together, strict=True):
        found, [alone] = found["instances"], twins.ours([sample])
        assert found.image_size == sample["image_size"]
        torch.testing.assert_close(found.scores, alone["instances"].scores, **CLOSE)
        names = sample["prompt"].phrases
        assert found.phrases == [names[i] for i in found.pred_classes]


def with_experts(config, experts: int):
    config = copy.deepcopy(config)
    for layer in (config.model.decoder.layer, config.model.enhancer.layer.image):
        dense = layer.ffn
        router = L(SoftmaxRouter)(dim=dense.dim, num_experts=experts)
        layer.ffn = L(MoEFeedForward)(dim=dense.dim, hidden=dense.hidden, router=router)
    return instantiate(config.model).eval()


@torch.no_grad()
def test_experts_start_as_the_dense_model(twins):
    """In the decoder and in the enhancer."""
    imported = import_public(f"hf:{twins.folder}")
    model = with_experts(imported.config, 16)
    model.load_state_dict(imported.state)
    samples = random_samples(*SIZES)
    dense = twins.ours.decode(*encode(twins.ours, samples))
    moe = model.decode(*encode(model, samples))
    assert len(moe.routings) == 5 and not dense.routings
    for a, b in zip(moe.layers, dense.layers, strict=True):
        torch.testing.assert_close(a.boxes, b.boxes, **CLOSE)
        torch.testing.assert_close(a.logits, b.logits, **CLOSE)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_training_step(twins, autocast):
    """Everything has a gradient, but what only shifts all attention scores alike."""
    model = twins.ours.train().requires_grad_(True)
    for module in model.modules():
        if isinstance(module, DropPath):  # may leave a block out for the whole batch
            module.drop_prob = 0.0
    samples = random_samples((90, 101), (64, 120))
    for sample in samples:
        instances = Instances(sample["image_size"])
        instances.gt_boxes = Boxes(torch.tensor([[5.0, 8.0, 40.0, 50.0], [1.0, 2.0, 60.0, 60.0]]))
        instances.gt_classes = torch.tensor([0, len(sample["prompt"].spans) - 1])
        sample["instances"] = instances
    model.enhancer.grad_checkpointing = model.decoder.grad_checkpointing = autocast
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = model(samples)
    sum(v for k, v in losses.items() if k.startswith("loss")).backward()
    assert all(v.isfinite() for v in losses.values())
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    rest = [n for n in without if "key" not in n and "k_proj" not in n and "embeddings" not in n]
    assert not rest
