"""Tab completion in bash, zsh and fish: overrides of `python -m runner`, verbs of `espalier`."""

import os
import shutil
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


OTHER_SHELLS = {
    "zsh": """
compdef() { }
compadd() { print -l -- ${@:#-*} }
eval "$(python -m runner.commands.cli completion zsh)"
words=(python -m runner precision=mx) CURRENT=4
_espalier_runner
""",
    "fish": """
python -m runner.commands.cli completion fish | source
complete -C "python -m runner precision=mx"
""",
}


@pytest.mark.parametrize("shell", OTHER_SHELLS)
def test_other_shells_complete_after_python_m_runner(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}: make debian")
    command = [shell, "-c", OTHER_SHELLS[shell]]
    done = subprocess.run(
        command, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["precision=mxfp4", "precision=mxfp4_tseng", "precision=mxfp8"]


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
    asked |= {"COMP_WORDS": "espalier plan dem", "COMP_CWORD": "2"}
    done = subprocess.run(command, cwd=ROOT, env=asked, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["demo"]
    asked |= {"COMP_WORDS": "espalier run -m precision.keep_f", "COMP_CWORD": "3"}
    done = subprocess.run(command, cwd=ROOT, env=asked, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["precision.keep_first="]


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
        ("+model/ad", ["+model/adapter="]),
        ("+model/adapter=ql", ["+model/adapter=qlora"]),
        ("+eval/also@eval.also.x=ind", ["+eval/also@eval.also.x=induction"]),
        ("model.adapter.rank_", []),
        ("model.parts.m.state", ["model.parts.m.state_dim="]),
        ("hydra/launcher=s", ["hydra/launcher=slurm"]),
        ("hydra.launcher.part", ["hydra.launcher.partition="]),
        ("se", ["seed="]),
        ("-c", ["-cd", "-cn"]),
    ],
)
def test_keys_their_choices_and_files_complete(
    word: str, becomes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert continuations(word) == becomes
