"""Exercises of lab 01: cut a word, count pairs, light the loss mask.

Hides: the texts that the checks try. Reference: Sennrich, Haddow & Birch 2016, 3.2; nanochat's chat format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from primechat.exercises import Exercise, require

RANKS = {bytes([i]): i for i in range(256)} | {
    b"bc": 256,
    b"ab": 257,
    b"aa": 258,
    b"de": 259,
    b"def": 260,
    b"bcde": 261,
    b"ea": 262,
}
WORDS = (
    (b"abc", [b"a", b"bc"]),
    (b"aaa", [b"aa", b"a"]),
    (b"bcdef", [b"bc", b"def"]),
    (b"bcdea", [b"bcde", b"a"]),
)


def check_cutting(cut_word: Callable[[bytes, dict[bytes, int]], list[bytes]]) -> None:
    """Try a function that cuts a word into tokens."""
    results = [(word, list(cut_word(word, dict(RANKS))), tokens) for word, tokens in WORDS]
    for word, found, _ in results:
        require(
            b"".join(found) == word,
            "No byte is lost",
            f"cut_word({word!r}) returned {found!r}: joined, these are not the word.",
        )
    for word, found, _ in results:
        pairs = [a + b for a, b in zip(found, found[1:], strict=False) if a + b in RANKS]
        require(
            not pairs,
            "Merge until no pair is known",
            f"cut_word({word!r}) returned {found!r}, but {pairs[:1]} is still in the vocabulary.",
        )
    word, found, tokens = results[1]
    require(
        found == tokens,
        "Leftmost of equals first",
        f"cut_word({word!r}) returned {found!r}, not {tokens!r}.",
    )
    for word, found, tokens in results:
        require(
            found == tokens,
            "Lowest rank first",
            f"cut_word({word!r}) returned {found!r}, not {tokens!r}.",
        )


def cut_word(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Join the pair of the lowest rank until none is known."""
    parts = [bytes([byte]) for byte in word]
    while True:
        known = []
        for i in range(len(parts) - 1):
            pair = parts[i] + parts[i + 1]
            if pair in ranks:
                known.append((ranks[pair], i))
        if not known:
            return parts
        _, i = min(known)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _cut_greedily(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    parts = []
    while word:
        size = max(n for n in range(1, len(word) + 1) if word[:n] in ranks)
        parts.append(word[:size])
        word = word[size:]
    return parts


def _merge_by(
    word: bytes, ranks: dict[bytes, int], sign: int, right: int, most: int = 99
) -> list[bytes]:
    parts = [bytes([byte]) for byte in word]
    for _ in range(most):
        pairs = zip(parts, parts[1:], strict=False)
        known = [
            (sign * ranks[a + b], right * i) for i, (a, b) in enumerate(pairs) if a + b in ranks
        ]
        if not known:
            break
        i = abs(min(known)[1])
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


COUNTED = {"ab": 5, "abc": 2, "bab": 1, "aaa": 1}


def check_counting(count_pairs: Callable[[dict[str, int]], dict[tuple[str, str], int]]) -> None:
    """Try a function that counts pairs of letters."""
    found = {pair: n for pair, n in dict(count_pairs(dict(COUNTED))).items() if n}
    require(
        ("c", "b") not in found and ("b", "b") not in found,
        "No pair across words",
        "count_pairs counted a pair, “cb” or “bb”, whose letters never stand in one word.",
    )
    require(
        found.get(("b", "a"), 0) == 1,
        "Order matters",
        f"count_pairs says ('b', 'a') stands {found.get(('b', 'a'), 0)} times; only “bab” has it, once.",
    )
    require(
        found.get(("a", "b"), 0) == 8,
        "A word weighs as often as it stands",
        f"count_pairs says ('a', 'b') stands {found.get(('a', 'b'), 0)} times; 5 + 2 + 1 words have it.",
    )
    require(
        found.get(("a", "a"), 0) == 2,
        "Every neighbour counts",
        f"count_pairs says ('a', 'a') stands {found.get(('a', 'a'), 0)} times; “aaa” has it twice.",
    )


def count_pairs(words: dict[str, int]) -> dict[tuple[str, str], int]:
    """Add up how often each pair of neighbours stands in the text."""
    pairs: dict[tuple[str, str], int] = {}
    for word, times in words.items():
        for i in range(len(word) - 1):
            pair = (word[i], word[i + 1])
            pairs[pair] = pairs.get(pair, 0) + times
    return pairs


def _count_once(words: dict[str, int]) -> Any:
    return Counter(pair for word in words for pair in zip(word, word[1:], strict=False))


def _count_across(words: dict[str, int]) -> Any:
    text = "".join(word * times for word, times in words.items())
    return Counter(zip(text, text[1:], strict=False))


def _count_unordered(words: dict[str, int]) -> Any:
    pairs: Counter[Any] = Counter()
    for (a, b), times in count_pairs(words).items():
        pairs[min(a, b), max(a, b)] += times
    return pairs


def _count_apart(words: dict[str, int]) -> Any:
    pairs = count_pairs(words)
    return pairs | {("a", "a"): 1}


BOS, USER, END_USER = "<|bos|>", "<|user_start|>", "<|user_end|>"
ANSWER, END_ANSWER = "<|assistant_start|>", "<|assistant_end|>"
OUT, END_OUT = "<|output_start|>", "<|output_end|>"
PYTHON, END_PYTHON = "<|python_start|>", "<|python_end|>"
TALK = (
    (BOS, 0),
    (USER, 0),
    ("2+2", 0),
    ("?", 0),
    (END_USER, 0),
    (ANSWER, 0),
    ("I", 1),
    (" count", 1),
    (PYTHON, 1),
    ("2+2", 1),
    (END_PYTHON, 1),
    (OUT, 0),
    ("4", 0),
    (END_OUT, 0),
    ("Four", 1),
    (END_ANSWER, 1),
    (USER, 0),
    ("Thanks", 0),
    (END_USER, 0),
    (ANSWER, 0),
    ("Bye", 1),
    (END_ANSWER, 1),
)
RULES = (
    ("The user's words are not learned", ("?", "Thanks", USER, END_USER, BOS)),
    ("An answer's start is given", (ANSWER,)),
    ("A tool's result is only read", (OUT, "4", END_OUT)),
    ("The model learns to end its answer", (END_ANSWER,)),
    ("The model learns to call a tool", (PYTHON, END_PYTHON)),
    ("The model learns what the assistant writes", ("I", " count", "2+2", "Four", "Bye")),
)


def check_mask(light_mask: Callable[[list[str]], list[int]]) -> None:
    """Try a function that marks the tokens that are learned."""
    tokens = [token for token, _ in TALK]
    found = [int(bit) for bit in light_mask(list(tokens))]
    require(
        len(found) == len(tokens),
        "One mark a token",
        f"light_mask returned {len(found)} marks for {len(tokens)} tokens.",
    )
    for rule, members in RULES:
        for i, (token, right) in enumerate(TALK):
            if token in members:
                require(
                    found[i] == right,
                    rule,
                    f"light_mask marks token {i}, {token!r}, {found[i]}; it must be {right}.",
                )


def light_mask(tokens: list[str]) -> list[int]:
    """Mark what the assistant itself writes."""
    mask, speaks, reads = [], False, False
    for token in tokens:
        reads = reads or token == "<|output_start|>"
        mask.append(int(speaks and not reads))
        if token == "<|output_end|>":
            reads = False
        if token == "<|assistant_start|>":
            speaks = True
        if token == "<|assistant_end|>":
            speaks = False
    return mask


def _alter_mask(tokens: list[str], members: tuple[str, ...], mark: int) -> list[int]:
    return [
        mark if token in members else bit
        for token, bit in zip(tokens, light_mask(tokens), strict=True)
    ]


EXERCISES = (
    Exercise(
        title="Cut a word as the tokenizer does",
        task="Write `cut_word(word, ranks)`: the word's bytes become parts, and as long as two neighbours "
        "joined are in `ranks`, the pair with the **lowest rank** is joined; of equals, the leftmost. "
        "Return the parts.",
        check=check_cutting,
        hint="In each round list all neighbours that are known with their rank, and take the minimum.",
        solution=cut_word,
        mistakes=(
            (_cut_greedily, "Lowest rank first"),
            (lambda word, ranks: _merge_by(word, ranks, -1, 1), "Lowest rank first"),
            (lambda word, ranks: _merge_by(word, ranks, 1, -1), "Leftmost of equals first"),
            (lambda word, ranks: _merge_by(word, ranks, 1, 1, 1), "Merge until no pair is known"),
            (lambda word, ranks: cut_word(word, ranks)[:-1], "No byte is lost"),
        ),
        praise="This is all of encoding: the merges are replayed in the order in which they were learned.",
    ),
    Exercise(
        title="Count the pairs that training counts",
        task="Write `count_pairs(words)`: `words` says how often each word stands in a text, for example "
        "`{'low': 5, 'lower': 2}`. Return how often each pair of neighbouring letters stands there: "
        "`{('l', 'o'): 7, …}`.",
        check=check_counting,
        hint="Go over the neighbours within each word and add the word's count, not one.",
        solution=count_pairs,
        mistakes=(
            (_count_once, "A word weighs as often as it stands"),
            (_count_across, "No pair across words"),
            (_count_unordered, "Order matters"),
            (_count_apart, "Every neighbour counts"),
        ),
        praise="The most frequent of these pairs becomes the next token; then the counting goes on with it.",
    ),
    Exercise(
        title="Light the loss mask",
        task="Write `light_mask(tokens)`: for a conversation's tokens, special ones by name, return a list "
        "of 1 where the model is trained to write the token and 0 elsewhere. It learns what **the assistant "
        "itself** writes, with `<|assistant_end|>` and its calls of Python, but not what Python answers.",
        check=check_mask,
        hint="Keep two switches while you walk over the tokens: who speaks, and whether Python answers.",
        solution=light_mask,
        mistakes=(
            (lambda tokens: [1] * len(tokens), "The user's words are not learned"),
            (lambda tokens: _alter_mask(tokens, (ANSWER,), 1), "An answer's start is given"),
            (
                lambda tokens: _alter_mask(tokens, (OUT, "4", END_OUT), 1),
                "A tool's result is only read",
            ),
            (
                lambda tokens: _alter_mask(tokens, (END_ANSWER,), 0),
                "The model learns to end its answer",
            ),
            (lambda tokens: light_mask(tokens)[1:], "One mark a token"),
        ),
        praise="A model trained without the mark on `<|assistant_end|>` never stops talking.",
    ),
)
