"""All tokens of a vocabulary: search them, sort them, find those that training never saw.

Hides: that the page holds only the rows in sight; searching and sorting happen here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import traitlets

from primechat.views.widgets.kit import Widget
from primechat.views.widgets.tokens.choices import Opened

KINDS = (
    "word start",
    "letters",
    "digits",
    "punctuation",
    "white space",
    "part of a character",
    "special",
)
ORDERS = ("id", "longest", "most seen", "least seen")


class Index:
    """What is searched of one vocabulary."""

    def __init__(self, tokenizer: Any) -> None:
        special = set((getattr(tokenizer, "specials", None) or {}).values())
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.texts = [token.decode("utf-8", "replace").lower() for token in self.tokens]
        self.lengths = np.array([len(text) for text in self.texts])
        last = len(KINDS) - 1
        kinds = [last if i in special else find_kind(token) for i, token in enumerate(self.tokens)]
        self.kinds = np.array(kinds)
        self.counts: np.ndarray | None = None


def find_kind(token: bytes) -> int:
    """Return the place in KINDS of a token that is not special."""
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:
        return 5
    if text.isspace():
        return 4
    core = text.lstrip()
    if core.isalpha():
        return 0 if core != text else 1
    return 2 if core.isdigit() else 3


class VocabularyBrowser(Widget):
    """Search in a vocabulary; `counted` tells for which tokenizer the tokens were counted in a text."""

    key = traitlets.Unicode().tag(sync=True)
    choices: Any = traitlets.List().tag(sync=True)
    kinds: Any = traitlets.List(list(KINDS)).tag(sync=True)
    orders: Any = traitlets.List(list(ORDERS)).tag(sync=True)
    start = traitlets.Dict().tag(sync=True)

    def __init__(
        self, opened: Opened, count: Callable[[Any], tuple[np.ndarray, str]], key: str, about: str
    ) -> None:
        """Show a vocabulary.

        Args:
            count: returns of a tokenizer how often each token stands in the training text, (vocab_size,), -1
                where it stands for no text, and a sentence on what was counted.
            about: what is counted and how long it takes, for the button.
        """
        super().__init__(key=key, choices=opened.describe())
        self._opened, self._count = opened, count
        self._indices: dict[str, tuple[Any, Index]] = {}
        opened.on_change.append(lambda: setattr(self, "choices", opened.describe()))
        self.start = {**self.answer_find(key), "about": about}

    def _index(self, key: str) -> Index:
        tokenizer = self._opened.get(key)
        if key not in self._indices or self._indices[key][0] is not tokenizer:
            self._indices[key] = (tokenizer, Index(tokenizer))
        return self._indices[key][1]

    def answer_find(
        self,
        key: str,
        query: str = "",
        kind: str = "",
        order: str = "id",
        offset: int = 0,
        limit: int = 120,
    ) -> dict[str, Any]:
        """Return some rows of what a search finds: (id, bytes, kind, count or None), and their number."""
        index = self._index(key)
        keep = np.ones(len(index.tokens), dtype=bool)
        if kind == "never seen" and index.counts is not None:
            keep &= index.counts == 0
        elif kind in KINDS:
            keep &= index.kinds == KINDS.index(kind)
        if query:
            wanted = query.lower()
            keep &= np.fromiter((wanted in text for text in index.texts), bool, len(index.texts))
            if query.strip().isdecimal() and int(query) < len(keep):
                keep[int(query)] = True
        ids = np.flatnonzero(keep)
        if order == "longest":
            ids = ids[np.argsort(-index.lengths[ids], kind="stable")]
        elif order in ("most seen", "least seen") and index.counts is not None:
            sign = -1 if order == "most seen" else 1
            ids = ids[np.argsort(sign * index.counts[ids], kind="stable")]
        counts = index.counts
        rows = [
            [
                int(i),
                list(index.tokens[i][:48]),
                KINDS[index.kinds[i]],
                None if counts is None or counts[i] < 0 else int(counts[i]),
            ]
            for i in ids[offset : offset + limit]
        ]
        return {
            "key": key,
            "total": len(ids),
            "vocab_size": len(keep),
            "offset": offset,
            "rows": rows,
            "never": None if counts is None else int((counts == 0).sum()),
        }

    def answer_count(self, key: str) -> dict[str, Any]:
        """Count the tokens in the training text; answer the sentence on it."""
        index = self._index(key)
        index.counts, said = self._count(self._opened.get(key))
        return {"said": said, "never": int((index.counts == 0).sum())}
