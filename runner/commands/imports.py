"""`espalier import`: models made elsewhere as cells, runs of other trackers as tables."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runner.commands.arguments import Overrides
from runner.machine.errors import ConfigError
from runner.machine.own_modules import module_command

if TYPE_CHECKING:
    from analysis.runs import Runs

app = typer.Typer(no_args_is_help=True, help="Bring in models and runs made elsewhere.")
runs = typer.Typer(
    no_args_is_help=True, help="Bring in runs of another tracker, as tables that analysis reads."
)
app.add_typer(runs, name="runs")
_MAX_LENGTH = 1024  # tokens of a sequence that an imported model is measured on
_WITH_OVERRIDES = {"ignore_unknown_options": True}

Out = Annotated[Path | None, typer.Option(help="Folder; default: imported/NAME.")]


@app.command(context_settings=_WITH_OVERRIDES)
def hf(
    source: Annotated[str, typer.Argument(help="DIR, or ORG/NAME[@REVISION] on the hub.")],
    overrides: Overrides = None,
) -> None:
    """Make a cell from a Hugging Face model: measure its loss on the data without training it.

    The sequences, here and in `eval`, are as long as its context, at most 1,024 tokens. Of a
    masked-diffusion model the bound is measured (Dream, LLaDA). To train the model further:
    python -m runner init=hf:DIR.
    """
    from runner.data.pretrained import pretrained_folder  # noqa: PLC0415

    _measure(pretrained_folder(f"hf:{source}"), overrides or [])


@app.command(context_settings=_WITH_OVERRIDES)
def gguf(
    source: Annotated[str, typer.Argument(help="FILE, or package:NAME.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder made of it; default: pretrained/NAME.")
    ] = None,
) -> None:
    """Make a Hugging Face folder from a file of llama.cpp, then a cell as `hf` does."""
    from runner.exchange.gguf_model import import_gguf  # noqa: PLC0415

    given = overrides or []
    roots = [a.removeprefix("root=") for a in given if a.startswith("root=")]
    local = import_gguf(source, out, Path(*roots[-1:]) / "pretrained").resolve()
    typer.echo(f"init=hf:{local}")
    _measure(local, given)


def _measure(local: Path, given: list[str]) -> None:
    from models.pretrained import is_shifted, read_config  # noqa: PLC0415
    from runner.data.tokenizer_folder import EXPAND, named_tokens  # noqa: PLC0415

    try:
        cfg: Any = read_config(local)[0]
        length, causal = getattr(cfg, "context_length", _MAX_LENGTH), getattr(cfg, "causal", True)
        shift = not causal and is_shifted(local)
        task = "diffusion_infill" if EXPAND in named_tokens(local) else "diffusion"
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(str(error)) from error
    overrides = [f"init='hf:{local}'", "name=imported", "train.steps=0"]
    overrides.append(f"train.sequence_length={min(length, _MAX_LENGTH)}")
    overrides += [] if causal else [f"task={task}", f"task.shift={str(shift).lower()}"]
    overrides += given
    sys.stdout.flush()
    os.execv(sys.executable, module_command("runner", *overrides))


@runs.command()
def mlflow(
    uri: Annotated[str, typer.Argument(help="sqlite:///FILE, a database, or http(s)://SERVER.")],
    experiment: Annotated[str, typer.Argument(help="The experiment's name.")],
    out: Out = None,
) -> None:
    """Bring in an experiment of MLflow."""
    from analysis.stores import from_mlflow  # noqa: PLC0415

    _write(from_mlflow(uri, experiment), out, experiment)


@runs.command()
def wandb(
    folder: Annotated[Path, typer.Argument(help="The folder wandb/ of local runs.")],
    out: Out = None,
) -> None:
    """Bring in local runs of W&B, offline or synced."""
    from analysis.foreign import from_wandb  # noqa: PLC0415

    _write(from_wandb(folder), out, folder.resolve().name)


@runs.command()
def tensorboard(
    folder: Annotated[Path, typer.Argument(help="The folder that --logdir takes.")],
    out: Out = None,
) -> None:
    """Bring in scalars of TensorBoard's event files."""
    from analysis.foreign import from_tensorboard  # noqa: PLC0415

    _write(from_tensorboard(folder), out, folder.resolve().name)


@runs.command()
def csv(
    file: Annotated[Path, typer.Argument(help="A row for each run, or with --step for each step.")],
    run: Annotated[str | None, typer.Option(help="The column that names the run.")] = None,
    step: Annotated[str | None, typer.Option(help="The column of steps.")] = None,
    out: Out = None,
) -> None:
    """Bring in runs from a CSV file."""
    from analysis.foreign import from_csv  # noqa: PLC0415

    _write(from_csv(file, run, step), out, file.stem)


def _write(found: "Runs", out: Path | None, name: str) -> None:
    from analysis.foreign import write_tables  # noqa: PLC0415

    folder = out or Path("imported") / name
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} exists; choose another --out, or delete it")
    write_tables(found, folder)
    metrics = found.history["key"].nunique()
    typer.echo(f"{folder}: {found.count()}; {metrics} metrics, {len(found.history):,} points")
    typer.echo(f"next: python -m analysis table {folder} --rows COLUMN --cols COLUMN")
