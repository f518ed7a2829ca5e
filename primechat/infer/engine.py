"""Prompts in, sampled tokens out, one model pass a token.

Hides: the cache. A prompt is read once, in pieces so that `cancel` is heard; each row of a batch draws from
its own generator and leaves the batch when it is done, so its text depends on its seed alone. inference_mode
is entered around each computation, never across a yield, where it would leak into the caller.
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

PREFILL_CHUNK = 512  # tokens of a prompt that are read between two looks at `cancel`
PREFILL_TOKENS = (
    1024  # of several prompts that are read together: larger products, as far as caches reach
)


class Options(TypedDict, total=False):
    """The options of `Engine.generate`, which all its methods share."""

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
    """Checked options of one call."""

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
        """Tell whether the caller has asked to stop."""
        return self.cancel is not None and self.cancel.is_set()


def read_options(options: Mapping[str, Any], method: str, *others: str) -> Settings:
    """Return the checked options of a method of Engine, which all take the same, some `others` besides.

    Raises:
        ConfigError: there is no such option, max_new_tokens is missing, or one breaks its rule.
    """
    method = f"Engine.{method}"
    check_options(options, [*others, *(item.name for item in fields(Settings))], method)
    if "max_new_tokens" not in options:
        raise OptionError(f"{method} needs max_new_tokens; try max_new_tokens=100.")
    return Settings(**options)


@dataclass(eq=False)
class Row:
    """One sequence; `stop_reason` is stop, length, context or cancelled, and empty before its end."""

    prompt: list[int]
    limit: int
    limit_reason: str
    draws: Iterator[float]
    stop_ids: frozenset[int]
    tool: ToolCall | None
    seen: torch.Tensor | None = None  # (V,) which tokens are there, where that counts
    tokens: list[int] = field(default_factory=list)
    forced: deque[int] = field(default_factory=deque)
    measures: Token | None = None
    stop_reason: str = ""

    def __post_init__(self) -> None:
        if self.limit == 0:
            self.stop_reason = self.limit_reason

    def accept(self, drawn: int) -> int:
        """Append the next token and return it: the calculator's where it has answered, else the drawn one."""
        if self.forced:
            token = self.forced.popleft()
        else:
            token = drawn
            if token in self.stop_ids:
                self.stop_reason = "stop"
            elif self.tool:
                self.forced.extend(self.tool.feed(token))
        self.tokens.append(token)
        if self.seen is not None and token not in self.stop_ids:
            self.seen[token] = True
        if not self.stop_reason and len(self.tokens) == self.limit:
            self.stop_reason = self.limit_reason
        return token


