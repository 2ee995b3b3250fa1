"""Everything that a GPU has to prove and to measure, in under 8 minutes: make gpu OUT=DIR

    python -m tests.bench.gpu DIR [--commit SHA] [--only SECTION ...]

Correctness first, then speed by its value. Each section is a process with a time limit; gpu.json
and gpu.md are written after each row, so that a run that is cut leaves what it had, and gpu.log
has the output of all. The exit code is 1 if a section failed; one cut at its limit is none.

Without a GPU it says so and rehearses: the CPU's twin of each section, at tiny size.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from runner.machine import environment, storage

TOTAL_S = 470.0  # of all sections
_LEAST_S, _TICK_S = 5.0, 0.1  # a section is not begun with less left
HAS_GPU = torch.cuda.is_available()
# Without beartype, which a GPU machine may lack; a warning of its torch or pytest fails nothing.
_PYTEST: tuple[str, ...] = (
    "pytest",
    "-v",
    "-o",
    "addopts=",
    "-o",
    "filterwarnings=",
    "-p",
    "no:cacheprovider",
)
# Most of a test is compilation, by one CPU core.
if HAS_GPU and importlib.util.find_spec("xdist"):
    _PYTEST += ("-p", "xdist.plugin", "-n", str(min(6, os.cpu_count() or 1)))
_OUTCOME = "PASSED|FAILED|ERROR|SKIPPED|XFAIL"
_TESTED = re.compile(rf"^(?P<name>tests/gpu/\S+?::.+?) (?P<outcome>{_OUTCOME})\b")
# Of a test that another process ran.
_TESTED_BESIDE = re.compile(
    rf"^\[gw\d+\] \[ *\d+%\] (?P<outcome>{_OUTCOME}) (?P<name>tests/gpu/.+)"
)
_REHEARSAL = {"ESPALIER_REHEARSAL": "1", "ESPALIER_EAGER_KERNELS": "1"}


@dataclass
class Section:
    """One process: its command after `python -m`, its limit on a GPU, and what came of it."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    interpreted: bool = False  # rehearsed by Triton's interpreter
    state: str = "not run"
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


def sections() -> list[Section]:
    """Return all sections in their order."""
    tests = "tests/gpu/test_gpu_"
    # Triton's interpreter takes minutes for all, and tests/kernels/test_triton.py has them.
    few = () if HAS_GPU else ("-k", "random_words or of_the_cpu")
    bench = "tests.bench.gpu_"
    return [
        Section(
            "tests: quantising", (*_PYTEST, f"{tests}quantising.py", *few), 60, interpreted=True
        ),
        Section("tests: recipes", (*_PYTEST, f"{tests}kernels.py", f"{tests}recipes.py"), 150),
        Section("tests: runs", (*_PYTEST, f"{tests}runs.py"), 60),
        Section("training 124M", (f"{bench}training", "124m"), 120),
        Section("quantising", (f"{bench}kernels", "quantise"), 25, interpreted=True),
        Section("losses", (f"{bench}kernels", "losses"), 45),
        Section("recurrences", (f"{bench}kernels", "recurrences"), 40),
        Section("recipes 950M", (f"{bench}training", "precision"), 90),
        Section("generation 124M", (f"{bench}generation",), 60),
        Section("training 950M", (f"{bench}training", "950m"), 120),
        Section("packed cells", (f"{bench}kernels", "cells"), 40),
        Section("grid of one experiment", (f"{bench}kernels", "grid"), 40),
    ]


