"""Hydra's side of a sweep: our sweeper turns overrides into cells, our launcher runs them.

A launcher of Hydra's own or of somebody else's works too: it then gets each point as overrides.
What runs cells is imported when there are cells: a key that is refused is refused at once.
"""

import copy
import importlib
import re
import sys
import types
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from runner.grid.evaluation_cells import missing_evaluations
from runner.grid.expression import evaluate
from runner.grid.language import Grid, Point, expand, parse_grid, unique
from runner.grid.resources import resolve_classes
from runner.grid.stages import in_order, link
from runner.machine.errors import ConfigError
from runner.records.cells import Cell, make_cells
from runner.records.config import (
    NODES,
    execution_half,
    flatten,
    is_among,
    set_key,
    target_class,
    typed,
)
from runner.records.contracts import reads

if TYPE_CHECKING:
    from runner.launch.backend import Backend

_NODE_KEY = re.compile(r"(?!hydra\.(?!launcher\.))[a-z_]+\.[\w.]+=")


class CellLauncher(Launcher):
    """A launcher of ours: it runs frozen cells on its backend."""

    def backend(self) -> "Backend":
        """Return where the cells run."""
        raise NotImplementedError

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Nothing to prepare: cells carry all they need."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Refused: frozen cells are made by our sweeper only."""
        raise ConfigError("this launcher needs hydra/sweeper=grid (the default)")


class LocalLauncher(CellLauncher):
    """`hydra/launcher=local`: the fork-server pool on this machine."""

    def __init__(self, jobs: int | None = None) -> None:
        self.jobs = jobs

    def backend(self) -> "Backend":
        """See `CellLauncher`."""
        from runner.launch.local import Local  # noqa: PLC0415

        return Local(self.jobs)


class SlurmLauncher(CellLauncher):
    """`hydra/launcher=slurm`: job arrays, see `runner/launch/slurm.py`."""

    def __init__(self, **keys: Any) -> None:
        self.keys = _plain(keys)

    def backend(self) -> "Backend":
        """See `CellLauncher`."""
        from runner.launch.slurm import Slurm, SlurmConfig  # noqa: PLC0415

        return Slurm(typed("hydra.launcher", SlurmConfig, self.keys))


