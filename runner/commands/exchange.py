"""The verb of `espalier` that gives models to others: export."""

from pathlib import Path
from typing import Annotated

import typer

from runner.commands.arguments import MODELS, Reference, Root
from runner.machine.errors import ConfigError

app = typer.Typer()
_FORMATS = ("hf", "gguf", "peft", "compressed-tensors")


@app.command(rich_help_panel=MODELS)
def export(
    run: Reference,
    folder: Annotated[Path, typer.Argument(help="A new folder; with --to gguf a new file.")],
    to: Annotated[
        str,
        typer.Option(
            help="hf: config.json, safetensors, tokenizer, model card. gguf: a file of llama.cpp. "
            "peft: the adapter alone. compressed-tensors: as hf, a quantised run in its few bits."
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

    if to not in _FORMATS:
        raise ConfigError(f"--to {to!r} is not a format; there are: {', '.join(_FORMATS)}")
    if to in ("gguf", "peft"):
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
        compressed=to == "compressed-tensors",
    )
    typer.echo(f"{folder}: {architecture}")
