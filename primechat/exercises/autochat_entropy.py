"""Lab 09: three exercises on measuring talk.

Hides: the checks' numbers. Reference: primechat.metrics.diversity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from primechat.exercises import Exercise, require


def entropy_nats(p: Sequence[float]) -> float:
    """Return -sum p ln p."""
    return -sum(x * math.log(x) for x in p if x > 0)


def check_entropy(entropy: Callable[[Sequence[float]], float]) -> None:
    """Check an entropy in nats."""
    try:
        sure = entropy([1.0, 0.0])
    except (ValueError, ZeroDivisionError) as error:
        require(False, "What has no chance counts nothing", f"entropy([1, 0]) raised {error!r}.")
    require(
        not math.isnan(sure),
        "What has no chance counts nothing",
        "entropy([1, 0]) is not a number.",
    )
    require(abs(sure) < 1e-6, "A sure choice has none", f"entropy([1, 0]) returned {sure}.")
    even = entropy([0.25] * 4)
    require(
        even > 0, "Entropy is never negative", f"entropy of four equal chances returned {even}."
    )
    said = f"entropy of four equal chances returned {even:.4f}, ln 4 is {math.log(4):.4f}."
    require(abs(even - math.log(4)) < 1e-6, "Equal chances of n have ln n", said)
    mixed = entropy([0.5, 0.25, 0.25])
    said = f"entropy([0.5, 0.25, 0.25]) returned {mixed:.4f}, not 1.5 ln 2."
    require(abs(mixed - 1.5 * math.log(2)) < 1e-6, "Each choice counts by its chance", said)


def share_repeated(tokens: Sequence[Any], n: int) -> float:
    """Return 1 - different / all n-grams."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def check_repeated(rep: Callable[[Sequence[Any], int], float]) -> None:
    """Check the share of repeated n-grams."""
    try:
        short = rep(["a"], 2)
    except (ZeroDivisionError, IndexError, ValueError) as error:
        require(False, "A short text repeats nothing", f"rep(['a'], 2) raised {error!r}.")
    require(short == 0, "A short text repeats nothing", f"rep(['a'], 2) returned {short}.")
    once = rep(list("abcd"), 2)
    require(once == 0, "No repeat, no share", f"rep of a b c d, n = 2, returned {once}.")
    last = rep(list("abab"), 2)
    said = f"rep of a b a b, n = 2, returned {last:.3f}: its pairs are ab, ba, ab, so 1/3."
    require(abs(last - 1 / 3) < 1e-9, "The last n-gram counts", said)
    apart = rep(list("abcab"), 2)
    said = f"rep of a b c a b, n = 2, returned {apart:.3f}: 4 pairs, 3 different, so 1/4."
    require(abs(apart - 1 / 4) < 1e-9, "Repeats need not be side by side", said)
    three = rep(list("abcabc"), 3)
    said = f"rep of a b c a b c, n = 3, returned {three:.3f}: its pieces are abc, bca, cab, abc, so 1/4."
    require(abs(three - 1 / 4) < 1e-9, "A piece has n tokens", said)


def see_roles(texts: Sequence[str], me: int) -> list[dict[str, str]]:
    """Return a conversation as one of its two speakers sees it."""
    messages = [
        {"role": "assistant" if i % 2 == me else "user", "content": text}
        for i, text in enumerate(texts)
    ]
    return messages[1:] if messages and messages[0]["role"] == "assistant" else messages


def check_roles(see: Callable[[Sequence[str], int], list[dict[str, str]]]) -> None:
    """Check the two points of view."""
    texts = ["Hi!", "Hello.", "How are you?", "Fine."]
    second, first = see(texts[:3], 1), see(texts, 0)
    require(
        [m["role"] for m in second] == ["user", "assistant", "user"],
        "My own turns are the assistant's",
        f"speaker 1 sees the roles {[m['role'] for m in second]}.",
    )
    require(
        [m["content"] for m in second] == texts[:3],
        "No turn is lost or changed",
        f"speaker 1 sees {second}.",
    )
    require(
        bool(first) and first[0]["role"] == "user",
        "A conversation begins with the user",
        f"speaker 0 sees {first[:1]} first; what it said itself before anyone answered is left out.",
    )
    require(
        [m["content"] for m in first] == texts[1:],
        "No turn is lost or changed",
        f"speaker 0 sees {first}.",
    )
    roles = [m["role"] for m in first]
    said = f"speaker 0 sees the roles {roles}."
    require(roles == ["user", "assistant", "user"], "My own turns are the assistant's", said)


