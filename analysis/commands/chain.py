"""The command that predicts accuracies through losses."""

from pathlib import Path
from typing import Annotated

import typer

from analysis.chain import CHAINS
from analysis.chain import chain as fit_chain
from analysis.commands.options import (
    Bootstrap,
    Cluster,
    D,
    Loss,
    N,
    RunsFile,
    Seed,
    Where,
    claim,
    column_names,
    finish,
    progress_bar,
    read_table,
)
from analysis.commands.prediction import run_points
from analysis.identification import extrapolation


def chain(
    runs: RunsFile,
    accuracy: Annotated[str, typer.Option(help="column of the accuracy, or of the error")],
    at: Annotated[list[str], typer.Option(help="a run to come: n=1e9,d=2e10; again for more")],
    laws: Annotated[str, typer.Option(help=f"one of {', '.join(CHAINS)}")] = "olmo_ladder",
    n: N = "num_parameters",
    d: D = "tokens",
    loss: Loss = "val_loss",
    where: Where = None,
    cluster: Cluster = None,
    bootstrap: Bootstrap = 1000,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="JSON")] = Path("chain.json"),
) -> None:
    """Predict the accuracy of runs to come through their loss, by a law of each."""
    if laws not in CHAINS:
        raise ValueError(f"--laws {laws} is none of {', '.join(CHAINS)}")
    outputs, both = claim("chain", out, [runs]), CHAINS[laws]
    names = column_names(both[0].columns, n, d, "", None)
    points = run_points(at, both[0].columns)
    source = read_table(runs, *names.values(), loss, accuracy, where=where)
    with progress_bar() as progress:
        found = fit_chain(
            source.table,
            both,
            columns=names,
            loss=loss,
            accuracy=accuracy,
            cluster=cluster,
            bootstraps=bootstrap,
            seed=seed,
            progress=progress,
        )
    table, doubts = found.predict(points), extrapolation(found.first, points)
    print(table.to_string(index=False))
    print(*doubts, found.first.counts(), sep="\n")
    body = {"laws": [law.name for law in both], "doubts": doubts} | found.report()
    finish(outputs, source, body | {"points": table.to_dict(orient="records")})
