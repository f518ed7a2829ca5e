"""Train a base model: predict the next token of plain text.

Hides: where its text comes from, a token cache for what lies on this machine or shards read on the fly.
Reference: nanochat's base training; Radford et al. 2019.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import find_steps, read_meta
from primechat.checkpoint.run_dir import recall_separator
from primechat.config import DistillConfig, PretrainConfig, TokenizerConfig
from primechat.errors import ConfigError
from primechat.events import OnEvent, TrainResult
from primechat.files.paths import resolve_path
from primechat.stages.job import Batches, Windows
from primechat.stages.reading import check_resumed_text, describe_text
from primechat.stages.tokenizer import train_tokenizer
from primechat.stages.trainer import Job, TrainingRun, pick_device, write_continuation
from primechat.text.batches import (
    BestFitBatches,
    PackedBatches,
    ShardBatches,
    TokenCache,
    build_cache,
    validation_windows,
)
from primechat.text.corpora import corpus_identity, is_local, read_documents
from primechat.text.shards import ShardFeed, open_feed
from primechat.text.tokenizer import Tokenizer
from primechat.train.parallel import join_ranks, wait_turn

EVAL_ROWS = 16
SHARD_EVAL_TOKENS = 20 * 524_288  # as nanochat: of a shard's 50 M tokens
SHARD_EVAL_DOCUMENTS = 20_000
CHAT_PROMPTS = ("A: Hi! How was your day?\nB:", "A: Do you like music?\nB:")
TEXT_PROMPTS = ("The most important thing about", "Once upon a time")


def pretrain(
    config: PretrainConfig, *, on_event: OnEvent | None = None, stop: threading.Event | None = None
) -> TrainResult:
    """Train a base model, or go on with one; the result's path is relative to the base directory.

    Raises:
        ConfigError: settings contradict each other, the tokenizer or the run that is there.
        PrimechatError: text, tokenizer or checkpoints cannot be used.
    """
    config = recall_separator(config, registry.run_dir("base", config.tag))
    model, T = config.model, config.model.sequence_len
    local, note = is_local(config.corpus), on_event
    ranks = join_ranks(pick_device(config.runtime.device))
    with wait_turn(ranks):
        tokenizer = choose_tokenizer(config, on_event, stop)
        fresh_text = check_resumed_text(
            config,
            tokenizer,
            lambda: identify_text(config),
            lambda: cache_corpus(config, "train", tokenizer, note),
            note,
        )
        val = cache_corpus(config, "val", tokenizer, note)
        train = cache_corpus(config, "train", tokenizer, note) if local else None
    feed = None if local else open_shards(config, ranks.local_rank == 0, note)

    layout = BestFitBatches if config.rows == "best-fit" else PackedBatches
    job = Job(
        family="base",
        model=model,
        start_state=None,
        tokenizer=tokenizer,
        open_batches=pack_rows(train, T, config.seed, layout)
        if train
        else read_shards(feed, tokenizer, config, on_event),
        open_windows=open_cache(val, T),
        val_tokens=val.tokens,
        most_eval_tokens=0 if local else SHARD_EVAL_TOKENS,
        default_steps=config.default_steps,
        prompts=CHAT_PROMPTS if config.corpus == "chitchat" else TEXT_PROMPTS,
        write_sample=write_continuation,
        meta=describe_text(config.corpus, identify_text(config)),
        fresh_text=fresh_text,
        init=config.init,
    )
    try:
        return TrainingRun(config, job, on_event, stop).work()
    finally:
        if feed is not None:
            feed.close()


def open_shards(config: PretrainConfig, fetches: bool, on_event: OnEvent | None) -> ShardFeed:
    """Return the shards of a corpus on the Hub; one process of each machine fetches them."""
    return open_feed(
        config.corpus,
        config.n_shards,
        registry.base_dir(),
        fetches=fetches,
        keep=config.keep_shards,
        on_event=on_event,
    )


def read_shards(
    feed: ShardFeed | None, tokenizer: Tokenizer, config: PretrainConfig, on_event: OnEvent | None
) -> Callable[[int, int, int, dict[str, Any] | None], Batches]:
    """Return what opens the batches of shards, as a job wants it."""
    assert feed is not None, "what is not local has shards"

    def open_batches(
        rows: int, rank: int, world_size: int, cursor: dict[str, Any] | None
    ) -> Batches:
        return ShardBatches(
            feed,
            tokenizer,
            sequence_len=config.model.sequence_len,
            rows=rows,
            rank=rank,
            world_size=world_size,
            cursor=cursor,
            skip_bad=config.skip_bad_shards,
            on_event=on_event if rank == 0 else None,
            best_fit=config.rows == "best-fit",
        )

    return open_batches


def pack_rows(
    cache: TokenCache, sequence_len: int, seed: int, kind: type[PackedBatches] = PackedBatches
) -> Callable[[int, int, int, dict[str, Any] | None], PackedBatches]:
    """Return what opens the batches of a cache, as a job wants it."""

    def open_batches(
        rows: int, rank: int, world_size: int, cursor: dict[str, Any] | None
    ) -> PackedBatches:
        shape: Any = dict(sequence_len=sequence_len, rows=rows, rank=rank, world_size=world_size)
        return kind(cache, seed=seed, cursor=cursor, **shape)

    return open_batches


def open_cache(cache: TokenCache, sequence_len: int) -> Windows:
    """Return what opens the validation windows of a cache."""

    def open_windows(tokens: int, rank: int, world_size: int) -> Iterable[tuple[Tensor, Tensor]]:
        kind: Any = dict(rows=EVAL_ROWS, max_tokens=tokens, rank=rank, world_size=world_size)
        return validation_windows(cache, sequence_len, **kind)

    return open_windows


def choose_tokenizer(
    config: PretrainConfig, on_event: OnEvent | None = None, stop: threading.Event | None = None
) -> Tokenizer:
    """Return the named tokenizer, else the tag's own, else the base directory's if it fits, else the shipped
    one if it is what training would give; or train one.

    Raises:
        ConfigError: the vocabulary of one that is named, or the tag's own, is not the model's.
    """
    own = registry.run_dir("base", config.tag) / "tokenizer"
    wanted, shared = config.model.vocab_size, registry.base_dir() / "tokenizer"
    folder = resolve_path(config.tokenizer, "tokenizer") if config.tokenizer else own
    # that file is written last: a folder that a kill left without it holds no tokenizer yet
    if not config.tokenizer and not (own / "tokenizer.pkl").exists():
        if (shared / "tokenizer.pkl").exists() and Tokenizer.load(shared).vocab_size == wanted:
            folder = shared
        elif (shipped := find_shipped(config)) is not None:
            folder = shipped
        else:
            made = TokenizerConfig(
                tag=config.tag,
                corpus=config.corpus,
                corpus_separator=config.corpus_separator,
                vocab_size=wanted,
            )
            train_tokenizer(made, on_event=on_event, stop=stop)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size != wanted:
        raise ConfigError(
            f"model.vocab_size={wanted} must be that of the tokenizer in {folder}, {tokenizer.vocab_size}; "
            "set it so, or take another --tag, which gets a tokenizer of its own."
        )
    return tokenizer


def find_shipped(config: PretrainConfig) -> Path | None:
    """Return the shipped tokenizer if training gives the very same: from this text, with as many tokens."""
    folder = registry.choose_tag(registry.SHIPPED, "base")
    steps = find_steps(folder) if folder else []
    if not folder or not steps:
        return None
    found = folder / "tokenizer"
    same = read_meta(folder, steps[-1]).get("corpus") == identify_text(config)
    return found if same and Tokenizer.load(found).vocab_size == config.model.vocab_size else None


def identify_text(config: PretrainConfig | DistillConfig) -> str:
    """Return the identity of the text that a config trains on."""
    return corpus_identity(
        config.corpus, "train", n_shards=config.n_shards, separator=config.corpus_separator
    )


def cache_corpus(
    config: PretrainConfig | DistillConfig,
    split: str,
    tokenizer: Tokenizer,
    on_event: OnEvent | None,
) -> TokenCache:
    """Return the cache of a split of the text that a config trains on."""
    return cache_text(
        config.corpus,
        split,
        tokenizer,
        config.n_shards,
        on_event,
        separator=config.corpus_separator,
    )


def cache_text(
    corpus: str,
    split: str,
    tokenizer: Tokenizer,
    n_shards: int,
    on_event: OnEvent | None,
    *,
    separator: str = "auto",
) -> TokenCache:
    """Tokenize a split once and return its memory-mapped cache; of a shard for validation its beginning."""
    documents: Iterable[str] = read_documents(
        corpus,
        split,
        n_shards=n_shards,
        base_dir=registry.base_dir(),
        separator=separator,
        on_event=on_event,
    )
    key = f"{split}-{corpus_identity(corpus, split, n_shards=n_shards, separator=separator)}"
    if not is_local(corpus) and split == "val":
        documents, key = islice(documents, SHARD_EVAL_DOCUMENTS), f"{key}-{SHARD_EVAL_DOCUMENTS}"
    return build_cache(
        documents, tokenizer, registry.base_dir() / "token_cache", key, on_event=on_event
    )