class Report:
    """gpu.json and gpu.md in a folder."""

    def __init__(self, folder: Path, commit: str, chosen: list[Section]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.sections = folder, chosen
        machine = environment.describe()
        machine["git_sha"] = commit or machine["git_sha"] or "unknown"
        machine["modified"] = bool(machine.pop("git_diff", ""))
        self.machine, self.started = machine, time.strftime("%Y-%m-%d %H:%M")

    def write(self) -> None:
        """Write what is known by now."""
        whole = {
            "rehearsal": not HAS_GPU,
            "started": self.started,
            "machine": self.machine,
            "sections": [asdict(section) for section in self.sections],
        }
        storage.write_atomically(self.folder / "gpu.json", json.dumps(whole, indent=1))
        storage.write_atomically(self.folder / "gpu.md", self._markdown())

    def _markdown(self) -> str:
        machine = self.machine
        where = ", ".join(machine["gpus"]) or f"no GPU: a rehearsal on {machine['cpu']}"
        changed = ", modified" if machine["modified"] else ""
        packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
        parts = [
            f"# {where}\n\n{self.started}, commit {machine['git_sha'][:9]}{changed}, "
            f"Python {machine['python']}, {packages}\n"
        ]
        parts += [
            f"## {one.name}: {one.state}, {one.seconds:.0f} s\n\n{_table(one.rows)}"
            for one in self.sections
        ]
        return "\n".join(parts)


def _table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return "(empty)\n"
    lines = [columns, ["---"] * len(columns)]
    lines += [["" if row.get(key) is None else f"{row[key]}" for key in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def run_section(section: Section, limit_s: float, log: Path, report: Report) -> None:
    """Run a section for at most `limit_s`; its rows are in the report as soon as it prints them."""
    start, counts, cut = time.monotonic(), Counter[str](), False
    variables = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | ({} if HAS_GPU else _REHEARSAL)
    if section.interpreted and not HAS_GPU:
        variables["TRITON_INTERPRET"] = "1"
    # A file, not a pipe, which a process that a killed section leaves behind would keep open.
    with open(log, "a") as output, open(log, errors="replace") as printed:
        print(f"===== {section.name}", file=output, flush=True)
        process = subprocess.Popen(
            [sys.executable, "-m", *section.command],
            env=os.environ | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        printed.seek(0, os.SEEK_END)
        ended = False
        while not ended:
            ended = process.poll() is not None
            section.seconds = time.monotonic() - start
            if not ended and section.seconds > limit_s:
                cut = True
                _kill(process)
            for line in _whole_lines(printed):
                if _read(line, section, counts):
                    report.write()
            time.sleep(_TICK_S)
    _kill(process)  # what it has left behind
    section.state = f"failed (exit code {process.returncode})" if process.returncode else "finished"
    if cut:
        section.state = f"cut at {limit_s:.0f} s"
    report.write()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all of its group; those of a process that has ended too."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _whole_lines(stream: IO[str]) -> Iterator[str]:
    """Yield the lines that have been printed to their end."""
    while True:
        position, line = stream.tell(), stream.readline()
        if not line.endswith("\n"):
            stream.seek(position)
            return
        yield line


def _read(line: str, section: Section, counts: Counter[str]) -> bool:
    """Add what a line of output says to the section's rows; return whether it said something.

    Of tests the first row counts the outcomes; one that did not pass has a row of its own.
    """
    if line.startswith("{"):
        section.rows.append(json.loads(line))
        return True
    tested = _TESTED.match(line) or _TESTED_BESIDE.match(line)
    if tested is None:
        return False
    name, outcome = tested["name"].rstrip(), tested["outcome"]
    if not counts:
        section.rows.append({})
    counts[outcome] += 1
    section.rows[0]["outcome"] = ", ".join(f"{n} {what.lower()}" for what, n in counts.items())
    if outcome in ("FAILED", "ERROR"):
        section.rows.append({"outcome": outcome.lower(), "test": name})
    return True


def main() -> int:
    """Run the sections; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--commit", default="", help="of this tree, where it is no clone")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="sections whose name has this")
    given = parser.parse_args()
    chosen = [s for s in sections() if not given.only or any(o in s.name for o in given.only)]
    if not HAS_GPU:
        print("no CUDA GPU here: rehearsing on the CPU; nothing is proven or measured")
    patience = 1 if HAS_GPU else 20  # a rehearsal measures nothing, on however busy a machine
    report = Report(given.folder, given.commit, chosen)
    deadline = time.monotonic() + patience * TOTAL_S
    report.write()
    log = given.folder / "gpu.log"
    log.unlink(missing_ok=True)
    for section in chosen:
        left = deadline - time.monotonic()
        if left < _LEAST_S:
            break
        run_section(section, min(patience * section.limit_s, left), log, report)
        print(f"{section.name}: {section.state}, {section.seconds:.0f} s", flush=True)
    print(f"see {given.folder / 'gpu.md'}")
    return int(any(section.state.startswith("failed") for section in chosen))


if __name__ == "__main__":
    sys.exit(main())
