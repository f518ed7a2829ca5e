"""Contamination: how much of an evaluation text occurs word for word in a training text.

It is found in one pass over a training text of any length, as only the n-grams of the evaluation text are
kept in memory. Words are compared in lower case and without punctuation. Reference: Brown et al. 2020,
Language Models are Few-Shot Learners, appendix C (13-grams).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from primechat.events import OverlapResult

WORD = re.compile(r"\w+")
N_GRAM = 13
N_EXAMPLES = 5


def measure_overlap(
    evaluation: Iterable[str], training: Iterable[str], n: int = N_GRAM
) -> OverlapResult:
    """Return the overlap of an evaluation text with a training text in n-grams.

    Args:
        evaluation: evaluation documents.
        training: training texts, read once.
        n: words per n-gram; documents with fewer words are only counted.

    Source: Brown et al. 2020, appendix C; as there, one shared 13-gram makes a document contaminated.
    """
    # Index the n-grams of the evaluation text.
    where: dict[int, list[int]] = {}  # hash of an n-gram -> numbers of its documents
    documents, short = [], 0
    for number, text in enumerate(evaluation):
        documents.append(text)
        grams = set(hash_grams(text, n))
        short += not grams
        for gram in grams:
            where.setdefault(gram, []).append(number)

    # Look them up in the training text.
    found: set[int] = set()
    n_texts = 0
    for text in training:
        n_texts += 1
        found.update(gram for gram in hash_grams(text, n) if gram in where)

    # Count the shared n-grams per document.
    hits: dict[int, int] = {}
    for gram in found:
        for number in where[gram]:
            hits[number] = hits.get(number, 0) + 1
    worst = sorted(hits, key=lambda number: (-hits[number], number))[:N_EXAMPLES]
    return OverlapResult(
        n=n,
        documents=len(documents),
        too_short=short,
        contaminated=len(hits),
        n_grams=len(where),
        shared_n_grams=len(found),
        training_texts=n_texts,
        examples=tuple(next(show_shared(documents[number], found, n)) for number in worst),
    )


def hash_grams(text: str, n: int) -> Iterator[int]:
    """Yield the hash of each n consecutive words."""
    words = WORD.findall(text.lower())
    yield from (hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1))


def show_shared(text: str, found: set[int], n: int) -> Iterator[str]:
    """Yield the n-grams of a document that also occur in the training text."""
    words = WORD.findall(text.lower())
    grams = (words[i : i + n] for i in range(len(words) - n + 1))
    yield from (" ".join(gram) for gram in grams if hash(tuple(gram)) in found)
