"""Figures of a run's mixtures of experts: what they did in its evaluations, and what they became.

    python -m dynamic_dino.moe.figures output/dynmoe/nano_stamps

For each evaluated data set: how many experts a token takes, and how often each is taken. If the
routers are top-any ones also, from the last checkpoint, how alike the experts' representations are
and their thresholds, and from metrics.json how many were active while training. These are the
figures of DynMoE (arXiv 2405.14297): 5, 6, and those of its appendix 8.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ..engine.checkpointing import last_checkpoint, read_checkpoint

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402  after the choice of the back-end
from matplotlib.figure import Figure  # noqa: E402


def experts_per_token(layers: list[dict]) -> Figure:
    """The mean number of each layer, and its distribution; rows of `RoutingStatistics.summary`."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    names = [str(i) for i in range(len(layers))]
    left.bar(names, [layer["experts_per_token"] for layer in layers])
    left.set(xlabel="MoE layer", ylabel="experts per token")
    for i, layer in enumerate(layers):
        right.plot(
            100 * np.array(layer["experts_per_token_distribution"]), "o-", label=f"layer {i}"
        )
    right.set(xlabel="experts", ylabel="tokens, %", ylim=(0, None))
    right.legend()
    return figure


def activation_frequency(layers: list[dict]) -> Figure:
    """One circle for each layer and expert, its area the share of the tokens that take the expert:
    an expert's load times the experts that a token takes."""
    figure, axis = plt.subplots(figsize=(8, 1 + 0.5 * len(layers)), layout="constrained")
    for i, layer in enumerate(layers):
        share = np.array(layer["load"]) * layer["experts_per_token"]
        axis.scatter(range(len(share)), np.full(len(share), i), s=300 * share)
        for expert, value in enumerate(share):
            axis.annotate(f"{100 * value:.0f}", (expert, i), ha="center", va="center", fontsize=7)
    axis.set(xlabel="expert", ylabel="MoE layer", yticks=range(len(layers)))
    axis.set_title("tokens that an expert is active for, %")
    axis.margins(0.1, 0.3)
    return figure


def routers_of(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The top-any routers of a model's state dict, in order: weight, thresholds and active."""
    prefixes = [name.removesuffix("thresholds") for name in state if name.endswith(".thresholds")]
    names = ("weight", "thresholds", "active")
    return [{name: state[prefix + name] for name in names} for prefix in prefixes]


def similarity(routers: list[dict[str, Tensor]]) -> Figure:
    """Cosines between the active experts' representations, layer by layer."""
    figure, axes = _row(len(routers), 3.2)
    for i, (axis, router) in enumerate(zip(axes, routers, strict=True)):
        rows = F.normalize(router["weight"][router["active"]].float())
        image = axis.imshow((rows @ rows.T).numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        slots = router["active"].nonzero().flatten().tolist()
        axis.set(title=f"layer {i}", xticks=range(len(slots)), yticks=range(len(slots)))
        axis.set_xticklabels(slots)
        axis.set_yticklabels(slots)
    figure.colorbar(image, ax=axes, label="cosine")
    return figure


def thresholds(routers: list[dict[str, Tensor]]) -> Figure:
    """G of each active expert: the cosine beyond which a token takes it."""
    figure, axes = _row(len(routers), 2.6)
    for i, (axis, router) in enumerate(zip(axes, routers, strict=True)):
        slots = router["active"].nonzero().flatten()
        axis.bar([str(s) for s in slots.tolist()], router["thresholds"][slots].float().numpy())
        axis.set(title=f"layer {i}", xlabel="expert", ylabel="threshold G")
    return figure


def over_training(rows: list[dict]) -> Figure | None:
    """Active experts and experts per token by iteration, from metrics.json; None if not logged."""
    names = ("active_experts", "experts_per_token", "unrouted_tokens")
    logged = {k for row in rows for k in row if k.startswith("moe/")}  # not those of evaluations
    keys = sorted(k for k in logged if k.split("/")[-1] in names)
    if not keys:
        return None
    figure, axes = _row(len(names), 3)
    for axis, name in zip(axes, names, strict=True):
        for key in (k for k in keys if k.endswith(f"/{name}")):
            found = [(row["iteration"], row[key]) for row in rows if key in row]
            axis.plot(*zip(*found, strict=True), label=key.split("/")[1])
        axis.set(xlabel="iteration", title=name.replace("_", " "), ylim=(0, None))
    axes[0].legend()
    return figure


def _row(count: int, height: float) -> tuple[Figure, np.ndarray]:
    figure, axes = plt.subplots(
        1, count, figsize=(3.4 * count, height), layout="constrained", squeeze=False
    )
    return figure, axes[0]


def save_figures(run: Path, output: Path) -> list[Path]:
    """Writes all figures that a run's folder has the numbers for; returns their files.

    Raises:
        FileNotFoundError: there is no evaluation of a mixture of experts, and no such checkpoint.
    """
    figures: dict[str, Figure | None] = {}
    for path in sorted(run.glob("evaluation/*/results.json")):
        layers = json.loads(path.read_text())["routing"]
        if layers:
            figures[f"experts_per_token_{path.parent.name}"] = experts_per_token(layers)
            figures[f"activation_frequency_{path.parent.name}"] = activation_frequency(layers)
    checkpoint = last_checkpoint(run)
    routers = routers_of(read_checkpoint(checkpoint, mmap=True)["model"]) if checkpoint else []
    if routers:
        figures |= {"similarity": similarity(routers), "thresholds": thresholds(routers)}
    metrics = run / "metrics.json"
    if metrics.is_file():
        lines = metrics.read_text().splitlines()
        figures["over_training"] = over_training([json.loads(line) for line in lines])
    files = {output / f"{name}.png": f for name, f in figures.items() if f is not None}
    if not files:
        raise FileNotFoundError(
            f"{run} holds neither an evaluation of a mixture of experts (evaluation/*/results.json)"
            " nor a checkpoint or metrics of one: name the train.output_dir of such a run"
        )
    output.mkdir(parents=True, exist_ok=True)
    for file, figure in files.items():
        figure.savefig(file, dpi=120)
        plt.close(figure)
    return list(files)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="train.output_dir of the run")
    parser.add_argument("--output", type=Path, help="folder for the figures; default: RUN/figures")
    options = parser.parse_args(arguments)
    try:
        files = save_figures(options.run, options.output or options.run / "figures")
    except FileNotFoundError as error:
        parser.error(str(error))
    print("\n".join(map(str, files)))


if __name__ == "__main__":
    main()
