"""The commands that compare runs: differences from a baseline, a table by rows and columns."""

from pathlib import Path
from typing import Annotated

import typer

from analysis import plots
from analysis.commands.options import Metric, RunsFile, finish, read_table
from analysis.errors import require
from analysis.paired import paired_difference
from analysis.report import write_report
from analysis.tables import cross_table
from analysis.tables import latex as as_latex


def ablate(
    runs: RunsFile,
    baseline: Annotated[str, typer.Option(help="column=value, precision=bf16")],
    pair: Annotated[
        str, typer.Option(help="columns in which two runs agree to be compared")
    ] = "seed",
    metric: Metric = "val_loss",
    out: Annotated[Path, typer.Option(help="JSON; figure and CSV go beside it")] = Path(
        "ablation.json"
    ),
) -> None:
    """Compare each value of a column with a baseline, paired: differences, intervals and tests."""
    key, equals, value = baseline.partition("=")
    if not equals:
        raise typer.BadParameter(f"{baseline} must be column=value", param_hint="--baseline")
    table = read_table(runs)
    require(table, [key])
    table[key] = table[key].astype(str)
    gap = paired_difference(table, key=key, baseline=value, metric=metric, pair=pair.split(","))
    print(gap.to_string(index=False))
    note = f"{len(table)} runs, {int(table[metric].isna().sum())} without {metric}"
    print(note)
    figure, data = plots.forest(gap, baseline=value, metric=metric)
    figures = [plots.save(out.parent, out.stem, figure, data, note)]
    differences = gap.to_dict(orient="records")
    finish(out, runs, {"metric": metric, "baseline": baseline, "differences": differences}, figures)


def table(
    runs: RunsFile,
    rows: Annotated[str, typer.Option(help="column whose values are the rows")],
    cols: Annotated[str | None, typer.Option(help="column whose values are the columns")] = None,
    metric: Metric = "val_loss",
    latex: Annotated[bool, typer.Option(help="print LaTeX (booktabs)")] = False,
    caption: Annotated[str, typer.Option(help="of the LaTeX table")] = "",
    out: Annotated[Path, typer.Option(help="JSON; a .csv and a .tex go beside it")] = Path(
        "table.json"
    ),
) -> None:
    """Tabulate mean +- standard deviation (number of runs); holes of the grid are shown."""
    scores = read_table(runs)
    cells = cross_table(scores, rows=rows, columns=cols, metric=metric)
    holes, lost = int((cells == "--").sum().sum()), int(scores[metric].isna().sum())
    note = f"{cells.size} cells, {holes} without a run; {len(scores)} runs, {lost} without {metric}"
    caption = caption or f"{metric}: mean +- s.d. (runs)"
    text = as_latex(cells, caption=caption, label=out.stem, note=note)
    out.with_suffix(".tex").write_text(text)
    cells.to_csv(out.with_suffix(".csv"))
    records = cells.reset_index().to_dict(orient="records")
    write_report(out, runs, {"metric": metric, "cells": records, "note": note})
    if latex:
        print(text, end="")
        print(f"% {note}")
    else:
        print(cells.to_string(), note, out, sep="\n")