class CellSweeper(Sweeper):
    """A sweeper of ours: it makes frozen cells, which a `CellLauncher` runs under a policy."""

    def __init__(self, keys: dict[str, Any]) -> None:
        from runner.launch.policy import Policy  # noqa: PLC0415

        self.keys = _plain(keys)
        policies = {f.name: self.keys.pop(f.name) for f in fields(Policy) if f.name in self.keys}
        self.policy = typed("hydra.sweeper", Policy, policies)

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what composing points needs."""
        self.composer = Composer(config, hydra_context.config_loader)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )


class GridSweeper(CellSweeper):
    """`hydra/sweeper=grid`: a grid of points, each frozen as a cell before any runs.

    Args:
        params, zip, draw, blocks, stages: the grid, see `runner/grid/language.py`; the command line wins over it.
        filter: keep the points for which this holds, see `runner/grid/expression.py`.
        dry_run: show the plan and run nothing (`espalier plan`).
        adopt: {run, reason}: bind a finished run to a new cell and run nothing (`espalier adopt`).
        max_alike, on_finish, on_failure: see `runner/launch/policy.py`.
    """

    def __init__(
        self,
        filter: str | None = None,
        dry_run: bool = False,
        adopt: dict[str, str] | None = None,
        **grid: Any,
    ) -> None:
        super().__init__(grid)
        self.adopt = adopt
        self.filter, self.dry_run = filter, dry_run
        self.grid = parse_grid(self.keys)

    def sweep(self, arguments: list[str]) -> Any:
        """Run the grid and exit with its code."""
        assert self.launcher is not None
        if not isinstance(self.launcher, CellLauncher):
            if self.grid.stages:
                raise ConfigError("hydra.sweeper.stages needs hydra/launcher=local or slurm")
            return self.launcher.launch(self.points(self.grid, arguments), initial_job_idx=0)
        cells = self.cells(arguments)
        if self.adopt:
            from rich.console import Console  # noqa: PLC0415

            from runner.records.adopt import adopt  # noqa: PLC0415

            cell, keys = adopt(cells, self.adopt["run"], self.adopt.get("reason", ""))
            Console().print(
                f"{cell.label} is now {cell.state}: {cell.folder}, differing in {', '.join(keys) or 'nothing'}"
            )
            return None
        if self.dry_run:
            from runner.views.plan import show_plan  # noqa: PLC0415

            show_plan(cells)
            return None
        from runner.launch.launch import launch  # noqa: PLC0415

        code = launch(cells, self.launcher.backend(), self.policy)
        if code:
            raise SystemExit(code)
        return None

    def cells(self, arguments: list[str]) -> list[Cell]:
        """Return the cells of the grid, of all its stages where it has some."""
        made: dict[str, list[Cell]] = {}
        for name, grid in self.grids().items():
            points = self.points(grid, arguments)
            composed = [(p, self.composer.compose(p)[0]) for p in points]
            nodes = [(_label(p, points, node), node) for p, node in composed]
            stage = self.grid.stages.get(name)
            if stage is not None and stage.inputs:
                nodes = link(name, stage, nodes, made)
            made[name] = make_cells(nodes)
            if name:
                made[name] = [replace(cell, label=f"{name}: {cell.label}") for cell in made[name]]
        cells = list({c.fingerprint: c for stage in made.values() for c in stage}.values())
        return [*cells, *missing_evaluations(cells)]

    def grids(self) -> dict[str, Grid]:
        """Return the grid of each stage in order, under "" where there are no stages."""
        stages = in_order(self.grid.stages)
        found = {name: replace(self.grid, blocks=(stage,), stages={}) for name, stage in stages}
        return found or {"": self.grid}

    def points(self, grid: Grid, arguments: list[str]) -> list[Point]:
        """Return the overrides of each point of `grid` that passes the filter.

        Raises:
            ConfigError: no point is left.
        """

        def product(overrides: list[str]) -> list[Point]:
            parsed = self.composer.parser.parse_overrides(open_keys(overrides))
            return [list(p) for batch in BasicSweeper.split_arguments(parsed, None) for p in batch]

        points = [open_keys(p) for p in unique(expand(grid, product, arguments))]
        if self.filter:
            kept = [p for p in points if evaluate(self.filter, self.composer.compose(p)[1])]
            if not kept:
                raise ConfigError(
                    f"hydra.sweeper.filter={self.filter!r} leaves none of {len(points)} points; loosen it"
                )
            return kept
        return points


class OptunaSweeper(CellSweeper):
    """`hydra/sweeper=optuna`: trials are asked and told cell by cell, see `runner/launch/study.py`."""

    def __init__(self, **keys: Any) -> None:
        from runner.launch.study import StudyConfig  # noqa: PLC0415  (optuna)

        super().__init__(keys)
        self.study = typed("hydra.sweeper", StudyConfig, self.keys)

    def sweep(self, arguments: list[str]) -> Any:
        """Run the study and exit with its code."""
        if not isinstance(self.launcher, CellLauncher):
            raise ConfigError("hydra/sweeper=optuna needs hydra/launcher=local or slurm")
        from runner.launch.launch import launch_study  # noqa: PLC0415
        from runner.launch.study import load_study, save_study  # noqa: PLC0415

        (base,) = make_cells([("base", self.composer.compose(open_keys(arguments))[0])])
        save_study(base.sweep, self.study, base)
        code = launch_study(load_study(base.sweep), base, self.launcher.backend(), self.policy)
        if code:
            raise SystemExit(code)


class Composer:
    """Composes points: Hydra once for each distinct choice of groups, values set on a copy of that."""

    def __init__(self, config: DictConfig, loader: ConfigLoader) -> None:
        self.config, self.loader = config, loader
        self._bases: dict[tuple[str, ...], tuple[dict[str, Any] | None, dict[str, str]]] = {}
        self.parser = OverridesParser.create(config_loader=loader)

    def compose(self, point: Point) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the plain, resolved node of a point, and what expressions see of it.

        That is every dotted key, and the choice made in each group.
        """
        parsed = self.parser.parse_overrides(point)
        values = [o for o in parsed if self._is_plain_value(o)]
        groups = tuple(str(o.input_line) for o in parsed if o not in values)
        if groups not in self._bases:
            composed = self.loader.load_sweep_config(self.config, list(groups))
            self._bases[groups] = (
                None if _interpolates(composed) else user_part(composed),
                _choices(composed),
            )
        base, choices = self._bases[groups]
        if base is None:  # resolving comes after setting: an interpolation sees the point's values
            node = user_part(self.loader.load_sweep_config(self.config, point))
        else:
            node = copy.deepcopy(base)
            for override in values:
                set_key(node, override.key_or_group, override.value())
        keys = flatten(node) | choices
        resolve_classes(node, keys)
        return node, keys

    def _is_plain_value(self, override: Override) -> bool:
        key, value = override.key_or_group, override.value()
        group = key in ("work", *NODES) or "/" in key or override.package is not None
        odd = isinstance(value, dict) or "${" in str(value) or override.is_delete()
        return not group and not odd


