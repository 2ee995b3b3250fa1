"""`espalier init`: a folder for a new experiment, whose sweep runs as it stands."""

import json
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from runner.commands.arguments import RUN
from runner.machine.errors import ConfigError

app = typer.Typer()
_SWEEP = """\
# yaml-language-server: $$schema=sweep.schema.json
# @package _global_
# QUESTION: what is to be known?
# Expected: what, and from where.
# Time: `espalier plan $folder`.   Run: python -m runner -m -cd $folder -cn sweep
defaults:
  - /config
  - _self_

name: $name
train: {sequence_length: 128, batch_size: 16, steps: 100}
eval: {every: 50, tokens: 16384}

hydra:
  mode: MULTIRUN
  # searchpath: [pkg://mylab.conf]   # groups of a package of your own: examples/own_lab
  sweeper:
    params:
      model: gpt_pico,gpt_nano
      optim.lr: 1e-3,3e-3
      seed: 1,2
"""
_FIGURES = '''\
"""Loss against size by learning rate, and a table of the ends."""

from pathlib import Path

from analysis import plots
from analysis.paired import over_seeds
from analysis.runs import Runs


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write the figure to `folder` and results.csv beside it; return the figure."""
    figure, data = plots.against_size(runs, by="optim.lr")
    ends = over_seeds(runs.finished, ["model", "optim.lr"], "val_loss")
    ends.to_csv(folder.parent / "results.csv", index=False)
    return [plots.save(folder, "loss_by_size", figure, data, runs.count())]
'''
_README = """\
# $name

**Question.** What is to be known?

**Grid.** Model x learning rate x seed.

![Loss against size](figures/loss_by_size.png)

**Verdict.** Open.
`espalier plots $name --experiment $folder --publish` draws the figure and the table here.

Commit, hardware, command: ...
"""


@app.command(rich_help_panel=RUN)
def init(
    folder: Annotated[Path, typer.Argument(help="The folder to make: experiments/NAME, or any.")],
) -> None:
    """Write a folder for a new experiment: sweep.yaml, figures.py, README.md, which run as are.

    Beside them the schema by which an editor completes sweep.yaml. A package with a model, a task
    and data of your own: examples/own_lab.
    """
    from runner.commands.sweep_schema import sweep_schema  # noqa: PLC0415
    from runner.records.names import check_name  # noqa: PLC0415

    name = check_name("DIR", folder.resolve().name)
    words = {"name": name, "folder": str(folder)}
    files = {
        "sweep.yaml": Template(_SWEEP).substitute(words),
        "figures.py": _FIGURES,
        "README.md": Template(_README).substitute(words),
        "sweep.schema.json": json.dumps(sweep_schema(), indent=1) + "\n",
    }
    there = [file for file in files if (folder / file).exists()]
    if there:
        raise ConfigError(f"{folder}/{there[0]} exists; choose another folder, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")
        typer.echo(folder / file)
    typer.echo(f"next: espalier plan {folder}")
