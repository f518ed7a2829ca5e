"""Train an adapter on conversations; the model beside which it stands is never written.

Hides: how an adapter's run is kept. Its checkpoints hold the adapter and its optimizer alone; before each
of them PEFT's two files are written anew, which is what `lora:<tag>+<base>` opens.
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
    """Train an adapter, or go on with one; the result's identifier opens the model with the adapter.

    Raises:
        ConfigError: settings contradict each other, the model or the run that is there.
        PrimechatError: text, tokenizer or checkpoints cannot be used.
    """
    if config.learn != "assistant":
        raise ConfigError(f"learn={config.learn!r} must be assistant for an adapter; leave it out.")
    if not config.rank:
        raise ConfigError("rank=0 has nothing to train; try 8.")
    folder, name = registry.locate_model(parse_plain(config.base))
    loaded, tokenizer = load_checkpoint(folder, name.step), registry.load_tokenizer(config.base)
    base = str(registry.pin_step(name, loaded.step))
    plain = make_job(config, loaded, tokenizer, base, on_event)
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
    return TrainingRun(config, job, on_event, stop).work()


@dataclass(frozen=True, kw_only=True)
class LoraJob(Job):
    """A job in which only an adapter learns."""

    spec: lora.LoraSpec
    tag: str
    base: str
    seed: int

    def identify(self, tag: str) -> str:
        """Return the identifier of the model with the adapter."""
        return f"lora:{tag}+{self.base}"

    def count_params(self, model: GPT) -> int:
        """Return the adapter's parameters."""
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def prepare(self, model: GPT) -> None:
        """Put a fresh adapter beside the model and freeze the rest."""
        lora.detach(model, self.tag)
        # not the first numbers of its base, which may have had the same seed
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "adapter"))
        lora.attach(model, self.tag, self.spec, generator=generator, train=True)
        if (
            self.spec.dropout
        ):  # draws from torch's own state, which checkpoints keep: that goes on from here
            torch.set_rng_state(generator.get_state())

    def fill_model(self, model: GPT, loaded: Loaded | None, seed: int) -> None:
        """Put in the base's weights, and the adapter of the step to go on from."""
        assert self.start_state is not None, "an adapter has a base"
        model.load_state_dict(self.start_state(), strict=False)
        self.prepare(model)  # anew: measuring has trained it a little
        if loaded is not None:
            for key, tensor in lora.read_state(model, self.tag).items():
                tensor.copy_(loaded.model_state[key])

    def load_step(self, folder: Path) -> Loaded:
        """Return the newest sound step of an adapter's run."""
        return load_checkpoint(folder, want_optim=True, read=self.read_step)

    def read_step(self, folder: Path, step: int, *_: object) -> Loaded:
        """Read one step or say what is wrong with it."""
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
        """Write PEFT's files, then commit the adapter and its optimizer: a step that counts has both."""
        state = lora.read_state(model, self.tag)
        parts = {f"model_{step:06d}.pt": state, f"optim_{step:06d}_rank0.pt": optim_state}
        facts = {"base": self.base, "rank": self.spec.rank, "n_params": self.count_params(model)}
        identity = self.tokenizer.identity
        with checkpoint.tell_refusal(folder, step):
            lora.save_adapter(
                model, self.tag, self.spec, folder, self.base, tokenizer_identity=identity
            )
            checkpoint.commit_step(folder, step, parts, {**meta, "step": step, "lora": facts})
