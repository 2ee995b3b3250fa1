"""What is wrong with a table, said in the words of the table."""

import pandas as pd

ASKED = "/asked"  # the column that says how a benchmark was asked


def require(table: pd.DataFrame, columns: list[str]) -> None:
    """Refuse a table that lacks a column, or whose benchmark scores are not of one kind.

    Raises:
        KeyError: a column is missing; the table's are named.
        ValueError: scores of a task were taken in different ways: another version, number of questions or of
            worked examples, other prompts, another lm-eval.
    """
    missing = [column for column in columns if column not in table]
    if missing:
        raise KeyError(
            f"no column {', '.join(missing)}; there are: {', '.join(map(str, table.columns))}"
        )
    for column in columns:
        about = f"{str(column).partition('/')[0]}{ASKED}"
        if "/" in str(column) and about in table:
            ways = table.loc[table[column].notna(), about].dropna().unique()
            if len(ways) > 1:
                raise ValueError(
                    f"{column} was taken in {len(ways)} ways ({'; '.join(ways)}): these are no scores of one "
                    "benchmark; evaluate the runs alike, or choose one way"
                )
