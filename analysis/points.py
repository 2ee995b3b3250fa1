"""The rows of a table that a law can be fitted to, and why the others are not."""

import numpy as np
import pandas as pd

from analysis.errors import require
from analysis.law import Law


def usable_points(
    table: pd.DataFrame, law: Law, columns: dict[str, str], loss: str, cluster: str | None = None
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Return the usable rows under the law's own names, and numbers of others by the reason.

    Beside the columns of the law and loss there is `cluster`, which numbers the values of that
    column, or the rows where there is none. The index is the table's.

    Raises:
        KeyError: a column is missing; the table's are named.
        ValueError: a value is infinite, or a loss whose logarithm is fitted is not positive; names
            the row.
    """
    names = {name: columns.get(name, name) for name in law.columns} | {"loss": loss}
    require(table, [*names.values(), *([cluster] if cluster else [])])
    points = pd.DataFrame(
        {name: pd.to_numeric(table[c], errors="coerce").astype(float) for name, c in names.items()}
    )
    for name, column in names.items():
        refuse(points[name], np.isinf(points[name]), column, "a finite number; leave the row out")
    if law.log:
        wanted = "positive: is it a logarithm?"
        refuse(points["loss"], points["loss"] <= 0, loss, wanted)
    empty = points.isna().any(axis=1)
    other = ~empty & (points[list(law.columns)] <= 0).any(axis=1)
    twice = ~empty & ~other & points.duplicated()
    counts = {
        "a value is missing": empty,
        "a size is not positive": other,
        "the same point again": twice,
    }
    left_out = {why: int(rows.sum()) for why, rows in counts.items() if rows.any()}
    labels = table[cluster] if cluster else pd.Series(range(len(table)), index=table.index)
    if labels.isna().any():
        raise ValueError(
            f"column {cluster}, row {labels.index[labels.isna()][0]}: no cluster named"
        )
    points["cluster"] = pd.factorize(labels)[0]
    return points[~(empty | other | twice)], left_out


def refuse(values: pd.Series, bad: pd.Series, column: str, wanted: str) -> None:
    """Raise ValueError if any of `values` is `bad`: the column, the first row, what is wanted."""
    if bad.any():
        more = f" and {int(bad.sum()) - 1} more" if bad.sum() > 1 else ""
        raise ValueError(
            f"column {column}, row {values.index[bad][0]}{more}: {values[bad].iloc[0]:g} must be "
            f"{wanted}"
        )
