"""Retention: how much of its teacher's quality a student keeps, where the rest is lost, and how it writes.

Tokens are grouped by the frequency, position and kind of the target. Reference: bits per byte as in
`metrics.bits`; retention = (untrained - student) / (untrained - teacher), 1 if the student is as good;
agreement of the most likely tokens and KL as in Stanton et al. 2021, Does Knowledge Distillation Really Work?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from primechat.events import PlaceGroup, RetentionResult
from primechat.infer.engine import Engine
from primechat.metrics.diversity import measure_distinct, measure_repetition, split_words
from primechat.protocols import ChatTokenizer, LanguageModel

FREQUENCIES = (
    (0.5, "most frequent half"),
    (0.8, "next 30 %"),
    (0.95, "next 15 %"),
    (1.0, "rarest 5 %"),
)
POSITIONS = (1, 4, 16, 64, 256, 1024, 4096)
WRITTEN_TEXTS, WRITTEN_TOKENS = 16, 64


def measure_retention(
    student: LanguageModel,
    teacher: LanguageModel,
    windows: Iterable[tuple[Tensor, Tensor]],
    byte_lengths: np.ndarray,
    *,
    name_kind: Callable[[int], str] | None = None,
) -> RetentionResult:
    """Return the comparison of a student with its teacher on windows of text, token by token.

    Args:
        student: model whose forward(ids) returns float32 logits (B, T, V).
        teacher: model of the same vocabulary.
        windows: batches (ids, targets), (B, T); targets of -1 or of 0 bytes are ignored.
        byte_lengths: (V,) bytes of each token.
        name_kind: returns the kind of a token id, for example word or punctuation.

    Returns:
        Measures over all targets, and grouped by the target's frequency in these windows, by its position in
        the window and by its kind. The untrained model gives every token the same probability.
    """
    # One row of figures per target.
    lengths = torch.from_numpy(np.asarray(byte_lengths, dtype=np.int64))
    columns: list[np.ndarray] = []
    for ids, targets in windows:
        keep = (targets >= 0) & (lengths[targets.clamp(min=0)] > 0)
        with torch.no_grad():
            # (n, V) each
            log_q, log_p = (torch.log_softmax(call(m, ids), -1)[keep] for m in (student, teacher))
        words = targets[keep]
        where = torch.arange(ids.size(1)).expand_as(ids)[keep]
        at = (torch.arange(len(words)), words)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        same = (log_q.argmax(-1) == log_p.argmax(-1)).float()
        rows = (words, where, -log_q[at], -log_p[at], same, kl, lengths[words])
        columns.append(torch.stack([row.double() for row in rows], dim=1).numpy())

    # Summed by groups.
    table = np.concatenate(columns)
    flat = math.log(student.vocab_size)
    groups: dict[str, tuple[PlaceGroup, ...]] = {
        "frequency": group_frequency(table, flat),
        "position": group_position(table, flat),
    }
    if name_kind:
        kinds = np.array([name_kind(int(word)) for word in table[:, 0]])
        names, counts = np.unique(kinds, return_counts=True)
        order = [str(names[i]) for i in np.argsort(-counts)]
        groups["kind"] = tuple(sum_places(name, table[kinds == name], flat) for name in order)
    return RetentionResult(total=sum_places("all", table, flat), groups=groups)


def judge_writing(texts: Iterable[str]) -> dict[str, float]:
    """Return distinct-2 of texts, and the mean share of word pairs that repeat within a text.

    Source: Li et al. 2016, section 5; Welleck et al. 2020, section 6.1 (seq-rep-2).
    """
    words = [split_words(text) for text in texts]
    repeated = [measure_repetition(said, 2) for said in words]
    return {"distinct_2": measure_distinct(words), "repetition": float(np.mean(repeated))}


def write_texts(
    model: LanguageModel | None, tokenizer: ChatTokenizer, windows: Iterable[tuple[Tensor, Tensor]]
) -> list[str]:
    """Return a model's continuations of the first quarter of 16 windows, or the windows' own without a model.

    Each has 64 tokens, drawn at temperature 0.8 and top-k 50.
    """
    rows = [row for ids, _ in windows for row in ids.tolist()][:WRITTEN_TEXTS]
    start = max(1, len(rows[0]) // 4)
    if model is None:
        said = [row[start : start + WRITTEN_TOKENS] for row in rows]
    else:
        options = dict(
            max_new_tokens=WRITTEN_TOKENS, temperature=0.8, top_k=50, seed=0, stop_ids=()
        )
        said = Engine(model, tokenizer).generate_batch([row[:start] for row in rows], **options)  # type: ignore[arg-type]
    return [tokenizer.decode(ids) for ids in said]


def call(model: LanguageModel, ids: Tensor) -> Tensor:
    """Return a model's logits (B, T, V) on the CPU."""
    logits: Tensor = model(ids.to(model.device))  # type: ignore[operator]
    return logits.float().cpu()


