"""Conversations from the user's own files, in the usual formats.

A .jsonl holds one conversation per line, a .json a list of conversations, a .txt ChatML. A conversation is a
list of messages (OpenAI, ShareGPT), an instruction with its output (Alpaca), or a text in ChatML. Anything
else is refused with its file and line and a description of what was found. Files are streamed.
Reference: OpenAI's chat format with content parts; FastChat's ShareGPT; Taori et al. 2023, Stanford Alpaca.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from primechat.errors import DataError
from primechat.text.corpora import read_rows
from primechat.text.plain import KNOWN_MARKS, PIECE_CHARS, read_lines, read_pieces

SUFFIXES = (".jsonl", ".json", ".txt")
FORMS = (
    "`messages` with role and content (OpenAI), `conversations` with from and value (ShareGPT), "
    "instruction, input and output (Alpaca), or a text in ChatML"
)
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "developer": "system",
}
TEXT_PARTS = ("text", "input_text", "output_text")
TOOL_PARTS = ("python", "python_output")
START, END = "<|im_start|>", "<|im_end|>"
BETWEEN_VALUES = re.compile(r"[\s,\]]*")
MARKS = re.compile("|".join(map(re.escape, KNOWN_MARKS)))  # allowed between messages

Message = tuple[str, Any]  # the role as stored, and the text or an assistant's parts


def read_own(path: Path) -> Iterator[tuple[list[Message], str]]:
    """Yield (messages, language) for each conversation of a file; the language is "" if not given.

    Raises:
        DataError: A line holds no conversation, or one with content other than text.
    """
    for number, row in read_values(path):
        messages = read_conversation(row, f"{path} line {number}")
        language = row.get("language") if isinstance(row, dict) else None
        yield messages, language if isinstance(language, str) else ""


def read_values(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) for each conversation of a file, in the file's own form."""
    if path.suffix == ".jsonl":
        return read_rows(path)
    return read_array(path) if path.suffix == ".json" else read_chatml(path)


def read_array(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) for each value of a JSON list, with only a part of the file in memory.

    Concatenated values without a list around them are read too.
    """
    decoder, chunks = json.JSONDecoder(), gather_pieces(read_pieces(path))
    text = next(chunks, "")
    at = len(text) - len(text.lstrip().removeprefix("["))
    line, is_open = 1 + text.count("\n", 0, at), "[" in text[:at]

    while True:
        # Skip separators, and note whether the list was closed.
        gap = BETWEEN_VALUES.match(text, at)
        assert gap, "it matches nothing, too"
        is_open = is_open and "]" not in gap[0]
        line += text.count("\n", at, gap.end())
        at = gap.end()
        if at == len(text):
            text, at = next(chunks, ""), 0
            if text:
                continue
            if is_open:
                raise DataError(f"{path} line {line} ends before its list does; fetch it again.")
            return

        # Decode a value, with more of the file if it is incomplete.
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            more = next(chunks, "")
            if more:  # the value may continue there
                text, at = text[at:] + more, 0
                continue
            reason = f"is not JSON ({error})"
            raise DataError(f"{path} line {line} {reason}; fix or remove it.") from None
        yield line, value
        line += text.count("\n", at, end)
        at = end


def gather_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the pieces of a text, joined into larger ones of at least PIECE_CHARS characters."""
    gathered: list[str] = []
    size = 0
    for piece in pieces:
        gathered.append(piece)
        size += len(piece)
        if size >= PIECE_CHARS:
            yield "".join(gathered)
            gathered, size = [], 0
    if gathered:
        yield "".join(gathered)


# The forms of a conversation


def read_conversation(row: Any, place: str) -> list[Message]:
    """Return the messages of a conversation in any of the supported forms.

    Args:
        row: Value read from a file.
        place: File and line, for error messages.

    Raises:
        DataError: The value is not a conversation, or has content other than text.
    """
    if isinstance(row, list):
        return [read_message(m, f"{place}, message {n}") for n, m in enumerate(row, start=1)]
    if isinstance(row, str) and START in row:
        return [(m["role"], m["content"]) for _, _, m in split_chatml([row], lambda _: place)]
    if isinstance(row, dict):
        for key in ("messages", "conversations", "conversation"):
            if isinstance(row.get(key), list):
                return read_conversation(row[key], place)
        if "instruction" in row and "output" in row:
            return read_alpaca(row, place)
        if isinstance(row.get("text"), str) and START in row["text"]:
            return read_conversation(row["text"], place)
    raise DataError(f"{place} {describe_value(row)}; a conversation is {FORMS}.")


