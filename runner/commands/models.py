"""The verbs of `espalier` for trained cells: generate, eval, ngram."""

import json
import sys
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from runner.commands.arguments import MODELS, DraftWord, KvCache, Reference, Root, draft_folder
from runner.machine.errors import ConfigError
from runner.machine.text_files import as_text

app = typer.Typer()
_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "slide",
    "seed",
    "draft",
)


@app.command(rich_help_panel=MODELS)
def generate(
    context: typer.Context,
    run: Reference,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; may be repeated.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(exists=True, help='JSON lines, {"prompt": ...} each; prints JSON lines too.'),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="The most tokens to add (default: 200; of a canvas half the context)."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Sample from the K most likely tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Nucleus sampling: the smallest set of tokens whose probability is at least P."
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Drop tokens less than P times as likely as the most likely one."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: tokens of the text so far become less likely.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Masked diffusion: forward passes (default: one for each token)."),
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(
            help="Masked diffusion: what is revealed first: origin, maskgit_plus, topk_margin, "
            "entropy (default), low_confidence or random."
        ),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(help="Masked diffusion: fill in so many tokens at a time, left to right."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Masked diffusion: reveal all tokens at least so confident."),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Masked diffusion: within a block compute anew all but the prefix (prefix), or "
            "the block alone (dual): approximate, faster."
        ),
    ] = None,
    remask: Annotated[
        float | None,
        typer.Option(help="Masked diffusion: the most probability of masking a token again."),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Masked diffusion: classifier-free guidance by the prompt."),
    ] = None,
    end_penalty: Annotated[
        float | None,
        typer.Option(help="Masked diffusion: against early ends, falling to 0 at the last step."),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this string; may be repeated.")
    ] = None,
    n: Annotated[
        int,
        typer.Option(
            help="Continuations of each prompt: samples 0, 1, ... of SEED, or the N best beams."
        ),
    ] = 1,
    beams: Annotated[
        int, typer.Option(help="Above 1: beam search with this many beams instead of sampling.")
    ] = 1,
    logprobs: Annotated[
        bool, typer.Option(help="Print JSON lines with the log-probability of each token.")
    ] = False,
    stream: Annotated[
        bool, typer.Option(help="Print text as it is generated (one prompt, one sample).")
    ] = False,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive",
            "-i",
            help="Continue each line of input; the default at a terminal without --prompt.",
        ),
    ] = False,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Prompts are what a user says: by the chat template or the marks of roles.",
        ),
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="With --chat: the message that comes first.")
    ] = None,
    tools: Annotated[
        str | None,
        typer.Option(
            help="What the model may call: calculator, database (with --chat), or a class of your "
            "own, package.module.Class; several with commas."
        ),
    ] = None,
    slide: Annotated[
        bool,
        typer.Option(help="Truncate a too long prompt to its last tokens instead of refusing it."),
    ] = False,
    average: Annotated[
        bool, typer.Option(help="Use the averaged weights (train.average).")
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the weights: fp32, bf16 (about twice as fast on a CPU with bf16 units), fp16."
        ),
    ] = "fp32",
    precision: Annotated[
        str,
        typer.Option(
            help="weights: compute in --dtype; training: under the precision recipe of the run, "
            "and say which. Scales of whole tensors then span the rows of a batch."
        ),
    ] = "weights",
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Decode by a compiled step, which takes a minute to compile: for long runs.",
        ),
    ] = False,
    kv_cache: KvCache = None,
    draft: DraftWord = None,
    seed: int = 0,
    root: Root = Path("."),
) -> None:
    """Continue prompts by a trained cell."""
    from runner.commands.generation_cli import (  # noqa: PLC0415
        PromptCompleter,
        as_json,
        passes_in_words,
        read_prompts,
    )
    from runner.records.cells import find_cell  # noqa: PLC0415

    _refuse_unused(context, beams=beams > 1, file=file is not None, chat=chat)
    interactive = interactive or (not (prompt or file or stream or logprobs) and sys.stdin.isatty())
    several = file is not None or n > 1 or beams > 1 or len(prompt or []) > 1 or logprobs
    if (stream or interactive) and several:
        raise ConfigError(
            "--stream and --interactive take one prompt and one sample; leave out --file, --n, "
            "--beams and --logprobs, or --stream and --interactive"
        )
    if file is not None:
        prompts = read_prompts(file)
    else:
        prompts = [as_text(text, "--prompt") for text in prompt or ["\n"]]
    completer = PromptCompleter(
        find_cell(root, run).folder,
        average=average,
        dtype=dtype,
        precision=precision,
        compiled=compiled,
        kv_cache=kv_cache,
        draft=draft_folder(root, draft),
        n=n,
        beams=beams,
        chat=chat,
        system=system,
        tools=tools,
        slide=slide,
        max_new_tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        steps=steps,
        algorithm=algorithm,
        block=block,
        threshold=threshold,
        cache=cache,
        remask=remask,
        guidance=guidance,
        end_penalty=end_penalty,
        stop=tuple(stop or ()),
        seed=seed,
    )
    if precision == "training":
        typer.echo(f"computed as in training: {completer.generator.computes}", err=True)
    write = partial(typer.echo, nl=False)
    passes = written = 0
    if interactive:
        typer.echo("type a line to have it continued; Ctrl-D ends", err=True)
        if isinstance(sys.stdin, TextIOWrapper):  # a byte that is no UTF-8 costs its line only
            sys.stdin.reconfigure(errors="surrogateescape")
        completer.complete_lines(sys.stdin, write)
    elif stream:
        streamed = completer.stream(prompts[0], write)
        passes, written = streamed.num_passes, len(streamed.ids)
        typer.echo()
    else:
        json_lines = file is not None or logprobs
        for text, completion in completer.complete(prompts):
            passes, written = passes + completion.num_passes, written + len(completion.ids)
            line = as_json(text, completion, logprobs=logprobs)
            typer.echo(line if json_lines else completer.shown(text) + completer.text(completion))
    if passes:
        typer.echo(passes_in_words(passes, written), err=True)


