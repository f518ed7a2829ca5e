"""Train a tokenizer in sight: pairs are counted, the most frequent one merges, the counts fall.

Hides: who is in charge. The page asks for a few merges at a time, so that it can pause at once and no thread
runs; the learner lives here and outlasts the page.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import traitlets

from primechat.views.widgets.kit import Widget

PAIRS, LATEST = 10, 10
SLICE_S = 0.05  # how long one answer may take before the page is told


class TokenizerTrainer(Widget):
    """Start, pause, one merge at a time; `done` is true when the vocabulary has its size."""

    samples: Any = traitlets.List().tag(sync=True)
    special_count = traitlets.Int().tag(sync=True)
    preview = traitlets.Unicode().tag(sync=True)
    done = traitlets.Bool().tag(sync=True)

    def __init__(
        self,
        samples: Sequence[tuple[str, str]],
        begin: Callable[[str, str], Any],
        cut: Callable[[Any, str], list[bytes]],
        finish: Callable[[Any], str],
        *,
        preview: str,
        special_count: int,
    ) -> None:
        """Show a trainer.

        Args:
            samples: texts to choose from: (key, label); one's own text is added.
            begin: returns a learner for a sample's key or, where that is empty, a text: with `learn()`,
                `list_pairs(n)`, `tokens`, `n_tokens`, `n_bytes`.
            cut: returns the tokens of a text as the learner would cut it now.
            finish: takes a learner that has its vocabulary; says in a sentence what became of it.
        """
        super().__init__(
            samples=[list(s) for s in samples], preview=preview, special_count=special_count
        )
        self._begin, self._cut, self._finish = begin, cut, finish
        self.learner: Any = None
        self._counts: list[int] = []
        self._goal, self._said = 0, ""
        self._first = samples[0][0]

    def answer_begin(self, sample: str, text: str, vocab_size: int) -> dict[str, Any]:
        """Count the pairs of a text; nothing is merged yet."""
        if not sample and not text.strip():
            raise ValueError("Your text is empty; paste one.")
        self.learner = self._begin(sample, text)
        self._counts, self._said = [], ""
        self._goal, self.done = vocab_size, False
        return self.answer_state()

    def answer_advance(self, merges: int, vocab_size: int) -> dict[str, Any]:
        """Make some merges, fewer where time is up; answer what is new and the state."""
        self._goal = vocab_size
        first, t_start = len(self._counts), time.perf_counter()
        while len(self._counts) - first < merges and not self._is_full():
            merge = self.learner.learn()
            if merge is None:
                self._goal = len(self.learner.tokens) + self.special_count
                break
            self._counts.append(merge.count)
            if time.perf_counter() - t_start > SLICE_S:
                break
        if self._is_full() and not self._said:
            self._said, self.done = self._finish(self.learner), True
        return self.answer_state(first)

    def answer_state(self, first: int = 0) -> dict[str, Any]:
        """Answer how far it is: all of what is drawn, the counts from merge `first` on."""
        if self.learner is None:  # the page is seen for the first time
            return self.answer_begin(self._first, "", 512)
        learner = self.learner
        pairs, cut = learner.list_pairs(PAIRS), self._cut(learner, self.preview)
        latest = range(max(256, len(learner.tokens) - LATEST), len(learner.tokens))
        return {
            "vocab_size": len(learner.tokens) + self.special_count,
            "goal": self._goal,
            "said": self._said,
            "pairs": [
                [list(learner.tokens[a]), list(learner.tokens[b]), count] for a, b, count in pairs
            ],
            "latest": [[i, list(learner.tokens[i]), self._counts[i - 256]] for i in latest],
            "first": first,
            "counts": self._counts[first:],
            "n_bytes": learner.n_bytes,
            "n_tokens": learner.n_tokens,
            "preview": [list(token) for token in cut],
        }

    def _is_full(self) -> bool:
        return len(self.learner.tokens) + self.special_count >= self._goal
