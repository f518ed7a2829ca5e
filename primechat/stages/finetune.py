"""Finetune a base model to answer: train on conversations, with the loss on the assistant's tokens only.

Decides how conversations become rows. They are rendered with their special tokens and packed end to end, and
all tokens but the assistant's are masked out of the loss. Conversations can also be separated by attention
masks or by rows of their own; measured, this gained nothing (labs/experiments.md), as a base model trained on
packed texts knows what a new beginning means. Forgetting is measured on the text of the pretraining.
Reference: nanochat's chat SFT and midtraining; Ouyang et al. 2022, section 3.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import Loaded, load_checkpoint
from primechat.config import FinetuneConfig
from primechat.config.names import parse_plain
from primechat.config.stages import check_rows
from primechat.errors import DataError, PrimechatError
from primechat.events import NoteEvent, OnEvent, TrainResult
from primechat.infer.samples import write_reply
from primechat.protocols import Conversation
from primechat.stages.job import Windows
from primechat.stages.pretrain import cache_text, make_windows, pack_rows
from primechat.stages.trainer import Job, TrainingRun, pick_device
from primechat.text.batches import PackedBatches, PaddedBatches, TokenCache, build_cache
from primechat.text.corpora import is_local
from primechat.text.dialogues import (
    READING,
    DialogueOptions,
    identify_mixture,
    parse_mixture,
    prepare_set,
    stream_dialogues,
)
from primechat.text.tokenizer import Tokenizer
from primechat.train.parallel import join_ranks, wait_turn

MIN_VAL_CHARS = 10  # of held-out replies: bits per byte of a single word mean nothing
PROMPTS = ("Hi! How was your day?", "Do you like music?")
MAX_TOKENS = 2048  # of one conversation


def finetune(
    config: FinetuneConfig, *, on_event: OnEvent | None = None, stop: threading.Event | None = None
) -> TrainResult:
    """Finetune a base model to a chat model, or resume a run, and return its result.

    Its val_bpb is measured on the assistant's tokens of held-out conversations.

    Raises:
        ConfigError: the settings contradict each other, the base model or an existing run.
        PrimechatError: the text, the tokenizer or a checkpoint cannot be used.
    """
    base = config.base or f"base/{config.tag}"
    folder, name = registry.locate_model(parse_plain(base))
    tokenizer, loaded = registry.load_tokenizer(base), load_checkpoint(folder, name.step)
    job = make_job(config, loaded, tokenizer, f"{base}@{loaded.step}", on_event)
    return TrainingRun(config, job, on_event, stop).run()


def make_job(
    config: FinetuneConfig,
    loaded: Loaded,
    tokenizer: Tokenizer,
    base: str,
    on_event: OnEvent | None,
) -> Job:
    """Return the job of training a checkpoint on conversations, for the common loop."""
    T = loaded.config.sequence_len
    check_rows(config.batch_tokens, T, "the base model's ")
    with wait_turn(join_ranks(pick_device(config.runtime.device))):
        train, val = (
            cache_dialogues(config, split, tokenizer, on_event) for split in ("train", "val")
        )
    if config.learn == "all":
        train, val = replace(train, mask=None), replace(val, mask=None)
    kind = PaddedBatches if config.layout == "padded" else PackedBatches

    return Job(
        family="sft" if config.learn == "assistant" else "mid",
        model=loaded.config,
        start_state=lambda: loaded.model_state,
        tokenizer=tokenizer,
        open_batches=pack_rows(train, T, config.seed, kind),
        open_windows=make_windows(val, T),
        val_tokens=val.tokens,
        default_steps=max(1, round(train.tokens / config.batch_tokens)),
        prompts=PROMPTS,
        write_sample=write_reply,
        meta={
            "base": base,
            "dialogues": identify_mixture(config.dialogues, "train", dialogue_options(config)),
        },
        open_general=open_general(config.general, loaded, tokenizer, on_event),
        bos_id=tokenizer.bos_id if config.layout == "masked" else -1,
    )


def open_general(
    corpus: str, loaded: Loaded, tokenizer: Tokenizer, on_event: OnEvent | None
) -> Windows | None:
    """Return a function that opens windows of the text on which forgetting is measured, or None."""
    made_with = loaded.meta.get("user_config") or {}
    named = corpus or str(made_with.get("corpus") or "chitchat")
    separator = "auto" if corpus else str(made_with.get("corpus_separator") or "none")
    if named == "none" or (not corpus and not is_local(named)):
        return None
    try:
        cache = cache_text(named, "val", tokenizer, 1, on_event, separator=separator)
    except PrimechatError as error:
        if corpus:
            raise
        if on_event:
            on_event(NoteEvent(text=f"Forgetting is not measured: {error}"))
        return None
    return make_windows(cache, loaded.config.sequence_len)


def dialogue_options(config: FinetuneConfig, split: str = "train") -> DialogueOptions:
    """Return a config's options for reading a split; for training, both sides act as the assistant."""
    return DialogueOptions(
        language=config.language,
        personas=config.personas,
        mirrored=split == "train",
        base_dir=registry.base_dir(),
        shards=config.dialogue_shards,
    )


def count_replies(conversation: Conversation) -> int:
    """Return the number of characters in the assistant's messages of a conversation."""
    said = [m["content"] for m in conversation["messages"] if m["role"] == "assistant"]
    parts = [[c] if isinstance(c, str) else [part["text"] for part in c] for c in said]
    return sum(len(text) for texts in parts for text in texts)


def cache_dialogues(
    config: FinetuneConfig, split: str, tokenizer: Tokenizer, on_event: OnEvent | None = None
) -> TokenCache:
    """Return the memory-mapped token cache of a split's conversations, with their loss masks."""
    options = dialogue_options(config, split)
    for part in parse_mixture(config.dialogues):
        prepare_set(part.name, options, on_event)

    def render() -> Iterator[tuple[list[int], list[int]]]:
        found, chars = False, 0
        for conversation in stream_dialogues(config.dialogues, split, options):
            ids, mask = tokenizer.render_conversation(conversation, max_tokens=MAX_TOKENS)
            # A question may fill all of MAX_TOKENS and leave nothing to learn or to score.
            if any(mask):
                found = True
                chars += count_replies(conversation)
                yield ids, mask
        if not found:
            why = f"a weight takes no conversation, or none answers within {MAX_TOKENS} tokens"
            raise DataError(
                f"dialogues={config.dialogues!r} leaves nothing in {split}: {why}; add others."
            )

        if split == "val" and chars < MIN_VAL_CHARS:
            raise DataError(
                f"dialogues={config.dialogues!r} holds out {chars} characters of replies for validation, it "
                f"must be at least {MIN_VAL_CHARS}; add conversations, or longer ones at the end."
            )

    key = f"chat-{split}-{READING}-{identify_mixture(config.dialogues, split, options)}"
    return build_cache(render(), tokenizer, registry.base_dir() / "token_cache", key)
