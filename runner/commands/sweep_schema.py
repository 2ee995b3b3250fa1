"""A JSON schema of sweep.yaml, by which an editor completes keys, shows meanings and marks typos.

The first line of a sweep.yaml names the file: `# yaml-language-server: $schema=sweep.schema.json`.
"""

import dataclasses
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from runner.commands.key_reference import (
    GROUPS,
    WITHIN,
    Key,
    KeyBlock,
    blocks,
    groups,
    names_in,
)
from runner.records.earlier_configs import OF_EVAL

Schema = dict[str, Any]
# A value may be an interpolation; YAML 1.1 reads 1e-3, which has no point, as text.
_RESOLVED = {"type": "string", "pattern": r"^\$\{"}
_NUMBER_AS_TEXT = {"type": "string", "pattern": r"^([-+]?[0-9.]|\$\{)"}
_TYPES: dict[Any, Schema] = {
    bool: {"type": "boolean"},
    int: {"type": "number", "multipleOf": 1},
    float: {"type": "number"},
    str: {"type": "string"},
    NoneType: {"type": "null"},
}


def sweep_schema() -> Schema:
    """Return the schema (draft 7) of a sweep.yaml: the keys of a run, and `hydra`."""
    nodes: Schema = {key.path: _value(key) for block in blocks("") for key in block.keys}
    nodes["inputs"] = {"type": "object"}
    nodes |= {group: _node(group, list(blocks(group))) for group in GROUPS}
    for earlier, today in OF_EVAL.items():
        was = {"deprecated": True, "description": f"Today eval.{today}."}
        nodes["eval"]["anyOf"][1]["properties"][earlier] = was
    sweeper, launcher = (_node(g, list(blocks(g))) for g in ("hydra/sweeper", "hydra/launcher"))
    params = {"params": {"$ref": "#/definitions/params"}}
    block = {"type": "object", "properties": params}
    grid = sweeper["anyOf"][1]["properties"]
    grid |= params
    grid["blocks"]["items"] = grid["stages"]["additionalProperties"] = block
    hydra = {"sweeper": sweeper, "launcher": launcher, "mode": {"enum": ["RUN", "MULTIRUN"]}}
    nodes["hydra"] = {"type": "object", "properties": hydra}
    nodes["defaults"] = _defaults()
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "sweep.yaml of Espalier",
        "definitions": {"params": _params()},
        "type": "object",
        "properties": nodes,
        "additionalProperties": False,
    }


def _node(group: str, parts: list[KeyBlock]) -> Schema:
    """Return the schema of a node: the keys of all classes of its group, or another's class."""
    prefix = group.replace("/", ".")
    tree = _object(parts[0].summary if len(parts) == 1 else f"One of: {', '.join(names_in(group))}")
    for key in (key for part in parts for key in part.keys):
        path = key.path.removeprefix(f"{prefix}.").split(".")
        if not {"NAME", "0"}.intersection(path):
            _put(tree, path, key)
    tree["properties"]["_target_"] = {"type": "string", "description": "The class of the config."}
    return {"anyOf": [{"required": ["_target_"]}, tree]}


def _put(tree: Schema, path: list[str], key: Key) -> None:
    for name in path[:-1]:
        tree = tree["properties"][name]
        tree = next((part for part in tree["anyOf"] if "properties" in part), tree)
    known = tree["properties"].setdefault(path[-1], _value(key))
    if known != _value(key):  # the classes of a group share the name
        known["anyOf"] += [part for part in _value(key)["anyOf"] if part not in known["anyOf"]]


def _object(description: str) -> Schema:
    return {
        "type": "object",
        "description": description,
        "properties": {},
        "additionalProperties": False,
    }


def _value(key: Key) -> Schema:
    """Return the schema of a key's value, with its meaning and default."""
    half = "Cannot change a result. " if key.execution else ""
    schema: Schema = {"description": f"{half}{key.meaning}".strip(), "anyOf": _kinds(key.type)}
    if not key.required and not dataclasses.is_dataclass(key.default):
        schema["default"] = key.default
    return schema


def _kinds(kind: Any) -> list[Schema]:
    """Return the schemas of which a value of type `kind` satisfies one."""
    if get_origin(kind) is Literal:
        return [{"enum": list(get_args(kind))}, _RESOLVED]
    if dataclasses.is_dataclass(kind):
        return [_object(""), {"required": ["_target_"]}, _RESOLVED]
    if kind in (int, float):
        return [_TYPES[kind], _NUMBER_AS_TEXT]
    if kind in _TYPES:
        return [_TYPES[kind], _RESOLVED]
    if get_origin(kind) in (list, tuple):
        return [{"type": "array"}, _RESOLVED]
    if get_origin(kind) is dict:
        return [{"type": "object"}, _RESOLVED]
    inner = [schema for part in get_args(kind) for schema in _kinds(part)]
    return [part for i, part in enumerate(inner) if part not in inner[:i]] or [{}]


def _params() -> Schema:
    """Return the schema of `params`: dotted keys and groups, whose values may be several."""
    known: Schema = {group: {"description": _choices(group)} for group in GROUPS}
    for group in filter(None, groups()):
        if group not in WITHIN and not group.startswith("hydra/"):
            keys = (key for block in blocks(group) for key in block.keys)
            known |= {key.path: {"description": f"{key.kind}. {key.meaning}"} for key in keys}
    for key in (key for block in blocks("") for key in block.keys):
        known[key.path] = {"description": f"{key.kind}. {key.meaning}"}
    return {"type": ["object", "null"], "properties": known}


def _defaults() -> Schema:
    """Return the schema of Hydra's list of defaults."""
    override = {f"override /{g}": _some(names_in(g)) for g in (*GROUPS, "hydra/launcher")}
    override["override hydra/sweeper"] = _some(names_in("hydra/sweeper"))
    items = [{"type": "string"}, {"type": "object", "properties": override}]
    return {
        "type": "array",
        "description": "What the file starts from: /config, `override /GROUP: NAME`, _self_ last.",
        "items": {"anyOf": items},
    }


def _some(names: list[str]) -> Schema:
    return {"anyOf": [{"enum": names}, {"type": ["string", "null"]}]}


def _choices(group: str) -> str:
    return f"One of {', '.join(names_in(group))}, or several: a,b"
