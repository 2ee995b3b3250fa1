"""The house keeps its shape: rooms, file sizes, names, import cost."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernels", "models", "runner", "analysis")
FILES = [f for p in PACKAGES for f in sorted((ROOT / p).rglob("*.py"))]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_file_is_short_and_says_what_it_is(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 400
    assert text.startswith('"""')
    assert file.name != "utils.py"


def test_every_experiment_has_its_files() -> None:
    folders = [p for p in (ROOT / "experiments").iterdir() if p.is_dir()]
    assert folders
    index = (ROOT / "experiments" / "README.md").read_text()
    for folder in folders:
        names = {p.name for p in folder.iterdir()}
        assert {"sweep.yaml", "README.md", "figures.py", "results.csv"} <= names, folder
        assert f"({folder.name}/README.md)" in index, f"no {folder.name} in the index"


def test_no_other_distribution_owns_our_package_names() -> None:
    owners = importlib.metadata.packages_distributions()
    for name in PACKAGES:
        assert set(owners.get(name, [])) <= {"espalier"}


def test_transformers_is_not_confused_by_our_kernels_package() -> None:
    subprocess.run([sys.executable, "-c", "import transformers.integrations"], check=True)


def test_help_answers_without_heavy_imports() -> None:
    code = (
        "import sys; from runner.commands.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'mlflow', 'datasets', 'transformers', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_launcher_starts_its_template_before_it_imports_torch() -> None:
    code = "import sys, runner.commands.hydra_plugin; assert not {'torch', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
