"""The engine: prompts in, sampled tokens out, one forward pass per token.

Hides: the cache. A prompt is read once, in chunks, so that `cancel` takes effect between them. Each row of a
batch draws from its own generator and leaves the batch when it is finished, so its text depends on its seed
alone. inference_mode is entered around each computation and never held across a yield, where it would leak
into the caller.
Reference: nanochat's engine.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from primechat.config.options import OptionError, check_options
from primechat.config.runtime import check_number
from primechat.errors import CheckpointError, ConfigError
from primechat.events import Token
from primechat.infer.calculator import ToolCall, find_tool
from primechat.infer.cpu import keep_freed_memory
from primechat.infer.reply import Reply
from primechat.infer.sampling import (
    check_sampling,
    draw_floats,
    measure_logits,
    penalise_seen,
    sample_logits,
    seed_row,
)
from primechat.protocols import Cache, ChatTokenizer, LanguageModel, ReadsPadded

if TYPE_CHECKING:
    from typing_extensions import Unpack

PREFILL_CHUNK = 512  # tokens of a prompt read between two checks of `cancel`
# Tokens of several prompts read together: enough for large products that still fit the CPU's caches.
PREFILL_TOKENS = 1024


class Options(TypedDict, total=False):
    """The options of `Engine.generate`, which all methods of `Engine` share."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    repetition_penalty: float
    seed: int
    stop_ids: Collection[int] | None
    cancel: threading.Event | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The checked options of one call."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_ids: Collection[int] | None = None
    cancel: threading.Event | None = None

    def __post_init__(self) -> None:
        check_number("max_new_tokens", self.max_new_tokens, low=0, whole=True)
        check_sampling(self.temperature, self.top_k, self.top_p, self.seed, self.repetition_penalty)

    @property
    def cancelled(self) -> bool:
        """Whether the caller has asked to stop."""
        return self.cancel is not None and self.cancel.is_set()


def read_options(options: Mapping[str, Any], method: str, *others: str) -> Settings:
    """Return the checked options of a call to a method of `Engine`.

    Args:
        options: what the caller gave.
        method: name of the method, for the messages.
        others: names that this method accepts besides the shared options, for the messages.

    Raises:
        ConfigError: an option is unknown or breaks its rule, or max_new_tokens is missing.
    """
    method = f"Engine.{method}"
    check_options(options, [*others, *(item.name for item in fields(Settings))], method)
    if "max_new_tokens" not in options:
        raise OptionError(f"{method} needs max_new_tokens; try max_new_tokens=100.")
    return Settings(**options)


@dataclass(eq=False)
class Row:
    """One sequence; `stop_reason` is stop, length, context or cancelled, and empty until it ends."""

    prompt: list[int]
    limit: int
    limit_reason: str
    draws: Iterator[float]
    stop_ids: frozenset[int]
    tool: ToolCall | None
    seen: torch.Tensor | None = (
        None  # (V,) bool, tokens used so far; None without a repetition penalty
    )
    tokens: list[int] = field(default_factory=list)
    forced: deque[int] = field(default_factory=deque)
    measures: Token | None = None
    stop_reason: str = ""

    def __post_init__(self) -> None:
        if self.limit == 0:
            self.stop_reason = self.limit_reason

    def accept(self, drawn: int) -> int:
        """Append the next token and return it: the calculator's if it is answering, else the drawn one."""
        # Choose the token; a drawn one may stop the row or call the calculator.
        if self.forced:
            token = self.forced.popleft()
        else:
            token = drawn
            if token in self.stop_ids:
                self.stop_reason = "stop"
            elif self.tool:
                self.forced.extend(self.tool.feed(token))

        # Record it, and check the limit.
        self.tokens.append(token)
        if self.seen is not None and token not in self.stop_ids:
            self.seen[token] = True
        if not self.stop_reason and len(self.tokens) == self.limit:
            self.stop_reason = self.limit_reason
        return token


