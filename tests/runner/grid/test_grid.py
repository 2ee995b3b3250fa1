"""The grid language, its filter and the plan, through the command line where that matters."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.grid.expression import evaluate
from runner.grid.language import Grid, Point, expand, parse_grid, unique
from runner.machine.errors import ConfigError
from tests.command_server import run
from tests.conftest import TINY

Run = Callable[..., subprocess.CompletedProcess[str]]


def _product(overrides: list[str]) -> list[Point]:
    """Hydra's product for lists without nesting."""
    points: list[Point] = [[]]
    for override in overrides:
        key, _, values = override.partition("=")
        points = [[*p, f"{key}={v}"] for p in points for v in values.split(",")]
    return points


def _expand(node: dict[str, Any], *typed: str) -> list[Point]:
    return expand(parse_grid(node, Grid), _product, list(typed))


def test_zip_advances_together_and_multiplies_the_rest() -> None:
    grid = {"params": {"seed": "1,2"}, "zip": [{"model.width": [64, 128], "optim.lr": [0.1, 0.01]}]}
    assert _expand(grid) == [
        [f"seed={s}", *pair]
        for s in (1, 2)
        for pair in (["model.width=64", "optim.lr=0.1"], ["model.width=128", "optim.lr=0.01"])
    ]
    with pytest.raises(ConfigError, match="a has 1, b has 2"):
        _expand({"zip": [{"a": [1], "b": [1, 2]}]})
    with pytest.raises(ConfigError, match="give all or none"):
        _expand(grid, "optim.lr=1")


def test_blocks_are_a_union_under_what_stands_above() -> None:
    grid = {"params": {"seed": "1,2"}, "blocks": [{"params": {"a": "1"}}, {"params": {"b": "1,2"}}]}
    assert _expand(grid) == [
        ["seed=1", "a=1"],
        ["seed=2", "a=1"],
        ["seed=1", "b=1"],
        ["seed=1", "b=2"],
        ["seed=2", "b=1"],
        ["seed=2", "b=2"],
    ]


def test_the_command_line_wins_and_nothing_is_swept_twice() -> None:
    assert _expand({"params": {"seed": "1,2"}}, "seed=7") == [["seed=7"]]
    with pytest.raises(ConfigError, match="a is swept twice"):
        _expand({"params": {"a": "1"}, "blocks": [{"params": {"a": "2"}}]})
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.zap"):
        _expand({"zap": 1})
    assert unique([["a"], ["a"], ["b"]]) == [["a"], ["b"]]


@pytest.mark.parametrize("method", ["random", "sobol", "halton"])
def test_draws_are_reproducible_prefixes_within_bounds(method: str) -> None:
    space = {
        "lr": {"low": 1e-4, "high": 1e-1, "log": True},
        "depth": {"low": 2, "high": 6, "integer": True},
        "act": {"choices": ["gelu", "swiglu"]},
    }
    draws = [
        _expand({"draw": {"count": n, "seed": 3, "method": method, "space": space}})
        for n in (16, 16, 5)
    ]
    assert draws[0] == draws[1]
    assert (
        draws[2] == draws[0][:5] or method == "sobol"
    )  # a shorter Sobol sequence is scrambled anew
    values = [dict(o.split("=") for o in point) for point in draws[0]]
    assert all(1e-4 <= float(v["lr"]) <= 1e-1 for v in values)
    assert {int(v["depth"]) for v in values} == {2, 3, 4, 5}
    assert {v["act"] for v in values} == {"gelu", "swiglu"}
    below = sum(float(v["lr"]) < 10**-2.5 for v in values)
    assert 4 <= below <= 12  # uniform in the logarithm
    other = _expand({"draw": {"count": 16, "seed": 4, "method": method, "space": space}})
    assert other != draws[0]


KEYS = {
    "model.width": 64,
    "train.batch_size": 8,
    "precision": "fp32",
    "optim.lr": 1e-3,
    "model.softcap": None,
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("model.width * train.batch_size < 513", True),
        ("model.width * train.batch_size < 512", False),
        ("2**6 == model.width and not precision == 'bf16'", True),
        ("precision in ('fp32', 'bf16') or nowhere", True),
        ("1e-4 < optim.lr <= 1e-3", True),
        ("model.softcap == None", True),
        ("-model.width // 3 % 5", -64 // 3 % 5),
    ],
)
def test_expressions_have_python_values(text: str, value: Any) -> None:
    assert evaluate(text, KEYS) == value


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "model.width.__class__",
        "(lambda: 1)()",
        "[x for x in (1,)]",
        "model.width if 1 else 2",
        "'a' * 10**9",
        "9**9**9",
        "1 +",
        "model.widht",
        "f'{precision}'",
        "optim[0]",
        "1/0",
        "model.width < 'a'",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        evaluate(text, KEYS)


@given(st.text(max_size=40))
def test_no_text_does_more_than_fail(text: str) -> None:
    try:
        evaluate(text, KEYS)
    except ConfigError:
        pass
    except (ValueError, RecursionError, MemoryError):  # what ast.parse itself may raise
        pass


def test_a_whole_list_and_a_swept_key_within_it_both_hold(
    espalier: Run, tmp_path: Path, text: Path
) -> None:
    source = f"{{_target_: runner.data.sources.SourceConfig, path: {text}}}"
    lists = f"data.sources=[{source}, {source}]"
    for order in (["data.sources.1.weight=2,3", lists], [lists, "data.sources.1.weight=2,3"]):
        done = espalier("-m", *order, "hydra.sweeper.dry_run=true", f"name=l{len(order[0])}")
        assert done.returncode == 0, done.stderr
        assert "2 cells (2 new)" in done.stdout


def test_dry_run_plans_and_runs_nothing(espalier: Run, tmp_path: Path) -> None:
    grid = [
        "-m",
        "seed=1,2",
        "optim.lr=1e-3,1e-2",
        "hydra.sweeper.filter='seed * optim.lr < 0.015'",
        "name=p",
    ]
    done = espalier(*grid, "hydra.sweeper.dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "3 cells (3 new)" in done.stdout
    assert not (tmp_path / "runs").exists()
    assert espalier(*grid).returncode == 0
    again = espalier(*grid, "hydra.sweeper.dry_run=true")
    assert "3 cells (3 finished); to run: 0.00e+00 FLOPs" in again.stdout
    more = espalier("-m", "seed=3", "name=p", "hydra.sweeper.dry_run=true")
    assert "of unknown time" not in more.stdout  # this host has runs at this precision now
    none = espalier(*grid[:-2], "hydra.sweeper.filter='seed > 9'")
    assert none.returncode != 0
    assert "leaves none of 4 points" in none.stderr


def test_an_experiment_with_zip_and_blocks_is_one_yaml(tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "exp"
    folder.mkdir()
    (folder / "sweep.yaml").write_text(
        "# @package _global_\ndefaults: [/config, _self_]\nname: z\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    dry_run: true\n"
        "    zip: [{model.width: [24, 48], optim.lr: [1e-2, 1e-3]}]\n"
        "    blocks:\n    - params: {seed: '1,2'}\n"
        "    - draw: {count: 3, space: {model.dropout: {low: 0.0, high: 0.5}}}\n"
    )
    base = [*TINY, f"data.sources.0.path={text}", f"root={tmp_path}"]
    done = run("runner", "-m", "-cd", str(folder), "-cn", "sweep", *base)
    assert done.returncode == 0, done.stderr
    assert "10 cells (10 new)" in done.stdout
    assert done.stdout.count("width=48 lr=0.001") == 5
