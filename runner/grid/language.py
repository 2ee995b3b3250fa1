"""The grid language of a sweep.yaml: products, zips, draws and unions of blocks.

    params: {model: "a,b", seed: "1,2"}                      Hydra's product
    zip: [{model.width: [64, 128], optim.lr: [3e-3, 1e-3]}]  keys of one entry advance together
    draw: {count: 20, seed: 0, method: sobol, space: {optim.lr: {low: 1e-4, high: 1e-2, log: true}}}
    blocks: [{params: ...}, {zip: ...}]                      a union, each multiplied by the above
    stages: {pre: {...}, ft: {from: pre, match: [seed], params: ...}}    a block each, see stages.py

A point is a list of `key=value` overrides; a key of the command line wins over the file's.
"""

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import field
from typing import Any, Literal, TypeVar

from models.config import config
from runner.machine.errors import ConfigError
from runner.records.config import typed

Point = list[str]


@config
class Axis:
    """The distribution of one key: uniform in [low, high), or over `choices`.

    Args:
        low, high: the ends of the interval.
        log: uniform in the logarithm.
        integer: round down to a whole number.
        choices: a list to draw from instead.
    """

    low: float | None = None
    high: float | None = None
    log: bool = False
    integer: bool = False
    choices: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        if (self.choices is None) == (self.low is None or self.high is None):
            raise ValueError("give either choices or both low and high")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"low={self.low} must be below high={self.high}")
        if self.log and (self.low or 0.0) <= 0:
            raise ValueError(f"log=true needs low={self.low} above 0")

    def at(self, u: float) -> Any:
        """Return the value at `u` in [0, 1)."""
        if self.choices is not None:
            return self.choices[int(u * len(self.choices))]
        assert self.low is not None
        assert self.high is not None
        if self.log:
            import numpy as np  # noqa: PLC0415

            value = float(np.exp(np.log(self.low) + u * (np.log(self.high) - np.log(self.low))))
        else:
            value = self.low + u * (self.high - self.low)
        return int(value) if self.integer else float(f"{value:.6g}")


@config
class Draw:
    """Random or quasi-random points.

    The same `seed` gives the same points, and with random and halton a larger `count` adds to them;
    with sobol it does up to the next power of two.

    Args:
        count: number of points.
        space: for each key its distribution.
        seed: of the points.
        method: independent points, or a sequence that fills the space evenly.
    """

    count: int
    space: dict[str, Axis]
    seed: int = 0
    method: Literal["random", "sobol", "halton"] = "sobol"

    def points(self) -> list[Point]:
        """Return `count` points."""
        import numpy as np  # noqa: PLC0415
        from scipy.stats import qmc  # noqa: PLC0415

        size = len(self.space)
        if self.method == "random":
            numbers = np.random.default_rng(self.seed).random((self.count, size))
        elif self.method == "halton":
            numbers = qmc.Halton(size, seed=self.seed).random(self.count)
        else:
            power = max(0, (self.count - 1).bit_length())
            numbers = qmc.Sobol(size, seed=self.seed).random_base2(power)[: self.count]
        return [
            [
                _override(key, axis.at(u))
                for (key, axis), u in zip(self.space.items(), row, strict=True)
            ]
            for row in numbers
        ]


@config
class Block:
    """A product of the values of `params`, the entries of `zip` and the points of `draw`.

    Args:
        params: values by key, "a,b" or a list; all combinations of them are points.
        zip: entries of lists by key; the keys of one entry advance together.
        draw: random points: how many, and the distribution of each key.
    """

    params: dict[str, Any] = field(default_factory=dict)
    zip: tuple[dict[str, list[Any]], ...] = ()
    draw: Draw | None = None


@config
class StageInput:
    """An input of a stage's cells from the cells of another stage.

    Args:
        stage: the name of the other stage.
        match: keys in which a cell and its input must agree.
        take, live: see `InputConfig` in `runner/records/inputs.py`.
        all: take all matching cells as a set; otherwise exactly one must match.
    """

    stage: str
    match: tuple[str, ...] = ()
    take: Literal["weights", "average", "everything"] = "weights"
    all: bool = False
    live: bool = False


