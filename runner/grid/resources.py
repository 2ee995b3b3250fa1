"""Resources as a function of the config: the first class of `resources.classes` whose `when` holds.

    resources:
      cpus: 2
      classes:
        - {when: "model.width >= 512", gpus: 4, timeout_min: 600}

Keys that the class does not set keep their values from outside `classes`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from models.config import config
from runner.grid.expression import evaluate
from runner.machine.errors import ConfigError
from runner.records.cells import Cell


@config
class ResourcesConfig:
    """The resources of one cell; `resources.classes` can set them by the config.

    Args:
        gpus: GPUs on each node (None: one where this machine has any, none on SLURM).
        processes: ranks on each node (None: one for each GPU).
        nodes: above 1 on SLURM only.
        gpu: its name, "A100", for checking formats and memory and for predicting time.
        cpus, mem_gb: cores and memory on each node, for SLURM (mem_gb None: its default).
        timeout_min: time limit of a SLURM job; a cell may take several jobs.
        hang_min: minutes without a new step after which a cell is stopped as failed (None: never).
        halve_on_oom: after running out of memory retry with half the micro-batch, at equal tokens
            per step.
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
        """The number of ranks on each node."""
        return self.processes or max(1, self.gpus or 1)

    @property
    def num_processes(self) -> int:
        """The number of ranks on all nodes."""
        return self.nodes * self.per_node


def resolve_classes(node: dict[str, Any], keys: Mapping[str, Any]) -> None:
    """Apply the first matching class of `resources.classes` to a composed node, in place.

    Args:
        keys: the names in `when`: dotted keys and the choices of groups.

    Raises:
        ConfigError: a class has no `when`, or the expression cannot be evaluated.
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
    """Return the cells grouped by their resources."""
    groups: dict[ResourcesConfig, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.config.resources, []).append(cell)
    return groups
