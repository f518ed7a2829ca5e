"""Plain text files, split into documents and streamed, with at most one document in memory.

A document ends at a mark between documents, such as GPT-2's <|endoftext|>, and the mark is removed. Text
without marks is cut at the first blank line after 2,000 characters, or else at the first line end after
20,000. This module also decides whether a mark separates documents or is only mentioned in a text.
"""

from __future__ import annotations

import codecs
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from primechat.errors import DataError

KNOWN_MARKS = ("<|endoftext|>", "<|bos|>", "</s>")
# Without a mark, a document ends at a blank line after PARAGRAPH_CHARS, or else a line end after LINE_CHARS.
PARAGRAPH_CHARS = 2_000
LINE_CHARS = 20_000
PIECE_CHARS = 2**20  # longer lines are read in pieces of this size
CONTEXT_CHARS = 200  # characters of a line that are examined on either side of a mark
OPENING = tuple("\"'`“‘«([{<|=,:/")

BLANKS = re.compile(r"[ \t]*")

MarkCounts = Counter[tuple[str, bool]]  # counts of (mark, whether it separates documents)


def read_plain(
    path: Path, separator: str = "auto", marks: MarkCounts | None = None
) -> Iterator[str]:
    """Yield the documents of a .txt file, including blank ones.

    A document of up to 20,000 characters that ends at a mark is never cut, whatever blank lines it has.

    Args:
        path: File to read.
        separator: `auto` splits at the known marks where they separate documents, `none` at no mark; any
            other value is a mark that ends a document wherever it occurs.
        marks: Counter to which the marks found are added.

    Raises:
        DataError: The file cannot be read, or is not UTF-8 text.
    """
    gathered: list[str] = []  # lines since the last boundary
    size, marked = 0, False
    for piece, ends in cut_at_marks(
        read_pieces(path), separator, Counter() if marks is None else marks
    ):
        gathered.append(piece)
        size += len(piece)
        if not ends and (size < LINE_CHARS or not piece.endswith("\n")):
            continue

        # A document that a mark ends stays whole, unless it is long.
        whole = ends and size - len(piece) < LINE_CHARS
        documents, rest = ([], gathered) if whole else cut_by_size(gathered)
        yield from documents
        if ends:
            yield join_lines(rest)
            rest, marked = [], True
        gathered, size = rest, sum(map(len, rest))

    if marked:  # the last document needs no mark after it
        yield join_lines(gathered)
    else:
        documents, rest = cut_by_size(gathered)
        yield from documents
        yield join_lines(rest)


def cut_by_size(lines: list[str]) -> tuple[list[str], list[str]]:
    """Return the documents into which lines are cut by size, and the remaining lines."""
    documents: list[str] = []
    begun: list[str] = []
    size = 0
    for line in lines:
        begun.append(line)
        size += len(line)
        is_long = size >= LINE_CHARS or (size >= PARAGRAPH_CHARS and not line.strip())
        if is_long and line.endswith("\n"):
            documents.append(join_lines(begun))
            begun, size = [], 0
    return documents, begun


def join_lines(lines: list[str]) -> str:
    """Return lines joined to one document, without leading and trailing line ends."""
    return "".join(lines).strip("\n")


# Marks between documents


def cut_at_marks(
    pieces: Iterable[str], separator: str, marks: MarkCounts
) -> Iterator[tuple[str, bool]]:
    """Yield a text in pieces, each with whether a document ends after it; separating marks are removed.

    Args:
        pieces: Lines with their line ends; a long line may come in several pieces.
        separator: See `read_plain`.
        marks: Counter to which the marks found are added.
    """
    if separator == "none":
        yield from ((piece, False) for piece in pieces)
        return
    known = KNOWN_MARKS if separator == "auto" else (separator,)
    pattern = re.compile("|".join(map(re.escape, known)))

    held = ""  # the end of a piece of a long line, where a mark may be cut in two
    before = ""  # the text before it, in the same line and document
    for piece in chain(pieces, [""]):
        if not (held or before) and piece.endswith("\n") and not pattern.search(piece):
            yield piece, False  # nearly every line of most texts
            continue

        # Marks up to `safe` have all the context that is needed to judge them.
        text, held = held + piece, ""
        line_is_whole = text.endswith("\n") or not piece
        safe = len(text) if line_is_whole else max(0, len(text) - CONTEXT_CHARS)

        start = 0
        for match in pattern.finditer(text):
            at, end = match.span()
            if at >= safe:
                break
            left = (before + text[max(start, at - CONTEXT_CHARS) : at])[-CONTEXT_CHARS:]
            right = text[end : end + CONTEXT_CHARS]
            is_border = separator != "auto" or stands_between(left, match[0], right)
            marks[match[0], is_border] += 1
            if is_border:
                yield text[start:at].rstrip(" \t"), True
                start = BLANKS.match(text, end).end()  # type: ignore[union-attr]
                before = ""

        # Yield the rest, and hold back what the next piece may continue.
        safe = max(safe, start)
        if safe > start:
            yield text[start:safe], False
        held = text[safe:]
        before = "" if line_is_whole else (before + text[start:safe])[-CONTEXT_CHARS:]


