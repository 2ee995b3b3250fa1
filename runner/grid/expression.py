"""The expression language of filters: arithmetic, comparison and logic over dotted config keys.

    model.width * train.batch_size < 2**14 and precision in ("fp32", "bf16")

The bare name of a group (`model`, `precision`) stands for the choice made there. Python's `eval` is
not used.
"""

import ast
import difflib
import operator
from collections.abc import Callable, Mapping
from typing import Any

from runner.machine.errors import ConfigError

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_LARGEST_EXPONENT = 1024


def evaluate(expression: str, keys: Mapping[str, Any]) -> Any:
    """Return the value of `expression`, its dotted names looked up in `keys`.

    Raises:
        ConfigError: it is not an expression of this language, or names an unknown key.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError as error:
        raise ConfigError(f"{expression!r} is not an expression: {error.msg}") from None
    try:
        return _Evaluator(expression, keys).visit(tree)
    except (TypeError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(f"{expression!r} cannot be evaluated: {error}") from None


class _Evaluator(ast.NodeVisitor):
    def __init__(self, expression: str, keys: Mapping[str, Any]) -> None:
        self.expression, self.keys = expression, keys

    def generic_visit(self, node: ast.AST) -> Any:
        raise ConfigError(
            f"{self.expression!r}: {type(node).__name__} is not allowed; use keys, numbers, "
            "strings, + - * / // % **, comparisons, in, and, or, not"
        )

    def visit_Constant(self, node: ast.Constant) -> Any:
        return node.value

    def visit_Tuple(self, node: ast.Tuple) -> Any:
        return [self.visit(item) for item in node.elts]

    def visit_List(self, node: ast.List) -> Any:
        return [self.visit(item) for item in node.elts]

    def visit_Name(self, node: ast.Name) -> Any:
        return self._look_up(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        parts, inner = [node.attr], node.value
        while isinstance(inner, ast.Attribute):
            parts, inner = [inner.attr, *parts], inner.value
        if not isinstance(inner, ast.Name):
            return self.generic_visit(node)
        return self._look_up(".".join([inner.id, *parts]))

    def _look_up(self, key: str) -> Any:
        if key not in self.keys:
            near = difflib.get_close_matches(key, self.keys, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"{self.expression!r}: no key {key}{hint}")
        return self.keys[key]

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        value = self.visit(node.operand)
        if isinstance(node.op, ast.Not):
            return not value
        return -value if isinstance(node.op, ast.USub) else +value

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        left, right = self.visit(node.left), self.visit(node.right)
        if type(node.op) not in _BINARY:
            return self.generic_visit(node.op)
        if isinstance(node.op, ast.Pow) and abs(right) > _LARGEST_EXPONENT:
            raise OverflowError(f"the exponent {right} is too large")
        if isinstance(left, (str, list)) or isinstance(right, (str, list)):
            raise TypeError("arithmetic is for numbers")
        return _BINARY[type(node.op)](left, right)

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        stop = isinstance(node.op, ast.Or)
        value: Any = not stop
        for part in node.values:
            value = self.visit(part)
            if bool(value) is stop:
                break
        return value

    def visit_Compare(self, node: ast.Compare) -> Any:
        left = self.visit(node.left)
        for op, part in zip(node.ops, node.comparators, strict=True):
            right = self.visit(part)
            if type(op) not in _COMPARE:
                return self.generic_visit(op)
            if not _COMPARE[type(op)](left, right):
                return False
            left = right
        return True
