"""Tools by name, conf/tool/NAME.yaml, or by the import path of a class of one's own."""

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from runner.machine.errors import ConfigError
from runner.records.config import target_class, typed

if TYPE_CHECKING:
    from runner.generate.tools import Tools


def named_tools(names: str, config: Any, tokenizer: Any) -> "Tools":
    """Return the tools of a list `calculator,mylab.tools.WeatherConfig` for a run.

    Args:
        config: of the run.
        tokenizer: of its model.

    Raises:
        ConfigError: a name is unknown, or a tool does not fit the run.
    """
    from runner.generate.tools import for_run, tools_for  # noqa: PLC0415

    try:
        tools = [for_run(_tool(name.strip()), config) for name in names.split(",")]
        return tools_for(tools, tokenizer)
    except ValueError as error:
        raise ConfigError(f"--tools {names}: {error}") from error


def _tool(name: str) -> Any:
    folder = Path(str(files("conf"))) / "tool"
    file = folder / f"{name}.yaml"
    if file.exists():
        node = yaml.safe_load(file.read_text(encoding="utf-8"))
    elif "." in name:
        node = {"_target_": name}
    else:
        known = ", ".join(sorted(shipped.stem for shipped in folder.glob("*.yaml")))
        raise ConfigError(
            f"--tools: {name!r} is none of: {known}; give one of them, or package.module.Class"
        )
    return typed("--tools", target_class("--tools", node.pop("_target_")), node)
