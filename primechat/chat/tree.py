"""The conversations of a chat page: a tree of messages each, and its form as JSON lines.

Hides: which branch is shown. Editing, answering anew and branching add a message beside another; nothing that
was said is lost, and each message remembers which of its answers the conversation goes on with.
Reference: primechat.text.chat_format, whose rules a saved conversation keeps.
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

Advice = tuple[
    dict[str, float], str
]  # how to sample by a model's makers' word, and where they say so
KINDS = {"text": 0, "python": 1, "python_output": 2, "mark": 3}


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """How replies are sampled, and what the model is told before the first message."""

    system: str = ""
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    alpha: float = 1.0  # strength of an adapter, where the model has one
    chosen: Sequence[str] = ()  # those of SAMPLING that the reader chose: there no advice is heeded

    def __post_init__(self) -> None:
        if not isinstance(self.system, str):
            raise ConfigError(f"system={self.system!r:.40} must be a text; try an empty one.")
        check_drawing(self, 100_000)
        check_number("alpha", self.alpha, low=0, high=100)

    def fit(self, advice: Advice, seed: int, cancel: threading.Event) -> dict[str, Any]:
        """Return them as the engine takes them, for a model whose makers advise how to sample."""
        heeded: Any = {name: x for name, x in advice[0].items() if name not in self.chosen}
        drawn: Any = {name: getattr(self, name) for name in (*SAMPLING, "max_new_tokens")} | heeded
        return {**drawn, "top_k": drawn["top_k"] or None, "seed": seed, "cancel": cancel}


def is_base(meta: dict[str, Any]) -> bool:
    """Tell whether a model goes on with text and knows no questions or answers, by its metadata.

    >>> is_base({"identifier": "lora:x+shipped/base"}), is_base({"identifier": "hf:gpt2", "chat": False})
    (True, True)
    """
    name = str(meta["identifier"]).rpartition("+")[2].removeprefix("shipped/")
    return not meta.get(
        "chat", not name.startswith("base")
    )  # another project's tells of its template


@dataclass(eq=False, kw_only=True)
class Message:
    """A message in the tree; of its `children`, the conversation goes on with the one at `pick`."""

    id: int
    role: str
    content: Any = ""
    parent: Message | None = None
    children: list[Message] = field(default_factory=list)
    pick: int = 0
    beside: list[int] = field(default_factory=list)  # the replies that were asked for side by side
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
        """What a reader sees of it."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part["text"] for part in self.content)

    def view(self) -> dict[str, Any]:
        """Return what the page draws."""
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
        """Return [text, kind, logprob, entropy, rank] of each token from `start`: what the page is sent."""
        rows = []
        for i, (kind, text) in enumerate(self.pieces[start:], start):
            m = self.measures[i] if i < len(self.measures) else None
            figures = [round(m.logprob, 3), round(m.entropy, 3), m.rank] if m else []
            rows.append([text, KINDS[kind], *figures])
        return rows


def list_parts(content: Any) -> list[list[Any]]:
    """Return a message that was loaded, not written here, as the page's tokens, one a part."""
    if isinstance(content, str):
        return [[content, 0]]
    around = {"text": ("", ""), "python": ("[", "]"), "python_output": (" = [", "]")}
    rows: list[list[Any]] = []
    for part in content:
        first, last = around[part["type"]]
        rows += [[first, KINDS["mark"]], [part["text"], KINDS[part["type"]]], [last, KINDS["mark"]]]
    return [row for row in rows if row[0]]


@dataclass(eq=False)
class Talk:
    """One conversation of a session, and the system message that leads it, None where there is none."""

    root: Message
    chosen: list[str]
    system: str | None = None

    @property
    def told(self) -> str:
        """The system message as the settings show it."""
        return self.system or ""

    def list_system(self) -> list[dict[str, Any]]:
        """Return the messages before the first of the tree: the system's, if there is one."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def walk(self) -> Iterator[Message]:
        """Yield the messages of the branch that is shown, first to last."""
        node = self.root
        while node.children:
            node = node.children[min(node.pick, len(node.children) - 1)]
            yield node

    @property
    def title(self) -> str:
        """The first message, shortened."""
        first = next(self.walk(), None)
        return "New conversation" if first is None else " ".join(first.text.split())[:48] or "..."


def write_jsonl(talks: Iterable[Talk]) -> list[str]:
    """Return a JSON line for each conversation in which something was said: the branch that is shown.

    `read_jsonl` reads back the very messages, whatever they hold. What was not answered here, because the
    reply was stopped before its first token, is left out together with that empty reply.
    """
    lines = []
    for talk in talks:
        messages: list[dict[str, Any]] = []
        for node in talk.walk():
            if node.role == "assistant" and node.model and not node.content:
                continue
            if messages and messages[-1]["role"] == node.role:
                messages.pop()
            messages.append({"role": node.role, "content": node.content})
        if messages:
            lines.append(write_line([*talk.list_system(), *messages]))
    return lines


def write_line(messages: list[dict[str, Any]]) -> str:
    """Return a conversation as a line of JSON that UTF-8 can hold, half characters escaped."""
    line = json.dumps({"messages": messages}, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps({"messages": messages})
    return line


def read_jsonl(text: str) -> list[list[dict[str, Any]]]:
    """Return the messages of each conversation in JSON lines, checked.

    Raises:
        DataError: there is none, or a line breaks a rule.
    """
    found = []
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # str.splitlines would cut at U+2028 in a message
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
