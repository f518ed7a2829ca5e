"""Contamination: how much of an evaluation text stands word for word in a training text.

Hides: how it is found in one pass over the training text, however long: only the evaluation text's n-grams
are kept. Words are compared in lower case and without punctuation.
Reference: Brown et al. 2020, Language Models are Few-Shot Learners, appendix C (13-grams).
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
    """Return which n-grams of an evaluation text a training text has too.

    Args:
        evaluation: documents.
        training: texts; read once.
        n: words of an n-gram; a document with fewer words is only counted.

    Source: Brown et al. 2020, appendix C; there a document is contaminated from one 13-gram on, as here.
    """
    where: dict[int, list[int]] = {}  # hash of an n-gram -> the documents that have it
    documents, short = [], 0
    for number, text in enumerate(evaluation):
        documents.append(text)
        grams = set(hash_grams(text, n))
        short += not grams
        for gram in grams:
            where.setdefault(gram, []).append(number)
    found: set[int] = set()
    n_texts = 0
    for text in training:
        n_texts += 1
        found.update(gram for gram in hash_grams(text, n) if gram in where)
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
    """Yield the hash of each run of n words."""
    words = WORD.findall(text.lower())
    yield from (hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1))


def show_shared(text: str, found: set[int], n: int) -> Iterator[str]:
    """Yield the n-grams of a document that are among the found ones."""
    words = WORD.findall(text.lower())
    grams = (words[i : i + n] for i in range(len(words) - n + 1))
    yield from (" ".join(gram) for gram in grams if hash(tuple(gram)) in found)
