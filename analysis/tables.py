"""Tables for a paper: mean +- spread over runs by rows and columns, as text or LaTeX (booktabs)."""

import numpy as np
import pandas as pd

from analysis.errors import require

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
}
_HOLE = "--"


def cross_table(
    runs: pd.DataFrame, *, rows: str, columns: str | None, metric: str, digits: int | None = None
) -> pd.DataFrame:
    """Return cells "mean +- s.d. (n)" by value of `rows` and `columns`; a hole of the grid is "--".

    Args:
        digits: after the point; None: as many as the spread over seeds justifies.
    """
    require(runs, [rows, metric, *([columns] if columns else [])])
    by = [rows, columns] if columns else [rows]
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
    return table.fillna(_HOLE)


def latex(table: pd.DataFrame, *, caption: str, label: str, note: str = "") -> str:
    """Return a LaTeX table (booktabs); "+-" becomes $\\pm$, special characters are escaped."""
    head = " & ".join(escape(str(name)) for name in [table.index.name or "", *table.columns])
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
        lines.append(" & ".join([escape(str(name)), *cells]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    if note:
        lines.append(rf"\par\smallskip\footnotesize {escape(note)}")
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def escape(text: str) -> str:
    """Return `text` with LaTeX's special characters escaped."""
    return "".join(_SPECIAL.get(letter, letter) for letter in text)


def number(value: float, digits: int = 4) -> str:
    """Return a number in LaTeX with `digits` significant digits, powers of ten written out."""
    if not np.isfinite(value):
        return _HOLE
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return rf"\ensuremath{{{float(mantissa):g} \times 10^{{{int(power)}}}}}"
    return rf"\ensuremath{{{value:.{digits}g}}}"


def _cell(mean: float, spread: float, count: float, decimals: int) -> str:
    error = f" +- {spread:.{decimals}f}" if np.isfinite(spread) else ""
    return f"{mean:.{decimals}f}{error} ({int(count)})"


def _decimals(grouped: pd.DataFrame) -> int:
    """Return the decimals that show two significant digits of the median spread, from 2 to 5."""
    spread = grouped["std"].median()
    if not np.isfinite(spread) or spread <= 0:
        return 3
    return int(np.clip(1 - np.floor(np.log10(spread)), 2, 5))
