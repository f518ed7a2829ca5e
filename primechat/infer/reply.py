"""The reply of a model, during and after its generation.

Hides: how tokens become text for a reader. Pieces are whole code points, special tokens are omitted, and
calls of the calculator appear in brackets: `[1+2] = [3]`.
Reference: the Unicode Standard, section 3.9 (where U+FFFD is inserted).
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

# For each special token: the text shown in its place, and the kind of text that follows it.
MARKS = {
    "<|python_start|>": ("[", "python"),
    "<|python_end|>": ("]", "text"),
    "<|output_start|>": (" = [", "python_output"),
    "<|output_end|>": ("]", "text"),
}


class Reply:
    """The text of one reply, generated while you iterate over it; it can be iterated over once.

    Attributes:
        text: the text so far.
        tokens: its token ids, including the stop token.
        pieces: (kind, text) of each token, in order, including those of `prefix`; kind is text, python,
            python_output, or mark for a special token.
        measures: a `Token` for each of `tokens`, if they were requested.
        stats: counts and speeds so far. The time to the first token (`ttft_s`) includes reading the prompt;
            speeds exclude the time that the reader takes; `context_used` is (prompt + new tokens) /
            model.sequence_len, above 1 beyond the context length of training.
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

        # What to show for each special token; stop tokens show nothing.
        self._marks: dict[int, tuple[str, str]] = dict.fromkeys(tokenizer.stop_ids, ("", "text"))
        for name in SPECIAL_TOKENS:
            try:
                self._marks[tokenizer.special(name)] = MARKS.get(name, ("", "text"))
            except (LookupError, ValueError, PrimechatError):
                pass  # a foreign tokenizer has other special tokens

        # The parts of the message so far, of which the prefix is the beginning.
        self._parts: list[tuple[str, str]] = []
        self._kind, self._decoder = "text", codecs.getincrementaldecoder("utf-8")("replace")
        for token in prefix:
            self._take(token)
        self._pieces: Iterator[str] | None = self._write_pieces(steps)

    def __iter__(self) -> Iterator[str]:
        if self._pieces is None:
            raise RuntimeError("A Reply can be read once; afterwards its text is in .text.")
        # The reader's loop alone owns the generator, so that leaving the loop ends it.
        pieces, self._pieces = self._pieces, None
        return pieces

    def read(self) -> str:
        """Generate the rest of the reply and return its whole text."""
        for _ in self:
            pass
        return self.text

    @property
    def message(self) -> dict[str, Any]:
        """The reply as a message for the next `chat`: text, or a list of parts if it used the calculator."""
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

            # An unfinished code point at the end becomes U+FFFD.
            if tail := self._add(self._kind, self._decoder.decode(b"", True)):
                kind, before = self.pieces.pop()
                self.pieces.append((kind, before + tail))
                yield tail
        finally:
            stats.total_s, stats.final = time.perf_counter() - t_start, True
            stats.stop_reason = self._row.stop_reason or "cancelled"

    def _take(self, token: int) -> str:
        """Add a token's text and return it; it is empty while a code point is incomplete."""
        if token not in self._marks:
            piece = self._add(self._kind, self._decoder.decode(self._tokenizer.token_bytes(token)))
            self.pieces.append((self._kind, piece))
            return piece

        # A special token ends the current part and begins the next.
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
