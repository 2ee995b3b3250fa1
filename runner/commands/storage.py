"""The verbs of `espalier` for files: show, ls, du, gc, pack, unpack."""

from pathlib import Path
from typing import Annotated

import typer

from runner.commands.arguments import DISK, RUNS, Name, Reference, Root, chosen_cells

app = typer.Typer()


@app.command(rich_help_panel=RUNS)
def show(
    cell: Reference,
    root: Root = Path("."),
    every: Annotated[
        bool, typer.Option("--all", help="All keys of the config, not only those off their default")
    ] = False,
) -> None:
    """Print a cell's state, sizes, attempts, latest metrics and config."""
    from runner.records.cells import find_cell, find_folder  # noqa: PLC0415
    from runner.records.config import flatten, freeze, set_values  # noqa: PLC0415
    from runner.views.describe import describe  # noqa: PLC0415

    for line in describe(find_folder(root, cell)):
        typer.echo(line)
    config = find_cell(root, cell).config
    typer.echo("config:" if every else "config, where it has not the default of its class (--all):")
    shown = flatten(freeze(config)).items() if every else set_values(config)
    for key, value in shown:
        typer.echo(f"  {key}: {value}")


@app.command(name="ls", rich_help_panel=RUNS)
def list_sweeps(root: Root = Path(".")) -> None:
    """List all sweeps with the states of their cells."""
    from runner.views.describe import summary  # noqa: PLC0415
    from runner.views.disk import sweeps  # noqa: PLC0415

    for name in sweeps(root):
        typer.echo(f"{name}: {summary(root, name)}")


@app.command(rich_help_panel=DISK)
def du(root: Root = Path(".")) -> None:
    """Show the disk usage of sweeps, caches and snapshots."""
    from runner.views.disk import size_bytes, sweeps, usage_bytes  # noqa: PLC0415

    for name in sweeps(root):
        used = {part: f"{count / 1e6:,.1f} MB" for part, count in usage_bytes(root, name).items()}
        typer.echo(f"{name}: {used['checkpoints']} checkpoints, {used['other']} other")
    for folder in ("data_cache", "snapshots", "mlflow"):
        typer.echo(f"{folder}/: {size_bytes(root / folder) / 1e6:,.1f} MB")


@app.command(rich_help_panel=DISK)
def gc(
    root: Root = Path("."),
    delete: Annotated[bool, typer.Option(help="Delete the files; default: list them.")] = False,
    checkpoints: Annotated[
        bool, typer.Option(help="Also all checkpoints of ended runs but the newest.")
    ] = False,
) -> None:
    """List files that no sweep and no queued job needs; --delete deletes them."""
    from runner.views.disk import waste  # noqa: PLC0415

    total = 0
    for item in list(waste(root, checkpoints=checkpoints)):
        total += item.size
        typer.echo(f"{item.path}: {item.size / 1e6:,.1f} MB, {item.reason}")
        if delete:
            item.delete()
    typer.echo(f"{total / 1e6:,.1f} MB {'deleted' if delete else 'could go: --delete'}")


@app.command(rich_help_panel=DISK)
def pack(
    name: Name,
    cells: Annotated[list[str] | None, typer.Argument(help="Fingerprints; default: all.")] = None,
    root: Root = Path("."),
    out: Annotated[Path | None, typer.Option(help="Default: NAME.tar.")] = None,
) -> None:
    """Write cells of a sweep to a tar file that `unpack` reads on another machine."""
    from runner.records.archive import pack as write  # noqa: PLC0415

    file = out or Path(f"{name}.tar")
    typer.echo(f"{file}: {write(chosen_cells(root, name, cells), name, file) / 1e6:,.1f} MB")


@app.command(rich_help_panel=DISK)
def unpack(file: Path, root: Root = Path(".")) -> None:
    """Add the cells of a packed file; leave runs that have begun here as they are."""
    from runner.records.archive import unpack as read  # noqa: PLC0415

    name, added, left = read(file, root)
    typer.echo(f"{name}: {added} cells added, {left} left as they were")
