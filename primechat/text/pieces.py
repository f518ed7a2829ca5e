"""Pre-tokenisation: the pieces into which a split pattern cuts text before any merge.

tiktoken and rustbpe split text themselves, in linear time. Their regular expressions fail in one case only:
each character of a run of white space takes a place on a stack, and a run of about a million overflows it.
`split_pieces` makes the same cuts without that stack and is used for such texts.
Reference: karpathy/nanochat, nanochat/tokenizer.py; the packages regex (Python) and fancy-regex (Rust).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import regex
import tiktoken

# nanochat's pattern: GPT-4's, but with numbers in pieces of two digits, not three, for small vocabularies.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)

# One character of each class that split patterns use; NO_CLASS is in none of them.
LETTERS = {"Lu": "\xc0", "Ll": "\xe0", "Lt": "\u01c5", "Lm": "\u02b0", "Lo": "\xaa"}
STAND_INS = {**LETTERS, "M": "\u0300", "N": "\xb2"}
NO_CLASS = "\ue000"

SPACE_BLOCK = 200_000  # characters; twice as much white space is far from overflowing the stack


def has_long_space(text: str) -> bool:
    """Return whether one of the blocks of SPACE_BLOCK characters of a text is all white space.

    A run of white space of at least twice that length always covers such a block.
    """
    last = len(text) - SPACE_BLOCK
    return any(text[i : i + SPACE_BLOCK].isspace() for i in range(0, last + 1, SPACE_BLOCK))


def cut_long_spaces(text: str) -> Iterator[str]:
    """Yield a text in parts, cut inside white space so that no run reaches 2 * SPACE_BLOCK characters."""
    start = 0
    for i in range(0, len(text) - SPACE_BLOCK + 1, SPACE_BLOCK):
        end = i + SPACE_BLOCK
        if text[i:end].isspace():
            yield text[start:end]
            start = end
    yield text[start:]


def replace_surrogates(text: str) -> str:
    """Return the text with lone surrogates, which UTF-8 cannot encode, replaced as in tiktoken."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def split_pieces(text: str, pattern: str = SPLIT_PATTERN) -> Iterator[str]:
    """Yield the pieces into which a split pattern cuts a text, identical to tiktoken's.

    The package regex may use a newer version of Unicode than tiktoken: a character that the two classify
    differently is matched as a stand-in of the class that tiktoken gives it.
    """
    text = replace_surrogates(text)
    compiled = regex.compile(pattern)
    yield from (text[slice(*match.span())] for match in compiled.finditer(settle_classes(text)))


def settle_classes(text: str) -> str:
    """Return the text with stand-ins for characters that regex and tiktoken classify differently."""
    strange = "".join(sorted({char for char in text if char > "\xff"}))
    if not strange:
        return text
    table: dict[int, str] = {}
    for name, stand_in in STAND_INS.items():
        theirs = set(open_probe(name).decode(open_probe(name).encode_ordinary(strange)))
        ours = set(regex.findall(rf"\p{{{name}}}", strange))
        table |= {ord(char): NO_CLASS for char in ours - theirs if ord(char) not in table}
        table |= {ord(char): stand_in for char in theirs - ours}
    return text.translate(table) if table else text


@cache
def open_probe(name: str) -> tiktoken.Encoding:
    """Return an encoding that keeps only the characters of one class."""
    return tiktoken.Encoding(
        name,
        pat_str=rf"\p{{{name}}}",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={},
    )