def stands_between(left: str, mark: str, right: str) -> bool:
    """Return whether a known mark separates documents, rather than being mentioned in a text.

    It does at the beginning or end of a line, and inside a line if it follows the text without a space. It
    does not after an opening quote or bracket; nor does a </s> that closes an <s>, as in HTML.

    Args:
        left: Text before the mark in its line.
        mark: The mark.
        right: Text after the mark in its line.

    >>> stands_between("The end.", "<|endoftext|>", "Once upon a time")
    True
    >>> stands_between("The token ", "<|endoftext|>", " ends a text.")
    False
    """
    if mark == "</s>" and re.search(r"<s[ >]", left):
        return False
    if not left.strip() or not right.strip():
        return True
    # A quote after the end of a sentence closes.
    opens = left[-1] in OPENING and left[-2:-1] not in (
        ".",
        "!",
        "?",
        "…",
    )
    return not left[-1].isspace() and not opens


def describe_marks(corpus: str, separator: str, marks: MarkCounts) -> str:
    """Return a sentence or two on the marks found in a corpus; empty if there are none."""
    between = {mark: n for (mark, is_border), n in marks.items() if is_border}
    inside = {mark: n for (mark, is_border), n in marks.items() if not is_border}
    said = []
    if between:
        found = ", ".join(f"{n:,} {mark}" for mark, n in between.items())
        said.append(f"{corpus}: {found} between documents split the text there and are left out.")
    elif separator not in ("auto", "none"):
        said.append(f"{corpus}: corpus_separator={separator!r} is nowhere in its .txt files.")
    if inside:
        found = ", ".join(f"{n:,} {mark}" for mark, n in inside.items())
        first = next(iter(inside))
        said.append(
            f"{corpus}: {found} inside lines stay text; "
            f"--corpus_separator '{first}' splits at every {first}."
        )
    return " ".join(said)


# Reading


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file."""
    return read_pieces(path, -1)


def read_pieces(path: Path, limit: int = PIECE_CHARS) -> Iterator[str]:
    """Yield the lines of a UTF-8 file; lines longer than `limit` characters come in pieces of that size.

    Raises:
        DataError: The file cannot be read, or is not UTF-8.
    """
    try:
        with open(os.path.expanduser(path), encoding="utf-8-sig") as file:
            while piece := file.readline(limit):
                yield piece
    except UnicodeDecodeError:
        raise DataError(describe_bad_byte(path)) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); make it readable.") from None


def describe_bad_byte(path: Path) -> str:
    """Return the error message for a file that is not UTF-8, with the offset of its first bad byte."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, line = 0, 1  # of the first byte that is not yet decoded
    with open(os.path.expanduser(path), "rb") as file:
        while True:
            pending = decoder.getstate()[0]
            chunk = file.read(2**20)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                offset, byte = offset + error.start, error.object[error.start]
                line += error.object[: error.start].count(b"\n")
                return (
                    f"{path} is not UTF-8 text: the byte 0x{byte:02x} at offset {offset:,} (line "
                    f"{line:,}) cannot be decoded; convert the file to UTF-8."
                )
            read = pending + chunk
            left = len(decoder.getstate()[0])
            offset += len(read) - left
            line += read[: len(read) - left].count(b"\n")
            if not chunk:
                return f"{path} changed while it was read; read it again."
