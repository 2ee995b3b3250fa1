"""Tab completion in bash: overrides of `python -m runner`, verbs of `espalier`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.commands.completion import continuations
from tests.conftest import ROOT

SCRIPT = """
eval "$(python -m runner -sc install=bash)"
for COMP_LINE in "python -m runner -m model=gpt_nano precision=mx" "python -m pytest te"; do
    COMP_POINT=${#COMP_LINE} COMP_WORDS=($COMP_LINE) COMPREPLY=()
    _espalier_runner
    echo "${COMPREPLY[*]}"
done
"""


def _environment(**more: str) -> dict[str, str]:
    folder = os.path.dirname(sys.executable)
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"} | more


def test_names_of_a_group_complete_after_python_m_runner() -> None:
    done = subprocess.run(
        ["bash", "-c", SCRIPT],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    found, of_other_commands = done.stdout.split("\n")[:2]
    assert found.split() == ["precision=mxfp4", "precision=mxfp4_tseng", "precision=mxfp8"]
    assert of_other_commands == ""


def test_verbs_of_espalier_complete(tmp_path: Path) -> None:
    asked = _environment(
        _ESPALIER_COMPLETE="complete_bash", COMP_WORDS="espalier sta", COMP_CWORD="1"
    )
    command = [sys.executable, "-m", "runner.commands.cli"]
    done = subprocess.run(command, cwd=ROOT, env=asked, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["status"]
    (tmp_path / "sweeps/known").mkdir(parents=True)
    (tmp_path / "sweeps/known/cells.jsonl").touch()
    asked |= {"COMP_WORDS": f"espalier status --root {tmp_path} kn", "COMP_CWORD": "4"}
    done = subprocess.run(command, cwd=ROOT, env=asked, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["known"]


@pytest.mark.parametrize(
    ("word", "becomes"),
    [
        ("optim.bet", ["optim.betas="]),
        ("~train.cli", ["~train.clip="]),
        ("precision=bf16,mxfp8", ["precision=bf16,mxfp8"]),
        ("train.compile=", ["train.compile=false", "train.compile=true"]),
        ("tokenizer.kind=w", ["tokenizer.kind=wordpiece"]),
        ("data.sources.0.path=READM", ["data.sources.0.path=README.md"]),
        ("nothing.at.all", []),
    ],
)
def test_keys_their_choices_and_files_complete(
    word: str, becomes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert continuations(word) == becomes
