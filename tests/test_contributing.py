"""The examples of CONTRIBUTING.md run as they stand, from a package outside the clone."""

import json
import os
import re
from pathlib import Path

import pytest

from tests.command_server import ROOT, run
from tests.conftest import TINY, write_text

_PART = re.compile(
    r"`(?P<path>(?:mylab|conf)/[\w/]+\.(?:py|yaml))`|```(?:python|yaml)\n(?P<code>.*?)```",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files on the page: a block belongs to the first path before it that has none yet."""
    folder, named = tmp_path_factory.mktemp("lab"), []
    for part in _PART.finditer((ROOT / "CONTRIBUTING.md").read_text()):
        if part["path"] is not None:
            named.append(part["path"])
            continue
        file = folder / named.pop(0)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(part["code"])
    assert not named, f"no block for {named}"
    write_text(folder / "text.txt")
    return folder


def _run(lab: Path, *overrides: str) -> dict[str, float]:
    """Run a cell with the lab's package at hand and return its last metrics."""
    flags = [f"root={lab}", f"hydra.searchpath=[file://{lab}/conf]"]
    if "data=counting" not in overrides:
        flags.append(f"data.sources.0.path={lab}/text.txt")
    environment = os.environ | {"PYTHONPATH": str(lab), "OMP_NUM_THREADS": "1"}
    done = run("runner", *TINY, *flags, *overrides, env=environment)
    assert done.returncode == 0, done.stderr
    fingerprint = re.search(r"[0-9a-f]{16}", done.stderr)
    assert fingerprint is not None
    last: dict[str, float] = {"fingerprint": fingerprint[0]}  # type: ignore[dict-item]
    for line in (lab / "runs" / fingerprint[0] / "metrics.jsonl").read_text().splitlines():
        last |= json.loads(line)
    return last


def test_model_optimiser_schedule_and_evaluation(lab: Path) -> None:
    last = _run(
        lab, "model=bigram", "optim=sgd", "schedule=hyperbolic", "+eval/also@eval.also.norms=norms"
    )
    assert last["weight_norm"] > 0
    assert last["lr"] == pytest.approx(0.1 / 1.11)


def test_a_task_keeps_the_checkpoint_of_highest_accuracy(lab: Path) -> None:
    last = _run(
        lab, "task=repeats", "train.steps=18", "eval.every=3", "train.checkpoint.keep_last=1"
    )
    assert 0.0 <= last["val_accuracy"] <= 1.0
    run = lab / "runs" / str(last["fingerprint"])
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    seen = {row["step"]: row["val_accuracy"] for row in rows if "val_accuracy" in row}
    best = max(seen, key=lambda step: (seen[step], -step))
    assert f"{best:08d}" in {folder.name for folder in (run / "checkpoints").iterdir()}


def test_source_and_tokenizer(lab: Path) -> None:
    overrides = [
        "data=counting",
        "data.split=documents",
        "tokenizer=words",
        "eval.also.samples.prompt=one",
    ]
    last = _run(lab, *overrides)
    assert last["val_loss"] < 2.4


def test_a_kind_of_work(lab: Path) -> None:
    trained = _run(lab)
    made = _run(
        lab,
        "work=make",
        "work.documents=3",
        "work.tokens=8",
        f"inputs.init.run={trained['fingerprint']}",
    )
    counted = _run(lab, "work=count", f"inputs.text.run={made['fingerprint']}")
    assert counted["words"] > 0
