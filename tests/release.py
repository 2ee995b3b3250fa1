"""Walk the list of a release: `make release`. Prints what is done, and what is not and how.

Nothing is changed; the exit code is 1 if a point is open.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
Point = tuple[str, Callable[[], bool], str]


def _run(*command: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def _changelog_names_the_version() -> bool:
    return f"## [{_PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def _citation_has_the_version() -> bool:
    return f"version: {_PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()


def _tree_is_clean() -> bool:
    return not _run("git", "status", "--porcelain", "--untracked-files=no").stdout


def _head_is_tagged() -> bool:
    return f"v{_PROJECT['version']}" in _run("git", "tag", "--points-at", "HEAD").stdout.split()


def pinned() -> bool:
    """Return whether each constraint names one version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return all(
        re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines if line[:1] not in ("", "#")
    )


def _checks_pass() -> bool:
    return _run("make", "check").returncode == 0


def _documents_build() -> bool:
    return _run("make", "docs").returncode == 0


def _wheel_builds() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        options = ("--no-deps", "--no-build-isolation", "-w", folder)
        built = _run(sys.executable, "-m", "pip", "wheel", "-q", ".", *options)
        return built.returncode == 0 and bool(list(Path(folder).glob("espalier-*.whl")))


POINTS: tuple[Point, ...] = (
    ("constraints.txt pins each package", pinned, "pip freeze in .venv tells the versions"),
    (
        "CHANGELOG.md has a section of the version",
        _changelog_names_the_version,
        "rename [Unreleased]; numerics that changed are stated in words",
    ),
    ("CITATION.cff has the version", _citation_has_the_version, "set `version:`"),
    ("what git tracks is committed", _tree_is_clean, "git status"),
    ("format, lint, types, imports, layout", _checks_pass, "make check"),
    ("the documentation builds without a warning", _documents_build, "make docs"),
    ("a wheel builds", _wheel_builds, "pip wheel . --no-deps"),
    ("the commit is tagged", _head_is_tagged, f"after make test: git tag v{_PROJECT['version']}"),
)


def main() -> None:
    """Print the list; exit with 1 if a point is open."""
    open_points = 0
    for name, is_done, way in POINTS:
        done = is_done()
        open_points += not done
        print(f"[{'x' if done else ' '}] {name}{'' if done else f': {way}'}", flush=True)
    sys.exit(1 if open_points else 0)


if __name__ == "__main__":
    main()
