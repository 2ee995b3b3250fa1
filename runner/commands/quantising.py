"""The verb that stores the weights of trained cells in few bits."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from runner.commands.arguments import MODELS, Root

app = typer.Typer()


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    rich_help_panel=MODELS,
)
def quantise(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            help="A run (folder, fingerprint, MLflow run id), or a sweep: all its cells."
        ),
    ],
    schemes: Annotated[
        str,
        typer.Option(
            help="With commas: int8, int8-dynamic, int4-g32, gptq-int4-g32, awq-..., hqq-..., fp8, "
            "nf4, nvfp4, mxfp4, mxfp8, ... (models/scheme.py has them all)."
        ),
    ] = "int8,int4-g32",
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Run on this machine, this many cells at a time (default: as last launched)."
        ),
    ] = None,
    average: Annotated[bool, typer.Option(help="Take the averaged weights.")] = False,
    plan: Annotated[bool, typer.Option(help="Show the cells and run nothing.")] = False,
    root: Root = Path("."),
) -> None:
    """Store the weights of trained cells in few bits, and measure what that costs.

    Each scheme gives a cell of the sweep NAME-quantised and a row of the table in the end; the cell
    is evaluated, generates, is served and exported as any other. Keys of the work follow by their
    last part: calibration=128; other
    overrides by their full name: eval.tokens=65536.
    """
    from runner.grid.quantised_cells import quantised_cells  # noqa: PLC0415
    from runner.launch.backends import last_backend  # noqa: PLC0415
    from runner.launch.launch import launch  # noqa: PLC0415
    from runner.launch.policy import load_policy  # noqa: PLC0415
    from runner.views.quantised_table import quantised_table  # noqa: PLC0415

    wanted = [one.strip() for one in schemes.split(",") if one.strip()]
    cells, name, skipped = quantised_cells(root, target, wanted, context.args, average=average)
    for line in skipped:
        typer.echo(line, err=True)
    folder = root / "sweeps" / name.removesuffix("-quantised")
    backend = last_backend(folder, jobs)
    if plan:
        from runner.views.plan import show_plan  # noqa: PLC0415

        show_plan(cells, time_limited=backend.record()["launcher"] == "slurm")
        return
    code = launch(cells, backend, load_policy(folder))
    table = quantised_table(cells)
    if table is not None:
        Console().print(table, soft_wrap=True)
    raise typer.Exit(code)
