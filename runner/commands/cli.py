"""`espalier`: train, watch, evaluate and compare runs."""

import os
import subprocess
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from runner.commands import (
    answers,
    exchange,
    figures,
    imports,
    infill,
    init,
    keys,
    models,
    precision,
    quantising,
    serving,
    storage,
)
from runner.commands.arguments import (
    MLFLOW,
    MODELS,
    RUN,
    RUNS,
    Experiment,
    Grid,
    Name,
    Overrides,
    Reference,
    Root,
    chosen_cells,
)
from runner.commands.completion import SCRIPTS, Shell
from runner.commands.experiments import sweep_command
from runner.commands.refusals import refusals
from runner.machine.errors import ConfigError
from runner.machine.own_modules import module_command

_MOST_PAGES = 8  # of sweeps, whose addresses `ui` prints
FurtherView = StrEnum("FurtherView", ["tensorboard", "wandb"])

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,  # `completion` prints its script, and that of `python -m runner` too
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version  # noqa: PLC0415

        typer.echo(f"espalier {version('espalier')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, watch, evaluate and compare runs."""


@app.command(rich_help_panel=RUN)
def completion(
    shell: Annotated[Shell, typer.Argument(help="The shell whose script is printed.")],
) -> None:
    """Print a shell's script that completes `espalier` and `python -m runner` by Tab.

    bash, zsh: eval "$(espalier completion bash)"; fish: espalier completion fish | source
    """
    from typer.completion import get_completion_script  # type: ignore[attr-defined]  # noqa: PLC0415

    ours = get_completion_script(
        prog_name="espalier", complete_var="_ESPALIER_COMPLETE", shell=shell.value
    )
    typer.echo(f"{SCRIPTS[shell.value]}{ours}")


@app.command(
    context_settings={
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
    rich_help_panel=RUN,
)
def run(arguments: Overrides = None) -> None:
    """Train a cell or, with -m, a grid: the arguments of `python -m runner`."""
    os.execv(sys.executable, module_command("runner", *(arguments or ())))


@app.command(context_settings={"ignore_unknown_options": True}, rich_help_panel=RUN)
def plan(
    experiment: Experiment,
    overrides: Overrides = None,
    grid: Grid = None,
) -> None:
    """Show the size, FLOPs and time of an experiment's cells, run nothing; overrides may follow."""
    _compose(experiment, grid, "hydra.sweeper.dry_run=true", *(overrides or ()))


@app.command(context_settings={"ignore_unknown_options": True}, rich_help_panel=RUN)
def adopt(
    run: Reference,
    experiment: Experiment,
    reason: Annotated[str, typer.Option(help="What was renamed; recorded with the run.")],
    overrides: Overrides = None,
    grid: Grid = None,
) -> None:
    """Bind a run to the new cell of an experiment that is most like it; overrides may follow."""
    quoted = {"run": run, "reason": reason.replace("\\", "\\\\").replace("'", "\\'")}
    binding = ",".join(f"{key}:'{value}'" for key, value in quoted.items())
    _compose(experiment, grid, f"hydra.sweeper.adopt={{{binding}}}", *(overrides or ()))


def _compose(experiment: str, grid: str | None, *overrides: str) -> None:
    os.execv(sys.executable, sweep_command(experiment, grid, *overrides))


@app.command(rich_help_panel=RUNS)
def status(
    name: Name,
    root: Root = Path("."),
    watch: Annotated[bool, typer.Option(help="Update the table until no cell runs.")] = False,
) -> None:
    """Show the cells of a sweep: state, step, loss."""
    from rich.live import Live  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    from runner.records.cells import Cell  # noqa: PLC0415
    from runner.records.drift import drifted  # noqa: PLC0415
    from runner.records.slurm_queue import queued  # noqa: PLC0415
    from runner.records.sweep_cells import sweep_rows  # noqa: PLC0415
    from runner.views.table import LiveTable  # noqa: PLC0415

    cells = sweep_rows(root, name)
    table = LiveTable(cells)
    table.queued = lambda: queued(root, name)
    if not watch:
        lines = drifted([cell for cell in cells if isinstance(cell, Cell)])
        Console().print(table.render(), *map(Text, lines), sep="\n", soft_wrap=True)
        return
    with Live(table.render(), console=Console(), refresh_per_second=2) as live:
        while any(cell.state == "running" for cell in cells) or table.queue():
            time.sleep(2.0)
            live.update(table.render())


@app.command(rich_help_panel=RUNS)
def logs(
    cells: Annotated[
        list[str], typer.Argument(metavar="[NAME] CELL", help="The cell, after its sweep or alone.")
    ],
    root: Root = Path("."),
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print new output while the cell runs.")
    ] = False,
) -> None:
    """Print the stdout and stderr of a cell's attempts, and of a job that ended before its own."""
    from runner.records.cells import find_cell, members  # noqa: PLC0415
    from runner.records.journal import attempts, lease  # noqa: PLC0415
    from runner.records.slurm_queue import log_without_worker  # noqa: PLC0415

    cell = find_cell(root, cells[-1])
    if len(cells) > 1:
        fingerprints = {row["fingerprint"] for row in members(root, cells[0])}
        if cell.fingerprint not in fingerprints:
            raise ConfigError(f"{cell.fingerprint} is no cell of {cells[0]}")
    file, leg = cell.folder / "log.txt", log_without_worker(cell)
    if leg is None and not (file.exists() and (follow or file.stat().st_size)):
        tries = attempts(cell.folder)
        at = f"; it ran in the terminal of {lease(tries[-1])['host']}" if tries else ""
        why = "it printed nothing" if file.exists() else f"no launcher has started this cell{at}"
        raise ConfigError(
            f"{file} is {'empty' if file.exists() else 'not there'}: {why} ({cell.state}); "
            f"`espalier show {cell.fingerprint[:8]}` lists its events"
        )
    if leg is not None:
        for part in (file, leg) if file.exists() else (leg,):
            typer.echo(part.read_text(encoding="utf-8", errors="replace"), nl=False)
        return
    with open(file, encoding="utf-8", errors="replace") as stream:
        typer.echo(stream.read(), nl=False)
        while follow and cell.state == "running":
            time.sleep(0.5)
            typer.echo(stream.read(), nl=False)


@app.command(rich_help_panel=RUNS)
def why(cell: Reference, root: Root = Path(".")) -> None:
    """Show the keys in which a cell differs from the most similar finished one."""
    from runner.records.cells import find_cell  # noqa: PLC0415
    from runner.records.difference import nearest_finished  # noqa: PLC0415

    this = find_cell(root, cell)
    nearest = nearest_finished(this)
    typer.echo(f"{this.fingerprint} is {this.state}")
    if nearest is None:
        typer.echo("no other cell here is finished")
        return
    folder, keys = nearest
    typer.echo(f"nearest finished cell: {folder.name}")
    for key, (ours, theirs) in keys.items():
        typer.echo(f"  {key}: {ours} here, {theirs} there")


@app.command(rich_help_panel=RUNS)
def diff(a: Reference, b: Reference, root: Root = Path(".")) -> None:
    """Show the keys in which two cells differ, execution keys included."""
    from runner.records.cells import find_cell  # noqa: PLC0415
    from runner.records.config import flatten, freeze  # noqa: PLC0415
    from runner.records.difference import difference  # noqa: PLC0415

    one, two = (flatten(freeze(find_cell(root, cell).config)) for cell in (a, b))
    for key, (left, right) in difference(one, two).items():
        typer.echo(f"{key}: {left} | {right}")


@app.command(rich_help_panel=RUNS)
def failures(name: Name, root: Root = Path(".")) -> None:
    """Group the failed cells of a sweep by cause, with the keys that they share."""
    from runner.records.failures import clusters  # noqa: PLC0415
    from runner.records.slurm_queue import queued  # noqa: PLC0415
    from runner.records.sweep_cells import sweep_cells  # noqa: PLC0415

    cells = sweep_cells(root, name)
    try:
        queue = queued(root, name)
    except OSError:  # not where SLURM answers: what the journals and logs tell is shown
        queue = {}
    failed = clusters(cells, queue)
    if not failed:
        typer.echo(f"no cell of {len(cells)} failed")
    for cluster in failed:
        typer.echo(cluster.describe(len(cells)))
        typer.echo("  " + " ".join(cell.fingerprint[:6] for cell in cluster.cells))


@app.command(context_settings={"ignore_unknown_options": True}, rich_help_panel=RUN)
def retry(
    name: Name,
    overrides: Overrides = None,
    cause: Annotated[
        str | None,
        typer.Option(
            "--class",
            help="Only failures of this cause (see `failures`); oom means GPU or host memory.",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Run on this machine, this many cells at a time (default: as last launched)."
        ),
    ] = None,
    root: Root = Path("."),
) -> None:
    """Run the failed cells of a sweep again, by the launcher used last.

    Overrides of execution keys may follow: resources.mem_gb=64 train.micro_batch=4.
    """
    from runner.launch.backends import last_backend  # noqa: PLC0415
    from runner.launch.launch import launch  # noqa: PLC0415
    from runner.launch.policy import load_policy  # noqa: PLC0415
    from runner.records.cells import with_execution  # noqa: PLC0415
    from runner.records.config import parse_overrides  # noqa: PLC0415
    from runner.records.failures import (  # noqa: PLC0415
        CLASSES,
        MEMORY,
        cause_of,
        clusters,
        last_failure,
    )
    from runner.records.names import sweep_folder  # noqa: PLC0415
    from runner.records.sweep_cells import sweep_cells  # noqa: PLC0415

    wanted = {"oom": MEMORY}.get(cause or "", (cause,))
    if cause is not None and not set(wanted) <= set(CLASSES):
        raise ConfigError(f"--class {cause!r} is none of: oom, {', '.join(CLASSES)}")
    changes = parse_overrides(overrides or [])
    failed = [cell for cell in sweep_cells(root, name) if cell.state == "failed"]
    chosen = [cell for cell in failed if cause is None or cause_of(last_failure(cell)) in wanted]
    if not chosen:
        typer.echo(f"nothing to retry: {len(failed)} cells of {name} failed, none of this class")
        return
    for cluster in clusters(chosen):
        typer.echo(f"again: {cluster.describe(len(failed))}")
    folder, cells = sweep_folder(root, name), [with_execution(cell, changes) for cell in chosen]
    raise typer.Exit(
        launch(cells, last_backend(folder, jobs), load_policy(folder), again=("failed",))
    )


@app.command(rich_help_panel=RUN)
def cancel(
    name: Name,
    cells: Annotated[list[str] | None, typer.Argument(help="Fingerprints; default: all.")] = None,
    root: Root = Path("."),
) -> None:
    """Save and stop running cells, keep others from starting; launching again resumes them."""
    from runner.launch.cancel import cancel as cancel_cells  # noqa: PLC0415
    from runner.records.slurm_queue import queued  # noqa: PLC0415

    for line in cancel_cells(chosen_cells(root, name, cells), queued(root, name)):
        typer.echo(line)


@app.command(rich_help_panel=MLFLOW)
def sync(
    names: Annotated[list[str], typer.Argument(help="Sweeps.")],
    root: Root = Path("."),
    uri: Annotated[
        str | None, typer.Option(help="MLflow tracking URI; default: where each was tracked.")
    ] = None,
    rebuild: Annotated[
        bool, typer.Option(help="Write them again from the start; an embedded store: all it has.")
    ] = False,
    also: Annotated[
        list[FurtherView] | None,
        typer.Option(help="A further view to fill, beside those of track.also."),
    ] = None,
) -> None:
    """Upload to MLflow, and to the views of track.also, the points that they do not have yet."""
    from runner.records.cells import members  # noqa: PLC0415

    for name in names:
        members(root, name)  # before the store is opened, which takes seconds
    from runner.views.mlflow import sync as upload  # noqa: PLC0415
    from runner.views.mlflow_cursors import recorded_views  # noqa: PLC0415
    from runner.views.upload import feed_views  # noqa: PLC0415

    typer.echo(f"{upload(root, names, uri, rebuild=rebuild)} points delivered")
    for name in names:
        views = [*recorded_views(root, name), *(also or [])]
        if views:
            sent = feed_views(root, name, list(dict.fromkeys(views)))
            typer.echo(f"{name}: {sent} points delivered to {', '.join(views)}")


@app.command(rich_help_panel=MLFLOW)
def ui(root: Root = Path("."), port: int = 5000, host: str = "127.0.0.1") -> None:
    """Serve the MLflow UI on the embedded store."""
    from runner.views.mlflow import refresh_pages  # noqa: PLC0415
    from runner.views.mlflow_cursors import embedded_uri  # noqa: PLC0415
    from runner.views.mlflow_page import addresses  # noqa: PLC0415

    refresh_pages(root)
    server, store = f"http://{host}:{port}", embedded_uri(root)
    pages = addresses(root, server, store)[:_MOST_PAGES]
    typer.echo("\n".join([f"{server}  (Ctrl-C ends it)", *pages]))
    off = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    raise typer.Exit(subprocess.call(command, env=os.environ | off))


for verbs in (init, keys, storage, figures, models, answers, infill, exchange, quantising, serving):
    app.add_typer(verbs.app)
app.add_typer(imports.app, name="import", rich_help_panel=MODELS)
app.add_typer(precision.app, name="precision", rich_help_panel=MODELS)


def main() -> None:
    """Run the console script; a user's error exits with its message, without a traceback."""
    if "_ESPALIER_COMPLETE" in os.environ:
        from typer.completion import get_completion_inspect_parameters  # noqa: PLC0415

        get_completion_inspect_parameters()  # makes known the shells that the scripts name
    with refusals(KeyError):  # of analysis: a column that runs lack
        app(prog_name="espalier")


if __name__ == "__main__":
    main()
