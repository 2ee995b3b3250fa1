"""The names that a run's groups were chosen by, as its sweep records them.

    precision=nvfp4                            {"precision": "nvfp4", ...}
    precision=nvfp4 precision.keep_last=0.25   {"precision": "nvfp4*", ...}

What a node holds does not give its name back: bf16 and nvfp4 both have precision.compute=bf16.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from runner.commands.overrides import key_of
from runner.machine.errors import ConfigError
from runner.records.config import NODES, execution_half, is_among, target_class
from runner.records.contracts import reads

_OF_PRETRAINED = ("model", "tokenizer")  # nodes that `init` replaces


def choices_of(
    node: Mapping[str, Any], overrides: Iterable[str], chosen: Mapping[str, str | None]
) -> dict[str, str]:
    """Return the name chosen in each group that counts, by the dotted path of its node.

    A name ends with "*" where an override sets a key of the node that can change the result.

    Args:
        node: what was composed.
        overrides: of the point or the command line.
        chosen: the names by group, as Hydra has them: {"precision": "nvfp4",
            "eval/also@eval.also.x": "norms", "hydra/launcher": "local"}.
    """
    try:
        half = execution_half(node)
        idle = set(NODES).difference(reads(target_class("work", node["work"]["_target_"])))
    except ConfigError:  # an invalid node, of which validation says what is wrong
        return {}
    values = [line for line in overrides if "." in key_of(line) or "={" in line]
    keys = [key for key in map(key_of, values) if "@" not in key and not is_among(key, half)]
    choices = {}
    for group, name in reversed(list(chosen.items())):  # Hydra has the last of the defaults first
        path = _path(group)
        if name is None or group.startswith("hydra/") or is_among(path, half | idle):
            continue
        choices[path] = f"{name}*" if any(is_among(key, {path}) for key in keys) else name
    if node.get("init"):
        choices |= {path: str(node["init"]) for path in _OF_PRETRAINED if path in choices}
    return choices


def _path(group: str) -> str:
    name, _, package = group.partition("@")
    return package if package and package != "_global_" else name.replace("/", ".")
