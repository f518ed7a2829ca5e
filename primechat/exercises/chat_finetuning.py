# ruff: noqa: E501 (a task is a line)
"""Exercises of lab 06: which tokens are learned from, and how a talk is put in order.

Hides: the small talks that the checks try. Reference: primechat.text.chat_format, primechat.text.dialogues.
"""

from __future__ import annotations

from typing import Any

from primechat.exercises import Exercise, require

Parts = list[tuple[str, int]]
Turns = list[tuple[str, str]]


def mark_learned(parts: Parts) -> list[int]:
    """Return 1 for each token that is learned from, 0 for the others."""
    return [int(role == "assistant") for role, n_tokens in parts for _ in range(n_tokens)]


def mark_last(parts: Parts) -> list[int]:
    """A mistake: only the last answer is learned from."""
    last = max(i for i, (role, _) in enumerate(parts) if role == "assistant")
    return [int(i == last) for i, (_, n_tokens) in enumerate(parts) for _ in range(n_tokens)]


def check_mask(attempt: Any) -> None:
    """Refuse a mask that is not the assistant's tokens."""
    parts = [("user", 3), ("assistant", 2), ("user", 1), ("assistant", 4)]
    got = list(attempt(list(parts)))
    require(len(got) == 10, "A number a token", f"for 10 tokens there were {len(got)} numbers")
    user = got[:3] + got[5:6]
    require(not any(user), "Nothing is learned from the user", f"the user's tokens have {user}")
    mine = got[3:5] + got[6:]
    require(all(mine), "Every answer is learned from", f"the assistant's tokens have {mine}")


def order_turns(talk: Turns) -> Turns:
    """Return a talk in which user and assistant take turns, from the user to the assistant."""
    found: Turns = []
    for role, text in talk:
        if not text.strip():
            continue
        if found and found[-1][0] == role:
            found[-1] = (role, f"{found[-1][1]}\n{text}")
        elif found or role == "user":
            found.append((role, text))
    return found[:-1] if found and found[-1][0] == "user" else found


def drop_doubles(talk: Turns) -> Turns:
    """A mistake: the second of two turns in a row is lost."""
    found: Turns = []
    for role, text in talk:
        if text.strip() and (not found or found[-1][0] != role) and (found or role == "user"):
            found.append((role, text))
    return found[:-1] if found and found[-1][0] == "user" else found


def keep_blanks(talk: Turns) -> Turns:
    """A mistake: blank turns stay."""
    found = order_turns([(role, text if text.strip() else "(blank)") for role, text in talk])
    return [(role, text.replace("(blank)", "")) for role, text in found]


def keep_greeting(talk: Turns) -> Turns:
    """A mistake: the assistant may begin."""
    return [talk[0], *order_turns(talk)] if talk[0][0] == "assistant" else order_turns(talk)


def join_first(talk: Turns) -> Turns:
    """A mistake: what stood beside a blank turn is not joined."""
    found = order_turns([(role, text if text.strip() else "(blank)") for role, text in talk])
    return [turn for turn in found if turn[1] != "(blank)"]


def check_order(attempt: Any) -> None:
    """Refuse a talk that a model cannot learn to answer from."""
    talk = [
        ("assistant", "Welcome"),
        ("user", "Hi"),
        ("assistant", "  "),
        ("user", "there"),
        ("assistant", "Hello"),
        ("assistant", "you"),
        ("user", "Bye"),
    ]
    got = [tuple(turn) for turn in attempt(list(talk))]
    require(bool(got) and got[0][0] == "user", "The user begins", f"the first turn was {got[:1]}")
    require(got[-1][0] == "assistant", "An answer ends it", f"the last turn was {got[-1]}")
    require(
        all(text.strip() for _, text in got) and not any(text != text.strip() for _, text in got),
        "No blank turns",
        f"the turns were {got}",
    )
    require(
        all(a[0] != b[0] for a, b in zip(got, got[1:], strict=False)),
        "They take turns",
        f"got {got}",
    )
    words = " ".join(text for _, text in got).split()
    require(
        words == ["Hi", "there", "Hello", "you"], "No word is lost", f"the words left were {words}"
    )
    require(
        got[0][1] == "Hi\nthere", "A line break joins", f"the user's two turns became {got[0][1]!r}"
    )


EXERCISES = (
    Exercise(
        title="What is learned from",
        task="A talk is given as parts `(role, number of tokens)`. Return a list with **1 for each token that is "
        "learned from** and 0 for each that is only read.",
        check=check_mask,
        hint="Go through the parts, and through the tokens of each; only the role decides.",
        solution=mark_learned,
        mistakes=(
            (
                lambda parts: [1 for _, n_tokens in parts for _ in range(n_tokens)],
                "Nothing is learned from the user",
            ),
            (lambda parts: [int(role == "assistant") for role, _ in parts], "A number a token"),
            (mark_last, "Every answer is learned from"),
        ),
        praise="This mask is what keeps the model from learning to speak for you.",
    ),
    Exercise(
        title="Put a talk in order",
        task="Real talks are untidy. Return the turns `(role, text)` so that **the user begins, they take turns, "
        "an answer ends it**. Drop blank turns; join two turns of one speaker with a line break.",
        check=check_order,
        hint="Skip blank texts first; then compare each turn's role with that of the last one you kept.",
        solution=order_turns,
        mistakes=(
            (drop_doubles, "No word is lost"),
            (keep_blanks, "No blank turns"),
            (
                lambda talk: order_turns([*talk, ("assistant", "x")])[:-1] + talk[-1:],
                "An answer ends it",
            ),
            (keep_greeting, "The user begins"),
            (join_first, "They take turns"),
            (
                lambda talk: [(role, " ".join(text.split())) for role, text in order_turns(talk)],
                "A line break joins",
            ),
        ),
        praise="The stages clean every set by these rules, and count what they changed.",
    ),
)
