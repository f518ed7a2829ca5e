"""Overlap of n-grams: found where it is, not where it is not."""

from __future__ import annotations

from primechat.metrics.contamination import measure_overlap

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def test_shared_runs_are_found() -> None:
    evaluation = [LONG, "a short one", " ".join(reversed(LONG.split()))]
    training = [f"He said: {LONG.upper().replace(' ', ', ')}!", "nothing of it"]
    found = measure_overlap(evaluation, iter(training))
    assert (found.documents, found.too_short, found.contaminated) == (3, 1, 1)
    assert (found.n_grams, found.shared_n_grams, found.training_texts) == (4, 2, 2)
    assert found.examples == (LONG.rpartition(" ")[0],)


def test_twelve_words_are_not_enough() -> None:
    twelve = " ".join(LONG.split()[:12])
    assert measure_overlap([LONG], [f"{twelve} and {twelve}"]).contaminated == 0
    assert measure_overlap([LONG], [twelve], n=12).contaminated == 1
    assert measure_overlap([], []).n_grams == 0
