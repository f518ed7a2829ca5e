"""Pretrain a base model: next-token prediction on plain text.

Decides where the text comes from: a token cache for a local corpus, or shards of the Hub that are tokenized
as they are read. Reference: nanochat's base training; Radford et al. 2019.
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
from primechat.infer.samples import write_continuation
from primechat.stages.job import Batches, Windows
from primechat.stages.reading import check_resumed_text, describe_text
from primechat.stages.tokenizer import train_tokenizer
from primechat.stages.trainer import Job, TrainingRun, pick_device
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
SHARD_EVAL_TOKENS = 20 * 524_288  # of the 50 M tokens of a shard, as in nanochat
SHARD_EVAL_DOCUMENTS = 20_000
CHAT_PROMPTS = ("A: Hi! How was your day?\nB:", "A: Do you like music?\nB:")
TEXT_PROMPTS = ("The most important thing about", "Once upon a time")


def pretrain(
    config: PretrainConfig, *, on_event: OnEvent | None = None, stop: threading.Event | None = None
) -> TrainResult:
    """Train a base model, or resume a run, and return the result; its path is relative to the base directory.

    Raises:
        ConfigError: the settings contradict each other, the tokenizer or an existing run.
        PrimechatError: the text, the tokenizer or a checkpoint cannot be used.
    """
    config = recall_separator(config, registry.run_dir("base", config.tag))
    model, T = config.model, config.model.sequence_len
    local, note = is_local(config.corpus), on_event

    # The tokenizer and the tokenized text; the other ranks then find them in the cache.
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

    # What this stage brings to the common loop.
    layout = BestFitBatches if config.rows == "best-fit" else PackedBatches
    job = Job(
        family="base",
        model=model,
        start_state=None,
        tokenizer=tokenizer,
        open_batches=pack_rows(train, T, config.seed, layout)
        if train
        else read_shards(feed, tokenizer, config, on_event),
        open_windows=make_windows(val, T),
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
        return TrainingRun(config, job, on_event, stop).run()
    finally:
        if feed is not None:
            feed.close()


def open_shards(config: PretrainConfig, fetches: bool, on_event: OnEvent | None) -> ShardFeed:
    """Return the shards of a corpus on the Hub; one process per machine downloads them."""
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
    """Return a function that opens batches of shards, as `Job.open_batches`."""
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
    """Return a function that opens packed batches of a cache, as `Job.open_batches`."""

    def open_batches(
        rows: int, rank: int, world_size: int, cursor: dict[str, Any] | None
    ) -> PackedBatches:
        shape: Any = dict(sequence_len=sequence_len, rows=rows, rank=rank, world_size=world_size)
        return kind(cache, seed=seed, cursor=cursor, **shape)

    return open_batches


def make_windows(cache: TokenCache, sequence_len: int) -> Windows:
    """Return a function that opens the validation windows of a cache, as `Job.open_windows`."""

    def open_windows(tokens: int, rank: int, world_size: int) -> Iterable[tuple[Tensor, Tensor]]:
        kind: Any = dict(rows=EVAL_ROWS, max_tokens=tokens, rank=rank, world_size=world_size)
        return validation_windows(cache, sequence_len, **kind)

    return open_windows


def choose_tokenizer(
    config: PretrainConfig, on_event: OnEvent | None = None, stop: threading.Event | None = None
) -> Tokenizer:
    """Return the tokenizer of a run, training one if there is none that fits.

    The first of these is used: the tokenizer named in the config, the tag's own, the base directory's if its
    vocabulary fits, the shipped one if training would give the same.

    Raises:
        ConfigError: the vocabulary of the named tokenizer, or of the tag's own, does not fit the model.
    """
    own = registry.run_dir("base", config.tag) / "tokenizer"
    wanted, shared = config.model.vocab_size, registry.base_dir() / "tokenizer"
    folder = resolve_path(config.tokenizer, "tokenizer") if config.tokenizer else own
    # tokenizer.pkl is written last: a folder without it holds no complete tokenizer.
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
    """Return the folder of the shipped tokenizer if it has this text and vocabulary size, else None."""
    folder = registry.choose_tag(registry.SHIPPED, "base")
    steps = find_steps(folder) if folder else []
    if not folder or not steps:
        return None
    found = folder / "tokenizer"
    same = read_meta(folder, steps[-1]).get("corpus") == identify_text(config)
    return found if same and Tokenizer.load(found).vocab_size == config.model.vocab_size else None


def identify_text(config: PretrainConfig | DistillConfig) -> str:
    """Return the identity of the training text of a config."""
    return corpus_identity(
        config.corpus, "train", n_shards=config.n_shards, separator=config.corpus_separator
    )


def cache_corpus(
    config: PretrainConfig | DistillConfig,
    split: str,
    tokenizer: Tokenizer,
    on_event: OnEvent | None,
) -> TokenCache:
    """Return the token cache of a split of a config's text."""
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
    """Return the memory-mapped token cache of a split; of a validation shard, only of its beginning."""
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
