"""Benchmarks by name: ours from local files, a user's own YAML, lm-eval's from the hub.

A YAML here is lm-eval's task format with more keys: `files` (patterns; the first that matches below
`eval.harness.data` gives the questions), `fewshot_files`, `columns` (of a .tsv file) and `splits`
(a function of the rows).
"""

import difflib
import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from models.moves import current_path, with_released_paths
from runner.machine.errors import ConfigError, DataError
from runner.machine.memo import Memo
from runner.machine.text_files import json_lines, read_text

SHIPPED = Path(__file__).parent / "benchmarks"
_NAMES = Memo("lm-eval")  # the tasks of an installation: to index them takes seconds


class _Loader(yaml.SafeLoader):
    """YAML with `!function package.module.name`."""


def _function(loader: yaml.SafeLoader, node: yaml.Node) -> Callable[..., Any]:
    assert isinstance(node, yaml.ScalarNode)
    module, _, name = current_path(str(loader.construct_scalar(node))).rpartition(".")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


_Loader.add_constructor("!function", _function)


def specify(name: str, data: str | None, include: str | None) -> dict[str, Any] | str:
    """Return lm-eval's task for `name`: a config that reads local files, or a name that it knows.

    Args:
        data: folder of the local files; None takes the shipped benchmarks from the hub.
        include: folder of a user's own YAML files.

    Raises:
        ConfigError: there is no such task (near names are listed).
        DataError: its file is not below `data`.
    """
    file = task_file(name, include)
    if file is None:
        return name
    spec = yaml.load(read_text(file), _Loader)
    if "files" not in spec:
        return dict(spec)
    if data is None:
        return _on_the_hub(name, file)
    columns, splits = spec.pop("columns", None), spec.pop("splits", None)
    questions = _matching_files(name, Path(data), spec.pop("files"))
    patterns = spec.pop("fewshot_files", None)
    examples = _matching_files(name, Path(data), patterns) if patterns else None

    def read(**_: Any) -> Mapping[str, Any]:
        rows = _rows(questions, columns)
        parts = splits(rows) if splits else {"test": rows}
        return {**parts, **({"train": _rows(examples, columns)} if examples else {})}

    return {**spec, "custom_dataset": read}


def _on_the_hub(name: str, file: Path) -> str:
    """Return lm-eval's name of a shipped benchmark, whose data it downloads."""
    if file.parent != SHIPPED:
        raise ConfigError(
            f"{file} reads local files; set eval.harness.data to the folder they are in"
        )
    return {"lambada": "lambada_openai"}.get(name, name)


def task_file(name: str, include: str | None) -> Path | None:
    """Return the YAML of a task, None if it is one of lm-eval's own.

    Raises:
        ConfigError: there is no such task.
    """
    folders = [Path(include)] if include else []
    own = {file.stem: file for folder in [SHIPPED, *folders] for file in folder.glob("*.yaml")}
    if name in own:
        return own[name]
    theirs = _lm_eval_tasks()
    if name not in theirs:
        near = difflib.get_close_matches(name, [*own, *theirs], n=5, cutoff=0.5)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ConfigError(
            f"eval.harness.tasks: no task {name!r}{hint}; shipped: {', '.join(sorted(own))}"
        )
    return None


def _lm_eval_tasks() -> set[str]:
    """Return the names of lm-eval's own tasks, whose folders are read again once they change."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    tasks = Path(spec.origin).parent / "tasks"
    folders = sorted([tasks, *(f for f in tasks.iterdir() if f.is_dir() and f.name[0] != "_")])
    changed = hashlib.sha256(str([f.stat().st_mtime_ns for f in folders]).encode()).hexdigest()
    key = f"{tasks} {changed[:16]}"
    if key not in _NAMES.entries:
        from lm_eval.tasks import TaskManager  # noqa: PLC0415

        _NAMES.entries[key] = TaskManager().all_tasks
        _NAMES.save()
    return set(_NAMES.entries[key])


def _matching_files(name: str, folder: Path, patterns: list[str]) -> list[Path]:
    for pattern in patterns:
        files = sorted(folder.glob(f"**/{pattern}"))
        if files:
            return files
    raise DataError(
        f"eval.harness.data={folder} holds no file for {name}; it reads {' or '.join(patterns)}, "
        "anywhere below"
    )


def _rows(files: list[Path], columns: list[str] | None) -> Any:
    """Return the dataset of the rows of `files`, all of one format: parquet, tsv or jsonl."""
    from datasets import Dataset  # noqa: PLC0415

    names = [str(file) for file in files]
    kind = files[0].name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        return Dataset.from_parquet(names)
    if kind == "tsv":
        return Dataset.from_csv(names, delimiter="\t", names=columns, quoting=3)
    rows = []
    for file in files:
        for where, row in json_lines(file):
            if not isinstance(row, dict):
                raise DataError(f"{where} is not a JSON object; mend or remove it")
            rows.append(row)
    keys = dict.fromkeys(key for row in rows for key in row)  # not every row has all of them
    return Dataset.from_dict({key: [row.get(key) for row in rows] for key in keys})


def content_hash(tasks: tuple[str, ...], data: str | None, include: str | None) -> str:
    """Return a hash of the local YAML and data files of `tasks`, part of a run's fingerprint.

    Raises:
        ConfigError: a task is unknown, or lm-eval is not installed.
        DataError: a file is missing.
    """
    if tasks and importlib.util.find_spec("lm_eval") is None:  # refused before anything is trained
        raise ConfigError("eval.harness.tasks needs lm-eval: pip install -e '.[eval]'")
    digest = hashlib.sha256()
    for name in tasks:
        file = task_file(name, include)
        digest.update(name.encode())
        if file is None:
            continue
        text = read_text(file)
        digest.update(with_released_paths(text).encode())
        spec = yaml.load(text, _Loader)
        for key in ("files", "fewshot_files"):
            files = _matching_files(name, Path(data), spec[key]) if data and key in spec else []
            for data_file in files:
                with open(data_file, "rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]
