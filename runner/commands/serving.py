"""The verb that serves a trained cell to clients of OpenAI's interface."""

from pathlib import Path
from typing import Annotated

import typer

from runner.commands.arguments import MODELS, DraftWord, KvCache, Reference, Root, draft_folder
from runner.machine.errors import ConfigError

app = typer.Typer()


@app.command(rich_help_panel=MODELS)
def serve(
    run: Reference,
    host: Annotated[
        str, typer.Option(help="Where to listen; any but this machine's own needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free; it is printed.")] = 8000,
    rows: Annotated[int, typer.Option(help="The most texts that are generated at a time.")] = 8,
    chunk: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a prompt that are read between two steps of the others "
            "(default: measured, as many as make a step twice as long)."
        ),
    ] = None,
    max_waiting: Annotated[
        int | None,
        typer.Option(help="Texts that wait; then clients are sent away (default: 4 x rows)."),
    ] = None,
    prefix_cache_mb: Annotated[
        int, typer.Option(help="Memory for what was read of earlier prompts; 0: none.")
    ] = 256,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="The sha256 of a key on each line; or the keys in ESPALIER_API_KEYS, with commas.",
        ),
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Of each key.")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Of each key: of prompts, and the most that is generated.")
    ] = None,
    request_timeout_s: Annotated[
        float, typer.Option(help="A request that takes longer is cancelled.")
    ] = 600.0,
    drain_s: Annotated[
        float, typer.Option(help="After SIGTERM what runs has so many seconds to end.")
    ] = 30.0,
    slow_reader_s: Annotated[
        float, typer.Option(help="A stream that nobody reads for longer is cancelled.")
    ] = 30.0,
    log_prompts: Annotated[bool, typer.Option(help="Write prompts and texts to the log.")] = False,
    invariant: Annotated[
        bool,
        typer.Option(help="Compute in one shape: no bit of an answer depends on the others."),
    ] = False,
    average: Annotated[
        bool, typer.Option(help="Use the averaged weights (train.average).")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of the weights: fp32, bf16, fp16.")] = "fp32",
    precision: Annotated[
        str, typer.Option(help="weights, or training: under the run's recipe; see `generate`.")
    ] = "weights",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Decode by a compiled step: a minute to start.")
    ] = False,
    kv_cache: KvCache = None,
    draft: DraftWord = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="A run whose adapter clients choose as the model NAME, on this one as its base: "
            "NAME=RUN, or RUN by its own name; may be given several times."
        ),
    ] = None,
    root: Root = Path("."),
) -> None:
    """Serve a trained cell to clients of OpenAI's interface, and a page to chat on."""
    from runner.records.cells import find_cell  # noqa: PLC0415

    try:
        from runner.serve.server import Options  # noqa: PLC0415
        from runner.serve.server import serve as serve_run  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serve needs the package {error.name}, which is not installed: "
            "pip install 'espalier[serve]'"
        ) from None
    options = Options(
        host=host,
        port=port,
        rows=rows,
        chunk=chunk,
        max_waiting=max_waiting,
        invariant=invariant,
        prefix_cache_mb=prefix_cache_mb,
        key_file=api_key_file,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        request_timeout_s=request_timeout_s,
        drain_s=drain_s,
        slow_reader_s=slow_reader_s,
        log_prompts=log_prompts,
    )
    serve_run(
        find_cell(root, run).folder,
        options,
        average=average,
        dtype=dtype,
        precision=precision,
        compiled=compiled,
        kv_cache=kv_cache,
        draft=draft_folder(root, draft),
        adapters=_adapter_folders(root, adapter or []),
    )


def _adapter_folders(root: Path, given: list[str]) -> dict[str, Path]:
    """Return the folders of runs by the names of their adapters.

    Raises:
        ConfigError: two have one name; see also `find_cell`.
    """
    from runner.records.cells import find_cell  # noqa: PLC0415

    folders: dict[str, Path] = {}
    for one in given:
        name, equals, run = one.partition("=")
        cell = find_cell(root, run if equals else one)
        name = name if equals else cell.config.name
        if name in folders:
            raise ConfigError(
                f"--adapter {one}: {name!r} is the name of an earlier one; give another: NAME=RUN"
            )
        folders[name] = cell.folder
    return folders
