"""Stages: cells that start from the output of other cells (pre-train, fine-tune, evaluate).

    stages:
      pre: {params: {data: stdlib}}
      ft: {from: pre, match: [model.width, seed], params: {data: text, optim.lr: "1e-4,3e-4"}}
      ev: {from: ft, match: [model.width, seed, optim.lr], params: {data: stdlib, train.steps: 0}}

The fingerprint of the upstream cell enters the downstream one: changing a stage reruns it and what
follows, nothing before it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runner.grid.language import Stage
from runner.machine.errors import ConfigError
from runner.records.cells import Cell
from runner.records.config import flatten, freeze, validate

LabelledNode = tuple[str, dict[str, Any]]


def in_order(stages: Mapping[str, Stage]) -> Iterator[tuple[str, Stage]]:
    """Yield each stage after the one that it starts from.

    Raises:
        ConfigError: a stage starts from one that is not there, or from itself in the end.
    """
    done: set[str | None] = {None}
    left = dict(stages)
    while left:
        ready = [name for name, stage in left.items() if stage.after in done]
        if not ready:
            odd = ", ".join(f"{name} from {stage.after}" for name, stage in left.items())
            raise ConfigError(f"hydra.sweeper.stages: {odd}: each needs a stage to start from; there are: {', '.join(stages)}")  # fmt: skip
        for name in ready:
            yield name, left.pop(name)
            done.add(name)


def link(
    name: str, stage: Stage, points: Sequence[LabelledNode], upstream: Sequence[Cell]
) -> list[LabelledNode]:
    """Give every point the one cell of `upstream` that agrees with it in the keys of `stage.match`.

    Raises:
        ConfigError: none agrees, or several do.
    """
    known = [(_keys(freeze(cell.config)), cell) for cell in upstream]
    linked = []
    for label, node in points:
        own = _keys(freeze(validate(node)))
        unknown = [key for key in stage.match if key not in own]
        if unknown:
            raise ConfigError(f"hydra.sweeper.stages.{name}.match: no key {unknown[0]}")
        found = [cell for keys, cell in known if all(keys.get(k) == own[k] for k in stage.match)]
        if len(found) != 1:
            at = ", ".join(f"{key}={own[key]}" for key in stage.match) or "no key to match"
            raise ConfigError(
                f"hydra.sweeper.stages.{name}: {label or 'its cell'} ({at}) starts from {len(found)} cells of "
                f"{stage.after}; it must be one: set {name}.match to the keys that tell them apart"
            )
        start = {"run": found[0].fingerprint, "take": stage.take}
        linked.append((label, {**node, "upstream": start}))
    return linked


def _keys(plain: Mapping[str, Any]) -> dict[str, Any]:
    return flatten({key: value for key, value in plain.items() if key != "upstream"})
