"""A fit printed on the terminal."""

from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from analysis.fit import Fit


def print_fit(
    console: Console, fitted: Fit, body: dict[str, Any], budgets: dict[str, pd.DataFrame]
) -> None:
    """Print parameters with intervals, how the starts ended, and reasons not to trust them.

    Args:
        body: the report of the fit; budgets: the compute-optimal sizes by FLOPs.
    """
    table = Table(box=None, pad_edge=False)
    profiles = {row["parameter"]: row for row in body.get("profiles", [])}
    for column in [*fitted.parameters.columns, *(["profile"] if profiles else [])]:
        table.add_column(column, justify="left" if column == "parameter" else "right")
    for row in fitted.parameters.itertuples(index=False):
        cells = [f"{value:.6g}" for value in row[1:]]
        if profiles:
            allowed = profiles[row[0]]
            ends = f"{allowed['low']:.4g} to {allowed['high']:.4g}"
            cells.append(f"{ends}, flat" if allowed["flat"] else ends)
        table.add_row(row[0], *cells)
    console.print(table)
    basin = fitted.second_basin
    console.print(
        f"objective {fitted.objective:.10g}, reached by {fitted.in_best_basin:.0%} of "
        f"{len(fitted.values)} starts; "
        + (f"next basin {basin:.4g}" if basin is not None else "no other basin")
    )
    if body["at_bound"]:
        console.print(
            f"implausible: {', '.join(body['at_bound'])} ended outside the bounds of "
            f"{fitted.law.name}"
        )
    for doubt in body["doubts"]:
        console.print(doubt)
    console.print(f"{fitted.counts()}; rms residual {body['rms_residual']:.4f}")
    if body["held_out_error"]:
        error = body["held_out_error"]
        console.print(
            f"held out: {error['mean_relative']:+.2%} mean, {error['worst_relative']:.2%} worst"
        )
    for name, key in (
        ("other choices", "sensitivity"),
        ("by variable projection", "variable_projection"),
    ):
        if key in body:
            rows = pd.DataFrame(body[key])
            text = rows.to_string(index=False, float_format=lambda v: f"{v:.5g}")
            console.print(f"\n{name}:\n{text}")
    for budget, best in budgets.items():
        console.print(f"\nbest at {budget} FLOPs:\n{best.to_string(index=False)}")
