"""The calculator that a model calls by writing `<|python_start|>` expression `<|python_end|>`.

Hides: how an expression is evaluated. It is parsed with `ast`, and only a short list of node types is
accepted; nothing is ever executed, and every size is bounded.
Reference: nanochat's engine, whose grammar it uses (plus `//` and `%`).
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable

from primechat.errors import PrimechatError
from primechat.protocols import ChatTokenizer

TOOL_TOKENS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
MAX_CHARS = 200  # of an expression
MAX_NUMBER = 10**30  # bound on every result, intermediate ones included

OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class ToolCall:
    """The state of the calculator for one reply: it reads the tokens and answers the expressions."""

    def __init__(self, tokenizer: ChatTokenizer, tool_ids: tuple[int, ...]) -> None:
        self.tokenizer = tokenizer
        self.start, self.end, self.output_start, self.output_end = tool_ids
        self.expression: list[int] | None = None  # tokens since <|python_start|>

    def feed(self, token_id: int) -> list[int]:
        """Read a token that the model chose and return the tokens that must follow it, usually none."""
        if token_id == self.start:
            self.expression = []
        elif self.expression is not None and token_id != self.end:
            self.expression.append(token_id)
        elif self.expression is not None:
            result = calculate(self.tokenizer.decode(self.expression))
            self.expression = None
            if result is not None:
                return [self.output_start, *self.tokenizer.encode(result), self.output_end]
        return []


def find_tool(tokenizer: ChatTokenizer) -> tuple[int, ...] | None:
    """Return the ids of TOOL_TOKENS, or None if the tokenizer lacks any of them."""
    try:
        return tuple(tokenizer.special(name) for name in TOOL_TOKENS)
    except (LookupError, ValueError, PrimechatError):
        return None


def calculate(expression: str) -> str | None:
    """Return the result of an expression as text, or None if it has none.

    Allowed are numbers with + - * / // % and brackets, where commas between digits are ignored, and
    `'text'.count('part')`.

    Args:
        expression: what the model wrote, at most 200 characters.

    Returns:
        The result as Python prints it; None if the expression is refused or has no result.

    >>> [calculate(e) for e in ("1,200 / (3 + 1)", "'strawberry'.count('r')", "2 ** 9", "1 / 0")]
    ['300.0', '3', None, None]
    """
    text = expression.strip()
    if len(text) > MAX_CHARS:
        return None

    # Only the characters of arithmetic, or one call of `count` on a quoted text.
    if re.fullmatch(r"[0-9.,()+\-*/% ]+", text):
        text = re.sub(r"(?<=\d),(?=\d)", "", text)
    elif not re.fullmatch(r"""(['"])[^\\]*\1 ?\.count\( ?(['"])[^\\]*\2 ?\)""", text):
        return None

    try:
        return str(evaluate_node(ast.parse(text, mode="eval").body))
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return None


def evaluate_node(node: ast.expr) -> float:
    """Return the value of a parsed expression.

    Raises:
        ValueError: the expression has an unsupported part or a number that is too large.
        ArithmeticError: the expression divides by zero.
    """
    match node:
        case ast.Constant(value=int() | float() as value):
            pass
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -evaluate_node(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            value = evaluate_node(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            value = OPERATORS[type(op)](evaluate_node(left), evaluate_node(right))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            value = text.count(part)
        case _:
            raise ValueError("The calculator does not know this kind of expression.")
    if not -MAX_NUMBER <= value <= MAX_NUMBER:  # refuses nan too
        raise ValueError("The number is too large for the calculator.")
    return value
