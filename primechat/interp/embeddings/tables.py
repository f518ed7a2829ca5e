"""Embedding tables of a model and facts about its tokens: kinds, counts, analogies.

Hides: where a model stores its tables. `input` is read for each input token (the model first scales each row
to the same length), `output` is compared with the last state to score the next token, `value.<i>` is added to
the values of layer i. Reference: Press & Wolf 2017 (input and output embedding); Mikolov et al. 2013
(analogies); Linzen 2016 (why analogies need controls).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from primechat.errors import ConfigError
from primechat.interp.embeddings.maps import scale_rows
from primechat.interp.hooks import capture, to_numpy
from primechat.model.gpt import GPT
from primechat.model.huggingface import ForeignModel
from primechat.text.corpora import read_documents
from primechat.text.tokenizer import Tokenizer

KINDS = ("begins a word", "inside a word", "digits", "signs and spaces", "bytes", "special")
SAMPLE_STEP = 5  # every fifth document is counted: 2.5 million characters of the bundled chats
RULES = {  # how the second word of a pair is formed from the first; both must be tokens
    "a space before": (lambda w: w.isalpha(), lambda w: " " + w),
    "capital letter": (
        lambda w: w[:1] == " " and w[1:].islower(),
        lambda w: " " + w[1:].capitalize(),
    ),
    "plural": (lambda w: w[:1] == " " and w[1:].isalpha() and len(w) > 3, lambda w: w + "s"),
    "-ing": (lambda w: w[:1] == " " and w[1:].isalpha() and len(w) > 3, lambda w: w + "ing"),
}
_counts: dict[tuple[str, str, int], np.ndarray] = {}
_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class AnalogyScore:
    """Accuracy on analogies a : b = c : ?, as shares of `n` questions.

    `offset` answers with the token nearest to c + b - a; `near`, the baseline, with the token nearest to c;
    `shuffled`, the control, uses the offset between two random tokens.
    """

    rule: str
    pairs: tuple[tuple[str, str], ...]
    n: int
    offset: float
    near: float
    shuffled: float


def list_tables(model: Any) -> dict[str, str]:
    """Return the names of a model's embedding tables, each with its title."""
    tables = {"input": "input embeddings", "output": "output embeddings"}
    if isinstance(model, ForeignModel):
        one, two = model.network.get_input_embeddings(), model.network.get_output_embeddings()
        is_one = two is None or one.weight is two.weight
        return {"input": "embeddings, input and output"} if is_one else tables
    if isinstance(model, GPT):
        return tables | {f"value.{i}": f"value embeddings of layer {i}" for i in model.value_embeds}
    raise ConfigError(
        f"{type(model).__name__} has no tables that are known; open one with open_model."
    )


def read_table(model: Any, table: str) -> np.ndarray:
    """Return a table as float32 (V, C), one row per token.

    Raises:
        ConfigError: the model has no such table.
    """
    there = list_tables(model)
    if table not in there:
        raise ConfigError(f"table={table!r} must be one of {', '.join(there)}; try input.")
    if isinstance(model, ForeignModel):
        network = model.network
        part = (
            network.get_input_embeddings() if table == "input" else network.get_output_embeddings()
        )
        weight = part.weight
    elif table == "input":
        weight = model.transformer["wte"].weight
    else:
        weight = model.lm_head.weight if table == "output" else model.value_embeds[table[6:]].weight
    return to_numpy(weight[: model.vocab_size])


