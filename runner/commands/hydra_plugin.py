"""Hydra plug-ins: our sweepers turn overrides into cells, our launchers run them.

Another launcher of Hydra works too: it gets each point as overrides. Slow modules are imported once
there are cells, so that a wrong key is refused at once.
"""

import copy
import importlib
import re
import sys
import types
from collections.abc import Mapping, Sequence
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

from models.config import config
from runner.commands.choices import choices_of
from runner.commands.missing_values import refuse_missing_values
from runner.commands.names import key_of, label, with_grid_name
from runner.commands.overrides import wholes_first
from runner.commands.sweep_keys import GridKeys, LocalKeys
from runner.data.pretrained import refuse_determined
from runner.grid.evaluation_cells import missing_evaluations
from runner.grid.expression import evaluate
from runner.grid.language import Grid, Point, expand, parse_grid, unique
from runner.grid.resources import resolve_classes
from runner.grid.stages import in_order, link
from runner.launch.policy import Policy
from runner.machine.errors import ConfigError
from runner.records.cells import Cell, check_outputs, make_cells
from runner.records.config import (
    NODES,
    SETTINGS,
    flatten,
    set_key,
    typed,
)

if TYPE_CHECKING:
    from runner.launch.backend import Backend

_NODE_KEY = re.compile(r"(?!hydra\.(?!launcher\.|sweeper\.))[a-z_]+\.[\w.]+=")


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
            return self.launcher.launch(self.points(self.grid, arguments), initial_job_idx=0)
        cells = self.cells(arguments)
        binding = self.grid.adopt
        if binding:
            from rich.console import Console  # noqa: PLC0415

            from runner.records.adopt import adopt  # noqa: PLC0415

            cell, keys = adopt(cells, binding["run"], binding.get("reason", ""))
            difference = ", ".join(keys) or "nothing"
            Console().print(
                f"{cell.label} is now {cell.state}: {cell.folder}, differing in {difference}"
            )
            return None
        if self.grid.dry_run:
            from runner.views.plan import show_plan  # noqa: PLC0415

            show_plan(cells, time_limited=isinstance(self.launcher, SlurmLauncher))
            return None
        from runner.launch.launch import launch  # noqa: PLC0415

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
            _refuse_lost_sweeps(parsed)
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

        _refuse_sweeps(self.composer.parser.parse_overrides(arguments))
        point = open_keys(arguments)
        node, _ = self.composer.compose(point)
        (base,) = make_cells([("base", node)], [self.composer.choices(point, node)])
        changed = save_study(base.sweep, self.study, base)
        study = load_study(base.sweep)
        code = launch_study(study, base, self.launcher.backend(), self.policy, changed)
        if code:
            raise SystemExit(code)


class Composer:
    """Composes points: by Hydra once per choice of groups, then by setting values on a copy."""

    def __init__(self, config: DictConfig, loader: ConfigLoader) -> None:
        self.config, self.loader = config, loader
        self._bases: dict[tuple[str, ...], tuple[dict[str, Any] | None, dict[str, Any]]] = {}
        self.parser = OverridesParser.create(config_loader=loader)
        # Hydra has composed the command line's own choice, which many sweeps never leave.
        _, groups = self._split([str(override) for override in config.hydra.overrides.task])
        self._keep(groups, config)

    def compose(self, point: Point) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (the plain, resolved node of a point, the names that expressions may use).

        The names are every dotted key and, for each group, the name of its choice.
        """
        node, choices = self._node(point)
        refuse_determined(node.get("init"), map(key_of, point))
        return node, _finished(node, choices)

    def _node(self, point: Point) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the resolved node of a point and its choices of groups."""
        values, groups = self._split(point)
        if groups not in self._bases:
            self._keep(groups, self.loader.load_sweep_config(self.config, list(groups)))
        base, chosen = self._bases[groups]
        if base is None:  # resolving comes after setting: an interpolation sees the point's values
            return user_part(self.loader.load_sweep_config(self.config, point)), _of_nodes(chosen)
        node = copy.deepcopy(base)
        for override in values:
            set_key(node, override.key_or_group, override.value())
        return node, _of_nodes(chosen)

    def choices(self, point: Point, node: dict[str, Any]) -> dict[str, str]:
        """Return the name chosen in each group by `point`, whose composed node is `node`."""
        return choices_of(node, point, self._bases[self._split(point)[1]][1])

    def _split(self, point: Point) -> tuple[list[Override], tuple[str, ...]]:
        """Return the overrides that set a value, and the lines of those that only Hydra can do."""
        parsed = self.parser.parse_overrides(point)
        values = [o for o in parsed if self._is_plain_value(o)]
        return values, tuple(str(o.input_line) for o in parsed if o not in values)

    def _keep(self, groups: tuple[str, ...], composed: DictConfig) -> None:
        base = None if _interpolates(composed) else user_part(composed)
        self._bases[groups] = (base, chosen_names(composed))

    def _is_plain_value(self, override: Override) -> bool:
        value = override.value()
        needs_hydra = isinstance(value, dict) or "${" in str(value) or override.is_delete()
        return not is_group(override) and not needs_hydra


