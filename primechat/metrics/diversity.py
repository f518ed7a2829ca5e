"""Published measures of how varied a text is, how much it repeats itself and how certain a model was, exact.

Tokens (words or ids) and n-grams are numbered once, and everything else is arithmetic on their counts. No
n-gram crosses the border of two texts. Two errors of published code are avoided: compressing twice, and
dropping the last n-gram. Reference: Shaib et al. 2024, Standardizing the Measurement of Text Diversity:
report the compression ratio, the repetition of long n-grams and self-BLEU together; each function names its
own source.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from primechat.errors import DataError

Tokens = Sequence[Hashable]  # words of `split_words`, or token ids
# A factor of MTLD is complete once its type-token ratio is lower (McCarthy and Jarvis 2010).
MTLD_BELOW = 0.72
BLEU_FLOOR = 0.1  # used in place of 0 matches (method 1 of Chen and Cherry 2014)


def split_words(text: str) -> list[str]:
    """Return the words and punctuation marks of a text in lower case.

    >>> split_words("Don't stop, I said!")
    ["don't", 'stop', ',', 'i', 'said', '!']
    """
    return re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*|[^\w\s]|_", text.lower())


def number_grams(texts: Sequence[Tokens], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a number for each n-gram of texts, the same for equal n-grams.

    Returns:
        The number of each n-gram in order (N,), from 0 without gaps, and the index of its text (N,).
    """
    if n < 1:
        raise DataError(f"n={n} must be at least 1; try 2.")
    index: dict[Hashable, int] = {}
    flat = np.array(
        [index.setdefault(token, len(index)) for text in texts for token in text], np.int64
    )
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    codes = flat
    for k in range(1, n):
        codes = codes[:-1] * max(len(index), 1) + flat[k:]
        # Renumbered from 0, so that no product overflows.
        codes = np.unique(codes, return_inverse=True)[1]

    # Drop n-grams that begin in one text and end in another.
    last = len(flat) - n + 1
    whole = owner[:last] == owner[n - 1 :] if last > 0 else np.zeros(0, bool)
    return np.unique(codes[: max(last, 0)][whole], return_inverse=True)[1], owner[: max(last, 0)][
        whole
    ]


def count_grams(texts: Sequence[Tokens], n: int) -> np.ndarray:
    """Return how often each n-gram occurs in texts, in the order of `number_grams`."""
    return np.bincount(number_grams(texts, n)[0])


def measure_distinct(texts: Sequence[Tokens], n: int = 2) -> float:
    """Return distinct-n: different n-grams / all n-grams, nan without any; longer texts score lower.

    Source: Li et al. 2016, A Diversity-Promoting Objective Function, section 5.
    """
    counts = count_grams(texts, n)
    return len(counts) / float(counts.sum()) if counts.size else float("nan")


def measure_ead(texts: Sequence[Tokens], vocab_size: int) -> float:
    """Return expectation-adjusted distinct: different tokens / the number expected of uniform draws.

    Args:
        texts: C tokens in total, N of them different.
        vocab_size: number of possible tokens V.

    Source: Liu et al. 2022, Rethinking and Refining the Distinct Metric: N / (V (1 - ((V - 1) / V)^C)).
    """
    counts = count_grams(texts, 1)
    expected = (
        -vocab_size * np.expm1(counts.sum() * np.log1p(-1 / vocab_size)) if vocab_size > 1 else 1.0
    )
    return float(len(counts) / expected) if counts.size else float("nan")


def measure_bleu(texts: Sequence[Tokens], max_n: int = 4) -> np.ndarray:
    """Return the BLEU of each text against all the others, (T,).

    The weights of 1- to max_n-grams are uniform, counts are clipped to the largest in any other text, and the
    brevity penalty uses the other text of nearest length. An order without a match counts as 0.1 matches.

    Source: Papineni et al. 2002, section 2; Chen and Cherry 2014, method 1.
    """
    n_texts = len(texts)
    if n_texts < 2:
        raise DataError(
            f"self-BLEU compares texts with each other; {n_texts} is too few, give at least 2."
        )
    lengths = np.array([len(text) for text in texts], float)
    logs, dead = np.zeros(n_texts), lengths == 0
    for n in range(1, max_n + 1):
        codes, owner = number_grams(texts, n)
        pairs, counts = np.unique(codes * n_texts + owner, return_counts=True)
        gram, text = pairs // n_texts, pairs % n_texts

        # Sort by n-gram, and within each the text with the most of it first.
        order = np.lexsort((-counts, gram))
        gram, text, counts = gram[order], text[order], counts[order]
        first = np.searchsorted(gram, np.arange(gram.max(initial=-1) + 1))
        second = first + 1
        has_second = (second < len(gram)) & (gram[np.minimum(second, len(gram) - 1)] == gram[first])

        # The largest count in another text: the first, or the second for the first text itself.
        runner_up = np.where(has_second, counts[np.minimum(second, len(gram) - 1)], 0)
        others = np.where(np.arange(len(gram)) == first[gram], runner_up[gram], counts[first][gram])

        # Clipped precision of this order.
        matched = np.bincount(text, np.minimum(counts, others), n_texts)
        dead |= (matched == 0) & (n == 1)
        logs += (
            np.log(np.where(matched > 0, matched, BLEU_FLOOR) / np.maximum(lengths - n + 1, 1))
            / max_n
        )

    # Brevity penalty; of two texts equally near in length, the shorter one counts.
    gaps = np.abs(lengths[:, None] - lengths) + np.where(lengths < lengths[:, None], 0, 1e-9)
    np.fill_diagonal(gaps, np.inf)
    nearest = lengths[gaps.argmin(axis=1)]
    penalty = np.minimum(0, 1 - nearest / np.maximum(lengths, 1))
    return np.where(dead, 0.0, np.exp(logs + penalty))


