"""Interfaces of models and tokenizers that the engine, the probes and the chat rely on.

Our own models and those of other projects both implement them. Nothing here imports torch at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

Conversation = dict[str, Any]  # {"messages": [{"role": "user", "content": "..."}, ...]}


class Cache(Protocol):
    """Keys and values of the tokens that a model has read, one row per sequence."""

    @property
    def lengths(self) -> list[int]:
        """Tokens read so far, for each row."""

    @property
    def capacity(self) -> int:
        """Tokens that each row can hold."""

    def select(self, rows: Sequence[int]) -> Cache:
        """Return a cache of the given rows, in that order; rows may be repeated."""

    def keep(self, rows: Sequence[int]) -> Cache:
        """Return this cache reduced to n of its rows; those with an index below n keep their index."""

    def join(self, others: Sequence[Cache]) -> Cache:
        """Return one cache with the rows of this one and of `others`, whatever their lengths."""


@runtime_checkable
class LanguageModel(Protocol):
    """A model that maps token ids to next-token logits, with a cache."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def sequence_len(self) -> int:
        """Context length in training, in tokens."""

    @property
    def max_context(self) -> int:
        """Largest number of tokens that a cache may hold (for ours, the length of the rotary table)."""

    @property
    def device(self) -> torch.device: ...

    def new_cache(self, batch_size: int, capacity: int) -> Any:
        """Return an empty `Cache` of `batch_size` rows."""

    def advance(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Read ids (B, T) int64 into the cache; return float32 logits (B, V) after the last one."""


@runtime_checkable
class ReadsPadded(Protocol):
    """A model that can read several prompts of different lengths in one pass."""

    def read_padded(self, ids: torch.Tensor, counts: list[int], cache: Any) -> torch.Tensor:
        """Read the first counts[i] of row i of ids (B, T) into an empty cache; return logits (B, V)."""


class Hook(Protocol):
    """A function that a forward pass calls with each named tensor; its result replaces the tensor."""

    def wants(self, point: str) -> bool:
        """Return whether a point that costs extra work is needed, such as the attention weights."""

    def __call__(self, point: str, x: torch.Tensor, /) -> torch.Tensor: ...


@runtime_checkable
class ChatTokenizer(Protocol):
    """A tokenizer that can also render a conversation as a prompt."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int: ...

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def special(self, name: str) -> int: ...

    def render_for_completion(self, conversation: Conversation) -> list[int]: ...