def describe_value(row: Any) -> str:
    """Return a description of a value that is not a conversation, for an error message.

    >>> describe_value({"question": "a", "answer": "b"})
    'is an object with question, answer'
    """
    if not isinstance(row, dict):
        return f"is a {type(row).__name__}"
    for key in ("messages", "conversations", "conversation"):
        if key in row:
            return f"has a {type(row[key]).__name__} in `{key}`"
    if isinstance(row.get("text"), str):
        return "is a document (`text`), which `primechat pretrain --corpus` reads"
    names = ", ".join(map(str, row))
    return f"is an object with {names:.80}" if row else "is an empty object"


def read_message(message: Any, place: str) -> Message:
    """Return the role and content of a message in OpenAI's or ShareGPT's form."""
    if not isinstance(message, dict):
        kind = type(message).__name__
        raise DataError(f"{place} is a {kind}; it must be an object with role and content.")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        names = ", ".join(map(str, message))
        raise DataError(
            f"{place} has {names or 'nothing'}; it must have role and content, or from and value."
        )
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        return role, read_parts(role, content, place)
    if content is not None and not isinstance(content, str):
        kind = type(content).__name__
        raise DataError(f"{place} has a {kind} as its content; it must be text or a list of parts.")
    return role, content or ""


def read_parts(role: str, parts: list[Any], place: str) -> Any:
    """Return the text of a list of content parts; an assistant's parts with tool calls remain a list.

    Raises:
        DataError: A part is not text, for example an image.
    """
    is_assistant = ROLES.get(role.lower()) == "assistant"
    read: list[dict[str, str]] = []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        kind = "text" if kind in TEXT_PARTS else kind
        if kind != "text" and not (is_assistant and kind in TOOL_PARTS):
            raise DataError(
                f"{place} has a part of type {kind!r}; only text can be read: "
                "remove the part, or the conversation."
            )
        if not isinstance(part.get("text"), str):
            raise DataError(
                f"{place} has a part of type {kind!r} without a text in `text`; add it."
            )
        read.append({"type": str(kind), "text": part["text"]})
    if is_assistant and any(part["type"] != "text" for part in read):
        return read
    return "\n".join(part["text"] for part in read)


def read_alpaca(row: dict[str, Any], place: str) -> list[Message]:
    """Return two messages: an instruction followed by its input, and the output."""
    for key in ("instruction", "input", "output"):
        if not isinstance(row.get(key) or "", str):
            kind = type(row[key]).__name__
            raise DataError(f"{place} has a {kind} in `{key}`; it must be text.")
    asked = [text for text in (row["instruction"], row.get("input")) if text and text.strip()]
    return [("user", "\n\n".join(asked)), ("assistant", row["output"] or "")]


# ChatML


def read_chatml(path: Path) -> Iterator[tuple[int, list[dict[str, str]]]]:
    """Yield (line number, messages) for each conversation of a file in ChatML.

    A new conversation begins at a system message, after a mark between documents, or at a blank line after an
    answer.
    """
    first, messages = 1, list[dict[str, str]]()
    for number, begins, message in split_chatml(read_lines(path), lambda n: f"{path} line {n}"):
        if begins and messages:
            yield first, messages
            messages = []
        if not messages:
            first = number
        messages.append(message)
    if messages:
        yield first, messages


def split_chatml(
    lines: Iterable[str], name_place: Callable[[int], str]
) -> Iterator[tuple[int, bool, dict[str, str]]]:
    """Yield (line number, whether a conversation begins, message) for each message of a text in ChatML.

    Args:
        lines: Lines of the text.
        name_place: Returns the name of a line for error messages.

    Raises:
        DataError: There is text outside of messages, or a message without an end.
    """
    gathered: list[str] = []
    at, last = 1, ""  # line at which `gathered` begins, and the last role
    for line in lines:
        gathered.append(line)
        if END not in line:
            continue
        *ended, rest = "".join(gathered).split(END)
        gathered = [rest]
        for piece in ended:
            between, _, said = piece.partition(START)
            role, _, content = said.partition("\n")
            if MARKS.sub("", between).strip() or START in content or not role.strip():
                raise DataError(refuse_chatml(name_place, at, piece))

            # Does this message begin a new conversation?
            answered = ROLES.get(last.lower()) == "assistant" and between.count("\n") > 1
            marked = MARKS.search(between) is not None
            last = role.strip()
            begins = marked or answered or ROLES.get(last.lower()) == "system"
            number = at + between.count("\n")
            yield number, begins, {"role": last, "content": content}
            at += piece.count("\n")

    between, _, said = "".join(gathered).partition(START)
    if MARKS.sub("", between).strip() or said.partition("\n")[2].strip():
        raise DataError(refuse_chatml(name_place, at, "".join(gathered)))


def refuse_chatml(name_place: Callable[[int], str], at: int, found: str) -> str:
    """Return the error message for a text that begins in line `at` and is not ChatML."""
    place = name_place(at + found[: len(found) - len(found.lstrip())].count("\n"))
    rule = f"ChatML has messages between {START}role and {END}, and nothing outside of them"
    return f"{place} has {found.strip()[:40]!r}; {rule}."