def measure_selfbleu(texts: Sequence[Tokens], max_n: int = 4) -> float:
    """Return self-BLEU, the mean BLEU of each text against all the others.

    It is 1 if all texts are equal and have at least max_n words: an order for which a text is too short
    counts as one without a match.

    Source: Zhu et al. 2018, Texygen, section 3.
    """
    return float(measure_bleu(texts, max_n).mean())


def measure_entropy(texts: Sequence[Tokens], n: int = 2) -> float:
    """Return the entropy of the n-gram distribution in nats, -sum p ln p.

    Source: Zhang et al. 2018, Generating Informative and Diverse Conversational Responses, section 4.
    """
    counts = count_grams(texts, n)
    p = counts / max(counts.sum(), 1)
    return float(-(p * np.log(p)).sum()) if p.size else float("nan")


def fit_zipf(texts: Sequence[Tokens]) -> float:
    """Return the least-squares slope of log frequency against log rank; natural text is near -1.

    Source: Holtzman et al. 2020, section 5.2; Zipf 1949.
    """
    counts = np.sort(count_grams(texts, 1))[::-1]
    if len(counts) < 2:
        return float("nan")
    return float(np.polyfit(np.log(np.arange(1, len(counts) + 1)), np.log(counts), 1)[0])


def measure_mtld(tokens: Tokens) -> float:
    """Return MTLD: the mean length of segments with a type-token ratio of at least 0.72, in both directions.

    An incomplete last segment counts as (1 - its ratio) / (1 - 0.72). The result is nan if no token repeats.

    Source: McCarthy and Jarvis 2010, MTLD, vocd-D, and HD-D, p. 384.
    """
    codes, _ = number_grams([tokens], 1)
    factors = [count_factors(codes), count_factors(codes[::-1])]
    if min(factors) == 0:
        return float("nan")
    return float(np.mean([len(codes) / factor for factor in factors]))


def count_factors(codes: np.ndarray) -> float:
    """Return the number of MTLD factors of a sequence, read forward."""
    before = np.full(len(codes), -1)  # index of the previous occurrence of each token
    order = np.argsort(codes, kind="stable")
    same = codes[order][1:] == codes[order][:-1]
    before[order[1:][same]] = order[:-1][same]
    factors, start, size = 0.0, 0, 256
    while start < len(codes):
        new = before[start : start + size] < start
        ratio = np.cumsum(new) / np.arange(1, len(new) + 1)
        low = np.flatnonzero(ratio < MTLD_BELOW)
        if low.size:
            factors, start, size = factors + 1, start + int(low[0]) + 1, 256
        elif start + size >= len(codes):
            return factors + float(1 - ratio[-1]) / (1 - MTLD_BELOW)
        else:
            size *= 2  # most factors are short: always reading to the end would take quadratic time
    return factors


def measure_repetition(tokens: Tokens, n: int = 4) -> float:
    """Return seq-rep-n of a continuation: 1 - different / all n-grams, 0 if it is shorter than n.

    Source: Welleck et al. 2020, Neural Text Generation with Unlikelihood Training, section 6.1.
    """
    counts = count_grams([tokens], n)
    return 1 - len(counts) / float(counts.sum()) if counts.size else 0.0


def measure_diversity(tokens: Tokens) -> float:
    """Return the product of (1 - seq-rep-n) for n = 2, 3, 4; it is 1 if no pair of words repeats.

    Source: Su et al. 2022, A Contrastive Framework for Neural Text Generation, section 4.2.
    """
    return float(np.prod([1 - measure_repetition(tokens, n) for n in (2, 3, 4)]))


