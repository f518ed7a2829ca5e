"""The conversations of a chat page: each a tree of messages, which can be written as JSON lines.

Editing, regenerating and branching add a message beside an existing one, so that nothing is lost. Each
message remembers which of its replies is on the visible branch.
Reference: primechat.text.chat_format, whose rules a saved conversation follows.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from primechat.config.runtime import SAMPLING, check_drawing, check_number
from primechat.errors import ConfigError, DataError, PrimechatError
from primechat.events import Token
from primechat.files.paths import parse_json
from primechat.text.chat_format import read_messages

# Sampling settings recommended by a model's authors, and the source of the recommendation.
Advice = tuple[dict[str, float], str]
KINDS = {"text": 0, "python": 1, "python_output": 2, "mark": 3}


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """Sampling settings of replies, and the system message."""

    system: str = ""
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    alpha: float = 1.0  # strength of the adapter, if the model has one
    chosen: Sequence[str] = ()  # names in SAMPLING set by the reader, which override the advice

    def __post_init__(self) -> None:
        if not isinstance(self.system, str):
            raise ConfigError(f"system={self.system!r:.40} must be a text; try an empty one.")
        check_drawing(self, 100_000)
        check_number("alpha", self.alpha, low=0, high=100)

    def fit(self, advice: Advice, seed: int, cancel: threading.Event) -> dict[str, Any]:
        """Return the options of the engine, where a model's advice fills in what the reader did not set."""
        heeded: Any = {name: x for name, x in advice[0].items() if name not in self.chosen}
        drawn: Any = {name: getattr(self, name) for name in (*SAMPLING, "max_new_tokens")} | heeded
        return {**drawn, "top_k": drawn["top_k"] or None, "seed": seed, "cancel": cancel}


def is_base(meta: dict[str, Any]) -> bool:
    """Return whether a model is a base model, which continues text and cannot chat, by its metadata.

    >>> is_base({"identifier": "lora:x+shipped/base"}), is_base({"identifier": "hf:gpt2", "chat": False})
    (True, True)
    """
    name = str(meta["identifier"]).rpartition("+")[2].removeprefix("shipped/")
    # A model from another project has "chat" in its metadata, depending on its chat template.
    return not meta.get("chat", not name.startswith("base"))


@dataclass(eq=False, kw_only=True)
class Message:
    """A message in the tree; the visible branch continues with `children[pick]`."""

    id: int
    role: str
    content: Any = ""
    parent: Message | None = None
    children: list[Message] = field(default_factory=list)
    pick: int = 0
    beside: list[int] = field(default_factory=list)  # ids of replies generated side by side
    model: str = ""
    is_base: bool = False
    tokens: list[int] = field(default_factory=list)
    pieces: list[tuple[str, str]] = field(default_factory=list)
    measures: list[Token] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)
    state: str = "done"  # waiting, writing, done, stopped, length, context or failed
    note: str = ""

    @property
    def text(self) -> str:
        """The visible text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part["text"] for part in self.content)

    def view(self) -> dict[str, Any]:
        """Return the message in the form that the page draws."""
        same = [child.id for child in self.parent.children] if self.parent else [self.id]
        written = (
            []
            if self.tokens or not self.content or self.role == "user"
            else list_parts(self.content)
        )
        return {
            "id": self.id,
            "role": self.role,
            "model": self.model,
            "base": self.is_base,
            "state": self.state,
            "note": self.note,
            "stats": self.stats,
            "siblings": same,
            "beside": self.beside,
            "text": self.text if self.role == "user" else "",
            "tokens": written or self.list_tokens(0),
        }

    def list_tokens(self, start: int) -> list[list[Any]]:
        """Return [text, kind, logprob, entropy, rank] for each token from `start` on, as sent to the page."""
        rows = []
        for i, (kind, text) in enumerate(self.pieces[start:], start):
            m = self.measures[i] if i < len(self.measures) else None
            figures = [round(m.logprob, 3), round(m.entropy, 3), m.rank] if m else []
            rows.append([text, KINDS[kind], *figures])
        return rows


def list_parts(content: Any) -> list[list[Any]]:
    """Return a loaded message, which was not generated here, as tokens for the page, one per part."""
    if isinstance(content, str):
        return [[content, 0]]
    around = {"text": ("", ""), "python": ("[", "]"), "python_output": (" = [", "]")}
    rows: list[list[Any]] = []
    for part in content:
        first, last = around[part["type"]]
        rows += [[first, KINDS["mark"]], [part["text"], KINDS[part["type"]]], [last, KINDS["mark"]]]
    return [row for row in rows if row[0]]


@dataclass(eq=False)
class Conversation:
    """One conversation of a session, with its models and its system message (None if there is none)."""

    root: Message
    chosen: list[str]
    system: str | None = None

    @property
    def told(self) -> str:
        """The system message as the settings show it, "" if there is none."""
        return self.system or ""

    def list_system(self) -> list[dict[str, Any]]:
        """Return the messages that precede the tree: the system message, if there is one."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def walk(self) -> Iterator[Message]:
        """Yield the messages of the visible branch, first to last."""
        node = self.root
        while node.children:
            node = node.children[min(node.pick, len(node.children) - 1)]
            yield node

    @property
    def title(self) -> str:
        """The first message, shortened."""
        first = next(self.walk(), None)
        return "New conversation" if first is None else " ".join(first.text.split())[:48] or "..."


def write_jsonl(conversations: Iterable[Conversation]) -> list[str]:
    """Return one JSON line per non-empty conversation, with the messages of its visible branch.

    `read_jsonl` returns the same messages, whatever they contain. A reply that was stopped before its first
    token is omitted together with the message that it answers.
    """
    lines = []
    for conversation in conversations:
        messages: list[dict[str, Any]] = []
        for node in conversation.walk():
            if node.role == "assistant" and node.model and not node.content:
                continue
            if messages and messages[-1]["role"] == node.role:
                messages.pop()
            messages.append({"role": node.role, "content": node.content})
        if messages:
            lines.append(write_line([*conversation.list_system(), *messages]))
    return lines


def write_line(messages: list[dict[str, Any]]) -> str:
    """Return a conversation as a line of JSON that can be encoded as UTF-8, lone surrogates escaped."""
    line = json.dumps({"messages": messages}, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps({"messages": messages})
    return line


def read_jsonl(text: str) -> list[list[dict[str, Any]]]:
    """Return the messages of each conversation in JSON lines, checked.

    Raises:
        DataError: there is no conversation, or a line breaks a rule of the chat format.
    """
    found = []
    # str.splitlines would also split at U+2028 inside a message.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = parse_json(line)
                found.append(read_messages({"messages": row} if isinstance(row, list) else row))
            except (ValueError, PrimechatError) as error:
                told = isinstance(error, PrimechatError)
                reason = str(error) if told else f"it is no JSON ({error!s:.80})"
                raise DataError(f"Line {number} of the file cannot be used: {reason}") from None
    if not found:
        raise DataError("The file holds no conversation; give JSON lines with a list of messages.")
    return found
