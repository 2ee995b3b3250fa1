"""The commands that compare runs: differences from a baseline, a table by rows and columns."""

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from analysis import plots
from analysis.commands.options import Metric, RunsFile, Where, claim, finish, read_table, write
from analysis.errors import require
from analysis.paired import paired_difference, unpaired_difference
from analysis.pooling import POOLED
from analysis.tables import cross_table, in_words, same_word
from analysis.tables import latex as as_latex

_PAIR = 2  # runs of a side, of which Welch's interval holds the truth more often than it says


def ablate(
    runs: RunsFile,
    baseline: Annotated[str | None, typer.Option(help="column=value, precision=bf16")] = None,
    pair: Annotated[
        str, typer.Option(help="columns in which two runs agree to be compared")
    ] = "seed",
    metric: Metric = "val_loss",
    where: Where = None,
    out: Annotated[Path, typer.Option(help="JSON; figure and CSV go beside it")] = Path(
        "ablation.json"
    ),
) -> None:
    """Compare each value of a column with a baseline: differences, intervals and tests.

    Paired, and beside it unpaired (Welch), where runs that differ in the columns of --pair are
    pooled.
    """
    if baseline is None:
        columns = _columns(read_table(runs, metric, where=where).table, metric)
        raise ValueError(f"give --baseline COLUMN=VALUE; columns with several values: {columns}")
    key, equals, text = baseline.partition("=")
    if not equals:
        raise ValueError(f"--baseline {baseline} must be column=value")
    if key == metric:
        raise ValueError(f"--baseline {baseline} is of the metric; choose what differs in it")
    outputs = claim("ablate", out, [runs], [""])
    source = read_table(runs, metric, where=where)
    table, agree = source.table, pair.split(",")
    require(table, [key, *agree])
    table[key] = in_words(table[key])
    value = same_word(text, table[key])
    paired = paired_difference(table, key=key, baseline=value, metric=metric, pair=agree)
    unpaired = unpaired_difference(table, key=key, baseline=value, metric=metric)
    print(paired.to_string(index=False))
    print(f"\nunpaired (Welch), all runs of a value, whatever their {', '.join(agree)}:")
    print(unpaired.to_string(index=False))
    shared = f"unpaired intervals are too wide: runs share {', '.join(agree)}; see the paired ones"
    doubts = [shared] if (paired["n"] > 0).any() else []
    few = unpaired.loc[unpaired[["n", "n_baseline"]].min(axis=1) == _PAIR, "value"]
    if len(few):
        doubts.append(f"unpaired intervals of two runs are conservative: {', '.join(few)}")
    print(*doubts, sep="\n", end="\n\n")
    note = f"{len(table)} runs, {int(table[metric].isna().sum())} without {metric}"
    alone = paired.loc[paired["n"] == 0, "value"]
    if len(alone):
        note += f"; no run of {', '.join(alone)} has a partner equal in {', '.join(agree)}"
    single = paired.loc[paired["n"] == 1, "value"]
    if len(single):
        note += f"; {', '.join(single)}: one pair, of which no interval can be told"
    print(note)
    figure, data = plots.forest(paired, baseline=value, metric=metric)
    body = {
        "metric": metric,
        "baseline": baseline,
        "differences": paired.to_dict(orient="records"),
        "unpaired_differences": unpaired.to_dict(orient="records"),
        "doubts": doubts,
        POOLED: paired.attrs.get(POOLED),
    }
    finish(outputs, source, body, [("", figure, data, note)])


def table(
    runs: RunsFile,
    rows: Annotated[str | None, typer.Option(help="column whose values are the rows")] = None,
    cols: Annotated[str | None, typer.Option(help="column whose values are the columns")] = None,
    metric: Metric = "val_loss",
    where: Where = None,
    latex: Annotated[bool, typer.Option(help="print LaTeX (booktabs)")] = False,
    caption: Annotated[str, typer.Option(help="of the LaTeX table")] = "",
    out: Annotated[Path, typer.Option(help="JSON; a .csv and a .tex go beside it")] = Path(
        "table.json"
    ),
) -> None:
    """Tabulate mean +- standard deviation (number of runs); holes of the grid are shown."""
    outputs = claim("table", out, [runs], texts=[".csv", ".tex"])
    source = read_table(runs, metric, where=where)
    scores = source.table
    if rows is None:
        columns = _columns(scores, metric)
        raise ValueError(f"give --rows COLUMN; columns with several values: {columns}")
    cells = cross_table(scores, rows=rows, columns=cols, metric=metric)
    holes, lost = int((cells == "--").sum().sum()), int(scores[metric].isna().sum())
    note = f"{cells.size} cells, {holes} without a run; {len(scores)} runs, {lost} without {metric}"
    note = "; ".join(filter(None, (note, cells.attrs.get(POOLED))))
    caption = caption or f"{metric}: mean +- s.d. (runs)"
    text = as_latex(cells, caption=caption, label=out.stem, note=note)
    records = cells.reset_index().to_dict(orient="records")
    body = {"metric": metric, "cells": records, "note": note}
    paths = write(outputs, source, body, texts={".tex": text, ".csv": cells.to_csv()})
    if latex:
        print(f"{text}% {note}\n% {paths}")
    else:
        print(cells.to_string(), note, paths, sep="\n")


def _columns(table: pd.DataFrame, metric: str) -> str:
    """Return the columns that tell runs apart, and not each from all others; all if none does."""
    counts = table.drop(columns=metric, errors="ignore").astype(str).nunique()
    several = [str(column) for column, count in counts.items() if 1 < count < len(table)]
    return ", ".join(several or map(str, counts.index))
