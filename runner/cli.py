"""`espalier`: the verbs around a run. Each imports what it needs when it is called."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from runner.errors import ConfigError, EspalierError

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
Root = Annotated[Path, typer.Option(help="Folder that holds runs/, sweeps/ and mlflow/.")]
Name = Annotated[str, typer.Argument(help="Sweep: its `name`.")]


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def run(context: typer.Context) -> None:
    """Train a cell or, with -m, a grid: the arguments of `python -m runner`."""
    os.execv(sys.executable, [sys.executable, "-m", "runner", *context.args])


@app.command()
def status(name: Name, root: Root = Path(".")) -> None:
    """Show the cells of a sweep: state, step, loss."""
    from runner.sweep.cells import load_cell, members  # noqa: PLC0415
    from runner.sweep.live import LiveTable  # noqa: PLC0415

    cells = []
    for row in members(root, name):
        cell = load_cell(root.resolve() / "runs" / row["fingerprint"])
        cells.append(replace(cell, label=row["label"]))
    Console().print(LiveTable(cells).render())


@app.command()
def plots(
    name: Name,
    root: Root = Path("."),
    out: Annotated[
        Path | None, typer.Option(help="Where to; default: the experiment's folder or plots/NAME.")
    ] = None,
) -> None:
    """Draw the figures of a sweep: its experiment's figures.py if there is one, else the defaults."""
    from analysis.runs import from_folders  # noqa: PLC0415

    runs = from_folders(root, name)
    script = Path(__file__).parent.parent / "experiments" / name / "figures.py"
    if script.exists():
        typer.echo(f"figures of {script}")
        spec = importlib.util.spec_from_file_location("figures", script)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        made = module.main(runs, out) if out else module.main(runs)
    else:
        from analysis.defaults import default_figures  # noqa: PLC0415

        typer.echo(f"{script} does not exist: default figures")
        made = default_figures(runs, out or root / "plots" / name)
    for path in made:
        typer.echo(path)


@app.command()
def sync(
    names: Annotated[list[str], typer.Argument(help="Sweeps.")],
    root: Root = Path("."),
    uri: Annotated[
        str | None, typer.Option(help="MLflow tracking URI; default: the embedded store.")
    ] = None,
    rebuild: Annotated[
        bool, typer.Option(help="Make the embedded store anew from these sweeps.")
    ] = False,
) -> None:
    """Deliver to MLflow what it does not have yet."""
    from runner.tracking import sync as deliver  # noqa: PLC0415

    typer.echo(f"{deliver(root, names, uri, rebuild=rebuild)} points delivered")


@app.command()
def ui(root: Root = Path("."), port: int = 5000, host: str = "127.0.0.1") -> None:
    """Serve the MLflow UI on the embedded store."""
    from runner.tracking import embedded_uri  # noqa: PLC0415

    typer.echo(f"http://{host}:{port}  (Ctrl-C ends it)")
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", embedded_uri(root)]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    raise typer.Exit(subprocess.call(command, env=environment))


@app.command()
def generate(
    run: Annotated[str, typer.Argument(help="Run folder or fingerprint.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "\n",
    tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest.")] = None,
    average: Annotated[
        bool, typer.Option(help="Use the averaged weights (train.average).")
    ] = False,
    seed: int = 0,
    root: Root = Path("."),
) -> None:
    """Continue a prompt with a trained cell."""
    folder = Path(run) if (Path(run) / "cell.json").exists() else root / "runs" / run
    if not (folder / "cell.json").exists():
        raise ConfigError(f"{run} is neither a run folder nor a fingerprint under {root / 'runs'}")
    from runner.serve.load import continue_text  # noqa: PLC0415

    typer.echo(
        continue_text(
            folder,
            prompt,
            tokens=tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            average=average,
        )
    )


def main() -> None:
    """Entry of the console script: a user's mistake ends in its message."""
    try:
        app()
    except (EspalierError, FileNotFoundError, KeyError) as error:
        sys.exit(f"error: {error.args[0] if isinstance(error, KeyError) else error}")


if __name__ == "__main__":
    main()
