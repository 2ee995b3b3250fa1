"""Arithmetic inside a text: expressions are parsed, never executed, and computed exactly.

A step is written `<12+34=46>` or, as in GSM8K, `<<12+34=46>>`.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from operator import add, floordiv, mul, sub, truediv
from typing import Literal

Verdict = Literal["right", "wrong_arithmetic", "wrong_reasoning", "unparsed"]
VERDICTS: tuple[Verdict, ...] = ("right", "wrong_arithmetic", "wrong_reasoning", "unparsed")

_LONGEST = 100  # characters; with no power among the operators, results stay as short
_ALLOWED = re.compile(r"[0-9+\-*/.()\s]+")
_STEP = re.compile(r"<{1,2}([^<>=]*)=([^<>]*)>{1,2}")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: add,
    ast.Sub: sub,
    ast.Mult: mul,
    ast.Div: truediv,
    ast.FloorDiv: lambda a, b: Fraction(floordiv(a, b)),
}


@dataclass(frozen=True)
class Step:
    """A step that a text writes out: `expression` and the `result` that it claims."""

    expression: str
    result: str

    @property
    def holds(self) -> bool | None:
        """Whether the result is right, as far as its digits go; None if it cannot be read.

        A result with d digits behind its point may be off by 10^-d: some texts round, some cut.
        """
        try:
            claimed, exact = number(self.result), value_of(self.expression)
        except ValueError:
            return None
        digits = len(self.result.strip().partition(".")[2])
        return abs(claimed - exact) < Fraction(1, 10**digits) if digits else claimed == exact


def number(text: str) -> Fraction:
    """Return the number that `text` writes: digits, a point, a sign, commas of thousands.

    Raises:
        ValueError: it writes none.
    """
    plain = text.strip().replace(",", "").removesuffix(".")
    if not re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)", plain):
        raise ValueError(f"{text[:_LONGEST]!r} is no number; write digits, at most one point")
    return Fraction(plain)


def value_of(expression: str) -> Fraction:
    """Return the value of an expression of numbers, + - * / // and brackets, exactly.

    Raises:
        ValueError: it is none, is longer than 100 characters or divides by zero.
    """
    text = expression.strip().replace(",", "")
    if len(text) > _LONGEST or not _ALLOWED.fullmatch(text):
        raise ValueError(
            f"{expression[:_LONGEST]!r} is no expression of at most {_LONGEST} characters; write "
            "numbers, + - * / and brackets"
        )
    # Python refuses 007, which is how a model may write 7.
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)
    try:
        return _value(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"{expression!r} cannot be parsed ({error}); mend the expression"
        ) from None
    except ZeroDivisionError:
        raise ValueError(f"{expression!r} divides by zero; it has no value") from None


def _value(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return Fraction(ast.get_source_segment(text, node) or repr(value))  # all its digits
        case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign, operand=operand):
            return _value(operand, text) * (-1 if isinstance(sign, ast.USub) else 1)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, text), _value(right, text))
    raise ValueError(f"{ast.unparse(node)} is none of: a number, + - * /, brackets")


def written(value: Fraction) -> str:
    """Return a value as a calculator shows it: exact if it ends, else with 4 digits of a part."""
    digits = next((n for n in range(4 * _LONGEST) if 10**n % value.denominator == 0), None)
    if digits is None:
        return written(round(value, 4))
    scaled = abs(value.numerator) * 10**digits // value.denominator
    whole, part = divmod(scaled, 10**digits)
    sign = "-" if value < 0 else ""
    return f"{sign}{whole}.{part:0{digits}}" if digits else f"{sign}{whole}"


def steps(text: str) -> Iterator[Step]:
    """Yield the steps that a text writes out, in order."""
    for found in _STEP.finditer(text):
        yield Step(found[1], found[2])


def verdict(text: str, answer: str | None, reference: str | None) -> Verdict:
    """Return what is wrong with a text whose parsed answer is `answer`, or "right".

    Args:
        reference: the right answer, parsed in the same way.

    Returns:
        unparsed: there is no answer. Of a wrong answer: wrong_arithmetic if the text claims a step
        whose result is another, or one that cannot be read; wrong_reasoning if all its steps hold.
    """
    if answer is None:
        return "unparsed"
    if answer == reference:
        return "right"
    return "wrong_reasoning" if all(step.holds for step in steps(text)) else "wrong_arithmetic"
