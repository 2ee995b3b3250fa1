"""Hydra plug-ins: our sweepers turn overrides into cells, our launchers run them.

Another launcher of Hydra works too: it gets each point as overrides. Slow modules are imported once
there are cells, so that a wrong key is refused at once.
"""

import importlib
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from models.config import config
from runner.commands.composer import Composer, open_keys, refuse_lost_sweeps, refuse_sweeps
from runner.commands.names import label, with_grid_name
from runner.commands.sweep_keys import GridKeys, LocalKeys
from runner.grid.evaluation_cells import missing_evaluations
from runner.grid.expression import evaluate
from runner.grid.language import Grid, Point, expand, parse_grid, unique
from runner.grid.stages import in_order, link
from runner.launch.policy import Policy
from runner.machine.errors import ConfigError
from runner.machine.interrupt import leave_to_python
from runner.records.cells import Cell, check_outputs, make_cells
from runner.records.config import (
    typed,
)

if TYPE_CHECKING:
    from runner.launch.backend import Backend


class CellLauncher(Launcher):
    """The base of our launchers, which run frozen cells on a backend."""

    def backend(self) -> "Backend":
        """Return the backend that runs the cells."""
        raise NotImplementedError

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Do nothing: a frozen cell holds everything that a run needs."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Refuse Hydra's own sweepers: only ours make frozen cells."""
        raise ConfigError("this launcher needs hydra/sweeper=grid (the default)")


class LocalLauncher(CellLauncher):
    """`hydra/launcher=local`: the fork-server pool on this machine."""

    def __init__(self, **keys: Any) -> None:
        self.keys = typed("hydra.launcher", LocalKeys, _plain(keys))

    def backend(self) -> "Backend":
        """See `CellLauncher`."""
        from runner.launch.local import Local  # noqa: PLC0415

        return Local(self.keys.jobs)


class SlurmLauncher(CellLauncher):
    """`hydra/launcher=slurm`: job arrays, see `runner/launch/slurm.py`."""

    def __init__(self, **keys: Any) -> None:
        self.keys = _plain(keys)

    def backend(self) -> "Backend":
        """See `CellLauncher`."""
        from runner.launch.slurm import Slurm, SlurmConfig  # noqa: PLC0415

        return Slurm(typed("hydra.launcher", SlurmConfig, self.keys))


