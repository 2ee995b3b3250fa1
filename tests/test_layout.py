"""The house keeps its shape: rooms, file sizes, names, import cost."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernels", "models", "runner", "analysis")
INITS = [f for p in PACKAGES for f in sorted((ROOT / p).rglob("__init__.py"))]
FILES = [f for p in PACKAGES for f in sorted((ROOT / p).rglob("*.py"))]
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
FIGURES = sorted((ROOT / "experiments").glob("*/figures.py"))
FILE_MODULES = {"fcntl", "glob", "io", "mmap", "pathlib", "shutil", "subprocess", "tempfile"}
FILE_FUNCTIONS = {"open", "read_bytes", "read_text", "write_bytes", "write_text"}


def _relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


def _imports(tree: ast.Module) -> set[str]:
    """Return the packages that a file imports anywhere, the first part of their names."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("file", FILES, ids=_relative)
def test_file_is_short_and_says_what_it_is(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 400
    assert text.startswith('"""')
    assert file.name != "utils.py"


@pytest.mark.parametrize("file", KERNELS, ids=_relative)
def test_kernels_are_functions_that_touch_no_file(file: Path) -> None:
    tree = ast.parse(file.read_text())
    nodes = list(ast.walk(tree))
    bases = [ast.unparse(b) for n in nodes if isinstance(n, ast.ClassDef) for b in n.bases]
    assert not [base for base in bases if base.rpartition(".")[2] == "Module"]
    assert not _imports(tree) & FILE_MODULES
    called = {ast.unparse(n.func) for n in nodes if isinstance(n, ast.Call)}
    assert not {name.rpartition(".")[2] for name in called} & FILE_FUNCTIONS
    assert not called & {"torch.load", "torch.save"}
    attributes = {ast.unparse(n) for n in nodes if isinstance(n, ast.Attribute)}
    assert not {a for a in attributes if a.startswith("os.") and not a.startswith("os.environ")}


@pytest.mark.parametrize("file", FIGURES, ids=_relative)
def test_figures_are_drawn_by_analysis_alone(file: Path) -> None:
    own_modules = {script.stem for script in file.parent.glob("*.py")}
    forbidden = {"runner", "models", "kernels", "torch", *own_modules}
    assert not _imports(ast.parse(file.read_text())) & forbidden


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


@pytest.mark.parametrize("init", INITS, ids=lambda f: str(f.parent.relative_to(ROOT)))
def test_a_package_lists_its_modules(init: Path) -> None:
    modules = {f.stem for f in init.parent.glob("*.py")} | {
        f.parent.name for f in init.parent.glob("*/__init__.py")
    }
    listed = re.search(r"__all__ = \[(.*?)\]", init.read_text(), re.DOTALL)
    assert listed is not None, "add __all__, the names of its modules"
    assert set(re.findall(r'"(\w+)"', listed[1])) == modules - {"__init__", "__main__"}


def test_files_of_tests_have_names_of_their_own() -> None:
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), "pytest imports them by name"