@config
class Stage(Block):
    """A block whose cells read those of other stages.

    Args:
        inputs: the other stages by the name of the input; short: `from: STAGE` and `match`.
    """

    inputs: dict[str, StageInput] = field(default_factory=dict)


@config
class Grid(Block):
    """A block that multiplies a union of `blocks`, or stages.

    Args:
        blocks: a list of {params, zip, draw}; the grid is the union of their points.
        stages: blocks by name, of which one may start from another: {from, match, params}.
    """

    blocks: tuple[Block, ...] = ()
    stages: dict[str, Stage] = field(default_factory=dict)


G = TypeVar("G", bound=Grid)


def parse_grid(node: dict[str, Any], cls: type[G]) -> G:
    """Return the grid of `node`, the keys of hydra.sweeper, as a `cls`.

    Raises:
        ConfigError: a key is unknown or a value has the wrong type.
    """
    keys = {k: v for k, v in node.items() if v is not None}
    keys["stages"] = {name: _stage(stage) for name, stage in (keys.get("stages") or {}).items()}
    return typed("hydra.sweeper", cls, keys)


def _stage(given: dict[str, Any]) -> dict[str, Any]:
    """Return a stage with `inputs` for `from`.

    `from: NAME` with match, take and live beside it is short for one input named init.
    """
    stage = dict(given)
    if isinstance(stage.get("from"), str):
        short = {key: stage.pop(key) for key in ("match", "take", "live") if key in stage}
        stage["inputs"] = {"init": {"stage": stage.pop("from"), **short}}
    elif "from" in stage:
        stage["inputs"] = stage.pop("from")
    return stage


def expand(
    grid: Grid, product: Callable[[list[str]], list[Point]], given: list[str]
) -> list[Point]:
    """Return all points of a grid.

    Args:
        product: Hydra's splitting of overrides with several values into points.
        given: overrides of the command line; their keys replace those of the grid.

    Raises:
        ConfigError: the lists of a zip differ in length, or a key is swept twice.
    """
    given_keys = {override.lstrip("+~").partition("=")[0] for override in given}
    common = _block(grid, product, given_keys)
    unions = [_block(block, product, given_keys) for block in grid.blocks] or [[[]]]
    points = [a + b for union in unions for a, b in itertools.product(common, union)]
    for point in points:
        keys = [override.lstrip("+").partition("=")[0] for override in point]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise ConfigError(f"{', '.join(sorted(twice))} is swept twice; name it in one place")
    return [a + b for a, b in itertools.product(points, product(given))]


def _block(
    block: Block, product: Callable[[list[str]], list[Point]], given_keys: set[str]
) -> list[Point]:
    params = [_override(k, value) for k, value in block.params.items() if k not in given_keys]
    factors = [product(params)]
    factors += [_zipped(entry, given_keys) for entry in block.zip]
    if block.draw is not None:
        factors.append([_without(point, given_keys) for point in block.draw.points()])
    return [list(itertools.chain(*choice)) for choice in itertools.product(*factors)]


def _without(point: Point, keys: set[str]) -> Point:
    return [override for override in point if override.partition("=")[0] not in keys]


def _zipped(entry: dict[str, list[Any]], given_keys: set[str]) -> list[Point]:
    lengths = {key: len(values) for key, values in entry.items()}
    if len(set(lengths.values())) != 1:
        listed = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise ConfigError(f"hydra.sweeper.zip: the lists must be equally long: {listed}")
    swept = {key: values for key, values in entry.items() if key not in given_keys}
    if len(swept) not in (0, len(entry)):
        raise ConfigError(
            f"hydra.sweeper.zip: {', '.join(entry)} advance together; "
            "give all or none on the command line"
        )
    columns = [[_override(key, value) for value in values] for key, values in swept.items()]
    return [list(point) for point in zip(*columns, strict=True)] or [[]]


def _override(key: str, value: Any) -> str:
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def unique(points: Iterable[Point]) -> list[Point]:
    """Return the points without repetitions, in order."""
    return [list(point) for point in dict.fromkeys(tuple(p) for p in points)]
