"""Configs need no torch: every class of conf/ is imported, validated and hashed without it."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

BLOCKED = """
import sys
sys.modules["torch"] = None  # whoever imports it raises ImportError
from pathlib import Path
from hydra import compose, initialize_config_dir
from runner.commands.composer import open_keys, to_plain
from runner.commands.hydra_plugin import register
from runner.records.cells import make_cells
from runner.records.config import target_class, validate

def composed(*overrides):
    register()
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        return to_plain(compose("config", open_keys(list(overrides))))
"""


def _run(code: str, *arguments: str) -> str:
    """Return what `code` prints in a fresh interpreter without torch."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_class_of_conf_is_imported_and_the_default_validated() -> None:
    named = {
        line.partition("_target_:")[2].split(",")[0].strip(" }")
        for file in ROOT.glob("conf/**/*.yaml")
        for line in file.read_text().splitlines()
        if "_target_:" in line
    }
    ours = sorted(name for name in named if not name.startswith("hydra_plugins"))
    assert len(ours) > 20
    printed = _run(
        "for name in sys.argv[1:]: target_class('conf', name)\n"
        "run = validate(composed())\n"
        "print(run.model.num_parameters(257), run.model.forward_flops_per_sequence(257, 64))",
        *ours,
    )
    assert printed.split()[0].isdigit()


def test_a_cell_has_its_fingerprint_and_its_sizes(text: Path) -> None:
    code = (
        "(cell,) = make_cells([('', composed(*sys.argv[1:]))])\n"
        "model = cell.config.model\n"
        "flops = model.forward_flops_per_sequence(257, 64)\n"
        "print(cell.fingerprint, model.num_parameters(257), *flops)"
    )
    for model in ("gpt_nano", "hybrid"):
        printed = _run(code, f"model={model}", "data=text", f"data.sources.0.path={text}")
        assert len(printed.split()[0]) == 16
        assert all(int(number) > 0 for number in printed.split()[1:])
