"""From overrides to composed nodes: what Hydra composes as plain data, and what it is asked for."""

import copy
import re
from collections.abc import Sequence
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from runner.commands.choices import choices_of
from runner.commands.missing_values import refuse_missing_values
from runner.commands.overrides import key_of, wholes_first
from runner.data.pretrained import refuse_determined
from runner.grid.language import Point
from runner.grid.resources import resolve_classes
from runner.machine.errors import ConfigError
from runner.records.config import NODES, SETTINGS, flatten, set_key

_SHORT_FLAGS = re.compile("-[mcih]")
_NODE_KEY = re.compile(r"(?!hydra\.(?!launcher\.|sweeper\.))[a-z_]+\.[\w.]+=")


class Composer:
    """Composes points: by Hydra once per choice of groups, then by setting values on a copy."""

    def __init__(self, config: DictConfig, loader: ConfigLoader) -> None:
        self.config, self.loader = config, loader
        self._bases: dict[tuple[str, ...], tuple[dict[str, Any] | None, dict[str, Any]]] = {}
        self.parser = OverridesParser.create(config_loader=loader)
        self._splits: dict[tuple[str, ...], tuple[list[Override], tuple[str, ...]]] = {}
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
        key = tuple(point)
        if key not in self._splits:  # a point is asked for several times, and parsing is slow
            parsed = self.parser.parse_overrides(point)
            values = [o for o in parsed if self._is_plain_value(o)]
            others = tuple(str(o.input_line) for o in parsed if o not in values)
            self._splits[key] = values, others
        return self._splits[key]

    def _keep(self, groups: tuple[str, ...], composed: DictConfig) -> None:
        base = None if _interpolates(composed) else user_part(composed)
        self._bases[groups] = (base, chosen_names(composed))

    def _is_plain_value(self, override: Override) -> bool:
        value = override.value()
        needs_hydra = isinstance(value, dict) or "${" in str(value) or override.is_delete()
        return not is_group(override) and not needs_hydra


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
    words = [a for a in arguments if "=" in a and not a.startswith("-") and _may_choose(a)]
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


def refuse_keys_of_grids(arguments: Sequence[str]) -> None:
    """Raise ConfigError if a single run is given a key of the sweeper or the launcher.

    Where a config is only shown (--cfg, --info) they may be.
    """
    if any(word.startswith("--") or _SHORT_FLAGS.fullmatch(word) for word in arguments):
        return
    for key in map(key_of, arguments):
        if key.startswith(("hydra.sweeper", "hydra.launcher", "hydra/sweeper", "hydra/launcher")):
            raise ConfigError(f"{key} counts for grids only; add -m, or leave it out")


def is_group(override: Override) -> bool:
    """Return whether an override chooses a config of a group."""
    return override.package is not None or _names_group(override.key_or_group)


def _may_choose(argument: str) -> bool:
    """Return whether an override that is not parsed yet chooses a config of a group."""
    key = key_of(argument)
    return "@" in key or _names_group(key)


def _names_group(key: str) -> bool:
    return key in ("work", *NODES, *SETTINGS) or "/" in key


def refuse_lost_sweeps(overrides: Sequence[Override]) -> None:
    """Raise ConfigError if a later override takes the place of several values of its key."""
    keys = [(o.key_or_group, o.package) for o in overrides]
    for index, override in enumerate(overrides):
        if override.is_sweep_override() and keys[index] in keys[index + 1 :]:
            raise ConfigError(
                f"{override.input_line}: {override.key_or_group} is given twice, and only the last "
                "would count; give all values in one place"
            )


def refuse_sweeps(overrides: Sequence[Override]) -> None:
    """Raise ConfigError if an override has several values, which a study does not take."""
    swept = [str(o.input_line) for o in overrides if o.is_sweep_override()]
    if swept:
        raise ConfigError(
            f"{', '.join(swept)}: a study draws its points itself; give one value, or name the key "
            "in hydra.sweeper.space"
        )
