"""Encoding takes any text: the same ids as tiktoken where that one can, and no run of anything stops it."""

from __future__ import annotations

import re

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from primechat.text import pieces
from primechat.text.pieces import SPLIT_PATTERN, cut_long_spaces, has_long_space, split_pieces
from primechat.text.tokenizer import Tokenizer

# Those of GPT-2, GPT-4 and GPT-4o, as tiktoken publishes them.
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT4 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TRAINING = [
    "the cat sat    on the mat\n\n\n   and 12345 don't!!! " * 4,
    "日本語 テキスト\r\n\t\t 👩‍👧 é e\u0301 …… " * 4,
    " " * 64,
    "a" * 64,
]
LEARNED = Tokenizer.train(TRAINING, 330)
TOKENIZERS = [
    Tokenizer(pattern, LEARNED.ranks, {}) for pattern in (SPLIT_PATTERN, GPT2, GPT4, GPT4O)
]
# What a run is made of; each is drawn at some length, so that borders fall everywhere.
ALPHABETS = [
    " ",
    "\n",
    "\r\n",
    " \t\u00a0\u3000\u2028",
    " \n",
    "\x1c\x85",  # white space to Python or to Rust only
    "a",
    "the cat",
    "AbC",
    "0123456789",
    "²Ⅷ",
    "!?/'",
    "'s'LL",
    "日本語",
    "é\u0301\u0300",
    "👩‍👧🏽",
    "\ud800",
]
RUNS = st.lists(
    st.tuples(st.sampled_from(ALPHABETS), st.integers(1, 40)).map(
        lambda run: (run[0] * run[1])[: run[1]]
    ),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["ours", "gpt2", "gpt4", "gpt4o"])
@settings(max_examples=200, deadline=None)
@given(text=RUNS, block=st.integers(1, 7))
def test_pieces_give_the_ids_of_tiktoken(tokenizer: Tokenizer, text: str, block: int) -> None:
    """With a limit of a few characters nearly every text is cut by us, and borders fall everywhere."""
    expected = tokenizer._encoding.encode_ordinary(text)
    assert tokenizer._encode_pieces(text) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "SPACE_BLOCK", block)
        assert tokenizer.encode(text) == expected


@settings(max_examples=300, deadline=None)
@given(text=RUNS, block=st.integers(1, 7))
def test_parts_hold_no_long_space(text: str, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "SPACE_BLOCK", block)
        parts = list(cut_long_spaces(text))
        runs = [run for part in parts for run in re.findall(r"\s+", part)]
        assert "".join(parts) == text
        assert max(map(len, runs), default=0) < 2 * block
        assert len(parts) == 1 or has_long_space(text), "only such a text is cut"
        if not has_long_space(text):
            assert max(map(len, re.findall(r"\s+", text)), default=0) < 2 * block


class Recorder:
    """Stands for tiktoken, and remembers what it is handed."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding, self.texts = encoding, list[str]()

    def encode_ordinary(self, text: str) -> list[int]:
        self.texts.append(text)
        return self.encoding.encode_ordinary(text)


@pytest.mark.parametrize(
    "text",
    [
        "a" + " " * 400_000 + "b" * 200_000,
        " " * 3_000_000,
        "x" + "\n \t" * 1_000_000 + "y",
        "\n" * 3_000_000,
        "a" * 3_000_000,
        "7" * 3_000_000,
        "!" * 3_000_000,
        "我有一只小狗" * 500_000,
        "e\u0301" * 1_500_000,
        "👩‍👧" * 1_000_000,
        ("Some words of prose, 42 of them.\n" * 100_000)[:3_000_000],
    ],
    ids=lambda text: f"{text[:4]!a}*{len(text)}",
)
def test_runs_of_millions(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each character is handed over once, and never a run of white space that overflows."""
    tokenizer = Tokenizer(SPLIT_PATTERN, LEARNED.ranks, LEARNED.specials)
    whole, piecewise = Recorder(tokenizer._encoding), Recorder(tokenizer._merging)
    monkeypatch.setattr(tokenizer, "_encoding", whole)
    monkeypatch.setattr(tokenizer, "_merging", piecewise)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert "".join([*whole.texts, *piecewise.texts]) == text
    assert not any(map(has_long_space, whole.texts))


def test_a_long_space_is_one_piece() -> None:
    """As the pattern says: the last space belongs to the word after it, the others are one piece."""
    n = 1_500_000
    assert [len(piece) for piece in split_pieces("a" + " " * n + "b")] == [1, n - 1, 2]
    ids = LEARNED.encode("a" + " " * n + "b")
    blank = tiktoken.Encoding(
        "blank", pat_str=" +", mergeable_ranks=LEARNED.ranks, special_tokens={}
    )
    spaces = blank.encode_ordinary(" " * (n - 1))
    assert ids == [*LEARNED.encode("a"), *spaces, *LEARNED.encode(" b")]


def test_training_on_endless_white_space() -> None:
    text = "a" + " " * 1_200_000 + "b"
    tokenizer = Tokenizer.train([text], 270)
    assert tokenizer.vocab_size == 270 and b" " * 32 in tokenizer.ranks
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_pattern_that_overflows_on_letters() -> None:
    """One of somebody else's may need stack for any character; the ids are the same without."""
    foreign = Tokenizer(r"(?:(?!x)[\s\S])+|x", LEARNED.ranks, {})
    text = "a" * 1_200_000 + "x" + "b" * 10
    assert foreign.decode(foreign.encode(text)) == text
    assert foreign.encode(text[-20:]) == foreign._encoding.encode_ordinary(text[-20:])
