"""The verbs of `espalier` that look after what lies on the disk: show, ls, du, gc, pack, unpack."""

from pathlib import Path
from typing import Annotated

import typer

from runner.commands.arguments import DISK, RUNS, Name, Reference, Root, chosen_cells
from runner.machine.errors import ConfigError

app = typer.Typer()


@app.command(rich_help_panel=RUNS)
def show(cell: Reference, root: Root = Path(".")) -> None:
    """Print all that is known of a cell: state, sizes, attempts, latest metrics, config."""
    from runner.records.cells import find_cell, find_folder  # noqa: PLC0415
    from runner.records.config import flatten, freeze  # noqa: PLC0415
    from runner.views.describe import describe  # noqa: PLC0415

    try:
        found = find_cell(root, cell)
    except ConfigError as error:
        folder = find_folder(root, cell)  # it is there, and cannot be read
        for line in describe(folder):
            typer.echo(line)
        raise error from None
    for line in describe(found.folder):
        typer.echo(line)
    for key, value in flatten(freeze(found.config)).items():
        typer.echo(f"  {key}: {value}")


@app.command(name="ls", rich_help_panel=RUNS)
def list_sweeps(root: Root = Path(".")) -> None:
    """List the sweeps with the states of their cells."""
    from runner.views.describe import summary  # noqa: PLC0415
    from runner.views.disk import sweeps  # noqa: PLC0415

    for name in sweeps(root):
        typer.echo(f"{name}: {summary(root, name)}")


@app.command(rich_help_panel=DISK)
def du(root: Root = Path(".")) -> None:
    """Show what the sweeps, caches and snapshots take on the disk."""
    from runner.views.disk import size_bytes, sweeps, usage_bytes  # noqa: PLC0415

    for name in sweeps(root):
        used = usage_bytes(root, name)
        typer.echo(
            f"{name}: {used['checkpoints'] / 1e6:,.1f} MB checkpoints, {used['other'] / 1e6:,.1f} MB other"
        )
    for folder in ("data_cache", "snapshots", "mlflow"):
        typer.echo(f"{folder}/: {size_bytes(root / folder) / 1e6:,.1f} MB")


@app.command(rich_help_panel=DISK)
def gc(
    root: Root = Path("."),
    delete: Annotated[bool, typer.Option(help="Delete it; without, only show.")] = False,
    checkpoints: Annotated[
        bool, typer.Option(help="Also all but the newest checkpoint of ended runs.")
    ] = False,
) -> None:
    """Find what no sweep and no queued job needs; --delete removes it."""
    from runner.views.disk import waste  # noqa: PLC0415

    total = 0
    for found in list(waste(root, checkpoints=checkpoints)):
        total += found.size
        typer.echo(f"{found.path}: {found.size / 1e6:,.1f} MB, {found.reason}")
        if delete:
            found.delete()
    typer.echo(f"{total / 1e6:,.1f} MB {'deleted' if delete else 'could go: --delete'}")


@app.command(rich_help_panel=DISK)
def pack(
    name: Name,
    cells: Annotated[list[str] | None, typer.Argument(help="Fingerprints; default: all.")] = None,
    root: Root = Path("."),
    out: Annotated[Path | None, typer.Option(help="Default: NAME.tar.")] = None,
) -> None:
    """Write cells of a sweep to one file, to be unpacked on another machine."""
    from runner.records.archive import pack as write  # noqa: PLC0415

    file = out or Path(f"{name}.tar")
    typer.echo(f"{file}: {write(chosen_cells(root, name, cells), name, file) / 1e6:,.1f} MB")


@app.command(rich_help_panel=DISK)
def unpack(file: Path, root: Root = Path(".")) -> None:
    """Add the cells of a packed file; runs that have begun here stay as they are."""
    from runner.records.archive import unpack as read  # noqa: PLC0415

    name, added, left = read(file, root)
    typer.echo(f"{name}: {added} cells added, {left} left as they were")
