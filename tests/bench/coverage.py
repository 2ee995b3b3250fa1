"""How often intervals of 95% hold the truth, on tables of runs whose law is known.

    python -m tests.bench.coverage [DRAWS [PART ...]]

PART is one of isoflop, laws, line, envelope, chain, differences, evaluations; default: all of them.
Each draw makes new noise for every design and every interval that is shown for such a table. What
is drawn is kept in `coverage.jsonl`, a line for each draw, and not drawn again: a study that is
stopped goes on, and a larger one begins where a smaller one ended. All rows grow evenly. Delete the
file when a method has changed. A cell is the share that holds the truth +- its Monte-Carlo standard
error; where only some draws were given an interval, their share stands before it.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from tests.bench import coverage_comparisons, coverage_laws
from tests.bench.coverage_laws import Inside, Study

_FILE = Path("coverage.jsonl")
STUDIES: Mapping[str, Study] = coverage_laws.STUDIES | coverage_comparisons.STUDIES


def main() -> None:
    """Print a table for each part: a row for each interval and design."""
    draws, parts = int(sys.argv[1]) if len(sys.argv) > 1 else 200, sys.argv[2:] or list(STUDIES)
    known = _known()
    for draw in range(draws):  # one of everything after another: a study that is cut is even
        for key, part, design, case in _rows(parts, draw):
            if key not in known:
                study = STUDIES[part]
                known[key] = study.draw(study.designs[design], study.cases[case], draw)
                with _FILE.open("a") as file:
                    file.write(json.dumps({"key": key, "inside": known[key]}) + "\n")
    for part in parts:
        cases = STUDIES[part].cases
        print(f"\n| interval of | {' | '.join(cases)} |\n|{' --- |' * (len(cases) + 1)}")
        found: dict[tuple[str, str], dict[str, list[float | None]]] = {}
        for draw in range(draws):
            for key, _, design, case in _rows([part], draw):
                for name, inside in known[key].items():
                    cell = found.setdefault((name, design), {}).setdefault(case, [])
                    cell.append(inside)
        for (name, design), cells in sorted(found.items()):
            tables = STUDIES[part].tables
            shown = [_cell(cells[case], draws, tables) for case in cases]
            print(f"| {name}; {design} | {' | '.join(shown)} |")


def _rows(parts: list[str], draw: int) -> Iterator[tuple[str, str, str, str]]:
    """Yield the key, part, design and case of everything that is drawn."""
    for part in parts:
        study = STUDIES[part]
        if draw % study.tables:
            continue
        for design in study.designs:
            if design in study.slow and draw % 20:
                continue
            for case in study.cases:
                yield f"{part} | {design} | {case} | {draw}", part, design, case


def _known() -> dict[str, Inside]:
    if not _FILE.exists():
        return {}
    lines = map(json.loads, _FILE.read_text().splitlines())
    return {line["key"]: line["inside"] for line in lines}


def _cell(shares: list[float | None], draws: int, tables: int) -> str:
    given = np.array([share for share in shares if share is not None])
    if not len(given):
        return "none given"
    error = given.std(ddof=1) / np.sqrt(len(given)) if len(given) > 1 else np.nan
    text = f"{given.mean():.1%} +- {error:.1%}"
    few = f"{len(given) / len(shares):.0%} given: " if len(given) < len(shares) else ""
    return few + text + (f" ({len(shares) * tables} draws)" if len(shares) * tables < draws else "")


if __name__ == "__main__":
    main()
