"""Train a LoRA adapter on conversations; the base model is never modified.

Decides how an adapter's run is saved. Its checkpoints hold only the adapter and its optimizer; before each of
them, PEFT's two files are written again, which `lora:<tag>+<base>` opens.
Reference: Hu et al. 2021; `primechat.model.lora`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from primechat.checkpoint import checkpoint, registry
from primechat.checkpoint.checkpoint import Loaded, load_checkpoint, read_meta
from primechat.config import LoRAConfig
from primechat.config.names import parse_plain
from primechat.errors import CheckpointError, ConfigError
from primechat.events import OnEvent, TrainResult
from primechat.files.weights import load_tensors
from primechat.model import lora
from primechat.model.gpt import GPT
from primechat.seeds import derive_seed
from primechat.stages.finetune import make_job
from primechat.stages.job import Job
from primechat.stages.trainer import TrainingRun


def train_lora(
    config: LoRAConfig, *, on_event: OnEvent | None = None, stop: threading.Event | None = None
) -> TrainResult:
    """Train an adapter, or resume a run, and return the result; its identifier opens base and adapter.

    Raises:
        ConfigError: the settings contradict each other, the model or an existing run.
        PrimechatError: the text, the tokenizer or a checkpoint cannot be used.
    """
    if config.learn != "assistant":
        raise ConfigError(f"learn={config.learn!r} must be assistant for an adapter; leave it out.")
    if not config.rank:
        raise ConfigError("rank=0 has nothing to train; try 8.")

    # The base, and the job of training all of it on conversations.
    folder, name = registry.locate_model(parse_plain(config.base))
    loaded, tokenizer = load_checkpoint(folder, name.step), registry.load_tokenizer(config.base)
    base = str(registry.pin_step(name, loaded.step))
    plain = make_job(config, loaded, tokenizer, base, on_event)

    # The same job for an adapter.
    spec = lora.LoraSpec(
        rank=config.rank,
        alpha=config.alpha,
        rslora=config.rslora,
        dropout=config.dropout,
        targets=config.targets,
    )
    job = LoraJob(
        **{**vars(plain), "family": "lora"}, spec=spec, tag=config.tag, base=base, seed=config.seed
    )
    return TrainingRun(config, job, on_event, stop).run()


@dataclass(frozen=True, kw_only=True)
class LoraJob(Job):
    """A job that trains only an adapter."""

    spec: lora.LoraSpec
    tag: str
    base: str
    seed: int

    def identify(self, tag: str) -> str:
        """Return the identifier of the model with the adapter."""
        return f"lora:{tag}+{self.base}"

    def count_params(self, model: GPT) -> int:
        """Return the number of parameters of the adapter."""
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def prepare(self, model: GPT) -> None:
        """Attach a new adapter to the model and freeze everything else."""
        lora.detach(model, self.tag)
        # A seed of its own, so that the adapter does not start with its base's initial numbers.
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "adapter"))
        lora.attach(model, self.tag, self.spec, generator=generator, train=True)
        # Dropout draws from torch's global generator, whose state is saved in checkpoints.
        if self.spec.dropout:
            torch.set_rng_state(generator.get_state())

    def fill_model(self, model: GPT, loaded: Loaded | None, seed: int) -> None:
        """Load the base's weights and, to resume, the adapter of a checkpoint."""
        assert self.start_state is not None, "an adapter has a base"
        model.load_state_dict(self.start_state(), strict=False)
        self.prepare(model)  # again, as tuning has trained the adapter a little
        if loaded is not None:
            for key, tensor in lora.read_state(model, self.tag).items():
                tensor.copy_(loaded.model_state[key])

    def load_step(self, folder: Path) -> Loaded:
        """Return the latest valid checkpoint of an adapter's run."""
        return load_checkpoint(folder, want_optim=True, read=self.read_step)

    def read_step(self, folder: Path, step: int, *_: object) -> Loaded:
        """Return one checkpoint of an adapter's run.

        Raises:
            CheckpointError: the checkpoint is damaged or holds no adapter.
        """
        meta = read_meta(folder, step)
        checkpoint.check_hashes(folder, meta)
        state = load_tensors(folder / f"model_{step:06d}.pt")
        if not isinstance(state, dict) or "lora" not in meta:
            raise CheckpointError(f"{folder} holds no adapter's run; choose another tag.")
        optim_state = checkpoint.read_optim(folder, step, meta)
        return Loaded(
            step=step, config=self.model, model_state=state, meta=meta, optim_state=optim_state
        )

    def save_step(
        self, folder: Path, step: int, model: GPT, optim_state: dict[str, Any], meta: dict[str, Any]
    ) -> None:
        """Write PEFT's files, then the checkpoint of adapter and optimizer: a committed step has both."""
        state = lora.read_state(model, self.tag)
        parts = {f"model_{step:06d}.pt": state, f"optim_{step:06d}_rank0.pt": optim_state}
        facts = {"base": self.base, "rank": self.spec.rank, "n_params": self.count_params(model)}
        identity = self.tokenizer.identity
        with checkpoint.explain_unreadable(folder, step):
            lora.save_adapter(
                model, self.tag, self.spec, folder, self.base, tokenizer_identity=identity
            )
            checkpoint.commit_step(folder, step, parts, {**meta, "step": step, "lora": facts})
