"""What a training stage brings to the common loop: its model, its text, its loss, and how a step is kept.

Hides: nothing; `stages.run` does the work. The methods are the ways in which a stage may differ from training
all weights on the next token.
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
    """Endless batches with a cursor that names the next token."""

    @property
    def cursor(self) -> dict[str, Any]: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a stage brings: its model, its text, and how to look at it.

    `open_batches` takes the rows of one step over all ranks, this rank, the number of ranks and a cursor;
    `open_windows` takes a number of validation tokens (0 is all), this rank and the number of ranks, and
    yields (ids, targets) batches, and so does `open_general`, of a text that may be forgotten;
    `default_steps` is for a config that names neither steps nor seconds; a `bos_id` of 0 or more keeps apart
    in training what it begins.
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
    most_eval_tokens: int = 0  # of them to score where the whole split is asked for; 0 is all
    fresh_text: bool = False  # resumed with another text, which is read from its beginning
    init: InitConfig = field(default_factory=InitConfig)  # of fresh weights

    def identify(self, tag: str) -> str:
        """Return the identifier of what the run makes."""
        return f"{self.family}/{tag}"

    def count_params(self, model: GPT) -> int:
        """Return the number of parameters to report."""
        return self.model.n_params

    def prepare(self, model: GPT) -> None:
        """Change the fresh model before anything is measured; what it weighs is spoilt after that."""

    def fill_model(self, model: GPT, loaded: Loaded | None, seed: int) -> None:
        """Put in the weights to go on from, or to start from."""
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
        """Return how many passes of the model a validation makes over each token that it scores."""
        return 2.0 if self.open_general else 1.0

    def measure_more(self, model: GPT, tokens: int) -> dict[str, Any]:
        """Return further fields of a validation's event; 0 tokens stands for the whole split."""
        return {}

    def load_step(self, folder: Path) -> Loaded:
        """Return the newest step of a run, with its optimizer."""
        return load_checkpoint(folder, want_optim=True)

    def save_step(
        self, folder: Path, step: int, model: GPT, optim_state: dict[str, Any], meta: dict[str, Any]
    ) -> None:
        """Commit one step."""
        save_checkpoint(
            folder,
            step,
            model_state=model.state_dict(),
            config=self.model,
            optim_state=optim_state,
            meta=meta,
        )
