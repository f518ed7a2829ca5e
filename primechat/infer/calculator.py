"""The calculator that a model may call by writing `<|python_start|>` expression `<|python_end|>`.

Hides: how an expression becomes its result. It is parsed with `ast` and walked over a short list of node
kinds; nothing is ever executed, and every size is bounded. Reference: nanochat's engine, whose grammar this
is (plus `//` and `%`).
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
MAX_NUMBER = 10**30  # no result, and no number on the way to it, is larger

OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class ToolCall:
    """Watches the tokens of one reply and answers the expressions in it."""

    def __init__(self, tokenizer: ChatTokenizer, tool_ids: tuple[int, ...]) -> None:
        self.tokenizer = tokenizer
        self.start, self.end, self.output_start, self.output_end = tool_ids
        self.expression: list[int] | None = None  # tokens since <|python_start|>

    def feed(self, token_id: int) -> list[int]:
        """Take in a token that the model chose; return the tokens that must follow it, most often none."""
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
    """Return the ids of TOOL_TOKENS, or None where a tokenizer does not have them all."""
    try:
        return tuple(tokenizer.special(name) for name in TOOL_TOKENS)
    except (LookupError, ValueError, PrimechatError):
        return None


def calculate(expression: str) -> str | None:
    """Evaluate an expression as the calculator does.

    Numbers with + - * / // % and brackets, commas between digits left out; or `'text'.count('part')`.

    Args:
        expression: what the model wrote, at most 200 characters.

    Returns:
        The result as Python prints it; None where the expression is refused or has no result.

    >>> [calculate(e) for e in ("1,200 / (3 + 1)", "'strawberry'.count('r')", "2 ** 9", "1 / 0")]
    ['300.0', '3', None, None]
    """
    text = expression.strip()
    if len(text) > MAX_CHARS:
        return None
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
        ValueError: it has a part that the calculator does not know, or a number that is too large.
        ArithmeticError: it divides by zero.
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
    if not -MAX_NUMBER <= value <= MAX_NUMBER:  # also refuses nan
        raise ValueError("The number is too large for the calculator.")
    return value
