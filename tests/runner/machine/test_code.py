"""Code that was edited since a run is told from code that was only laid out anew."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.machine.code import hashes
from runner.records import journal
from runner.records.cells import freeze_cell, make_cells
from runner.records.drift import drift, drifted, note_code
from tests.command_server import ROOT

CONFIG = '''"""A config."""
import torch.nn
from models.config import config

@config
class LabConfig:
    """Words."""
    width: int = 8
    def build(self, vocab_size, seed):
        from driftlab.parts import halves
        return halves.half(torch.nn.Embedding(vocab_size, vocab_size))
'''
FILES = {
    "driftlab/__init__.py": "",
    "driftlab/config.py": CONFIG,
    "driftlab/parts/__init__.py": "from . import halves",
    "driftlab/parts/halves.py": "from .. import shared\ndef half(x):\n    return x / shared.TWO\n",
    "driftlab/shared.py": '"""Two."""\nTWO = 2\n',
    "driftlab/unused.py": "x = 1\n",
    "driftlab_neighbour.py": "x = 1\n",
}
LAID_OUT = '"""Two and\nmore words."""\n\n# why\nTWO = (\n    2\n)\n'


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package outside the clone, importable."""
    for name, text in FILES.items():
        (tmp_path / "lab" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lab" / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "lab"))
    return tmp_path / "lab" / "driftlab"


def test_an_edit_is_seen_where_the_program_changes_and_nowhere_else(
    lab: Path, tmp_path: Path, compose: Callable[..., dict[str, Any]]
) -> None:
    node = compose("name=d")
    node["model"] = {"_target_": "driftlab.config.LabConfig"}
    (cell,) = make_cells([("lab", node)])
    freeze_cell(cell)
    attempt = cell.folder / "attempts/0001"
    attempt.mkdir(parents=True)
    assert note_code(attempt, cell) is None
    found = json.loads((attempt / "code.json").read_text())
    lab_modules = {"", ".config", ".parts", ".parts.halves", ".shared"}
    assert {m for m in found if m.startswith("driftlab")} == {f"driftlab{m}" for m in lab_modules}
    assert {"models.layers", "kernels.philox", "runner.learn.trainer"} <= found.keys()
    tops = {module.partition(".")[0] for module in found}
    assert tops == {"driftlab", "models", "kernels", "runner"}, "what is installed is not followed"
    assert not [m for m in found if m.startswith(("runner.views", "runner.commands"))]
    assert drift(cell.folder) is None
    (lab / "shared.py").write_text(LAID_OUT)
    (lab / "unused.py").write_text("x = 2\n")
    assert drift(cell.folder) is None
    (lab / "shared.py").write_text(LAID_OUT.replace("    2\n", "    3\n"))
    assert str(drift(cell.folder)).startswith(
        "driftlab.shared edited since; the results are those of the old"
    )
    (attempt / "lease.json").write_text("{}")
    (attempt / "events.jsonl").write_text('{"event": "finished", "time": 0}\n')
    assert journal.state(cell.folder) == "finished"
    (line,) = drifted([cell])
    assert "driftlab.shared" in line
    assert note_code(attempt, cell) is None, "edited after its launcher read it: nothing to resume"
    again = cell.folder / "attempts/0002"
    again.mkdir()
    assert note_code(again, cell) == "code: driftlab.shared edited since the first attempt"
    (lab / "parts/halves.py").write_text("def half(x:")  # half edited: named, not a crash
    assert "driftlab.parts.halves" in str(drift(cell.folder))
    (lab / "parts/halves.py").unlink()
    assert "driftlab.parts.halves" in str(drift(cell.folder))
    (again / "code.json").write_text('{"torn')
    (line,) = drifted([cell])
    assert f"{again / 'code.json'} is not JSON" in line


def test_an_uncommitted_edit_of_ours_is_seen(tmp_path: Path) -> None:
    """In a copy of the packages, by a fresh process: this one has imported them."""
    for package in ("kernels", "models", "runner"):
        subprocess.run(["cp", "-r", str(ROOT / package), str(tmp_path)], check=True)
    layers = tmp_path / "models/layers.py"
    then = hashes(["models.decoder_config"])
    layers.write_text(layers.read_text().replace("F.silu", "F.gelu"))
    (tmp_path / "models/decoder.py").write_text(
        (ROOT / "models/decoder.py").read_text() + "\n# a comment\n"
    )
    script = f"from runner.machine.code import changed; print(changed({then!r}))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['models.layers']"
