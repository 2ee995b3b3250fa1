"""Epoch's refit of Chinchilla by our fit, the published numbers, and the sweep to sharpen it.

ESPALIER_EPOCH=svg_extracted_data.csv python experiments/chinchilla_refit/figures.py
"""

import os
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import law_plots, plots
from analysis.design import as_sweep, design
from analysis.fit import Fit, fit
from analysis.laws import CHINCHILLA
from analysis.robustness import flat_valleys, profiles, sensitivity
from analysis.runs import Runs

HERE = Path(__file__).parent
PUBLISHED = {  # arXiv 2404.10102: estimate and standard error
    "A": (482.006, 124.522),
    "B": (2085.434, 1293.284),
    "E": (1.81686, 0.02566),
    "alpha": (0.34781, 0.01540),
    "beta": (0.36585, 0.02060),
}
HOFFMANN = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.3392, "beta": 0.2849}
COLUMNS = {"n": "Model Size", "d": "tokens"}
TARGET, BUDGET = 5.76e23, 1e21  # FLOPs of Chinchilla; what the proposed sweep may cost


def main(_: Runs | None, folder: Path) -> list[Path]:
    """Write figures, results.csv and sweep.yaml; return the figures. Needs no run of ours."""
    table = pd.read_csv(os.environ["ESPALIER_EPOCH"])
    table["tokens"] = table["Training FLOP"] / (6 * table["Model Size"])
    published = table[table["loss"] < np.sort(table["loss"])[-5]]  # the published procedure
    fitted = fit(published, CHINCHILLA, columns=COLUMNS, loss="loss", bootstraps=4000)
    results = fitted.parameters.copy()
    results["published"], results["published_se"] = zip(*PUBLISHED.values(), strict=True)
    results["hoffmann"] = list(HOFFMANN.values())
    allowed = flat_valleys(profiles(fitted))
    results["profile_low"], results["profile_high"] = allowed["low"], allowed["high"]
    results.to_csv(folder.parent / "results.csv", index=False)
    print(
        results.to_string(index=False),
        f"objective {fitted.objective:.10f}",
        fitted.counts(),
        sep="\n",
        end="\n\n",
    )
    to_all = fit(table, CHINCHILLA, columns=COLUMNS, loss="loss", bootstraps=0)
    choices = sensitivity(table, to_all, columns=COLUMNS, loss="loss")
    choices.to_csv(folder.parent / "choices.csv", index=False)
    print(choices.to_string(index=False), end="\n\n")
    print(fitted.compute_optimal(TARGET).to_string(index=False), end="\n\n")
    (folder.parent / "sweep.yaml").write_text(_propose(fitted))
    figure, data = law_plots.law_with_residuals(fitted.residuals(), title="Chinchilla, refitted")
    shown = data[["predicted", "residual"]]  # Epoch's points are theirs to publish
    made = [plots.save(folder, "law", figure, shown, fitted.counts())]
    figure, data = law_plots.pair_plot(fitted, title="4,000 bootstraps: alpha with A, beta with B")
    data = data.describe().reset_index()
    made.append(plots.save(folder, "pairs", figure, data, fitted.counts()))
    return made


def _propose(fitted: Fit) -> str:
    """Print and return the sweep that would most sharpen the fit."""
    proposed = design(fitted, pd.read_csv(HERE / "shapes.csv"), budget=BUDGET, target=TARGET)
    print(
        proposed.runs.to_string(index=False),
        f"{proposed.before:.2%} -> {proposed.after:.2%}",
        sep="\n",
    )
    return as_sweep(proposed, name="chinchilla_refit")


if __name__ == "__main__":
    for path in main(None, HERE / "figures"):
        print(path)
