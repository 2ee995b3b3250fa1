"""Grids in which parts are switched: differences paired by seed as a table and a forest plot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import plots
from analysis.paired import beside_baseline, holm, over_seeds, paired_difference
from analysis.runs import Runs


def ablate(
    runs: Runs,
    *,
    choice: Callable[["pd.Series[Any]"], str],
    baseline: str,
    pair: list[str],
    metric: str = "val_loss",
    folder: Path,
    name: str,
    title: str,
) -> list[Path]:
    """Compare choices with a baseline; return the figure's path.

    The forest plot is written to `folder`, results.csv beside it.

    Args:
        choice: names the choice of a run, a row of the table.
        pair: columns in which two runs agree to be compared.
    """
    done = runs.finished.copy()
    done["choice"] = [choice(row) for _, row in done.iterrows()]
    table = beside_baseline(done, key="choice", baseline=baseline, metric=metric, pair=pair)
    level = table.set_index("choice")["mean"][baseline]
    gap = table[table["choice"] != baseline].rename(columns={"choice": "value"})
    return _write(
        runs, gap.assign(n=gap["pairs"]), table, level, baseline, metric, folder, name, title
    )


def effects(
    runs: Runs,
    *,
    factors: dict[str, tuple[str, Any, Any]],
    metric: str = "val_loss",
    folder: Path,
    name: str,
    title: str,
) -> list[Path]:
    """Compare each factor of a full factorial grid, on minus off, paired in all other factors.

    Return the figure's path; the forest plot and the means of the cells are written to `folder`,
    results.csv beside it.

    Args:
        factors: by the name in the figure (column, value when off, value when on).
    """
    done = runs.finished.copy()
    columns = [column for column, _, _ in factors.values()]
    for column, off, _ in factors.values():  # what is at its default is not in the table
        done[column] = done[column].where(done[column].notna(), off) if column in done else off
    rows = []
    for label, (column, off, on) in factors.items():
        pair = [c for c in [*columns, "seed"] if c != column]
        differences = paired_difference(done, key=column, baseline=off, metric=metric, pair=pair)
        rows.append(differences[differences["value"] == on].assign(value=label))
    gap = pd.concat(rows, ignore_index=True)
    gap["p_holm"] = holm(gap["p"].to_numpy())  # over the factors
    means = over_seeds(done, columns, metric)
    folder.mkdir(parents=True, exist_ok=True)
    means.to_csv(folder / f"{name}_means.csv", index=False)
    print(means.to_string(index=False), end="\n\n")
    return _write(runs, gap, gap, done[metric].mean(), "off", metric, folder, name, title)


def _write(
    runs: Runs,
    gap: pd.DataFrame,
    results: pd.DataFrame,
    level: float,
    baseline: str,
    metric: str,
    folder: Path,
    name: str,
    title: str,
) -> list[Path]:
    results = results.assign(percent=100 * results["difference"] / level)
    print(results.to_string(index=False))
    results.to_csv(folder.parent / "results.csv", index=False)
    figure, data = plots.forest(gap, baseline=baseline, metric=metric)
    figure.axes[0].set_title(title)
    return [plots.save(folder, name, figure, data, runs.count())]
