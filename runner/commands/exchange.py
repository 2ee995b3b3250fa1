"""The verbs of `espalier` that exchange models with others: export, import."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from runner.commands.arguments import MODELS, Reference, Root
from runner.machine.errors import ConfigError
from runner.machine.own_modules import module_command

app = typer.Typer()
_MAX_LENGTH = 1024  # tokens of a sequence that an imported model is measured on


@app.command(rich_help_panel=MODELS)
def export(
    run: Reference,
    folder: Annotated[Path, typer.Argument(help="A new folder; with --to gguf a new file.")],
    to: Annotated[
        str,
        typer.Option(
            help="hf: config.json, safetensors, tokenizer, model card. gguf: a file of llama.cpp. "
            "peft: the adapter alone."
        ),
    ] = "hf",
    layout: Annotated[
        str | None,
        typer.Option(
            help="llama, qwen3, gpt2 or espalier (our own class); default: the first that fits."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: fp32, bf16, fp16; gguf also q8_0.")
    ] = "fp32",
    shard: Annotated[str, typer.Option(help="The largest size of a file.")] = "5GB",
    license_name: Annotated[
        str | None, typer.Option("--license", help="For the model card: mit, apache-2.0, ...")
    ] = None,
    average: Annotated[
        bool, typer.Option(help="Use the averaged weights (train.average).")
    ] = False,
    root: Root = Path("."),
) -> None:
    """Write a trained cell for transformers, for llama.cpp, or its adapter for peft."""
    from runner.exchange.huggingface import export as write  # noqa: PLC0415
    from runner.records.cells import find_cell  # noqa: PLC0415

    if to not in ("hf", "gguf", "peft"):
        raise ConfigError(f"--to {to!r} is not a format; there are: hf, gguf, peft")
    if to != "hf":
        from runner.exchange.gguf_model import export_gguf  # noqa: PLC0415
        from runner.exchange.peft import export_adapter  # noqa: PLC0415

        if layout is not None or license_name is not None:
            raise ConfigError(f"--layout and --license do nothing with --to {to}; leave them out")
        cell = find_cell(root, run)
        if to == "gguf":
            export_gguf(cell, folder, dtype=dtype, average=average)
        else:
            export_adapter(cell, folder, average=average)
        typer.echo(f"{folder}: {to}")
        return
    architecture = write(
        find_cell(root, run),
        folder,
        layout=layout,
        dtype=dtype,
        max_shard_size=shard,
        license_name=license_name,
        average=average,
    )
    typer.echo(f"{folder}: {architecture}")


@app.command(
    name="import",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    rich_help_panel=MODELS,
)
def import_model(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(metavar="hf|gguf", help="What is imported.")],
    source: Annotated[
        str,
        typer.Argument(
            help="hf: DIR, or ORG/NAME[@REVISION] on the hub. gguf: FILE, or package:NAME."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="gguf: the folder made of it (default: pretrained/NAME)."),
    ] = None,
) -> None:
    """Make a cell from a model made elsewhere: measure its loss on the data without training it.

    A GGUF file becomes a Hugging Face folder first. The sequences, here and in `eval`, are as long
    as its context, at most 1,024 tokens. Of a masked-diffusion model the bound is measured (Dream,
    LLaDA). Overrides may follow (data=..., name=...,
    train.sequence_length=...). To train the model further: python -m runner init=hf:DIR.
    """
    from models.pretrained import is_shifted, read_config  # noqa: PLC0415
    from runner.data.pretrained import pretrained_folder  # noqa: PLC0415

    if kind == "gguf":
        from runner.exchange.gguf_model import import_gguf  # noqa: PLC0415

        roots = [a.removeprefix("root=") for a in context.args if a.startswith("root=")]
        local = import_gguf(source, out, Path(*roots[-1:]) / "pretrained").resolve()
        typer.echo(f"init=hf:{local}")
    elif kind != "hf":
        raise ConfigError(f"{kind!r} is not a format; there are: hf, gguf")
    elif out is not None:
        raise ConfigError("--out does nothing with hf; leave it out")
    else:
        local = pretrained_folder(f"hf:{source}")
    try:
        cfg: Any = read_config(local)[0]
        length, causal = getattr(cfg, "context_length", _MAX_LENGTH), getattr(cfg, "causal", True)
        shift = not causal and is_shifted(local)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(str(error)) from error
    overrides = [f"init='hf:{local}'", "name=imported", "train.steps=0"]
    overrides.append(f"train.sequence_length={min(length, _MAX_LENGTH)}")
    overrides += [] if causal else ["task=diffusion", f"task.shift={str(shift).lower()}"]
    overrides += context.args
    sys.stdout.flush()
    os.execv(sys.executable, module_command("runner", *overrides))