def _plain(node: dict[str, Any]) -> dict[str, Any]:
    plain = OmegaConf.to_container(OmegaConf.create(node), resolve=True)
    return {str(k): v for k, v in plain.items()} if isinstance(plain, dict) else {}


def open_keys(arguments: list[str]) -> list[str]:
    """Let `model.dropout=0.1` name a key that its YAML leaves at the default.

    Hydra would ask for `+`; our own validation knows every key and refuses the unknown ones.
    """
    return [f"++{a}" if _NODE_KEY.match(a) else a for a in arguments]


def to_plain(composed: DictConfig) -> dict[str, Any]:
    """Return the node of a composed config, its resources chosen, as plain data."""
    node = user_part(composed)
    resolve_classes(node, flatten(node) | _choices(composed))
    return node


def user_part(composed: DictConfig) -> dict[str, Any]:
    """Return all but Hydra's own part as plain data, interpolations resolved."""
    plain = OmegaConf.to_container(_without_hydra(composed), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _without_hydra(composed: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])


def _interpolates(composed: DictConfig) -> bool:
    return "${" in str(OmegaConf.to_container(_without_hydra(composed), resolve=False))


def _choices(composed: DictConfig) -> dict[str, str]:
    if "hydra" in composed:
        choices = composed.hydra.runtime.choices
    else:  # of a single run Hydra keeps them apart
        choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return {k: str(v) for k, v in choices.items() if k in ("work", *NODES)}


def _label(point: Point, points: list[Point], node: dict[str, Any]) -> str:
    """Name a point by what varies within the sweep, short enough for a table: `gpt_nano bf16 lr=1e-3`.

    Of a single point all that can change its result is named, but for paths and nodes that its work does not read.
    """
    common = set(point).intersection(*map(set, points)) if len(points) > 1 else set()
    parts = [o.lstrip("+").partition("=") for o in point if o not in common]
    if len(points) == 1:
        work = target_class("work", node["work"]["_target_"])
        idle = execution_half(node) | set(NODES).difference(reads(work))
        parts = [p for p in parts if not is_among(p[0], idle) and "path" not in p[0]]
    keys = [key.rpartition(".")[2] for key, _, _ in parts]
    return " ".join(
        value if key in ("work", *NODES) else f"{key if keys.count(last) > 1 else last}={value}"
        for (key, _, value), last in zip(parts, keys, strict=True)
    )


def register() -> None:
    """Make our launchers and sweepers known to Hydra; called once, before Hydra starts.

    Hydra 1.3 takes plug-ins only from a package `hydra_plugins`, so this module also answers to
    `hydra_plugins.espalier`.
    """
    try:
        parent = importlib.import_module("hydra_plugins")
    except ImportError:
        parent = sys.modules["hydra_plugins"] = types.ModuleType("hydra_plugins")
        parent.__path__ = []
    parent.espalier = sys.modules["hydra_plugins.espalier"] = sys.modules[__name__]  # type: ignore[attr-defined]
    for plugin in (LocalLauncher, SlurmLauncher, GridSweeper, OptunaSweeper):
        plugin.__module__ = "hydra_plugins.espalier"
        Plugins.instance().register(plugin)
