"""What a training stage brings to the common loop: its model, text and loss, and how it saves a step.

The methods are the points at which a stage may differ from training all weights on next-token prediction;
`stages.trainer` runs the job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from primechat.checkpoint.checkpoint import Loaded, load_checkpoint, save_checkpoint
from primechat.config import GPTConfig, InitConfig, RuntimeConfig
from primechat.infer.engine import Engine
from primechat.model.gpt import GPT
from primechat.seeds import fold_seed
from primechat.text.tokenizer import Tokenizer
from primechat.train.autotune import make_loss
from primechat.train.loop import SumLoss

Windows = Callable[[int, int, int], Iterable[tuple[Tensor, Tensor]]]


class Batches(Protocol):
    """An endless stream of batches, with a cursor at the next token."""

    @property
    def cursor(self) -> dict[str, Any]: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """A stage's model, text and evaluation, for the common loop.

    `open_batches` takes the rows of one step over all ranks, this rank, the number of ranks and a cursor.
    `open_windows` takes a number of validation tokens (0 means all), this rank and the number of ranks, and
    yields batches (ids, targets); `open_general` does the same for a text that may be forgotten.
    `default_steps` applies to a config with neither steps nor seconds. If `bos_id` is 0 or more, this token
    begins a document, and in training documents packed into a row do not attend to each other.
    """

    family: str
    model: GPTConfig
    start_state: Callable[[], dict[str, Tensor]] | None
    tokenizer: Tokenizer
    open_batches: Callable[[int, int, int, dict[str, Any] | None], Batches]
    open_windows: Windows
    val_tokens: int  # of the whole validation split
    default_steps: int
    prompts: tuple[str, ...]
    write_sample: Callable[[Engine, str, int], str]
    meta: dict[str, Any]
    open_general: Windows | None = None
    bos_id: int = -1
    most_eval_tokens: int = 0  # limit of what is scored as the whole split; 0 means no limit
    fresh_text: bool = False  # resumed with a different text, which is read from its beginning
    init: InitConfig = field(default_factory=InitConfig)  # of new weights

    def identify(self, tag: str) -> str:
        """Return the identifier of the trained model."""
        return f"{self.family}/{tag}"

    def count_params(self, model: GPT) -> int:
        """Return the number of parameters to report."""
        return self.model.n_params

    def prepare(self, model: GPT) -> None:
        """Change the new model before tuning, which overwrites its weights."""

    def fill_model(self, model: GPT, loaded: Loaded | None, seed: int) -> None:
        """Load the weights of a checkpoint, or those to start from, or draw new ones."""
        if loaded is not None:
            model.load_state_dict(loaded.model_state)
        elif self.start_state is not None:
            model.load_state_dict(self.start_state())
        else:
            model.init_weights(torch.Generator().manual_seed(fold_seed(seed)), self.init)

    def make_loss(self, model: GPT, runtime: RuntimeConfig) -> SumLoss:
        """Return the summed loss of a micro-batch."""
        return make_loss(model, runtime, self.bos_id)

    def weigh_scoring(self) -> float:
        """Return the number of forward passes that a validation makes per scored token."""
        return 2.0 if self.open_general else 1.0

    def measure_more(self, model: GPT, tokens: int) -> dict[str, Any]:
        """Return further fields of a validation's event; 0 tokens mean the whole split."""
        return {}

    def load_step(self, folder: Path) -> Loaded:
        """Return the latest checkpoint of a run, with its optimizer state."""
        return load_checkpoint(folder, want_optim=True)

    def save_step(
        self, folder: Path, step: int, model: GPT, optim_state: dict[str, Any], meta: dict[str, Any]
    ) -> None:
        """Save a checkpoint of one step."""
        save_checkpoint(
            folder,
            step,
            model_state=model.state_dict(),
            config=self.model,
            optim_state=optim_state,
            meta=meta,
        )
