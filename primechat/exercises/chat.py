"""Lab 10: how a reply is drawn token by token, and three exercises on it.

Hides: the checks' numbers. Reference: Holtzman et al. 2020 (nucleus sampling); the Unicode Standard, section
3.9 (UTF-8).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np

from primechat.exercises import Exercise, require

PROMPTS = ("Hi! How was your day?", "What do you like to eat?", "Tell me about your family.")
BUCKETS = (("1st", 1), ("2nd", 2), ("3rd to 5th", 5), ("6th to 10th", 10), ("11th to 50th", 50))


def collect_ranks(
    model: Any, tokenizer: Any, *, temperature: float = 0.8, tokens: int = 40
) -> list[int]:
    """Return the rank of each token in a few short replies; 0 is the one that the model held likeliest."""
    from primechat.infer.engine import Engine

    engine, ranks = Engine(model, tokenizer), list[int]()
    for seed, prompt in enumerate(PROMPTS):
        ids = tokenizer.render_for_completion({"messages": [{"role": "user", "content": prompt}]})
        steps = engine.stream(
            ids, max_new_tokens=tokens, temperature=temperature, top_k=50, seed=seed, stop_ids=()
        )
        ranks += [token.rank for token in steps]
    return ranks


def share_ranks(ranks: Sequence[int]) -> dict[str, float]:
    """Return the share of tokens in each bucket of ranks."""
    tops = [top for _, top in BUCKETS]
    counts = Counter(min(int(np.searchsorted(tops, rank + 1)), len(BUCKETS) - 1) for rank in ranks)
    return {name: counts[i] / max(len(ranks), 1) for i, (name, _) in enumerate(BUCKETS)}


class RankStudy:
    """How likely a model held the tokens that it took; measured when somebody wants to know, once.

    Args:
        opener: opens the model with its tokenizer.
    """

    def __init__(self, opener: Callable[[], tuple[Any, Any, Any]]) -> None:
        self.opener = opener

    @cached_property
    def shares(self) -> dict[str, dict[str, float]]:
        """`share_ranks` of the model and of one of its shape that has learned nothing."""
        import torch

        from primechat.model.gpt import GPT

        model, tokenizer, _ = self.opener()
        fresh = GPT(model.config)
        fresh.init_weights(torch.Generator().manual_seed(0))
        found = {"this model": model, "random weights": fresh.requires_grad_(False).eval()}
        return {name: share_ranks(collect_ranks(one, tokenizer)) for name, one in found.items()}


# Exercise 1

P = (0.5, 0.25, 0.125, 0.125)


def draw_token(p: Sequence[float], u: float) -> int:
    """Return the index in whose stretch u falls."""
    total = 0.0
    for i, share in enumerate(p):
        total += share
        if u < total:
            return i
    return len(p) - 1


def check_draw(draw: Callable[[Sequence[float], float], int]) -> None:
    """Check a draw from a distribution by one uniform number."""
    for u, wanted in ((0.0, 0), (0.49, 0), (0.5, 1), (0.74, 1), (0.8, 2), (0.9, 3), (0.999, 3)):
        found = draw(P, u)
        require(
            isinstance(found, (int, np.integer)),
            "An index comes back",
            f"draw(p, {u}) returned {found!r}.",
        )
        require(
            0 <= found < 4,
            "An index comes back",
            f"draw(p, {u}) returned {found}, p has 4 entries.",
        )
        if u in (0.0, 0.5):
            require(
                found == wanted,
                "A border belongs to the token above it",
                f"draw(p, {u}) returned {found}.",
            )
        require(
            found == wanted,
            "Each token gets its share",
            f"draw({P}, {u}) returned {found}, not {wanted}.",
        )
    require(
        draw((0.0, 1.0), 0.0) == 1,
        "What has no chance is never drawn",
        "draw((0, 1), 0.0) returned 0.",
    )


# Exercise 2


def keep_nucleus(p: Sequence[float], top_p: float) -> list[int]:
    """Return the smallest set of the likeliest tokens that reaches top_p."""
    kept: list[int] = []
    total = 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        kept.append(i)
        total += p[i]
        if total >= top_p:
            break
    return kept


def check_nucleus(keep: Callable[[Sequence[float], float], Iterable[int]]) -> None:
    """Check which tokens top-p keeps."""
    p = (0.125, 0.5, 0.125, 0.25)
    cases = ((0.5, {1}), (0.6, {1, 3}), (0.75, {1, 3}), (1.0, {0, 1, 2, 3}), (0.01, {1}))
    for top_p, wanted in cases:
        found = set(keep(p, top_p))
        said = f"top_p={top_p} of {p} kept {sorted(found)}, not {sorted(wanted)}."
        require(bool(found), "At least one token is kept", said)
        total = sum(p[i] for i in found)
        require(total >= top_p, "The kept tokens reach top_p", said)
        require(
            min(p[i] for i in found) >= min(p[i] for i in wanted), "The likeliest are kept", said
        )
        require(len(found) == len(wanted), "No more than needed are kept", said)


# Exercise 3


def stream_text(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield the text of bytes as soon as it is whole."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text
    if text := decoder.decode(b"", True):
        yield text


def check_stream(stream: Callable[[Iterable[bytes]], Iterable[str]]) -> None:
    """Check that bytes become text as they come, never half a character."""
    taken: list[bytes] = []

    def feed(pieces: Sequence[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            taken.append(piece)
            yield piece

    wave = "👋".encode()
    pieces = [b"h", b"i " + wave[:1], wave[1:3], wave[3:], b"!"]
    found = list(stream(pieces))
    require("\ufffd" not in "".join(found), "No half characters", f"{pieces} became {found}.")
    require("".join(found) == "hi 👋!", "No text is lost", f"{pieces} became {found}.")
    texts = (text for text in stream(feed(pieces)) if text)
    for n, text in ((1, "h"), (2, "i ")):
        next(texts)
        said = f"{len(taken)} of {pieces} were taken before {text!r} came, not {n}."
        require(len(taken) == n, "Text appears as it comes", said)
    broken = "".join(stream([b"a", wave[:2]]))
    require(
        broken == "a\ufffd", "A cut end is shown", f"a cut character at the end became {broken!r}."
    )


EXERCISES = (
    Exercise(
        title="Draw a token",
        task="A model gives each token a probability, and a generator gives one number `u` from 0 up to, "
        "not including, 1. Write `draw(p, u)`: lay the probabilities end to end and return the index of the "
        "one in whose stretch `u` falls.",
        check=check_draw,
        hint="Add up the probabilities one by one and stop at the first sum that is larger than u.",
        solution=draw_token,
        mistakes=(
            (lambda p, u: int(np.argmax(p)), "A border belongs to the token above it"),
            (
                lambda p, u: int(np.searchsorted(np.cumsum(p), u)),
                "A border belongs to the token above it",
            ),
            (lambda p, u: int(u * len(p)), "Each token gets its share"),
            (lambda p, u: u, "An index comes back"),
        ),
        praise="This is the whole secret of a seed: the same numbers u give the same reply.",
    ),
    Exercise(
        title="Cut off the tail",
        task="Top-p keeps **the smallest set of the likeliest tokens** whose probabilities reach `top_p` "
        "together. Write `keep(p, top_p)` and return their indices.",
        check=check_nucleus,
        hint="Walk from the likeliest token down; the one that makes the sum reach top_p is in.",
        solution=keep_nucleus,
        mistakes=(
            (lambda p, top_p: keep_nucleus(p, top_p)[:-1], "At least one token is kept"),
            (lambda p, top_p: keep_nucleus(p, top_p)[:-1] or [1], "The kept tokens reach top_p"),
            (lambda p, top_p: list(np.argsort(p)), "The likeliest are kept"),
            (lambda p, top_p: range(len(p)), "The likeliest are kept"),
        ),
        praise="A model gives some chance to nonsense; top-p cuts it off, however many tokens that takes.",
    ),
    Exercise(
        title="Never half a character",
        task="Tokens are bytes, and 👋 takes four of them, often in two tokens. Write `stream(pieces)`: take "
        "bytes as they come and yield text **as soon as it is whole**, never half a character.",
        check=check_stream,
        hint="codecs.getincrementaldecoder('utf-8')('replace') keeps what is not whole yet.",
        solution=stream_text,
        mistakes=(
            (
                lambda pieces: (piece.decode("utf-8", "replace") for piece in pieces),
                "No half characters",
            ),
            (
                lambda pieces: (piece.decode("utf-8", "ignore") for piece in pieces),
                "No text is lost",
            ),
            (
                lambda pieces: [b"".join(pieces).decode("utf-8", "replace")],
                "Text appears as it comes",
            ),
            (lambda pieces: hold_back(pieces), "Text appears as it comes"),
            (lambda pieces: (t for t in decode_forgetful(pieces)), "A cut end is shown"),
        ),
        praise="The page above does just this; without it, emoji would flicker as broken signs.",
    ),
)


def decode_forgetful(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield text as it comes and forget a cut end: the last mistake of the last exercise."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    yield from (text for piece in pieces if (text := decoder.decode(piece)))


def hold_back(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield text once a whole piece can be read: a mistake, as half a character keeps back what is whole."""
    rest = b""
    for piece in pieces:
        rest += piece
        with suppress(UnicodeDecodeError):
            yield rest.decode()
            rest = b""
    if rest:
        yield rest.decode("utf-8", "replace")
