"""A reply while it is being written, and after.

Hides: how tokens become text for a reader. Pieces are whole code points, special tokens are left out, and the
calculator's traffic stands in brackets: `[1+2] = [3]`. Reference: the Unicode Standard, section 3.9 (where
U+FFFD stands).
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from primechat.errors import PrimechatError
from primechat.events import ReplyStats, Token
from primechat.protocols import ChatTokenizer
from primechat.text.tokenizer import SPECIAL_TOKENS

if TYPE_CHECKING:
    from primechat.infer.engine import Row

MARKS = {  # what a reader sees of a special token, and the kind of text that follows it
    "<|python_start|>": ("[", "python"),
    "<|python_end|>": ("]", "text"),
    "<|output_start|>": (" = [", "python_output"),
    "<|output_end|>": ("]", "text"),
}


class Reply:
    """The text of one reply; iterate over it once, and it is written as you read.

    Attributes:
        text: what has been written so far.
        tokens: its token ids, the stop token included.
        pieces: (kind, text) of each token, in order, what was written of it before (`prefix`) included; kind
            is text, python, python_output, or mark for a special token.
        measures: a `Token` for each of `tokens`, where they were asked for.
        stats: counts and speeds so far. The first token's time (`ttft_s`) includes reading the prompt; speeds
            leave out the time that the reader takes; `context_used` is (prompt + new tokens) /
            model.sequence_len, above 1 beyond the context of its training.
    """

    def __init__(
        self,
        steps: Iterator[None],
        row: Row,
        tokenizer: ChatTokenizer,
        sequence_len: int,
        prefix: Sequence[int] = (),
    ) -> None:
        self.text = ""
        self.tokens, self.pieces, self.measures = row.tokens, list[tuple[str, str]](), list[Token]()
        self.stats = ReplyStats(prompt_tokens=len(row.prompt))
        self._row, self._tokenizer, self._sequence_len = row, tokenizer, sequence_len
        self._marks: dict[int, tuple[str, str]] = dict.fromkeys(tokenizer.stop_ids, ("", "text"))
        for name in SPECIAL_TOKENS:
            try:
                self._marks[tokenizer.special(name)] = MARKS.get(name, ("", "text"))
            except (LookupError, ValueError, PrimechatError):
                pass  # a foreign tokenizer has other special tokens
        self._parts: list[tuple[str, str]] = []
        self._kind, self._decoder = "text", codecs.getincrementaldecoder("utf-8")("replace")
        for token in prefix:
            self._take(token)
        self._pieces: Iterator[str] | None = self._write_pieces(steps)

    def __iter__(self) -> Iterator[str]:
        if self._pieces is None:
            raise RuntimeError("A Reply can be read once; afterwards its text is in .text.")
        pieces, self._pieces = (
            self._pieces,
            None,
        )  # the reader's loop owns it: leaving the loop ends it
        return pieces

    def read(self) -> str:
        """Write the whole reply and return its text."""
        for _ in self:
            pass
        return self.text

    @property
    def message(self) -> dict[str, Any]:
        """The reply as a message for the next `chat`: text, or parts where the calculator was called."""
        if all(kind == "text" for kind, _ in self._parts):
            return {"role": "assistant", "content": "".join(text for _, text in self._parts)}
        return {
            "role": "assistant",
            "content": [{"type": kind, "text": text} for kind, text in self._parts],
        }

    def _write_pieces(self, steps: Iterator[None]) -> Generator[str, None, None]:
        stats, busy_s, t_start = self.stats, 0.0, time.perf_counter()
        t_step = t_start
        try:
            for _ in steps:
                busy_s += time.perf_counter() - t_step
                piece = self._take(self.tokens[-1])
                if self._row.measures is not None:
                    self.measures.append(self._row.measures)
                self._count(busy_s, time.perf_counter() - t_start)
                if piece:
                    yield piece
                t_step = time.perf_counter()
            if tail := self._add(self._kind, self._decoder.decode(b"", True)):
                kind, before = self.pieces.pop()
                self.pieces.append((kind, before + tail))
                yield tail
        finally:
            stats.total_s, stats.final = time.perf_counter() - t_start, True
            stats.stop_reason = self._row.stop_reason or "cancelled"

    def _take(self, token: int) -> str:
        """Add a token's text and return it, empty where a code point is not whole yet."""
        if token not in self._marks:
            piece = self._add(self._kind, self._decoder.decode(self._tokenizer.token_bytes(token)))
            self.pieces.append((self._kind, piece))
            return piece
        piece = self._add(self._kind, self._decoder.decode(b"", True))
        mark, self._kind = self._marks[token]
        self.text += mark
        if self._kind != "text":
            self._parts.append((self._kind, ""))
        self.pieces.append(("mark", piece + mark))
        return piece + mark

    def _add(self, kind: str, text: str) -> str:
        if text:
            self.text += text
            before = self._parts.pop()[1] if self._parts and self._parts[-1][0] == kind else ""
            self._parts.append((kind, before + text))
        return text

    def _count(self, busy_s: float, total_s: float) -> None:
        stats, n = self.stats, len(self.tokens)
        stats.new_tokens, stats.total_s = n, total_s
        if n == 1:
            stats.ttft_s = busy_s
            stats.prefill_tok_s = stats.prompt_tokens / max(busy_s, 1e-9)
        else:
            stats.decode_tok_s = (n - 1) / max(busy_s - stats.ttft_s, 1e-9)
        stats.context_used = (stats.prompt_tokens + n) / self._sequence_len
