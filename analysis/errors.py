"""Checks of a table of runs; their errors name its columns."""

import pandas as pd

ASKED = "/asked"  # suffix of the column that describes how a benchmark was run


def require(table: pd.DataFrame, columns: list[str]) -> None:
    """Refuse a table that lacks a column, or whose benchmark scores are not of one kind.

    Raises:
        KeyError: a column is missing; the table's are named.
        ValueError: runs took the scores of a task in different ways: another version, number of
            questions or of worked examples, other prompts, another lm-eval, cut to other lengths.
    """
    missing = [column for column in columns if column not in table]
    if missing:
        raise KeyError(
            f"no column {', '.join(missing)}; there are: {', '.join(map(str, table.columns))}"
        )
    for column in columns:
        described = f"{str(column).partition('/')[0]}{ASKED}"
        if "/" in str(column) and described in table:
            ways = table.loc[table[column].notna(), described].dropna().unique()
            if len(ways) > 1:
                raise ValueError(
                    f"{column} was taken in {len(ways)} ways ({'; '.join(ways)}): these are no "
                    "scores of one benchmark; evaluate the runs alike, or choose one way"
                )