def measure_selfrepetition(texts: Sequence[Tokens], n: int = 4) -> float:
    """Return the mean over texts of ln(1 + the number of other texts with each of its n-grams, summed).

    Source: Salkar et al. 2022, Self-Repetition in Abstractive Neural Summarizers; Shaib et al. 2024.
    """
    codes, owner = number_grams(texts, n)
    pairs = np.unique(codes * max(len(texts), 1) + owner)
    spread = np.bincount(pairs // max(len(texts), 1))  # number of texts with each n-gram
    shared = np.bincount(owner, spread[codes] - 1, len(texts))
    return float(np.log1p(shared).mean()) if texts else float("nan")


def measure_compression(text: str) -> float:
    """Return raw bytes / gzip bytes; higher is more repetitive, and short texts score low.

    Source: Shaib et al. 2024, section 3.
    """
    raw = text.encode("utf-8", "replace")
    return len(raw) / len(gzip.compress(raw, 9, mtime=0))


def measure_vendi(vectors: np.ndarray) -> float:
    """Return the effective number of different items: exp of the entropy of K / n's eigenvalues.

    Args:
        vectors: (n, d), one per item and none of zeros; K holds the cosine of each pair.

    Source: Friedman and Dieng 2023, The Vendi Score, definition 3.1.
    """
    x = np.asarray(vectors, np.float64)
    if x.ndim != 2 or not len(x):
        raise DataError(
            f"vectors of the shape {x.shape} must be (n, d) with n of at least 1; stack them."
        )
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    if not norms.all():
        raise DataError("A vector of zeros has no direction; leave its item out.")
    x = x / norms
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x  # both have the same nonzero eigenvalues
    p = np.linalg.eigvalsh(gram / len(x))
    p = p[p > 1e-12]
    return float(np.exp(-(p * np.log(p)).sum()))


def count_vectors(texts: Sequence[Tokens], n: int = 1) -> np.ndarray:
    """Return the n-gram counts of each text, (T, different n-grams): vectors for `measure_vendi`."""
    codes, owner = number_grams(texts, n)
    width = int(codes.max(initial=-1)) + 1
    return np.bincount(owner * width + codes, minlength=len(texts) * width).reshape(
        len(texts), width
    )


def measure_drift(vectors: np.ndarray) -> np.ndarray:
    """Return the cosine distance of each turn from the first, 1 - cos(e_t, e_0), for (T, d) vectors."""
    x = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(x, axis=1)
    return 1 - x @ x[0] / np.maximum(norms * norms[0], 1e-300)


def measure_information(conditional: Sequence[float], marginal: Sequence[float]) -> float:
    """Return the mutual information of consecutive turns in nats: the mean of ln p(y | x) - ln p(y).

    Args:
        conditional: ln p of each turn y given the turn x before it.
        marginal: ln p of the same turns without context.

    Source: Li et al. 2016, section 3; Church and Hanks 1990.
    """
    return float(np.mean(np.asarray(conditional, float) - np.asarray(marginal, float)))


MEASURES: dict[str, Callable[[list[str]], float]] = {
    # Each is computed on a group of texts; self-BLEU needs at least two.
    "distinct-2": lambda texts: measure_distinct([split_words(text) for text in texts], 2),
    "distinct-4": lambda texts: measure_distinct([split_words(text) for text in texts], 4),
    "entropy-2": lambda texts: measure_entropy([split_words(text) for text in texts], 2),
    "self-BLEU": lambda texts: measure_selfbleu([split_words(text) for text in texts]),
    "self-repetition": lambda texts: measure_selfrepetition([split_words(text) for text in texts]),
    "compression": lambda texts: measure_compression("\n".join(texts)),
    "Zipf slope": lambda texts: fit_zipf([split_words(text) for text in texts]),
    "MTLD": lambda texts: measure_mtld(split_words("\n".join(texts))),
    "rep-4": lambda texts: float(
        np.mean([measure_repetition(split_words(text), 4) for text in texts])
    ),
    "diversity": lambda texts: float(
        np.mean([measure_diversity(split_words(text)) for text in texts])
    ),
    "Vendi": lambda texts: measure_vendi(
        count_vectors([words for t in texts if (words := split_words(t))])
    ),
}


def measure_texts(texts: Sequence[str], names: Sequence[str] = tuple(MEASURES)) -> dict[str, Any]:
    """Return the named measures of a group of texts; nan if the group is too small for one."""
    found = {}
    for name in names:
        try:
            found[name] = MEASURES[name](list(texts))
        except DataError:
            found[name] = float("nan")
    return found