def _adjacent(tokens: Sequence[Any], n: int) -> float:
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    same = sum(grams[i] == grams[i - n] for i in range(n, len(grams)))
    return same / len(grams) if grams else 0.0


def _drop_last(tokens: Sequence[Any], n: int) -> float:
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


EXERCISES = (
    Exercise(
        title="How open is a choice?",
        task="A model gives each token a probability. Write `entropy(p)`: the sum of -p ln p, in nats. It is "
        "0 where one token is sure, and ln n where n tokens are equally likely.",
        check=check_entropy,
        hint="Leave out what has probability 0: 0 ln 0 counts as 0, but math.log(0) raises.",
        solution=entropy_nats,
        mistakes=(
            (lambda p: -sum(x * math.log(x) for x in p), "What has no chance counts nothing"),
            (lambda p: sum(x * math.log(x) for x in p if x > 0), "Entropy is never negative"),
            (lambda p: -sum(x * math.log2(x) for x in p if x > 0), "Equal chances of n have ln n"),
            (lambda p: math.log(sum(x > 0 for x in p)), "Each choice counts by its chance"),
        ),
        praise="This is the first row of the heat strip, averaged over a turn's tokens.",
    ),
    Exercise(
        title="How much is said again?",
        task="Write `rep(tokens, n)`: of all pieces of n tokens in a row, the share that is not needed to "
        "list the different ones: 1 - different / all. A text shorter than n repeats nothing.",
        check=check_repeated,
        hint="There are len(tokens) - n + 1 pieces; one published program forgets the last of them.",
        solution=share_repeated,
        mistakes=(
            (_drop_last, "The last n-gram counts"),
            (_adjacent, "Repeats need not be side by side"),
            (
                lambda t, n: (
                    1 - len({tuple(t[i : i + n]) for i in range(len(t) - n + 1)}) / (len(t) - n + 1)
                ),
                "A short text repeats nothing",
            ),
            (lambda t, n: 1 - len(set(t)) / len(t) if len(t) > n else 0, "The last n-gram counts"),
            (lambda t, n: share_repeated(t, 2), "A piece has n tokens"),
        ),
        praise="Three of these, for n = 2, 3 and 4, make the measure called diversity.",
    ),
    Exercise(
        title="Two points of view",
        task="Two models talk, speaker 0 first. Write `see(texts, me)`: the conversation as messages "
        "`{'role', 'content'}` for speaker `me`. Its own turns are the **assistant**'s, the other's the "
        "**user**'s; a chat model wants a user first, so what it said before anyone answered is left out.",
        check=check_roles,
        hint="Turn i is mine where i % 2 == me; then look whether the first message is the assistant's.",
        solution=see_roles,
        mistakes=(
            (
                lambda texts, me: [
                    {"role": ("user", "assistant")[i % 2], "content": t}
                    for i, t in enumerate(texts)
                ],
                "No turn is lost or changed",
            ),
            (lambda texts, me: see_roles(texts, 1 - me), "My own turns are the assistant's"),
            (
                lambda texts, me: [
                    {"role": ("user", "assistant")[i % 2 == me], "content": t}
                    for i, t in enumerate(texts)
                ],
                "A conversation begins with the user",
            ),
            (lambda texts, me: see_roles(texts[-2:], me), "My own turns are the assistant's"),
            (
                lambda texts, me: [
                    m | {"role": m["role"] if me else "user"} for m in see_roles(texts, me)
                ],
                "My own turns are the assistant's",
            ),
        ),
        praise="This swap is all that self-talk needs: one model, two points of view.",
    ),
)
