"""A calculator for inline calls: sums, and how often a letter stands in a word; nothing is run."""

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

from models.config import config

_ALLOWED = re.compile(r"[0-9+\-*/.() ]+")
_COUNT = re.compile(r"""\s*(['"])([^'"]*)\1\.count\((['"])([^'"]*)\3\)\s*""")
_MOST_CHARACTERS, _MOST_DIGITS = 128, 40
_OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@config
class CalculatorConfig:
    """Answers `<<48/2=` with `24>>`, the form of GSM8K, or as its marks say.

    Args:
        opens, closes: what a call stands between.
        before, after: what stands before and after the answer.
        timeout_s: seconds to wait for an answer.
    """

    opens: str = "<<"
    closes: str = "="
    before: str = ""
    after: str = ">>"
    timeout_s: float = 3.0

    def __call__(self, text: str) -> str:
        """Return the value of an expression; see `calculate`."""
        return calculate(text)


def calculate(text: str) -> str:
    """Return the value of a sum, or of 'word'.count('w'), as it is written.

    Whole numbers have no point; others at most 10 significant digits. Commas are left out.

    Raises:
        ValueError: it is neither, too long, divides by 0, or gives a number of more than 40 digits.
    """
    counted = _COUNT.fullmatch(text)
    if counted is not None:
        return str(counted[2].count(counted[4]))
    sum_ = text.replace(",", "").strip()
    if not _ALLOWED.fullmatch(sum_) or "**" in sum_ or "//" in sum_:
        raise ValueError(f"{text[:40]!r} has more than numbers, + - * / and brackets")
    if len(sum_) > _MOST_CHARACTERS:
        raise ValueError(f"{text[:40]!r}... is longer than {_MOST_CHARACTERS} characters")
    try:
        value = _value(ast.parse(sum_, mode="eval").body)
    except (SyntaxError, ZeroDivisionError, OverflowError, RecursionError) as error:
        raise ValueError(f"{text[:40]!r} has no value: {error}") from None
    if abs(value) >= 10**_MOST_DIGITS:
        raise ValueError(f"{text[:40]!r} has more than {_MOST_DIGITS} digits")
    if value == int(value):
        return str(int(value))
    return f"{value:.10g}"


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand)
        return value if isinstance(node.op, ast.UAdd) else -value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise SyntaxError("only numbers and + - * / are calculated")
