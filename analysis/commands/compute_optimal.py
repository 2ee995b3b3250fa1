"""The commands that find the best size at each compute, by isoFLOP minima or lower envelope."""

import math
from pathlib import Path
from typing import Annotated

import typer

from analysis import law_plots
from analysis.commands.options import (
    Bootstrap,
    Loss,
    N,
    RunsFile,
    Seed,
    Where,
    claim,
    finish,
    positive,
    read_curves,
    read_table,
)
from analysis.envelope import envelope as lower_envelope
from analysis.isoflop import isoflop as isoflop_minima
from analysis.minima import METHODS


def isoflop(
    runs: RunsFile,
    flops: Annotated[str, typer.Option(help="column of the training FLOPs")] = "flops",
    n: N = "num_parameters",
    loss: Loss = "val_loss",
    d: Annotated[str | None, typer.Option(help="column of the tokens; default: flops / 6n")] = None,
    where: Where = None,
    method: Annotated[str, typer.Option(help="parabola or akima")] = "parabola",
    bootstrap: Bootstrap = 1000,
    seed: Seed = 0,
    at: Annotated[
        list[float] | None, typer.Option(help="FLOPs to give the best size at; again for more")
    ] = None,
    out: Annotated[Path, typer.Option(help="JSON; figures and CSVs go beside it")] = Path(
        "isoflop.json"
    ),
) -> None:
    """Find the best size at each budget and how it grows with compute (approach 2)."""
    if method not in METHODS:
        raise ValueError(f"--method {method} is none of {', '.join(METHODS)}")
    outputs = claim("isoflop", out, [runs], ["", "_best"])
    source = read_table(runs, flops, n, loss, *([d] if d else []), where=where)
    minima = isoflop_minima(
        source.table,
        flops=flops,
        n=n,
        loss=loss,
        tokens=d,
        method=method,  # type: ignore[arg-type]
        bootstraps=bootstrap,
        seed=seed,
    )
    print(minima.budgets.to_string(index=False), end="\n\n")
    print(minima.exponents.to_string(index=False))
    later = {f"{budget:g}": minima.at(budget) for budget in at or []}
    for budget, best in later.items():
        print(f"\nbest at {budget} FLOPs:\n{best.to_string(index=False)}")
    if len(minima.outliers):
        print(f"\noutliers:\n{minima.outliers.to_string(index=False)}\n")
    note = minima.counts()
    print(note)
    exponent = minima.exponents.set_index("quantity").loc["n"]["exponent"]
    figure, data = law_plots.isoflop_curves(minima, title=f"Best size grows as C^{exponent:.2f}")
    drawings = [("", figure, data, note)]
    figure, data = law_plots.best_size(minima, title="Compute-optimal size, isoFLOP minima")
    drawings.append(("_best", figure, data, note))
    sizes = {budget: best.to_dict(orient="records") for budget, best in later.items()}
    finish(outputs, source, minima.report() | {"compute_optimal": sizes}, drawings)


def envelope(
    curves: Annotated[
        Path,
        typer.Argument(
            exists=True,
            metavar="CURVES",
            help="CSV or parquet, a row for each logged point, or sweeps/NAME",
        ),
    ],
    run: Annotated[str, typer.Option(help="column that names the run")] = "fingerprint",
    n: N = "num_parameters",
    flops: Annotated[str, typer.Option(help="column of the FLOPs so far")] = "flops",
    loss: Loss = "loss",
    where: Where = None,
    width: Annotated[
        float, typer.Option(help="of the smoothing, in natural log of FLOPs", callback=positive)
    ] = 0.1,
    out: Annotated[Path, typer.Option(help="JSON; figures and CSVs go beside it")] = Path(
        "envelope.json"
    ),
) -> None:
    """Find which size has the smallest loss after each number of FLOPs (approach 1)."""
    outputs = claim("envelope", out, [curves], [""])
    source = read_curves(curves, run=run, n=n, flops=flops, loss=loss, where=where)
    hull = lower_envelope(source.table, run=run, n=n, flops=flops, loss=loss, width=width)
    print(hull.exponents.to_string(index=False))
    note = (
        f"{hull.curves['run'].nunique()} runs; {hull.unused:.0%} of the envelope lies at the "
        "smallest or largest size; "
    ) + (
        f"bias of the exponent ({hull.bias:+.3f}) subtracted"
        if math.isfinite(hull.bias)
        else "no law fits these curves or their runs are too few: bias and interval not known"
    )
    print(note)
    figure, data = law_plots.best_size(hull, title="Compute-optimal size, lower envelope")
    finish(outputs, source, hull.report(), [("", figure, data, note)])
