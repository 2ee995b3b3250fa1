"""Stages: cells whose inputs are other cells (pre-train, fine-tune, evaluate; proxies, mixture).

    stages:
      pre: {params: {data: stdlib}}
      ft: {from: pre, match: [model.width, seed], params: {data: text, optim.lr: "1e-4,3e-4"}}
      ev: {from: ft, match: [model.width, seed, optim.lr], params: {data: stdlib, work: evaluate}}

`from: pre` is short for one input named init. In full, an input has a match of its own and may be a
set (`all`):

      proxy: {zip: [{data.sources.0.weight: [1, 2, 3]}]}
      mix: {from: {proxies: {stage: proxy, all: true}}, params: {work: weigh}}
      run: {from: {mix: {stage: mix}}, params: {data.weights: "input:mix/weights.json"}}

The fingerprints of a cell's inputs enter its own, so that changing a stage reruns it and the stages
after it, none before.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runner.grid.language import Stage, StageInput
from runner.machine.errors import ConfigError
from runner.records.cells import Cell
from runner.records.config import flatten, freeze, validate

LabelledNode = tuple[str, dict[str, Any]]
_UNKNOWN = "0" * 16  # stands for a fingerprint


def in_order(stages: Mapping[str, Stage]) -> Iterator[tuple[str, Stage]]:
    """Yield (name, stage) so that each follows the stages of its inputs.

    Raises:
        ConfigError: an input's stage does not exist, or stages form a cycle.
    """
    done: set[str] = set()
    left = dict(stages)
    while left:
        ready = [n for n, s in left.items() if {i.stage for i in s.inputs.values()} <= done]
        if not ready:
            blocked = ", ".join(
                f"{name} from {' and '.join(i.stage for i in stage.inputs.values())}"
                for name, stage in left.items()
            )
            raise ConfigError(
                f"hydra.sweeper.stages: {blocked}: each needs stages to take from; "
                f"there are: {', '.join(stages)}"
            )
        for name in ready:
            yield name, left.pop(name)
            done.add(name)


def link(
    name: str, stage: Stage, points: Sequence[LabelledNode], made: Mapping[str, Sequence[Cell]]
) -> list[LabelledNode]:
    """Return the points of stage `name` with their inputs: the cells that agree in `match`.

    Args:
        made: the cells of earlier stages.

    Raises:
        ConfigError: no cell matches, several do where one is required, or a match has no such key.
    """
    known = {
        source: [(_keys(freeze(cell.config)), cell) for cell in made[source]]
        for source in {given.stage for given in stage.inputs.values()}
    }
    linked = []
    for label, node in points:
        inputs = dict(node.get("inputs") or {})
        # A task may refuse to be without its inputs, whose runs are known only once keys match.
        unknown = {key: {"runs": [_UNKNOWN]} for key in stage.inputs}
        own = _keys(freeze(validate({**node, "inputs": inputs | unknown})))
        for key, given in stage.inputs.items():
            where = f"hydra.sweeper.stages.{name}"
            matches = _matching(where, own, given, known[given.stage])
            if not matches or (len(matches) > 1 and not given.all):
                at = ", ".join(f"{k}={own[k]}" for k in given.match) or "no key to match"
                raise ConfigError(
                    f"{where}: {label or 'its cell'} ({at}) takes input {key} of {len(matches)} "
                    f"cells of {given.stage}; it must be one: set its match to the keys that tell "
                    "them apart, or all: true"
                )
            runs = [cell.fingerprint for cell in matches]
            taken = {"runs": runs, "take": given.take, "all": given.all}
            inputs[key] = taken | ({"live": True} if given.live else {})
        linked.append((label, {**node, "inputs": inputs}))
    return linked


def _matching(
    where: str,
    own: Mapping[str, Any],
    given: StageInput,
    cells: Sequence[tuple[dict[str, Any], Cell]],
) -> list[Cell]:
    unknown = [key for key in given.match if key not in own]
    if unknown:
        raise ConfigError(f"{where}.match: no key {unknown[0]}")
    return [cell for keys, cell in cells if all(keys.get(k) == own[k] for k in given.match)]


def _keys(plain: Mapping[str, Any]) -> dict[str, Any]:
    return flatten({key: value for key, value in plain.items() if key != "inputs"})
