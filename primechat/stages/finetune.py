"""Teach a base model to answer: train on conversations, on the assistant's tokens only.

Hides: how conversations become rows. They are rendered with their special tokens, laid end to end, and
every token that is not the assistant's is masked out of the loss. Reference: nanochat's chat SFT; Ouyang et
al. 2022, section 3.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from primechat import store
from primechat.config import FinetuneConfig
from primechat.errors import ConfigError
from primechat.infer.engine import Engine
from primechat.model.checkpoint import load_checkpoint
from primechat.records import OnEvent, TrainResult
from primechat.stages.pretrain import EVAL_ROWS
from primechat.stages.run import SAMPLE_TOKENS, Job, TrainingRun
from primechat.text.batches import PackedBatches, TokenCache, build_cache, validation_windows
from primechat.text.corpora import corpus_identity, read_conversations
from primechat.text.tokenizer import Tokenizer

PROMPTS = ("Hi! How was your day?", "Do you like music?")
MAX_TOKENS = 2048  # of one conversation


def finetune(
    config: FinetuneConfig, *, on_event: OnEvent | None = None, stop: threading.Event | None = None
) -> TrainResult:
    """Make a chat model of a base model, or go on with one.

    Args:
        config: base model, dialogues, length, optimizer, machine.
        on_event: hears of steps, validations, samples and checkpoints.
        stop: once set, the run saves and ends after the present step.

    Returns:
        What came of it; val_bpb is on the assistant's tokens of held-out conversations.

    Raises:
        ConfigError: settings contradict each other, the base model or the run that is there.
        PrimechatError: text, tokenizer or checkpoints cannot be used.
    """
    base = config.base or f"base/{config.tag}"
    folder, name = store.locate_model(store.parse_identifier(base))
    tokenizer = store.load_tokenizer(base)
    loaded = load_checkpoint(folder, name.step)
    model, T = loaded.config, loaded.config.sequence_len
    if config.batch_tokens % T:
        near = max(1, round(config.batch_tokens / T)) * T
        raise ConfigError(
            f"batch_tokens={config.batch_tokens} must be a multiple of the base model's sequence_len={T}; "
            f"try {near}."
        )
    train, val = (cache_dialogues(config.dialogues, split, tokenizer) for split in ("train", "val"))

    def open_batches(rows: int, rank: int, world_size: int, cursor: dict[str, Any] | None) -> PackedBatches:
        return PackedBatches(
            train,
            sequence_len=T,
            rows=rows,
            rank=rank,
            world_size=world_size,
            seed=config.seed,
            cursor=cursor,
        )

    def start_state() -> dict[str, Tensor]:
        return loaded.model_state

    job = Job(
        family="sft",
        model=model,
        start_state=start_state,
        tokenizer=tokenizer,
        open_batches=open_batches,
        open_windows=lambda tokens, rank, world_size: validation_windows(
            val, T, rows=EVAL_ROWS, max_tokens=tokens, rank=rank, world_size=world_size
        ),
        last_eval_tokens=config.look.last_eval_tokens,
        default_steps=max(1, round(train.tokens / config.batch_tokens)),
        prompts=PROMPTS,
        write_sample=write_reply,
        meta={"base": f"{base}@{loaded.step}", "dialogues": corpus_identity(config.dialogues, "train")},
    )
    return TrainingRun(config, job, on_event, stop).work()


def write_reply(engine: Engine, prompt: str, seed: int) -> str:
    """Return what the model answers to one message."""
    messages = [{"role": "user", "content": prompt}]
    return engine.chat(messages, max_new_tokens=SAMPLE_TOKENS, temperature=0.8, top_k=50, seed=seed).read()


def cache_dialogues(dialogues: str, split: str, tokenizer: Tokenizer) -> TokenCache:
    """Render a split's conversations once, with their masks, and return the memory-mapped cache."""

    def render() -> Iterator[tuple[list[int], list[int]]]:
        for conversation in read_conversations(dialogues, split, mirrored=split == "train"):
            yield tokenizer.render_conversation(conversation, max_tokens=MAX_TOKENS)

    key = f"chat-{split}-{corpus_identity(dialogues, split)}"
    return build_cache(render(), tokenizer, store.base_dir() / "token_cache", key)
