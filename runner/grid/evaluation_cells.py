"""Evaluations as cells: each trained cell gives one that trains nothing and asks benchmarks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.config import plain
from models.precision_config import PrecisionConfig
from runner.evaluate.config import HarnessConfig
from runner.evaluate.evaluations import file_of
from runner.machine.errors import ConfigError
from runner.machine.text_files import read_json
from runner.records import checkpoint_folder
from runner.records.cells import Cell, find_cell, make_cells
from runner.records.config import freeze, parse_overrides, set_key, typed
from runner.records.earlier_configs import EVALUATE
from runner.records.fingerprint import evaluation_key
from runner.records.names import sweep_folder
from runner.records.sweep_cells import sweep_cells

_ALSO = "eval.also."
_BUDGETS = ("tokens", "flops", "tokens_per_parameter")


def evaluation_cells(
    root: Path, target: str, overrides: Sequence[str], *, average: bool = False
) -> tuple[list[Cell], str, list[str]]:
    """Return (evaluation cells, the sweep's name, a line for each cell left out and why).

    Args:
        target: a run, or a sweep of which all cells are evaluated.
        overrides: key=value, see `benchmark_overrides`: tasks, or nodes of eval.also; without any
            each cell is judged by the eval.also of its own.
        average: evaluate the averaged weights.

    Raises:
        ConfigError: `target` is neither, an override is malformed, or nothing can be evaluated.
    """
    sources, name = cells_of(root, target)
    changes = benchmark_overrides(overrides)
    given = bool(changes.get("eval.harness.tasks")) or any(k.startswith(_ALSO) for k in changes)
    if not given and not any(map(_counted, sources)):
        raise ConfigError(
            "no benchmark is named; give tasks=[lambada,...], or eval.also.NAME={_target_: ...}"
        )
    follow = bool(changes.get("eval.harness.follow"))
    points, choices, skipped = [], [], []
    for cell in sources:
        if cell.config.model is None or cell.config.train is None:
            skipped.append(f"{cell.fingerprint} ({cell.label}) trains no model: left out")
        elif not given and not _counted(cell):
            skipped.append(f"{cell.fingerprint} ({cell.label}) has no eval.also: left out")
        elif not follow and not checkpoint_folder.listing(cell.folder / "checkpoints"):
            skipped.append(
                f"{cell.fingerprint} ({cell.label}) has no checkpoint ({cell.state}): left out"
            )
        else:
            points.append((cell.label, _node(cell, name, changes, average=average)))
            choices.append(cell.choices)
    if not points:
        raise ConfigError(
            "\n".join([*skipped, f"nothing of {target} can be evaluated; train it first"])
        )
    return make_cells(points, choices), name, skipped


def cells_of(root: Path, target: str) -> tuple[list[Cell], str]:
    """Return (cells, the sweep's name) of a sweep, or of a run alone.

    Raises:
        ConfigError: `target` is neither.
    """
    if "/" not in target and (sweep_folder(root, target) / "cells.jsonl").exists():
        return sweep_cells(root, target), target
    cell = find_cell(root, target)
    return [cell], str(cell.config.name)


def benchmark_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return {full key: value} of key=value overrides; a key without dots is of eval.harness.

    Of cells there is also precision: training (the default: the recipe of the run), fp32 or bf16.

    Raises:
        ConfigError: an override is malformed.
    """
    values = {
        key if "." in key else f"eval.harness.{key}": value
        for key, value in parse_overrides(overrides).items()
    }
    tasks = values.get("eval.harness.tasks")
    return values | ({"eval.harness.tasks": [tasks]} if isinstance(tasks, str) else {})


def harness_config(overrides: Sequence[str]) -> HarnessConfig:
    """Return the benchmark config with the values of `overrides`, see `benchmark_overrides`.

    Raises:
        ConfigError: an override is malformed or its key is not one of eval.harness.
    """
    values = {
        key.removeprefix("eval.harness."): value
        for key, value in benchmark_overrides(overrides).items()
    }
    return typed("eval.harness", HarnessConfig, values)


def _node(cell: Cell, name: str, changes: dict[str, Any], *, average: bool) -> dict[str, Any]:
    changes = dict(changes)
    live = bool(changes.pop("eval.harness.follow", False))
    precision = changes.pop("eval.harness.precision", "training")
    node = _evaluating(cell, name, "average" if average else "weights", live=live)
    if precision != "training":
        if precision not in ("fp32", "bf16"):
            raise ConfigError(f"precision={precision} is none of: training, fp32, bf16")
        node["precision"] = plain(PrecisionConfig(compute=precision), target=True)
    for key, value in changes.items():
        set_key(node, key, value)
    return node


def _evaluating(cell: Cell, name: str, take: str, *, live: bool = False) -> dict[str, Any]:
    """Return the node of a run that evaluates the model of `cell` in the sweep `name`-eval."""
    node = without_training(cell, f"{name}-eval", take, live=live)
    return node | {"work": {"_target_": EVALUATE}}


def without_training(cell: Cell, sweep: str, take: str, *, live: bool = False) -> dict[str, Any]:
    """Return the node of a run in `sweep` that starts from the model of `cell` and trains nothing.

    Args:
        take: "weights" or "average".
    """
    node = freeze(cell.config)
    # The other inputs of `cell` stay: its data may be among them.
    taken = {"init": {"runs": [cell.fingerprint], "take": take, "live": live}}
    node |= {"name": sweep, "inputs": {**node["inputs"], **taken}}
    node |= {"init": None, "root": cell.config.root}
    node["train"] |= {"steps": None, "compile": False} | dict.fromkeys(_BUDGETS)
    return node


def _counted(cell: Cell) -> dict[str, Any]:
    """Return the evaluations of a cell's eval.also whose results are kept under their own keys."""
    also = getattr(cell.config.eval, "also", {})
    return {name: one for name, one in also.items() if getattr(one, "counts", True)}


def _is_judged(cell: Cell, evaluation: Any, step: int) -> bool:
    """Return whether there are results of a checkpoint at least as late as `step`.

    Those of an evaluation that followed the run and was stopped are earlier.
    """
    file = file_of(cell.folder, evaluation_key(cell.fingerprint, evaluation))
    return file.exists() and read_json(file).get("step", step) >= step


def missing_evaluations(cells: Sequence[Cell]) -> list[Cell]:
    """Return a cell for each finished run of `cells` that lacks results of its `eval.also`.

    It makes the missing evaluations only. Its choice `evaluates` names the run, whose row in
    `analysis` has what it finds.
    """
    points, choices = [], []
    for cell in cells:
        if not _counted(cell) or cell.config.train is None or cell.state != "finished":
            continue
        saved = checkpoint_folder.listing(cell.folder / "checkpoints")
        missing = {
            name: evaluation
            for name, evaluation in _counted(cell).items()
            if saved and not _is_judged(cell, evaluation, int(saved[-1].name))
        }
        if missing:
            node = _evaluating(cell, str(cell.config.name), "weights")
            node["name"] = cell.config.name
            node["eval"]["harness"] = {}
            node["eval"]["also"] = {n: plain(e, target=True) for n, e in missing.items()}
            points.append((f"{cell.label}: {', '.join(missing)}", node))
            choices.append({**cell.choices, "evaluates": f"run:{cell.fingerprint}"})
    return make_cells(points, choices)
