"""Expressions of a table's columns, and columns of numbers; their errors name column and row."""

import re
from tokenize import TokenError

import pandas as pd

# What pandas raises for an expression that is mistyped or does not fit the columns.
_MISTYPED = (
    NameError,
    SyntaxError,
    TokenError,
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
)


def true_rows(table: pd.DataFrame, expression: str, option: str) -> "pd.Series[bool]":
    """Return for each row whether `expression` is true; a missing value makes it false.

    Args:
        option: where the expression was given ("--where"), for the message.

    Raises:
        ValueError: it names no column of the table, compares words with numbers, or is neither true
            nor false.
    """
    keep = _evaluate(table, expression, f"{option} {expression!r}")
    if not isinstance(keep, pd.Series) or not pd.api.types.is_bool_dtype(keep):
        raise ValueError(
            f"{option} {expression!r} is neither true nor false for each row; compare a column "
            "with a value: 'seed == 1'"
        )
    return keep.fillna(False).astype(bool)


def numbers(table: pd.DataFrame, column: str) -> "pd.Series[float]":
    """Return a column, or an expression of columns, as finite numbers; NaN where it is empty.

    Raises:
        KeyError: there is no such column; the table's are named.
        ValueError: a row holds a word or an infinite number.
    """
    if column in table:
        return _finite(table[column], column)
    if not any(sign in column for sign in "+-*/"):
        raise KeyError(f"no column {column}; {_columns(table)}")
    values = _evaluate(table, column, f"column {column!r}")
    if not isinstance(values, pd.Series):
        raise ValueError(f"{column!r} is no expression of columns; {_columns(table)}")
    return _finite(values, column)


def _evaluate(table: pd.DataFrame, expression: str, what: str) -> object:
    try:
        return table.eval(expression)
    except _MISTYPED as error:
        reason = str(error).partition("\n")[0].removesuffix("(<unknown>, line 1)").strip()
        for name in _named(table, expression):  # a word where a number is compared
            if isinstance(error, TypeError):
                _finite(table[name], name)
        dotted = [c for c in map(str, table.columns) if "." in c and c in expression]
        quoted = [f"`{name}`" for name in dotted if f"`{name}`" not in expression]
        hint = f"write {', '.join(quoted)} in backticks" if quoted else _columns(table)
        raise ValueError(f"{what}: {reason}; {hint}") from error


def _finite(column: "pd.Series[float]", name: str) -> "pd.Series[float]":
    values = pd.to_numeric(column, errors="coerce")
    wrong = (values.isna() & column.notna()) | values.isin([float("inf"), float("-inf")])
    if wrong.any():
        first, count = int(wrong.to_numpy(dtype=bool).argmax()), int(wrong.sum())
        label = column.index[first]
        row = label + 1 if isinstance(label, int) else label
        more = f" (and in {count - 1} more)" if count > 1 else ""
        value = column.iloc[first]
        shown = value if isinstance(value, float) else repr(value)
        raise ValueError(
            f"{name} is {shown} in row {row}{more} and must be a finite number: correct it, empty "
            "it, or leave the row out by --where"
        )
    return values.astype(float)


def _named(table: pd.DataFrame, expression: str) -> list[str]:
    """Return the columns that the expression names."""
    names = map(str, table.columns)
    return [n for n in names if re.search(rf"(?<![\w.]){re.escape(n)}(?![\w.])", expression)]


def _columns(table: pd.DataFrame) -> str:
    return f"there are: {', '.join(map(str, table.columns))}"
