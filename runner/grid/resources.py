"""Resources as a function of the config: the first class of `resources.classes` whose `when` holds.

    resources:
      cpus: 2
      classes:
        - {when: "model.width >= 512", gpus: 4, timeout_min: 600}

What a class does not name keeps the value that stands above it.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from runner.grid.expression import evaluate
from runner.machine.errors import ConfigError
from runner.records.cells import Cell

if TYPE_CHECKING:
    from runner.learn.config import ResourcesConfig  # torch: seconds


def choose(node: dict[str, Any], keys: Mapping[str, Any]) -> None:
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


def by_class(cells: Iterable[Cell]) -> "dict[ResourcesConfig, list[Cell]]":
    """Return the cells grouped by what they need."""
    groups: dict[ResourcesConfig, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.config.resources, []).append(cell)
    return groups
