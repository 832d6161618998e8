"""The calculator, the model's tool: evaluates arithmetic by walking its syntax tree, without executing anything.

    1,234 * (2 + 0.5)           numbers, + - * / // %, parentheses, commas between thousands
    'strawberry'.count('r')     how often one string occurs in another

The expression is untrusted text from a model. Everything else is refused, and length, depth and magnitude are bounded,
so that a result takes microseconds. There is no power operator: it makes huge numbers from short expressions. engine.py
calls it and inserts its output into the answer.
"""

import ast
import operator
import re
import warnings

MAX_CHARS = 256         # of the expression
MAX_DEPTH = 128         # of the syntax tree; a sum of n numbers is n - 1 deep
MAX_MAGNITUDE = 10**18  # of every number, intermediate results included; bounds the result's length, too
FLOAT_DIGITS = 12       # significant digits of a result: too few to show 0.1 + 0.2 as 0.30000000000000004

OPERATORS = {
    ast.UAdd: operator.pos,     ast.USub:     operator.neg,
    ast.Add:  operator.add,     ast.Sub:      operator.sub,      ast.Mult: operator.mul,
    ast.Div:  operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod:  operator.mod,
}
ODD_NUMBER = re.compile(r"[0-9]_|\b0[xXbBoO]")
THOUSANDS_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")


def calculate(expression: str) -> str | None:
    """The value of an expression as text; None where it is refused or undefined (division by zero)."""
    # Python's grammar has more numbers than arithmetic (0x10, 1_000) and strings with escapes
    if len(expression) > MAX_CHARS or "\\" in expression or ODD_NUMBER.search(expression):
        return None
    if not set("'\"") & set(expression):  # a comma inside a string is a character to count
        expression = THOUSANDS_COMMA.sub("", expression)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser's, about text such as 1or 2
            tree = ast.parse(expression.strip(), mode="eval")
        value = _evaluate(tree.body, depth=0)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None  # the last two: the parser, for deep nesting
    if isinstance(value, int) or (value.is_integer() and abs(value) < 10**15):  # larger floats skip whole numbers
        return str(int(value))
    return f"{value:.{FLOAT_DIGITS}g}"


def _evaluate(node: ast.expr, depth: int) -> int | float:
    """The value of a syntax tree; ValueError for anything but arithmetic, and beyond the bounds."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    match node:
        case ast.Constant(int() | float() as value) if not isinstance(value, bool):
            pass
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            value = OPERATORS[type(op)](_evaluate(left, depth + 1), _evaluate(right, depth + 1))
        case ast.UnaryOp(op, operand) if type(op) in OPERATORS:
            value = OPERATORS[type(op)](_evaluate(operand, depth + 1))
        case ast.Call(ast.Attribute(ast.Constant(str() as text), "count"), [ast.Constant(str() as part)], []):
            value = text.count(part)
        case _:
            raise ValueError(f"{type(node).__name__} is not arithmetic")
    if not abs(value) <= MAX_MAGNITUDE:
        raise ValueError("too large")  # infinity included
    return value