class CellSweeper(Sweeper):
    """The base of our sweepers, which make frozen cells for a `CellLauncher` to run."""

    def __init__(self, keys: Policy) -> None:
        self.policy = Policy(**{f.name: getattr(keys, f.name) for f in fields(Policy)})

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Make the composer of points and the launcher."""
        self.composer = Composer(config, hydra_context.config_loader)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )


class GridSweeper(CellSweeper):
    """`hydra/sweeper=grid`: a grid of points, each frozen as a cell before any of them runs."""

    def __init__(self, **keys: Any) -> None:
        self.grid = parse_grid(_plain(keys), GridKeys)
        super().__init__(self.grid)

    def sweep(self, arguments: list[str]) -> Any:
        """Run the grid and exit with its code."""
        assert self.launcher is not None
        if not isinstance(self.launcher, CellLauncher):
            if self.grid.stages:
                raise ConfigError("hydra.sweeper.stages needs hydra/launcher=local or slurm")
            leave_to_python()
            return self.launcher.launch(self.points(self.grid, arguments), initial_job_idx=0)
        cells = self.cells(arguments)
        binding = self.grid.adopt
        from rich.console import Console  # noqa: PLC0415

        if binding:
            from runner.records.adopt import adopt  # noqa: PLC0415

            leave_to_python()
            cell, keys = adopt(cells, binding["run"], binding.get("reason", ""))
            difference = ", ".join(keys) or "nothing"
            Console().print(
                f"{cell.label} is now {cell.state}: {cell.folder}, differing in {difference}"
            )
            return None
        if self.grid.dry_run:
            from runner.views.plan import show_plan  # noqa: PLC0415

            show_plan(cells, time_limited=isinstance(self.launcher, SlurmLauncher))
            try:
                self.launcher.backend().check(cells)
            except ConfigError as error:  # planned here, launched elsewhere: no error yet
                Console().print(f"a launch from here refuses them: {error}", soft_wrap=True)
            return None
        from runner.launch.launch import launch  # noqa: PLC0415

        leave_to_python()
        code = launch(cells, self.launcher.backend(), self.policy)
        if code:
            raise SystemExit(code)
        return None

    def cells(self, arguments: list[str]) -> list[Cell]:
        """Return the cells of the grid or of all its stages, and missing evaluations of them."""
        made: dict[str, list[Cell]] = {}
        for name, grid in self.grids().items():
            points = self.points(grid, arguments)
            composed = [(p, self.composer.compose(p)[0]) for p in points]
            nodes = [(label(p, points, node), node) for p, node in composed]
            stage = self.grid.stages.get(name)
            if stage is not None and stage.inputs:
                nodes = link(name, stage, nodes, made)
            of = {"stage": name} if name else {}
            choices = [of | self.composer.choices(p, node) for p, node in composed]
            made[name] = make_cells(nodes, choices)
            if name:
                made[name] = [replace(cell, label=f"{name}: {cell.label}") for cell in made[name]]
        cells = list({c.fingerprint: c for stage in made.values() for c in stage}.values())
        check_outputs(cells)
        cells = with_grid_name(cells, arguments)
        return [*cells, *missing_evaluations(cells)]

    def grids(self) -> Mapping[str, Grid]:
        """Return the grid of each stage in order; without stages the grid itself under ""."""
        stages = in_order(self.grid.stages)
        grids = {name: replace(self.grid, blocks=(stage,), stages={}) for name, stage in stages}
        return grids or {"": self.grid}

    def points(self, grid: Grid, arguments: list[str]) -> list[Point]:
        """Return the overrides of each point of `grid` that passes the filter.

        Raises:
            ConfigError: no point is left.
        """

        def product(overrides: list[str]) -> list[Point]:
            parsed = self.composer.parser.parse_overrides(open_keys(overrides))
            refuse_lost_sweeps(parsed)
            return [list(p) for batch in BasicSweeper.split_arguments(parsed, None) for p in batch]

        points = [open_keys(p) for p in unique(expand(grid, product, arguments))]
        condition = self.grid.filter
        if condition:
            chosen = [p for p in points if evaluate(condition, self.composer.compose(p)[1])]
            if not chosen:
                raise ConfigError(
                    f"hydra.sweeper.filter={condition!r} leaves none of {len(points)} points; "
                    "loosen it"
                )
            return chosen
        return points


class OptunaSweeper(CellSweeper):
    """`hydra/sweeper=optuna`: a study whose trials are cells, see `runner/launch/study.py`."""

    def __init__(self, **keys: Any) -> None:
        from runner.launch.study_config import StudyConfig  # noqa: PLC0415

        @config
        class StudyKeys(StudyConfig, Policy):
            """Keys of `hydra.sweeper`."""

        given = typed("hydra.sweeper", StudyKeys, _plain(keys))
        super().__init__(given)
        self.study = StudyConfig(**{f.name: getattr(given, f.name) for f in fields(StudyConfig)})

    def sweep(self, arguments: list[str]) -> Any:
        """Run the study and exit with its code."""
        if not isinstance(self.launcher, CellLauncher):
            raise ConfigError("hydra/sweeper=optuna needs hydra/launcher=local or slurm")
        from runner.launch.launch import launch_study  # noqa: PLC0415
        from runner.launch.study import load_study  # noqa: PLC0415
        from runner.launch.study_config import save_study  # noqa: PLC0415

        refuse_sweeps(self.composer.parser.parse_overrides(arguments))
        point = open_keys(arguments)
        node, _ = self.composer.compose(point)
        (base,) = make_cells([("base", node)], [self.composer.choices(point, node)])
        leave_to_python()
        changed = save_study(base.sweep, self.study, base)
        study = load_study(base.sweep)
        code = launch_study(study, base, self.launcher.backend(), self.policy, changed)
        if code:
            raise SystemExit(code)


def _plain(node: dict[str, Any]) -> dict[str, Any]:
    plain = OmegaConf.to_container(OmegaConf.create(node), resolve=True)
    return {str(k): v for k, v in plain.items()} if isinstance(plain, dict) else {}


def register() -> None:
    """Register our launchers and sweepers with Hydra; called once, before Hydra starts.

    Hydra 1.3 loads plug-ins only from a package `hydra_plugins`, so this module is also registered
    as `hydra_plugins.espalier`.
    """
    try:
        parent = importlib.import_module("hydra_plugins")
    except ImportError:
        parent = sys.modules["hydra_plugins"] = types.ModuleType("hydra_plugins")
        parent.__path__ = []
    this = sys.modules["hydra_plugins.espalier"] = sys.modules[__name__]
    parent.espalier = this  # type: ignore[attr-defined]
    for plugin in (LocalLauncher, SlurmLauncher, GridSweeper, OptunaSweeper):
        plugin.__module__ = "hydra_plugins.espalier"
        Plugins.instance().register(plugin)
