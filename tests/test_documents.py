"""Every command in README, docs and examples is one that the program takes; every link leads on."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import analysis.__main__
from runner.commands.cli import app
from runner.commands.key_reference import CONF, blocks, groups
from runner.commands.overrides import key_of
from tests.conftest import ROOT
from tests.release import POINTS

PAGES = sorted(
    (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("examples/*/README.md"),
    )
)
_BLOCK = re.compile(
    r"(?:^|\n\n)((?: {4}[^\n]*\n)+)|```(?:console|shell|bash)?\n(.*?)```", re.DOTALL
)
_BEGIN = re.compile(r"(?:^|(?<=\s\s))(?=(?:espalier|python -m (?:runner|analysis)|make) )")
_FILE = re.compile(r"[a-z_]+(/[a-z_]+)+|[a-z_]+\.(csv|json|jsonl|parquet)")
_LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)[^)]*\)")


def _commands(page: Path) -> Iterator[str]:
    """Yield the commands in the blocks of a page; a comment ends a line."""
    for block in _BLOCK.finditer(page.read_text()):
        for line in (block[1] or block[2] or "").replace("\\\n", " ").splitlines():
            code = re.sub(r"\s#.*|\s\.\.\.(?=\s|$)", "", line).strip()
            yield from (part.strip() for part in _BEGIN.split(code) if _BEGIN.match(part))


COMMANDS = sorted({(page, command) for page in PAGES for command in _commands(page)})


@cache
def _cli(program: str) -> Any:
    """Return a program whose verbs take their arguments and do nothing."""
    command = typer.main.get_command(app if program == "espalier" else analysis.__main__.app)
    waiting = [command]
    while waiting:
        part = waiting.pop()
        below = list(getattr(part, "commands", {}).values())
        waiting += below
        if not below:
            part.callback = None
    return command


def _code(program: str, words: list[str]) -> int:
    """Return the exit code of a program that does nothing but take its arguments.

    The files that they name are made in the working directory.
    """
    for word in filter(_FILE.fullmatch, words):
        Path(word).parent.mkdir(parents=True, exist_ok=True)
        Path(word).touch() if Path(word).suffix else Path(word).mkdir(exist_ok=True)
    try:
        _cli(program).main(words, prog_name=program)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@cache
def _keys() -> frozenset[str]:
    """Return every key as documents write it, and the names of groups."""
    found = {key.path for group in groups() for block in blocks(group) for key in block.keys}
    return frozenset(found | set(groups()))


def _is_key(name: str) -> bool:
    """Return whether a key, a node above one or a folder of conf/ has this name."""
    if (CONF / name.partition("@")[0]).is_dir() or name == "hydra.searchpath":
        return True
    parts = name.split(".")
    return any(
        all(
            one == given or one in ("NAME", "LETTER") or (one == "0" and given.isdigit())
            for one, given in zip(key.split("."), parts, strict=False)
        )
        for key in _keys()
        if key.count(".") >= name.count(".")
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_is_one(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wrong = []
    for command in sorted({command for place, command in COMMANDS if place == page}):
        words = shlex.split(command)
        words = words[: words.index(">")] if ">" in words else words
        if words[0] == "make":
            named = [word for word in words[1:] if "=" not in word and word != ";"]
            wrong += [command] if not set(named) <= targets else []
        elif words[:3] == ["python", "-m", "runner"]:
            keys = [key_of(word) for word in words[3:] if "=" in word and word[0] != "-"]
            wrong += [f"{command}: {key} is no key" for key in keys if not _is_key(key)]
        else:
            program = "espalier" if words[0] == "espalier" else "analysis"
            given = words[1:] if program == "espalier" else words[3:]
            wrong += [command] if _code(program, given) == 2 else []
    assert not wrong


def test_pages_have_commands_and_safe_ones_run() -> None:
    assert len(COMMANDS) > 80
    safe = {c for _, c in COMMANDS if c.startswith("espalier keys ") and ">" not in c}
    assert safe
    for command in safe - {c for c in safe if "[" in c}:
        done = CliRunner().invoke(app, shlex.split(command)[1:])
        assert done.exit_code == 0, f"{command}: {done.output}"


def test_links_lead_to_files_that_exist() -> None:
    made = {"reference/keys.md", "reference/verbs.md", "reference/api.md"}
    broken = [
        f"{page.name}: {link}"
        for page in PAGES
        for link in _LINK.findall(page.read_text())
        if link not in made and not (page.parent / link).exists()
    ]
    assert broken == []


def test_the_readme_is_read_in_two_minutes() -> None:
    text = re.sub(r"^ {4}.*$|```.*?```", "", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    assert len(text.split()) <= 500, "250 words a minute, without the commands"


def test_a_release_finds_pins_and_citation() -> None:
    states = {name: is_done() for name, is_done, _ in POINTS[:3]}
    assert states["constraints.txt pins each package"]
    assert states["CITATION.cff has the version"]


def test_the_container_installs_what_the_clone_has() -> None:
    """Every file that the Dockerfile copies exists, and the editor's container is built from it."""
    steps = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    known = ("FROM", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "CMD")
    assert all(step.split()[0] in known for step in steps if step and step[0] != "#")
    copied = [name for step in steps if step.startswith("COPY") for name in step.split()[1:-1]]
    assert copied
    assert all((ROOT / name).exists() for name in copied)
    editor = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    assert (ROOT / ".devcontainer" / editor["build"]["dockerfile"]).samefile(ROOT / "Dockerfile")
    assert f"useradd --create-home {editor['remoteUser']}" in (ROOT / "Dockerfile").read_text()


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    copied = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", copied, ignore=shutil.ignore_patterns("_build", "reference"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for command in (
        [sys.executable, "reference.py"],
        [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "-b", "html", ".", "html"],
    ):
        done = subprocess.run(
            command, cwd=copied, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    pages = "".join(file.read_text() for file in (copied / "html").rglob("*.html"))
    assert "optim.weight_decay" in pages
    fetched = re.findall(r"""<(?:script|link|img)[^>]+(?:src|href)=["'](https?://[^"']+)""", pages)
    assert fetched == []
