"""Hydra's side of a sweep: our sweeper turns overrides into cells, our launcher runs them.

A launcher of Hydra's own or of somebody else's works too: it then gets each point as overrides.
"""

import importlib
import re
import sys
import types
from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from runner.config import NODES
from runner.sweep.cells import Cell, make_cells

Point = list[str]
_NODE_KEY = re.compile(r"(?!hydra\.)[a-z_]+\.[\w.]+=")


class LocalLauncher(Launcher):
    """`hydra/launcher=local`: the fork-server pool on this machine."""

    def __init__(self, jobs: int | None = None) -> None:
        self.jobs = jobs

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Let the template of the workers import torch while the cells are composed."""
        from runner.sweep.pool import warm_up  # noqa: PLC0415

        warm_up()

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Refused: this launcher runs frozen cells, which only our sweeper makes."""
        raise RuntimeError("hydra/launcher=local needs hydra/sweeper=grid (the default)")

    def launch_cells(self, cells: list[Cell], *, retry_failed: bool) -> int:
        """Run `cells`; return the exit code."""
        from runner.sweep.launch import launch  # noqa: PLC0415

        return launch(cells, jobs=self.jobs, retry_failed=retry_failed)


class GridSweeper(Sweeper):
    """`hydra/sweeper=grid`: Hydra's product, each point frozen as a cell before any runs.

    Args:
        params: the grid of a sweep.yaml, `{optim.lr: "1e-3,3e-3"}`; the command line wins over it.
        retry_failed: run failed cells again.
    """

    def __init__(self, params: dict[str, Any] | None = None, retry_failed: bool = False) -> None:
        self.params, self.retry_failed = dict(params or {}), retry_failed

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what composing points needs."""
        self.config, self.context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run the grid and exit with its code."""
        points = self.points(arguments)
        assert self.launcher is not None
        if not isinstance(self.launcher, LocalLauncher):
            return self.launcher.launch(points, initial_job_idx=0)
        cells = make_cells((_label(point, points), self.compose(point)) for point in points)
        code = self.launcher.launch_cells(cells, retry_failed=self.retry_failed)
        if code:
            raise SystemExit(code)
        return None

    def points(self, arguments: list[str]) -> list[Point]:
        """Return the overrides of each point of the product."""
        parser = OverridesParser.create(config_loader=self.context.config_loader)
        given = {override.key_or_group for override in parser.parse_overrides(arguments)}
        pairs = [f"{key}={value}" for key, value in self.params.items() if key not in given]
        params = open_keys(pairs)
        parsed = parser.parse_overrides([*params, *arguments])
        return [point for batch in BasicSweeper.split_arguments(parsed, None) for point in batch]

    def compose(self, point: Point) -> dict[str, Any]:
        """Return the plain, resolved node of a point."""
        assert self.config is not None
        composed = self.context.config_loader.load_sweep_config(self.config, point)
        return to_plain(composed)


def open_keys(arguments: list[str]) -> list[str]:
    """Let `model.dropout=0.1` name a key that its YAML leaves at the default.

    Hydra would ask for `+`; our own validation knows every key and refuses the unknown ones.
    """
    return [f"++{a}" if _NODE_KEY.match(a) else a for a in arguments]


def to_plain(composed: DictConfig) -> dict[str, Any]:
    """Return the user's part of a composed config as plain data, interpolations resolved."""
    keys = [str(key) for key in composed if key != "hydra"]
    plain = OmegaConf.to_container(OmegaConf.masked_copy(composed, keys), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _label(point: Point, points: list[Point]) -> str:
    """Name a point by what varies within the sweep, short enough for a table: `gpt_nano bf16 lr=1e-3`."""
    common = set(point).intersection(*map(set, points)) if len(points) > 1 else set()
    parts = [o.lstrip("+").partition("=") for o in point if o not in common]
    keys = [key.rpartition(".")[2] for key, _, _ in parts]
    return " ".join(
        value if key in NODES else f"{key if keys.count(last) > 1 else last}={value}"
        for (key, _, value), last in zip(parts, keys, strict=True)
    )


def register() -> None:
    """Make both known to Hydra; called once, before Hydra starts.

    Hydra 1.3 takes plug-ins only from a package `hydra_plugins`, so this module also answers to
    `hydra_plugins.espalier`.
    """
    try:
        parent = importlib.import_module("hydra_plugins")
    except ImportError:
        parent = sys.modules["hydra_plugins"] = types.ModuleType("hydra_plugins")
        parent.__path__ = []
    parent.espalier = sys.modules["hydra_plugins.espalier"] = sys.modules[__name__]  # type: ignore[attr-defined]
    for plugin in (LocalLauncher, GridSweeper):
        plugin.__module__ = "hydra_plugins.espalier"
        Plugins.instance().register(plugin)
