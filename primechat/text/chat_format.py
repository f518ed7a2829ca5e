"""The chat format: conversations to token ids and a loss mask.

Special tokens enclose each message and nothing else separates messages; text never becomes a special token.
The mask is 1 only for tokens that the assistant writes itself; tool output, which is inserted, has mask 0.
Reference: karpathy/nanochat, nanochat/tokenizer.py, `render_conversation`.
"""

from __future__ import annotations

from typing import Any

from primechat.errors import DataError
from primechat.protocols import ChatTokenizer, Conversation

PARTS = {
    "text": (),
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}


def render(
    tokenizer: ChatTokenizer, conversation: Conversation, max_tokens: int = 2048
) -> tuple[list[int], list[int]]:
    """Return the ids and the loss mask of a conversation, truncated to `max_tokens`.

    Args:
        conversation: `{"messages": [...]}` with alternating roles user and assistant; a leading system
            message is merged into the first user message.

    Returns:
        Two lists of equal length: the ids, and a mask that is 1 for tokens to learn from.

    Raises:
        DataError: A message breaks these rules; the error gives its number, counted from 1.
    """
    special = tokenizer.special
    ids, mask = [tokenizer.bos_id], [0]

    def add(tokens: list[int], learned: int) -> None:
        ids.extend(tokens)
        mask.extend([learned] * len(tokens))

    for i, message in enumerate(merge_system(read_messages(conversation))):
        # A user's message is read, never learned.
        if i % 2 == 0:
            asked = tokenizer.encode(message["content"])
            add([special("<|user_start|>"), *asked, special("<|user_end|>")], 0)
            continue

        # An assistant's message is learned part by part, except for tool output.
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


def render_prompt(tokenizer: ChatTokenizer, conversation: Conversation) -> list[int]:
    """Return the prompt ids for the assistant's next message; an assistant's last message is dropped."""
    messages = read_messages(conversation)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise DataError("a conversation to complete must have a user message; add one.")
    ids, _ = render(tokenizer, {"messages": messages}, max_tokens=2**62)
    return [*ids, tokenizer.special("<|assistant_start|>")]


def read_messages(conversation: object) -> list[dict[str, Any]]:
    """Return the messages of a conversation after checking their roles, order and contents."""
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

        # Roles take turns.
        role, content = message.get("role"), message.get("content")
        wanted = (
            "system" if first and number == 1 else "user" if (number - first) % 2 else "assistant"
        )
        if role != wanted:
            rule = "user and assistant take turns, after at most one system message"
            raise DataError(
                f"message {number} is from {role!r:.40} where {wanted!r} must speak; {rule}."
            )

        # Content is text, or a list of typed parts from an assistant.
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
    """Return the messages with a leading system message prepended to the first user message."""
    if messages[0]["role"] != "system":
        return messages
    merged = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [merged, *messages[2:]]
