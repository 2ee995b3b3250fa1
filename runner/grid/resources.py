"""Resources as a function of the config: the first class of `resources.classes` whose `when` holds.

    resources:
      cpus: 2
      classes:
        - {when: "model.width >= 512", gpus: 4, timeout_min: 600}

What a class does not name keeps the value that stands above it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from models.config import config
from runner.grid.expression import evaluate
from runner.machine.errors import ConfigError
from runner.records.cells import Cell


@config
class ResourcesConfig:
    """What one cell needs; `resources.classes` sets it by the config, see `runner/grid/resources.py`.

    Args:
        gpus: GPUs on each node (None: one where this machine has any, none on SLURM).
        processes: ranks on each node (None: one for each GPU).
        nodes: above 1 on SLURM only.
        gpu: its name, "A100": format and memory are checked against it, and time is told by it.
        cpus, mem_gb: cores and memory on each node, asked of SLURM (mem_gb None: its default).
        timeout_min: time limit of a SLURM job; a cell may take several of them.
        hang_min: a cell without a new step for so long is stopped and failed (None: never).
        halve_on_oom: after out of memory, try again with half the micro-batch, at equal tokens a step.
    """

    gpus: int | None = None
    gpu: str | None = None
    processes: int | None = None
    nodes: int = 1
    cpus: int = 1
    mem_gb: float | None = None
    timeout_min: int = 60
    hang_min: float | None = 30.0
    halve_on_oom: bool = True

    def __post_init__(self) -> None:
        for name in ("processes", "nodes", "cpus", "timeout_min"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"resources.{name}={value} must be at least 1")
        if self.gpus is not None and self.gpus < 0:
            raise ValueError(f"resources.gpus={self.gpus} must not be negative")

    @property
    def per_node(self) -> int:
        """Ranks on each node, the default resolved."""
        return self.processes or max(1, self.gpus or 1)

    @property
    def num_processes(self) -> int:
        """Ranks in all."""
        return self.nodes * self.per_node


def resolve_classes(node: dict[str, Any], keys: Mapping[str, Any]) -> None:
    """Replace `resources.classes` of a composed node by what they say for it.

    Args:
        keys: what `when` sees: dotted keys and the choices of groups.

    Raises:
        ConfigError: a class without `when`, or an expression that cannot be evaluated.
    """
    resources = node.get("resources")
    if not isinstance(resources, dict):
        return
    for entry in resources.pop("classes", None) or []:
        if not isinstance(entry, dict) or "when" not in entry:
            raise ConfigError(f"resources.classes: {entry!r} needs a key `when`, an expression")
        if evaluate(str(entry["when"]), keys):
            resources.update({key: value for key, value in entry.items() if key != "when"})
            return


def group_by_resources(cells: Iterable[Cell]) -> dict[ResourcesConfig, list[Cell]]:
    """Return the cells grouped by what they need."""
    groups: dict[ResourcesConfig, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.config.resources, []).append(cell)
    return groups