class Engine:
    """A sampler for a language model, primechat's own or a foreign one.

    Args:
        model: the language model, which maps token ids to logits.
        tokenizer: its tokenizer; without the special tokens of the calculator there is no calculator.
    """

    def __init__(self, model: LanguageModel, tokenizer: ChatTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._tool_ids = find_tool(tokenizer)

    def generate(self, ids: Sequence[int], **options: Unpack[Options]) -> Iterator[int]:
        """Return an iterator over the tokens as they are sampled, including those of the calculator.

        Args:
            ids: the prompt; at least one token.
            options: all but the first have a default.
                max_new_tokens: maximum number of tokens to yield; prompt and new tokens together never
                    exceed model.max_context.
                temperature: divides the logits; 0 takes the likeliest token. Default: 1.
                top_k: sample from this many of the likeliest tokens; None (default) samples from all.
                top_p: sample from the likeliest tokens that together reach this probability; None (default)
                    samples from all.
                repetition_penalty: above 1, tokens of the prompt and of the text so far become less likely
                    (`penalise_seen`), except stop_ids, so that texts still end. Default: 1.
                seed: seed of this call's own generator; the global one is not touched. Default: 0.
                stop_ids: tokens that end the text; the one that ends it is yielded. None (default) uses the
                    tokenizer's, () uses none.
                cancel: once set, at most one more token is yielded, and no further chunk of the prompt is
                    read.

        Raises:
            ConfigError: an option or the prompt breaks its rule; raised at the call, before iteration.
        """
        settings = read_options(options, "generate")
        row = self._open_row(ids, settings.seed, settings)
        return (row.tokens[-1] for _ in self._write([row], settings))

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int = 1,
        seeds: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> list[list[int]]:
        """Return the new tokens of each sample, prompt by prompt, without the stop token.

        Sample i, counted over all prompts, is what `generate` yields with seed `seed_row(seed, i)`, or with
        `seeds[i]` if seeds are given.

        Args:
            prompts: token ids, of any lengths; each prompt is read once.
            num_samples: number of texts for each prompt.
            seeds: one seed for each sample, instead of those derived from the option `seed`.
            options: as for `generate`.

        Raises:
            ConfigError: an option or a prompt breaks its rule.
        """
        check_number("num_samples", num_samples, low=1, whole=True)
        settings = read_options(options, "generate_batch", "num_samples", "seeds")
        places = [prompt for prompt in prompts for _ in range(num_samples)]
        rows = self._open_rows(places, settings, seeds)
        for _ in self._write(rows, settings):
            pass
        return [row.tokens[:-1] if row.stop_reason == "stop" else row.tokens for row in rows]

    def measure_batch(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> list[list[Token]]:
        """Return the tokens that `generate_batch` samples and the stop token, each with its measures.

        Args:
            prompts: token ids, of any lengths; row i uses the seed `seed_row(seed, i)`.
            seeds: one seed for each row, instead of those derived from the option `seed`.
            options: as for `generate`.

        Raises:
            ConfigError: an option or a prompt breaks its rule.
        """
        settings = read_options(options, "measure_batch", "seeds")
        rows = self._open_rows(prompts, settings, seeds)
        found: list[list[Token]] = [[] for _ in rows]
        for _ in self._write(rows, settings, 0):
            for row, tokens in zip(rows, found, strict=True):
                if len(row.tokens) > len(tokens) and row.measures is not None:
                    tokens.append(row.measures)
        return found

    def stream(
        self, ids: Sequence[int], *, n_alternatives: int = 0, **options: Unpack[Options]
    ) -> Iterator[Token]:
        """Return an iterator over tokens, each with measures of the model's distribution.

        The measures describe the distribution before temperature and truncation.

        Args:
            ids: the prompt.
            n_alternatives: how many of the likeliest tokens each `Token` lists.
            options: as for `generate`.

        Raises:
            ConfigError: an option or the prompt breaks its rule; raised at the call, before iteration.
        """
        settings = read_options(options, "stream", "n_alternatives")
        row = self._open_row(ids, settings.seed, settings)
        steps = self._write([row], settings, n_alternatives)
        return (row.measures for _ in steps if row.measures is not None)

    def chat(self, messages: Sequence[dict[str, Any]], **options: Unpack[Options]) -> Reply:
        """Return the assistant's reply to a conversation; iterating over it generates the text.

        Args:
            messages: {"role": ..., "content": ...}, oldest first; none is ever dropped.
            options: as for `generate`; max_new_tokens defaults to 256.

        Raises:
            ConfigError: the conversation exceeds model.max_context, or an option breaks its rule; raised at
                the call, before iteration.
        """
        return self.reply(
            self.tokenizer.render_for_completion({"messages": list(messages)}), **options
        )

    def complete(self, text: str, **options: Unpack[Options]) -> Reply:
        """Return a reply that continues a plain text, as a base model does; options as for `chat`."""
        return self.reply([self.tokenizer.bos_id, *self.tokenizer.encode(text)], **options)

    def reply(
        self,
        ids: Sequence[int],
        prefix: Sequence[int] = (),
        n_alternatives: int | None = None,
        **options: Unpack[Options],
    ) -> Reply:
        """Return a reply that continues token ids.

        Args:
            ids: everything before the reply.
            prefix: the part of the reply that is already written; it belongs to the reply's text, not to its
                tokens.
            n_alternatives: how many of the likeliest tokens each of `Reply.measures` lists; None measures
                nothing.
            options: as for `chat`.

        Raises:
            ConfigError: an option or the prompt breaks its rule; raised at the call, before iteration.
        """
        settings = read_options({"max_new_tokens": 256, **options}, "chat", "n_alternatives")
        row = self._open_row([*ids, *prefix], settings.seed, settings)

        # Let the calculator read the prefix: an open expression continues, one just closed is answered.
        if row.tool:
            for token in prefix:
                answered = bool(row.forced) and row.forced.popleft() == token
                row.forced = row.forced if answered else deque(row.tool.feed(token))
        steps = self._write([row], settings, n_alternatives)
        return Reply(steps, row, self.tokenizer, self.model.sequence_len, prefix)

    def _open_rows(
        self, prompts: Sequence[Sequence[int]], settings: Settings, seeds: Sequence[int] | None
    ) -> list[Row]:
        """Return a checked row for each prompt, each with its own seed."""
        if seeds is None:
            seeds = [seed_row(settings.seed, i) for i in range(len(prompts))]
        if len(seeds) != len(prompts):
            raise ConfigError(
                f"{len(seeds)} seeds do not fit {len(prompts)} texts; give one seed for each text."
            )
        pairs = zip(prompts, seeds, strict=True)
        return [self._open_row(prompt, seed, settings) for prompt, seed in pairs]

    def _open_row(self, ids: Sequence[int], seed: int, settings: Settings) -> Row:
        """Return a row for a prompt, once the prompt is checked."""
        # Check the prompt.
        prompt, longest = list(ids), self.model.max_context
        if not prompt:
            raise ConfigError("The prompt is empty; begin with the tokenizer's bos_id.")
        if min(prompt) < 0 or max(prompt) >= self.model.vocab_size:
            wrong = next(i for i in prompt if not 0 <= i < self.model.vocab_size)
            raise ConfigError(
                f"Token id {wrong} must be below {self.model.vocab_size}; use the model's own tokenizer."
            )
        if len(prompt) > longest:
            raise ConfigError(
                f"The text has {len(prompt)} tokens where {longest} is the most; shorten it or begin anew."
            )

        # Mark the tokens of the prompt for the repetition penalty, except those that end a text.
        stop_ids = self.tokenizer.stop_ids if settings.stop_ids is None else settings.stop_ids
        room, seen = longest - len(prompt), None
        if settings.repetition_penalty != 1:
            seen = torch.zeros(self.model.vocab_size, dtype=torch.bool, device=self.model.device)
            seen[[token for token in set(prompt) if token not in stop_ids]] = True
        return Row(
            prompt=prompt,
            limit=min(settings.max_new_tokens, room),
            limit_reason="length" if settings.max_new_tokens <= room else "context",
            draws=draw_floats(seed),
            stop_ids=frozenset(stop_ids),
            seen=seen,
            tool=ToolCall(self.tokenizer, self._tool_ids) if self._tool_ids else None,
        )

    def _write(
        self, rows: list[Row], settings: Settings, n_alternatives: int | None = None
    ) -> Iterator[None]:
        """Generate all rows to their ends, one token per row and step, and yield after each step."""
        rows = [row for row in rows if not row.stop_reason]
        if len(rows) > 1:
            keep_freed_memory()
        read = self._read_prompts(rows, settings) if rows else None
        if read is not None:
            logits, cache = read
            while not settings.cancelled:
                self._sample(logits, rows, settings, n_alternatives)
                yield

                # Drop finished rows: the last unfinished ones take their places in the cache.
                alive = [i for i, row in enumerate(rows) if not row.stop_reason]
                if not alive or settings.cancelled:
                    break
                if len(alive) < len(rows):
                    late = [i for i in alive if i >= len(alive)]
                    order = [late.pop() if rows[i].stop_reason else i for i in range(len(alive))]
                    rows = [rows[i] for i in order]
                    with torch.inference_mode():
                        cache = cache.keep(order)

                # Read the new tokens.
                logits = self._advance([row.tokens[-1:] for row in rows], cache)

        # A row that has not ended by itself was cancelled.
        for row in rows:
            row.stop_reason = row.stop_reason or "cancelled"

    @torch.inference_mode()
    def _sample(
        self, logits: torch.Tensor, rows: list[Row], settings: Settings, n_alternatives: int | None
    ) -> None:
        """Give each row its next token from logits (B, V), and measure it if n_alternatives is not None."""
        # Draw a token per row, unless the calculator dictates it.
        draws = [None if row.forced else row.draws for row in rows]
        cut = logits
        if settings.repetition_penalty != 1:
            seen = torch.stack([row.seen for row in rows if row.seen is not None])
            cut = penalise_seen(logits, seen, settings.repetition_penalty)
        drawn = sample_logits(cut, draws, settings.temperature, settings.top_k, settings.top_p)
        ids = [row.accept(token) for row, token in zip(rows, drawn.tolist(), strict=True)]

        # Measure the tokens on the logits before the penalty.
        if n_alternatives is not None:
            measures = measure_logits(
                logits, torch.tensor(ids, device=logits.device), n_alternatives
            )
            for row, token in zip(rows, measures, strict=True):
                row.measures = token

    @torch.inference_mode()
    def _advance(self, ids: list[list[int]], cache: Cache) -> torch.Tensor:
        return self.model.advance(torch.tensor(ids, device=self.model.device), cache)

    @torch.inference_mode()
    def _read_prompts(
        self, rows: list[Row], settings: Settings
    ) -> tuple[torch.Tensor, Cache] | None:
        """Read each prompt once and return the logits and cache of all rows, or None if cancelled.

        If the model can read several prompts together, `rows` is sorted in place by prompt length.
        """
        # Merge equal neighbouring prompts; `places` holds the index of the prompt of each row.
        capacity = max(len(row.prompt) + row.limit for row in rows)
        together = self.model.read_padded if isinstance(self.model, ReadsPadded) else None
        if together:
            rows.sort(key=lambda row: (len(row.prompt), row.prompt))
        places = [
            i for i, (_, same) in enumerate(groupby(rows, key=lambda row: row.prompt)) for _ in same
        ]
        prompts = [prompt for prompt, _ in groupby(row.prompt for row in rows)]

        # Read them, several short ones together or a long one in chunks.
        logits: list[torch.Tensor] = []
        caches: list[Any] = []
        whole: Any = self.model.new_cache(len(prompts), capacity) if together else None
        for start, stop in group_prompts(prompts, PREFILL_TOKENS if together else 0):
            cache = whole.part(start, stop) if together else self.model.new_cache(1, capacity)
            for at in range(0, len(prompts[start]) if stop - start == 1 else 1, PREFILL_CHUNK):
                if settings.cancelled:
                    return None
                if together and stop - start > 1:
                    counts = [len(prompt) for prompt in prompts[start:stop]]
                    ids = [
                        [*prompt, *[0] * (counts[-1] - len(prompt))]
                        for prompt in prompts[start:stop]
                    ]
                    last = together(torch.tensor(ids, device=self.model.device), counts, cache)
                else:
                    last = self._advance([prompts[start][at : at + PREFILL_CHUNK]], cache)
            logits.append(last)
            caches.append(cache)

        # Broken weights show up in the first logits.
        first = torch.cat(logits)
        if not bool(first.amax(-1).isfinite().all()):
            raise CheckpointError(
                "The model's logits are not numbers: its weights are broken; take another step."
            )

        # Join the caches into one, and repeat rows that share a prompt.
        if together:
            whole.adopt(caches)
        else:
            whole = caches[0].join(caches[1:]) if len(caches) > 1 else caches[0]
        if len(places) == len(prompts):
            return first, whole
        return first[places], whole.select(places)


def group_prompts(prompts: Sequence[Sequence[int]], room: int) -> list[tuple[int, int]]:
    """Return the ranges (start, stop) of neighbouring prompts to read together.

    The prompts of a range have similar lengths and, with their padding, at most `room` tokens in all. A
    longer prompt is a range of its own.

    >>> group_prompts([[1] * 4, [2] * 6, [3] * 7, [4] * 50], 20)
    [(0, 2), (2, 3), (3, 4)]
    """
    groups: list[tuple[int, int]] = []
    for i, prompt in enumerate(prompts):
        start = groups[-1][0] if groups else 0
        if (
            groups
            and len(prompt) * (i + 1 - start) <= room
            and len(prompt) <= 1.5 * len(prompts[start])
        ):
            groups[-1] = (start, i + 1)
        else:
            groups.append((i, i + 1))
    return groups
