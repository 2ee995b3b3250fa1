"""The names chosen in groups are recorded with a run, marked where keys of the node were set."""

from collections.abc import Callable
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from runner.commands.composer import Composer, open_keys
from runner.commands.hydra_plugin import register
from runner.records import cells
from runner.records.cells import join_sweep, make_cells, members
from runner.records.sweep_cells import sweep_cells
from tests.command_server import ROOT


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("precision=nvfp4", {"precision": "nvfp4", "model": "gpt_nano", "optim": "adamw"}),
        ("precision=nvfp4 precision.keep_last=0.25", {"precision": "nvfp4*"}),
        ("~train.clip", {"train": "default*"}),
        ("model={width: 32} model.depth=1", {"model": "gpt_nano*"}),
        ("train.micro_batch=4 train.compile=true", {"train": "default", "optim": "adamw"}),
        ("optim.lr=0.003 model=gpt_pico", {"optim": "adamw*", "model": "gpt_pico"}),
        ("optim.lr=${model.width}", {"optim": "adamw*", "model": "gpt_nano"}),
        ("+model/part@model.parts.x=engram", {"model.parts.x": "engram", "model": "gpt_nano"}),
        ("work=make", {"work": "make", "model": None, "train": None, "data": None}),
        ("name=x root=/tmp seed=3 track.uri=off", {"model": "gpt_nano", "track": None}),
        ("init=hf:org/name", {"model": "hf:org/name", "tokenizer": "hf:org/name"}),
    ],
)
def test_what_is_recorded(line: str, expected: dict[str, str | None]) -> None:
    register()
    point = open_keys(line.replace(": ", ":").split())
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = hydra_compose("config", [], return_hydra_config=True)
        composer = Composer(config, GlobalHydra.instance().config_loader())
        choices = composer.choices(point, composer.compose(point)[0])
    assert {key: choices.get(key) for key in expected} == expected


def test_each_sweep_has_its_own_and_an_older_one_gets_them(
    compose: Callable[..., dict[str, Any]],
) -> None:
    (old,) = make_cells([("it", compose("name=old"))])
    sweep = join_sweep("old", [old])
    root = sweep.parent.parent
    assert members(root, "old") == [{"fingerprint": old.fingerprint, "label": "it"}]
    (cell,) = make_cells([("renamed", compose("name=old"))], [{"precision": "fp32"}])
    for name in ("old", "new"):
        join_sweep(name, [cell])
        join_sweep(name, [cell])
    assert len((sweep / "cells.jsonl").read_text().splitlines()) == 2
    (row,) = members(root, "old")
    assert row == {"fingerprint": old.fingerprint, "label": "it", "choices": {"precision": "fp32"}}
    (row,) = members(root, "new")
    assert row["label"] == "renamed"
    cells.freeze_cell(cell)
    (member,) = sweep_cells(root, "new")
    assert member.choices == {"precision": "fp32"}