def read_states(model: Any, ids: Sequence[int] | np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of the stages of the stream and its states (L + 2, T, C), each scaled to length 1.

    The stages are the embedding, the output of each layer, and the input of the final norm.
    """
    if isinstance(model, ForeignModel):
        row = torch.tensor([list(ids)], device=model.device)
        with torch.inference_mode():
            seen = model.network(row, output_hidden_states=True, use_cache=False).hidden_states
        names = ["embed", *(f"layer.{i}.resid" for i in range(len(seen) - 2)), "last"]
        return tuple(names), np.stack([scale_rows(to_numpy(x[0])) for x in seen])
    points = capture(model, ids, points=("embed", "layer.*.resid", "last")).points
    return tuple(points), np.stack([scale_rows(x) for x in points.values()])


def measure_surprise(model: Any, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the loss in nats of each token given those before it (T,); the first is 0."""
    row = torch.tensor([list(ids)], device=model.device)
    with torch.no_grad():
        return np.r_[0, to_numpy(model.loss(row[:, :-1], row[:, 1:], reduction="none")[0])]


def name_token(tokenizer: Any, token_id: int) -> str:
    """Return a printable form of a token: spaces as ·, other white space as symbols, lone bytes in hex."""
    raw = tokenizer.token_bytes(token_id)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return " ".join(f"{byte:02X}" for byte in raw)
    marks = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
    return "".join(marks.get(c, c if c.isprintable() else f"\\x{ord(c):02X}") for c in text)


def sort_kinds(tokenizer: Any) -> np.ndarray:
    """Return the kind of each token, an index into KINDS: (V,) int64."""
    special = {tokenizer.special(name) for name in getattr(tokenizer, "specials", ())}

    def sort(token_id: int) -> int:
        if token_id in special:
            return 5
        try:
            text = tokenizer.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            return 4
        if any(c.isalpha() for c in text):
            return 1 if text[0].isalpha() else 0
        if text.strip().isnumeric():
            return 2
        return 3 if text.isspace() or text.strip().isprintable() else 4

    return np.array([sort(i) for i in range(tokenizer.vocab_size)])


def count_tokens(
    tokenizer: Tokenizer, corpus: str = "chitchat", step: int = SAMPLE_STEP
) -> np.ndarray:
    """Return how often each token occurs in a corpus's training text: (V,) int64, cached.

    Args:
        tokenizer: the tokenizer whose tokens are counted.
        corpus: corpus as in `text.corpora.read_documents`.
        step: only every step-th document is read.
    """
    key = (tokenizer.identity, corpus, step)
    with _lock:
        if key not in _counts:
            total = np.zeros(tokenizer.vocab_size, dtype=np.int64)
            documents = islice(read_documents(corpus, "train"), 0, None, step)
            while part := list(islice(documents, 2048)):
                ids = np.fromiter(
                    (i for row in tokenizer.encode_batch(part, 2) for i in row), dtype=np.int64
                )
                total += np.bincount(ids, minlength=len(total))
            total.setflags(write=False)
            _counts[key] = total
        return _counts[key]


def answer_analogy(
    table: np.ndarray, a: int, b: int, c: int, k: int = 5
) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Return the answers to a : b = c : ? by c + b - a.

    Returns:
        The k nearest tokens other than a, b and c, with cosines; and, for comparison, those nearest to c
        alone: if both lists agree, the analogy shows nothing.

    Source: Mikolov et al. 2013, on rows of length 1.
    """
    unit = scale_rows(table)

    def rank(target: np.ndarray) -> list[tuple[int, float]]:
        cosines = unit @ scale_rows(target)
        cosines[[a, b, c]] = -np.inf
        best = np.argsort(-cosines)[:k]
        return [(int(i), float(cosines[i])) for i in best]

    return rank(unit[c] + unit[b] - unit[a]), rank(unit[c])


def find_pairs(tokenizer: Any, rule: str) -> list[tuple[int, int]]:
    """Return the pairs of tokens related by a rule of RULES, in the order of their ids."""
    takes, change = RULES[rule]
    ids: dict[str, int] = {}
    for token_id in range(tokenizer.vocab_size):
        try:
            ids[tokenizer.token_bytes(token_id).decode()] = token_id
        except UnicodeDecodeError:
            continue
    return [
        (i, ids[change(text)]) for text, i in ids.items() if takes(text) and change(text) in ids
    ]


def score_analogies(
    tokenizer: Any, table: np.ndarray, rule: str, *, max_questions: int = 2000, seed: int = 0
) -> AnalogyScore | None:
    """Return a table's accuracy on the analogies of a rule; None if it has fewer than three pairs.

    Args:
        tokenizer: tokenizer whose tokens are the rows.
        table: (V, C).
        rule: a key of RULES.
        max_questions: if there are more questions, a sample of this size is used.
        seed: of the sample and of the shuffled control.
    """
    # The questions: ordered pairs of the rule's pairs.
    pairs = np.array(find_pairs(tokenizer, rule), dtype=np.int64).reshape(-1, 2)
    n = len(pairs)
    if n < 3:
        return None
    rng = np.random.default_rng(seed)
    if n * (n - 1) <= max_questions:
        first, second = np.nonzero(~np.eye(n, dtype=bool))
    else:  # sampled without listing them all: a large vocabulary has millions
        first = rng.integers(0, n, max_questions)
        second = (first + rng.integers(1, n, max_questions)) % n
    a, b = pairs[first].T
    c, d = pairs[second].T

    # The offset of the control is that between two random tokens.
    x, y = rng.integers(0, len(table), (2, len(first)))
    unit = scale_rows(table)

    def hit(target: np.ndarray, barred: tuple[np.ndarray, ...]) -> float:
        right = 0
        for rows in np.array_split(np.arange(len(first)), max(1, len(first) // 256)):
            cosines = scale_rows(target[rows]) @ unit.T
            for ids in barred:
                cosines[np.arange(len(rows)), ids[rows]] = -np.inf
            right += int((cosines.argmax(1) == d[rows]).sum())
        return right / len(first)

    spell = tokenizer.token_bytes
    return AnalogyScore(
        rule=rule,
        pairs=tuple((spell(i).decode(), spell(j).decode()) for i, j in pairs.tolist()),
        n=len(first),
        offset=hit(unit[c] + unit[b] - unit[a], (a, b, c)),
        near=hit(unit[c], (a, b, c)),
        shuffled=hit(unit[c] + unit[y] - unit[x], (x, y, c)),
    )