def _refuse_unused(context: typer.Context, *, beams: bool, file: bool, chat: bool) -> None:
    """Raise ConfigError for options of `generate` that another one makes do nothing."""
    if context.params["system"] is not None and not chat:
        raise ConfigError("--system does nothing without --chat; add --chat")
    unused = {"--beams": _SAMPLING if beams else (), "--file": ("prompt",) if file else ()}
    for option, names in unused.items():
        sources = {name: str(context.get_parameter_source(name)) for name in names}
        given = [name for name, source in sources.items() if source.endswith("COMMANDLINE")]
        if given:
            listed = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ConfigError(f"{listed} does nothing with {option}; leave one out")


@app.command(
    name="eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    rich_help_panel=MODELS,
)
def evaluate(
    context: typer.Context,
    target: Annotated[
        str,
        typer.Argument(
            help="A run (folder, fingerprint, MLflow run id), or a sweep: all its cells."
        ),
    ],
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Run on this machine, this many cells at a time (default: as last launched)."
        ),
    ] = None,
    average: Annotated[bool, typer.Option(help="Evaluate the averaged weights.")] = False,
    plan: Annotated[bool, typer.Option(help="Show the cells and run nothing.")] = False,
    root: Root = Path("."),
) -> None:
    """Run evaluations of trained cells, each a cell of the sweep NAME-eval.

    Keys of eval.harness follow by their last part: tasks=[lambada,arc_easy] data=DIR limit=500
    follow=true; other overrides by their full name: resources.gpus=1. What eval.also of a run names
    is measured too, without tasks that alone.
    """
    from runner.grid.evaluation_cells import evaluation_cells  # noqa: PLC0415
    from runner.launch.backends import last_backend  # noqa: PLC0415
    from runner.launch.launch import launch  # noqa: PLC0415
    from runner.launch.policy import load_policy  # noqa: PLC0415
    from runner.views.mlflow import sync  # noqa: PLC0415

    cells, source, skipped = evaluation_cells(root, target, context.args, average=average)
    for line in skipped:
        typer.echo(line, err=True)
    folder = root / "sweeps" / source
    backend = last_backend(folder, jobs)
    if plan:
        from runner.views.plan import show_plan  # noqa: PLC0415

        show_plan(cells, time_limited=backend.record()["launcher"] == "slurm")
        return
    code = launch(cells, backend, load_policy(folder))
    if cells[0].config.track.uri != "off":
        sync(root, [source])  # the runs evaluated have new scores
    raise typer.Exit(code)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    rich_help_panel=MODELS,
)
def ngram(
    context: typer.Context,
    run: Reference,
    order: Annotated[int, typer.Option(help="Tokens of an n-gram.")] = 4,
    out: Annotated[
        Path | None, typer.Option(help="Also write it here, as JSON: a new file.")
    ] = None,
    root: Root = Path("."),
) -> None:
    """Fit an n-gram model to a run's training text and evaluate it as the run was: a baseline.

    Benchmarks follow as for `eval`: tasks=[lambada,blimp] data=DIR.
    """
    from runner.evaluate.ngram_baseline import ngram_baseline  # noqa: PLC0415
    from runner.grid.evaluation_cells import harness_config  # noqa: PLC0415
    from runner.records.cells import find_cell  # noqa: PLC0415

    if out is not None and out.exists():
        raise ConfigError(f"{out} exists; choose another --out")
    results = ngram_baseline(find_cell(root, run), order, harness_config(context.args))
    for name in ("val_loss", "val_bits_per_byte"):
        typer.echo(f"{name}: {results[name]:.4f}")
    for row in results.get("scores", []):
        error = "" if row["stderr"] is None else f", standard error {row['stderr']:.4f}"
        typer.echo(f"{row['name']}: {row['value']:.4f} ({row['n']} questions{error})")
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n")
