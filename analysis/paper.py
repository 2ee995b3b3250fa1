"""A folder for a paper: figures with captions, tables, numbers as macros, a .tex that compiles.

The text refers to numbers by macros (`\\BfSixteenMean`), so it follows the data when the command is
run again. provenance.json lists the runs, commits and the command that the numbers come from.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.outputs import Outputs
from analysis.readme import story
from analysis.runs import Runs
from analysis.tables import escape, latex, number

_DIGITS = dict(
    zip(
        "0123456789",
        ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine"),
        strict=True,
    )
)
_MAIN = r"""\documentclass{article}
\usepackage[margin=1in]{geometry}
\usepackage{booktabs,graphicx}
\input{numbers}
\title{%(title)s}
\date{}
\begin{document}
\maketitle
%(question)s

The sweep has \NumCells{} cells: \CellStates.

%(tables)s
%(figures)s
\section*{Provenance}
\raggedright
%(provenance)s
\end{document}
"""


def write_paper(
    runs: Runs,
    name: str,
    folder: Path,
    *,
    figures: list[Path],
    results: Path | None,
    readme: Path | None,
    provenance: dict[str, Any],
) -> Path:
    """Return the path of main.tex in `folder` after writing the paper there.

    main.tex and captions are written once, so that edits stay; all else is written again, but for
    files that are no longer, or never were, as this function made them.

    Args:
        figures: PDF files, a CSV of the same name beside each.
        results: results.csv of the experiment.
        readme: of the experiment, whose question opens the paper.
        provenance: commits, command and fingerprints, see `provenance`.

    Raises:
        OutputError: a file there was not made by this function, or the folder cannot be written.
        ValueError: two numbers would have one name.
    """
    outputs = Outputs(folder / "provenance.json", "espalier paper")
    with outputs.staged(provenance) as staged:
        (staged / "figures").mkdir()
        blocks = [_copy_figure(figure, runs, staged / "figures") for figure in figures]
        tables = ""
        macros = [
            ("NumCells", str(len(runs.table))),
            ("CellStates", escape(runs.count().partition(": ")[2])),
        ]
        if results is not None and results.exists():
            numbers = pd.read_csv(results)
            shown = _readable(numbers).set_index(numbers.columns[0])
            (staged / "results.tex").write_text(
                latex(shown, caption=f"{name}: results", label="results")
            )
            tables = r"\input{results}"
            macros += list(_macros(numbers))
        (staged / "numbers.tex").write_text(_definitions(macros))
        (staged / "provenance.tex").write_text(_provenance(provenance))
        parts = {
            "title": escape(name),
            "question": escape(story(readme).get("question", "") if readme else ""),
            "tables": tables,
            "figures": "\n".join(blocks),
            "provenance": r"\input{provenance}",
        }
        (staged / "main.tex").write_text(_MAIN % parts)
        for file in [staged / "main.tex", *staged.glob("figures/*.caption.tex")]:
            if (folder / file.relative_to(staged)).exists():  # yours since it was written
                file.unlink()
    return folder / "main.tex"


def _copy_figure(figure: Path, runs: Runs, folder: Path) -> str:
    """Return the LaTeX of a figure after copying it, its CSV and a caption to `folder`."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "-", figure.stem)  # TeX reads file names too
    for kind in (".pdf", ".csv"):
        if figure.with_suffix(kind).exists():
            shutil.copy(figure.with_suffix(kind), folder / f"{stem}{kind}")
    title = escape(figure.stem.replace("_", " ").capitalize())
    (folder / f"{stem}.caption.tex").write_text(f"{title}. {escape(runs.count())}.\n")
    return _figure(stem)


def provenance(root: Path, runs: Runs) -> dict[str, Any]:
    """Return fingerprints, commits, versions and hardware of the finished runs under `root`."""
    names = sorted(runs.finished["fingerprint"])
    facts = []
    for name in names:
        files = sorted((root / "runs" / name).glob("attempts/*/environment.json"))
        facts += [json.loads(file.read_text()) for file in files[-1:]]

    def distinct(key: str) -> list[str]:
        return sorted({str(fact[key]) for fact in facts})

    return {
        "commits": distinct("git_sha"),
        "torch": distinct("torch"),
        "hardware": sorted({f"{fact['cpu']} {fact['gpus'] or ''}".strip() for fact in facts}),
        "fingerprints": names,
    }


def macro_name(*parts: object) -> str:
    """Return a macro's name, letters only: ("nvfp4", "low") -> NvfpFourLow."""
    words = re.findall(
        r"[A-Za-z]+|\d", " ".join(str(part) for part in parts).replace("-", " minus ")
    )
    return "".join(_DIGITS.get(word, word[:1].upper() + word[1:]) for word in words)


def _macros(results: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Yield (macro, number) for each number; leading columns that identify rows name them."""
    keys = 1
    while keys < len(results.columns) and results.iloc[:, :keys].duplicated().any():
        keys += 1
    for row in results.itertuples(index=False):
        for column, value in list(zip(results.columns, row, strict=True))[keys:]:
            if isinstance(value, (int, float)):
                yield macro_name(*row[:keys], column), number(float(value))


def _definitions(macros: list[tuple[str, str]]) -> str:
    twice = {name for name, _ in macros if sum(name == other for other, _ in macros) > 1}
    if twice:
        raise ValueError(
            f"several numbers would be called {', '.join(sorted(twice))}: "
            "name the rows of results.csv apart"
        )
    return "".join(f"\\newcommand{{\\{name}}}{{{value}}}\n" for name, value in macros)


def _readable(table: pd.DataFrame) -> pd.DataFrame:
    shown = table.map(lambda value: f"{value:.4g}" if isinstance(value, float) else value)
    return shown.replace("nan", "--").fillna("--")


def _figure(stem: str) -> str:
    return (
        "\\begin{figure}[htbp]\n\\centering\n"
        f"\\includegraphics{{figures/{stem}}}\n"
        f"\\caption{{\\protect\\input{{figures/{stem}.caption}}\\unskip}}\n\\end{{figure}}"
    )


def _provenance(facts: dict[str, Any]) -> str:
    lines = []
    for key, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        lines.append(f"\\noindent {escape(key)}: {{\\ttfamily\\small {escape(text)}}}\\par")
    return "\n".join(lines) + "\n"
