"""What is wrong with a table, said in the words of the table."""

import pandas as pd


def require(table: pd.DataFrame, columns: list[str]) -> None:
    """Raise KeyError where a column is missing; the table's are named."""
    missing = [column for column in columns if column not in table]
    if missing:
        raise KeyError(f"no column {', '.join(missing)}; there are: {', '.join(map(str, table.columns))}")  # fmt: skip