class Engine:
    """Samples from a language model, ours or foreign.

    Args:
        model: integers to logits.
        tokenizer: its tokenizer; one without the calculator's special tokens has no calculator.
    """

    def __init__(self, model: LanguageModel, tokenizer: ChatTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._tool_ids = find_tool(tokenizer)

    def generate(self, ids: Sequence[int], **options: Unpack[Options]) -> Iterator[int]:
        """Yield tokens as they are sampled, the calculator's among them.

        Args:
            ids: the prompt; one token at least.
            options: all but the first have a default.
                max_new_tokens: to yield at most; prompt and new tokens together end at model.max_context.
                temperature: divides the logits; 0 takes the likeliest token; 1 is the default.
                top_k: sample from this many of the likeliest tokens; None from all.
                top_p: sample from the likeliest tokens that together reach this probability; None from all.
                repetition_penalty: above 1, tokens of the prompt and of the text so far become less likely
                    (`penalise_seen`), those of stop_ids never, so that texts still end; 1.
                seed: of this call's own generator, 0; the global one is not touched.
                stop_ids: tokens that end the text, the ending one is yielded; None those of the tokenizer,
                    () none.
                cancel: once set, at most one more token comes, and no further piece of the prompt is read.

        Raises:
            ConfigError: an option or the prompt breaks its rule, at once.
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

        Sample i of them all is what `generate` writes with seed `seed_row(seed, i)`, or `seeds[i]`.

        Args:
            prompts: token ids, of any lengths; each is read once.
            num_samples: texts for each prompt.
            seeds: one for each sample, instead of those that the option `seed` leads to.
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
        """Return what `generate_batch` writes, the stop token included, each token with its measures.

        Args:
            prompts: token ids, of any lengths; row i draws from the seed `seed_row(seed, i)`.
            seeds: one for each row, instead of those.
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
        """Yield tokens with measures of the model's distribution before temperature and truncation.

        Args:
            ids: the prompt.
            n_alternatives: how many of the likeliest tokens each `Token` names.
            options: as for `generate`.

        Raises:
            ConfigError: an option or the prompt breaks its rule, at once.
        """
        settings = read_options(options, "stream", "n_alternatives")
        row = self._open_row(ids, settings.seed, settings)
        steps = self._write([row], settings, n_alternatives)
        return (row.measures for _ in steps if row.measures is not None)

    def chat(self, messages: Sequence[dict[str, Any]], **options: Unpack[Options]) -> Reply:
        """Return the assistant's reply to a conversation; iterating over it writes it.

        Args:
            messages: {"role": ..., "content": ...}, oldest first; none is ever dropped.
            options: as for `generate`; max_new_tokens is 256 unless given.

        Raises:
            ConfigError: the conversation exceeds model.max_context, or an option breaks its rule, at once.
        """
        return self.reply(
            self.tokenizer.render_for_completion({"messages": list(messages)}), **options
        )

    def complete(self, text: str, **options: Unpack[Options]) -> Reply:
        """Return a reply that goes on from a plain text, as a base model does; options as for `chat`."""
        return self.reply([self.tokenizer.bos_id, *self.tokenizer.encode(text)], **options)

    def reply(
        self,
        ids: Sequence[int],
        prefix: Sequence[int] = (),
        n_alternatives: int | None = None,
        **options: Unpack[Options],
    ) -> Reply:
        """Return a reply that goes on from token ids.

        Args:
            ids: all that stands before the reply.
            prefix: the reply as far as it was written before; it is part of its text, not of its tokens.
            n_alternatives: how many of the likeliest tokens each of `Reply.measures` names; None measures
                nothing.
            options: as for `chat`.

        Raises:
            ConfigError: an option or the prompt breaks its rule, at once.
        """
        settings = read_options({"max_new_tokens": 256, **options}, "chat", "n_alternatives")
        row = self._open_row([*ids, *prefix], settings.seed, settings)
        if row.tool:
            for token in prefix:  # an expression that was begun goes on; one just ended is answered
                answered = bool(row.forced) and row.forced.popleft() == token
                row.forced = row.forced if answered else deque(row.tool.feed(token))
        steps = self._write([row], settings, n_alternatives)
        return Reply(steps, row, self.tokenizer, self.model.sequence_len, prefix)

    def _open_rows(
        self, prompts: Sequence[Sequence[int]], settings: Settings, seeds: Sequence[int] | None
    ) -> list[Row]:
        """Check prompts and make rows of them, each with a seed of its own."""
        if seeds is None:
            seeds = [seed_row(settings.seed, i) for i in range(len(prompts))]
        if len(seeds) != len(prompts):
            raise ConfigError(
                f"{len(seeds)} seeds do not fit {len(prompts)} texts; give one seed for each text."
            )
        pairs = zip(prompts, seeds, strict=True)
        return [self._open_row(prompt, seed, settings) for prompt, seed in pairs]

    def _open_row(self, ids: Sequence[int], seed: int, settings: Settings) -> Row:
        """Check a prompt and make a row of it."""
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
        """Write rows to their ends, a token each a step, and yield after each step."""
        rows = [row for row in rows if not row.stop_reason]
        if len(rows) > 1:
            keep_freed_memory()
        read = self._read_prompts(rows, settings) if rows else None
        if read is not None:
            logits, cache = read
            while not settings.cancelled:
                self._sample(logits, rows, settings, n_alternatives)
                yield
                alive = [i for i, row in enumerate(rows) if not row.stop_reason]
                if not alive or settings.cancelled:
                    break
                if len(alive) < len(rows):
                    late = [
                        i for i in alive if i >= len(alive)
                    ]  # they take the places that became free
                    order = [late.pop() if rows[i].stop_reason else i for i in range(len(alive))]
                    rows = [rows[i] for i in order]
                    with torch.inference_mode():
                        cache = cache.keep(order)
                logits = self._advance([row.tokens[-1:] for row in rows], cache)
        for row in rows:
            row.stop_reason = row.stop_reason or "cancelled"

    @torch.inference_mode()
    def _sample(
        self, logits: torch.Tensor, rows: list[Row], settings: Settings, n_alternatives: int | None
    ) -> None:
        """Let each row take its next token from logits (B, V), and measure it if n_alternatives is given."""
        draws = [None if row.forced else row.draws for row in rows]
        cut = logits
        if settings.repetition_penalty != 1:
            seen = torch.stack([row.seen for row in rows if row.seen is not None])
            cut = penalise_seen(logits, seen, settings.repetition_penalty)
        drawn = sample_logits(cut, draws, settings.temperature, settings.top_k, settings.top_p)
        ids = [row.accept(token) for row, token in zip(rows, drawn.tolist(), strict=True)]
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
        """Read each prompt once; return logits and cache of all rows, or None where cancelled.

        Several are read together where the model can; then the rows are sorted by length.
        """
        capacity = max(len(row.prompt) + row.limit for row in rows)
        together = self.model.read_padded if isinstance(self.model, ReadsPadded) else None
        if together:
            rows.sort(key=lambda row: (len(row.prompt), row.prompt))
        places = [
            i for i, (_, same) in enumerate(groupby(rows, key=lambda row: row.prompt)) for _ in same
        ]
        prompts = [prompt for prompt, _ in groupby(row.prompt for row in rows)]
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
        first = torch.cat(logits)
        if not bool(first.amax(-1).isfinite().all()):
            raise CheckpointError(
                "The model's logits are not numbers: its weights are broken; take another step."
            )
        if together:
            whole.adopt(caches)
        else:
            whole = caches[0].join(caches[1:]) if len(caches) > 1 else caches[0]
        if len(places) == len(prompts):
            return first, whole
        return first[places], whole.select(places)


def group_prompts(prompts: Sequence[Sequence[int]], room: int) -> list[tuple[int, int]]:
    """Return which neighbours to read together: of like lengths, at most `room` tokens with what pads them.

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
