"""Distillation: a student nears its teacher, also in four bits; what cannot be a teacher."""

from pathlib import Path
from typing import Any

import pytest

from runner.learn.memory import predicted_bytes
from runner.machine.errors import ConfigError
from runner.records.cells import Cell, make_cells
from tests.conftest import compose_tiny, write_text
from tests.workers import train_here


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cell]:
    """A folder with a trained run in it."""
    root = tmp_path_factory.mktemp("distillation")
    long = ["train.steps=60", "train.batch_size=16", "optim.lr=2e-2", "eval.every=60"]
    node = compose_tiny(root, write_text(root / "text.txt"), *long)
    (cell,) = make_cells([("", node)])
    train_here(cell)
    return root, cell


def _cell(root: Path, *overrides: str, **inputs: str) -> Cell:
    given = ["task=distillation", "train.steps=24", "eval.every=8", "optim.lr=1e-2", *overrides]
    node = compose_tiny(root, root / "text.txt", *given)
    node["inputs"] = {name: {"runs": [run]} for name, run in inputs.items()}
    (cell,) = make_cells([("", node)])
    return cell


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.width=16", "model.depth=1"],
        ["task.divergence=reverse", "task.temperature=2"],
        ["task.divergence=top_k", "task.top_k=8", "task.lm_weight=0.1"],
    ],
    ids=["forward, a smaller student", "reverse", "top_k"],
)
def test_a_student_nears_its_teacher(taught: tuple[Path, Cell], overrides: list[str]) -> None:
    root, teacher = taught
    cell = _cell(root, *overrides, teacher=teacher.fingerprint)
    logged = train_here(cell)
    assert logged["val_divergence"][-1] < 0.8 * logged["val_divergence"][0]
    assert logged["val_loss"][-1] < logged["val_loss"][0]
    assert len(set(logged["val_teacher_loss"])) == 1
    assert logged["val_loss"][-1] > logged["val_teacher_loss"][-1] - 0.05
    assert predicted_bytes(cell.config, 257) > predicted_bytes(teacher.config, 257)


def test_a_quantised_student_nears_its_own_weights_in_full(taught: tuple[Path, Cell]) -> None:
    root, start = taught
    same = ["task.teacher=init", "train.batch_size=16", "optim.lr=1e-4"]
    full = _cell(root, *same, "train.steps=1", "eval.every=1", init=start.fingerprint)
    assert train_here(full)["loss"][0] < 1e-6  # the student is its teacher
    quantised = ["precision=nvfp4_all_layers", "precision.pad=true"]
    quantised += ["train.steps=10", "eval.every=2"]
    logged = train_here(_cell(root, *same, *quantised, init=start.fingerprint))
    assert logged["loss"][0] > 0.01  # the teacher is not quantised
    assert logged["val_divergence"][-1] < 0.8 * logged["val_divergence"][0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"task.teacher=teacher: there is no such input \(there are: none\)"),
        (["task.top_k=0"], "task.top_k=0 must be at least 1"),
        (["task.temperature=0"], "task.temperature=0.0 must be positive"),
    ],
)
def test_what_cannot_be_taught_is_refused(
    taught: tuple[Path, Cell], overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _cell(taught[0], *overrides)


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"task": "distillation"}, "teacher"),
        ({"task": "grpo", "task.beta": 0.1}, "init"),
    ],
    ids=str,
)
def test_averaged_weights_of_what_is_kept_beside_are_refused(
    taught: tuple[Path, Cell], setting: dict[str, Any], name: str
) -> None:
    root, teacher = taught
    given = [f"{key}={value}" for key, value in setting.items()]
    node = compose_tiny(root, root / "text.txt", *given)
    node["inputs"] = {name: {"runs": [teacher.fingerprint], "take": "average"}}
    with pytest.raises(ConfigError, match=f"inputs.{name}.take=average has others; give take=wei"):
        make_cells([("", node)])


def test_a_teacher_of_another_tokenizer_is_refused(taught: tuple[Path, Cell]) -> None:
    root, _ = taught
    node = compose_tiny(root, root / "text.txt", "train.steps=2", "tokenizer=char")
    (other,) = make_cells([("", node)])
    train_here(other)
    with pytest.raises(ConfigError, match=r"task.teacher=teacher: run \w+ has another tokenizer"):
        train_here(_cell(root, teacher=other.fingerprint))
