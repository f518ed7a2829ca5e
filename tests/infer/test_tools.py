from __future__ import annotations

import doctest
import tracemalloc

import pytest
from tiny import byte_tokenizer

from primechat.infer import calculator
from primechat.infer.calculator import TOOL_TOKENS, ToolCall, calculate, find_tool


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("1+1", "2"),
        (" 2 * (3 + 4) ", "14"),
        ("-5*3", "-15"),
        ("+4 - -3", "7"),
        ("7//2", "3"),
        ("-7 % 3", "2"),
        ("10/4", "2.5"),
        ("10/2", "5.0"),
        ("0.1+0.2", "0.30000000000000004"),
        ("1,000,000*2", "2000000"),
        (".5+.5", "1.0"),
        ("'strawberry'.count('r')", "3"),
        ('"banana".count("an")', "2"),
        ("'a,b,c'.count(',')", "2"),
        ("'1,2'.count(',')", "1"),
        ("'naïve'.count('ï')", "1"),
    ],
)
def test_results(expression: str, result: str) -> None:
    assert calculate(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "",
        " ",
        "2**8",
        "2* *3",
        "1/0",
        "1//0",
        "1%0",
        "(1+2",
        "1e5",
        "1_0",
        "0x10",
        "007",
        "1j",
        "(1, 2)",
        "5(3)",
        "1.2.3",
        ",5",
        "1,,0",
        "'x' * 5",
        "'a'.upper()",
        "'a'.count('a', 1)",
        "'a'.count('a').count('b')",
        "'a'.count(sub='a')",
        "f'{1}'.count('1')",
        "b'a'.count(b'a')",
        "'\\x61'.count('a')",
        "'a'.count('a') + 1",
        "__import__('os').system('true')",
        "().__class__",
        "[1][0]",
        "1 if 1 else 2",
        "1 < 2",
        "not 1",
        "~1",
        "1 << 9",
        "lambda: 1",
        "x",
        "'a'.count",
        "1;2",
        "1\n+2",
        "\u0663+1",
        "9" * 31,
        "-" + "9" * 31,
        "9" * 29 + "*" + "9" * 29,
        "9" * 29 + "." + "9" * 9 + "*99",
        "1" * 5000,
        "1+" * 120 + "1",
        "(" * 150 + "1" + ")" * 40,
        "\0",
        "'a'.count('b'" + " " * 300 + ")",
    ],
)
def test_refusals(expression: str) -> None:
    assert calculate(expression) is None


@pytest.mark.parametrize(
    "expression", ["9" * 10_000_000, "(" * 1_000_000, "'" + "a" * 10_000_000 + "'.count('a')"]
)
def test_long_expressions_cost_nothing(expression: str) -> None:
    tracemalloc.start()
    assert calculate(expression) is None
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_tool_call_answers() -> None:
    tokenizer = byte_tokenizer()
    ids = find_tool(tokenizer)
    assert ids == tuple(tokenizer.special(name) for name in TOOL_TOKENS)
    call = ToolCall(tokenizer, ids)
    start, end, output_start, output_end = ids

    def feed(text: str) -> list[list[int]]:
        return [call.feed(token) for token in tokenizer.encode(text)]

    assert not any(feed("1+1")) and call.feed(end) == []  # no call is open
    assert call.feed(start) == [] and not any(feed("12/60"))
    assert call.feed(end) == [output_start, *tokenizer.encode("0.2"), output_end]
    assert call.feed(end) == []  # answered once
    call.feed(start)
    feed("1/0")
    assert call.feed(end) == []
    call.feed(start)
    feed("9+")
    call.feed(start)  # begins anew
    feed("2+2")
    assert call.feed(end) == [output_start, *tokenizer.encode("4"), output_end]


def test_foreign_tokenizers_have_no_tool() -> None:
    class Foreign:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def special(self, name: str) -> int:
            raise self.error

    for error in (KeyError("x"), ValueError("x")):
        assert find_tool(Foreign(error)) is None  # type: ignore[arg-type]


def test_examples() -> None:
    assert doctest.testmod(calculator).failed == 0
