"""Conversations to token ids, with a mask of what is learned from.

Hides: the chat format. Each message stands between its special tokens, nothing else separates them, and text
never becomes a special token. Only what the assistant itself writes has mask 1; tool output, which is forced
in, has 0.
Reference: karpathy/nanochat, nanochat/tokenizer.py, `render_conversation`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from primechat.errors import DataError
from primechat.protocols import Conversation

if TYPE_CHECKING:
    from primechat.text.tokenizer import Tokenizer

PARTS = {
    "text": (),
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}


def render(
    tokenizer: Tokenizer, conversation: Conversation, max_tokens: int = 2048
) -> tuple[list[int], list[int]]:
    """Return ids and mask of a conversation, both cut to `max_tokens`.

    Args:
        conversation: `{"messages": [...]}`, roles user and assistant in turn; a leading system message joins
            the first user message.

    Returns:
        ids and a mask as long: 1 where the assistant's own token is learned from.

    Raises:
        DataError: A message breaks these rules; it is named by its number, from 1.
    """
    special = tokenizer.special
    ids, mask = [tokenizer.bos_id], [0]

    def add(tokens: list[int], learned: int) -> None:
        ids.extend(tokens)
        mask.extend([learned] * len(tokens))

    for i, message in enumerate(merge_system(read_messages(conversation))):
        if i % 2 == 0:
            asked = tokenizer.encode(message["content"])
            add([special("<|user_start|>"), *asked, special("<|user_end|>")], 0)
            continue
        add([special("<|assistant_start|>")], 0)
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            tokens, ends = (
                tokenizer.encode(part["text"]),
                [special(name) for name in PARTS[part["type"]]],
            )
            add([*ends[:1], *tokens, *ends[1:]], int(part["type"] != "python_output"))
        add([special("<|assistant_end|>")], 1)
    return ids[:max_tokens], mask[:max_tokens]


def render_prompt(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """Return the ids after which the assistant speaks; only an assistant's last message is dropped."""
    messages = read_messages(conversation)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise DataError("a conversation to complete must have a user message; add one.")
    ids, _ = render(tokenizer, {"messages": messages}, max_tokens=2**62)
    return [*ids, tokenizer.special("<|assistant_start|>")]


def read_messages(conversation: object) -> list[dict[str, Any]]:
    """Return the messages of a conversation after checking roles, their order and the contents."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"conversation={conversation!r:.50} must be a dict with a list of messages; add one."
        )
    first = isinstance(messages[0], dict) and messages[0].get("role") == "system"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            kind = type(message).__name__
            raise DataError(f"message {number} must be a dict with role and content, not {kind}.")
        role, content = message.get("role"), message.get("content")
        wanted = (
            "system" if first and number == 1 else "user" if (number - first) % 2 else "assistant"
        )
        if role != wanted:
            rule = "user and assistant take turns, after at most one system message"
            raise DataError(
                f"message {number} is from {role!r:.40} where {wanted!r} must speak; {rule}."
            )
        if isinstance(content, str):
            continue
        speaker = f"the {role}'s"
        parts = content if role == "assistant" and isinstance(content, list) else [None]
        if not all(
            isinstance(p, dict) and p.get("type") in tuple(PARTS) and isinstance(p.get("text"), str)
            for p in parts
        ):
            may = (
                f" or a list of parts of type {', '.join(PARTS)} with a text"
                if role == "assistant"
                else ""
            )
            raise DataError(
                f"message {number} has the content {content!r:.60}; {speaker} must be text{may}."
            )
    if first and len(messages) == 1:
        raise DataError("message 1 is from the system and nothing follows; add a user message.")
    return messages


def merge_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with a leading system message put before the first user message's text."""
    if messages[0]["role"] != "system":
        return messages
    merged = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [merged, *messages[2:]]