def sum_places(name: str, rows: np.ndarray, flat: float) -> PlaceGroup:
    """Return the measures of a group of targets, given their rows as stacked by `measure_retention`."""
    n_bytes, n = float(rows[:, 6].sum()), len(rows)
    scale = math.log(2) * max(1.0, n_bytes)
    student, teacher, untrained = (
        rows[:, 2].sum() / scale,
        rows[:, 3].sum() / scale,
        n * flat / scale,
    )
    gap = untrained - teacher
    return PlaceGroup(
        name=name,
        tokens=n,
        student_bpb=float(student),
        teacher_bpb=float(teacher),
        untrained_bpb=float(untrained),
        retention=float((untrained - student) / gap) if gap else math.nan,
        agreement=float(rows[:, 4].mean()) if n else math.nan,
        kl_nats=float(rows[:, 5].mean()) if n else math.nan,
    )


def group_frequency(table: np.ndarray, flat: float) -> tuple[PlaceGroup, ...]:
    """Return groups by the target's frequency in these windows, each with a given share of all targets."""
    words, counts = np.unique(table[:, 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    reached = np.cumsum(counts[order]) / counts.sum()
    edges = np.array([edge for edge, _ in FREQUENCIES])
    # A token belongs to the group in which the cumulative share before it ends.
    place = np.searchsorted(edges, np.concatenate([[0.0], reached])[:-1] + 1e-12)
    found = dict(
        zip(words[order].tolist(), np.minimum(place, len(edges) - 1).tolist(), strict=True)
    )
    which = np.array([found[word] for word in table[:, 0].tolist()])
    rows = ((name, table[which == i]) for i, (_, name) in enumerate(FREQUENCIES))
    return tuple(sum_places(name, part, flat) for name, part in rows if len(part))


def group_position(table: np.ndarray, flat: float) -> tuple[PlaceGroup, ...]:
    """Return groups by the number of tokens that the models have read before the target."""
    groups, low = [], 0
    for high in POSITIONS:
        part = table[(table[:, 1] >= low) & (table[:, 1] < high)]
        if len(part):
            groups.append(
                sum_places(f"{low + 1} to {high}" if high > low + 1 else str(high), part, flat)
            )
        low = high
    return tuple(groups)


def name_kind(text: str) -> str:
    """Return the kind of a token's text: word (begins one), inside a word, digits, punctuation or blank.

    >>> [name_kind(t) for t in (" the", "ing", " 12", "!", "\\n")]
    ['begins a word', 'inside a word', 'digits', 'punctuation', 'blank']
    """
    bare = text.strip()
    if not bare:
        return "blank"
    if bare.isdigit():
        return "digits"
    if not any(c.isalpha() for c in bare):
        return "punctuation"
    return "begins a word" if text[:1].isspace() or text[:1].isupper() else "inside a word"
