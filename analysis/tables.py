"""Tables for a paper: mean +- spread over runs by rows and columns, as text or LaTeX (booktabs)."""

import re
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import require
from analysis.pooling import say_pooled

_SPECIAL = {
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
_HOLE = "--"
EMPTY = "(empty)"  # the name of a value that is missing
_MOST_DECIMALS = 5


def cross_table(
    runs: pd.DataFrame, *, rows: str, columns: str | None, metric: str, digits: int | None = None
) -> pd.DataFrame:
    """Return cells "mean +- s.d. (n)" by value of `rows` and `columns`; a hole of the grid is "--".

    Runs whose value of `rows` or `columns` is empty have a row or column of their own. What the
    runs of a cell differ in besides the seed is said, see `analysis.pooling.say_pooled`.

    Args:
        digits: after the point; None: as many as the spread over seeds justifies.

    Raises:
        ValueError: two of rows, columns and metric are the same.
    """
    by = [rows, columns] if columns else [rows]
    require(runs, [*by, metric])
    if len({*by, metric}) <= len(by):
        raise ValueError(f"rows, columns and metric are {', '.join([*by, metric])}: choose others")
    for name in by:
        if runs[name].isna().any():
            runs = runs.assign(**{name: in_words(runs[name])})
    grouped = (
        runs.dropna(subset=[metric]).groupby(by, sort=False)[metric].agg(["mean", "std", "count"])
    )
    decimals = digits if digits is not None else _decimals(grouped)
    text = pd.Series(
        [
            _cell(mean, spread, count, decimals)
            for mean, spread, count in grouped.to_numpy(dtype=float)
        ],
        index=grouped.index,
    )
    table = text.unstack(columns) if columns else text.to_frame(metric)
    every = list(dict.fromkeys(runs[rows]))
    table = table.reindex(index=every)
    if columns:
        table = table.reindex(columns=list(dict.fromkeys(runs[columns])))
    table = table.fillna(_HOLE)
    say_pooled(table, runs.dropna(subset=[metric]), by, metric)
    return table


def in_words(values: "pd.Series[Any]") -> "pd.Series[str]":
    """Return the values of a column as words: whole numbers without a point, no value "(empty)"."""
    return values.map(lambda v: EMPTY if pd.isna(v) else _word(v)).astype(object)


def same_word(text: str, words: "pd.Series[str]") -> str:
    """Return the one of `words` that `text` means: 16.0 is 16, true is True; `text` if none is."""
    try:
        number = _word(float(text))
    except ValueError:
        number = text
    meant = [word for word in words if word in (text, number) or word.lower() == text.lower()]
    return meant[0] if meant and text not in meant else text


def _word(value: object) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def latex(table: pd.DataFrame, *, caption: str, label: str, note: str = "") -> str:
    """Return a LaTeX table (booktabs); "+-" becomes $\\pm$, special characters are escaped.

    Args:
        label: of \\ref, after "tab:"; what is no letter, digit, "_", ":", "." or "-" becomes "-".
    """
    head = " & ".join(escape(str(name)) for name in [table.index.name or "", *table.columns])
    label = re.sub(r"[^A-Za-z0-9_:.-]", "-", label)
    lines = [
        r"\begin{table}[htbp]",
        r"\centering",
        rf"\caption{{{escape(caption)}}}",
        rf"\label{{tab:{label}}}",
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"\toprule",
        rf"{head} \\",
        r"\midrule",
    ]
    for name, row in table.iterrows():
        cells = [escape(str(value)).replace("+-", r"$\pm$") for value in row]
        first = escape(str(name))
        if first.startswith(("[", "*")):  # after the end of a row TeX reads them as its arguments
            first = "{}" + first
        lines.append(" & ".join([first, *cells]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    if note:
        lines.append(rf"\par\smallskip\footnotesize {escape(note)}")
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def escape(text: str) -> str:
    """Return `text` in one line with LaTeX's special characters escaped."""
    return "".join(_SPECIAL.get(letter, letter) for letter in " ".join(text.split()))


def number(value: float, digits: int = 4) -> str:
    """Return a number in LaTeX with `digits` significant digits, powers of ten written out."""
    if not np.isfinite(value):
        return _HOLE
    if value != 0 and not 1e-3 <= abs(value) < 10**digits:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return rf"\ensuremath{{{float(mantissa):g} \times 10^{{{int(power)}}}}}"
    return rf"\ensuremath{{{value:.{digits}g}}}"


def _cell(mean: float, spread: float, count: float, decimals: int) -> str:
    error = f" +- {_shown(spread, decimals, 2)}" if np.isfinite(spread) else ""
    return f"{_shown(mean, decimals, 3)}{error} ({int(count)})"


def _shown(value: float, decimals: int, digits: int) -> str:
    """Return a number with `decimals`, or with a power of ten where these would hide it."""
    hidden = value != 0 and not 10.0**-decimals <= abs(value) < 1e7
    return f"{value:.{digits}g}" if hidden else f"{value:.{decimals}f}"


def _decimals(grouped: pd.DataFrame) -> int:
    """Return the decimals that show two significant digits of the median spread.

    They are 2 to 5; without a spread, those that show four digits of the median mean, 3 or more.
    """
    spread, mean = grouped["std"].median(), grouped["mean"].abs().median()
    if np.isfinite(spread) and spread > 0:
        least, digits, shown = 2, 1, spread
    else:
        least, digits, shown = 3, 3, mean
    if not np.isfinite(shown) or shown <= 0:
        return least
    return int(np.clip(digits - np.floor(np.log10(shown)), least, _MOST_DECIMALS))