def _plain(node: dict[str, Any]) -> dict[str, Any]:
    plain = OmegaConf.to_container(OmegaConf.create(node), resolve=True)
    return {str(k): v for k, v in plain.items()} if isinstance(plain, dict) else {}


def open_keys(arguments: list[str]) -> list[str]:
    """Return overrides with `++`, so that `model.dropout=0.1` may set a key absent from its YAML.

    Our own validation refuses unknown keys. Their order is that of `wholes_first`.
    """
    return [f"++{a}" if _NODE_KEY.match(a) else a for a in wholes_first(arguments)]


def to_plain(composed: DictConfig) -> dict[str, Any]:
    """Return a composed config as plain data, with `resources.classes` resolved."""
    node = user_part(composed)
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    refuse_determined(node.get("init"), map(key_of, given))
    _finished(node, _choices(composed))
    return node


def _finished(node: dict[str, Any], choices: dict[str, str]) -> dict[str, Any]:
    """Resolve `resources.classes` in a composed `node`; return the names expressions may use."""
    refuse_missing_values(node, choices)
    keys = flatten(node) | choices
    resolve_classes(node, keys)
    return keys


def user_part(composed: DictConfig) -> dict[str, Any]:
    """Return a composed config without Hydra's own part, as plain data without interpolations."""
    plain = OmegaConf.to_container(_without_hydra(composed), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _without_hydra(composed: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])


def _interpolates(composed: DictConfig) -> bool:
    return "${" in str(OmegaConf.to_container(_without_hydra(composed), resolve=False))


def _choices(composed: DictConfig) -> dict[str, str]:
    return _of_nodes(chosen_names(composed))


def chosen_names(composed: DictConfig) -> dict[str, Any]:
    """Return the names by Hydra's groups, `eval/also@eval.also.norms` and `hydra/launcher` too."""
    if "hydra" in composed:
        return dict(composed.hydra.runtime.choices)
    # in a single run
    return dict(HydraConfig.get().runtime.choices) if HydraConfig.initialized() else {}


def _of_nodes(chosen: dict[str, Any]) -> dict[str, str]:
    return {group: str(name) for group, name in chosen.items() if group in ("work", *NODES)}


def check_overrides(arguments: Sequence[str]) -> None:
    """Check that groups are chosen by name: on anything else Hydra itself fails.

    Raises:
        ConfigError: a group's value is no name.
    """
    words = [a for a in arguments if "=" in a and not a.startswith("-")]
    for override in OverridesParser.create().parse_overrides(words):
        if not is_group(override) or override.is_sweep_override() or override.is_delete():
            continue
        key, value = override.key_or_group, override.value()
        names = value if isinstance(value, list) else [value]
        if not all(isinstance(name, str) for name in names):
            raise ConfigError(
                f"{override.input_line}: {key} is chosen by name, {key}=NAME, of conf/{key}/; "
                "a key below it is set as GROUP.KEY=VALUE"
            )


def is_group(override: Override) -> bool:
    """Return whether an override chooses a config of a group."""
    key = override.key_or_group
    return key in ("work", *NODES, *SETTINGS) or "/" in key or override.package is not None


def _refuse_lost_sweeps(overrides: Sequence[Override]) -> None:
    """Raise ConfigError if a later override takes the place of several values of its key."""
    keys = [(o.key_or_group, o.package) for o in overrides]
    for index, override in enumerate(overrides):
        if override.is_sweep_override() and keys[index] in keys[index + 1 :]:
            raise ConfigError(
                f"{override.input_line}: {override.key_or_group} is given twice, and only the last "
                "would count; give all values in one place"
            )


def _refuse_sweeps(overrides: Sequence[Override]) -> None:
    """Raise ConfigError if an override has several values, which a study does not take."""
    swept = [str(o.input_line) for o in overrides if o.is_sweep_override()]
    if swept:
        raise ConfigError(
            f"{', '.join(swept)}: a study draws its points itself; give one value, or name the key "
            "in hydra.sweeper.space"
        )


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
