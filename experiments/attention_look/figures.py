"""Loss and prefix matching of one and two layers over training, beside what counting reaches."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs

HERE = Path(__file__).parent
NAME = "attention_look"


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure, results.csv and scores.csv; return the figure."""
    done = runs.finished
    scores = _scores(runs, done)
    last = scores[scores["step"] == scores["step"].max()]
    best = last.groupby("fingerprint")["prefix_matching"].max().rename("best_head")
    table = over_seeds(
        done.merge(best, on="fingerprint"),
        ["model.depth"],
        "val_loss",
        facts=["repeat_gain", "best_head"],
    )
    table.to_csv(folder.parent / "results.csv", index=False)
    references = pd.read_csv(HERE / "references.csv")
    print(table.to_string(index=False), references.to_string(index=False), sep="\n")
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.9), layout="constrained")
    for index, depth in enumerate((1, 2)):
        label = f"{depth} layer{'s' * (depth > 1)} (n={len(done[done['model.depth'] == depth])})"
        for axis, key in ((axes[0], "val_loss"), (axes[1], "repeat_gain")):
            _seeds(axis, runs, done[done["model.depth"] == depth], key, f"C{index}", label)
    for reference, style in zip(references.itertuples(), (":", "-.", "--"), strict=True):
        line = {"color": "0.5", "linestyle": style, "linewidth": 0.9}
        axes[0].axhline(reference.loss_nats, label=reference.rule, **line)
    axes[0].set(xlabel="optimiser steps", ylabel="validation loss (nats)")
    axes[0].legend()
    axes[1].set(xlabel="optimiser steps", ylabel="second time easier by (nats)")
    for (depth, seed, layer, _), part in scores.groupby(["model.depth", "seed", "layer", "head"]):
        later = depth == 2 and layer == 1
        axes[2].plot(
            part["step"],
            part["prefix_matching"],
            color=f"C{2 + seed}" if later else "0.7",
            linewidth=0.9,
            zorder=3 if later else 1,
        )
    axes[2].axhline(_ideal(done.iloc[0]), color="0.5", linestyle="--", linewidth=0.9)
    for seed in sorted(done["seed"].unique()):
        axes[2].plot([], [], color=f"C{2 + seed}", label=f"second layer, seed {seed}")
    axes[2].plot([], [], color="0.7", label="first layers")
    axes[2].plot([], [], color="0.5", linestyle="--", label="a head that does nothing else")
    axes[2].set(xlabel="optimiser steps", ylabel="prefix matching of each head", ylim=(-0.03, 0.95))
    axes[2].legend()
    return [plots.save(folder, NAME, figure, scores, runs.count())]


def _scores(runs: Runs, done: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each evaluation and head."""
    rows = runs.history[runs.history["key"].str.startswith("prefix_matching/")]
    layer_head = rows["key"].str.extract(r"/(\d+)\.(\d+)").astype(int)
    rows = rows.assign(layer=layer_head[0], head=layer_head[1]).drop(columns="key")
    rows = rows.rename(columns={"value": "prefix_matching"})
    return rows.merge(done[["fingerprint", "model.depth", "seed"]], on="fingerprint")


def _seeds(
    axis: plt.Axes, runs: Runs, part: pd.DataFrame, key: str, color: str, label: str
) -> None:
    """Draw the curve of each seed, the first with the label."""
    curves = runs.curves(key, "step")
    for index, run in enumerate(part["fingerprint"]):
        curve = curves[curves["fingerprint"] == run]
        shown = label if not index else None
        axis.plot(curve["x"], curve["value"], color=color, linewidth=0.9, label=shown)


def _ideal(run: "pd.Series[float]") -> float:
    """Return the score of a head that attends evenly to what followed its token before.

    As in training it is measured on random tokens, each half of a sequence equal to the other.
    """
    length, vocab_size = int(run["train.sequence_length"]) // 2, int(run["tokenizer.vocab_size"])
    half = np.random.default_rng(0).integers(0, vocab_size, (2000, length))
    tokens = np.concatenate((half, half), axis=1)
    queries = np.arange(length, 2 * length - 1)
    same = tokens[:, :, None] == tokens[:, None, queries]
    before = (np.arange(2 * length)[:, None] < queries[None]) & same
    return float((1 / before.sum(axis=1)).mean())
