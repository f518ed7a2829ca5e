"""Check that a resumed run reads the same text as before.

The text may have moved. A different or edited text must be allowed by the config, and is then read from its
beginning, as a position in one text means nothing in another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import find_steps, read_meta
from primechat.checkpoint.run_dir import read_frozen
from primechat.config import DistillConfig, PretrainConfig
from primechat.errors import ConfigError, DataError
from primechat.events import NoteEvent, OnEvent
from primechat.text.sametext import content_identity, same_tokens
from primechat.text.tokenizer import Tokenizer
from primechat.text.tokens import TokenCache, find_cache


def describe_text(corpus: str, stamp: str) -> dict[str, str]:
    """Return the metadata that a checkpoint records about its text; `stamp` is its `corpus_identity`."""
    content = content_identity(corpus, stamp, registry.base_dir() / "token_cache")
    return {"corpus": stamp, "corpus_content": content}


def check_resumed_text(
    config: PretrainConfig | DistillConfig,
    tokenizer: Tokenizer,
    identify: Callable[[], str],
    open_train: Callable[[], TokenCache],
    on_event: OnEvent | None,
) -> bool:
    """Return whether a resumed run continues with a different text, which the config must allow.

    Args:
        config: settings of the resumed run.
        tokenizer: its tokenizer.
        identify: returns the `corpus_identity` of the text.
        open_train: returns the token cache of the training split.
        on_event: receives notes about a text that moved or changed.

    Raises:
        ConfigError: the text is different and the config does not allow that.
        DataError: the text does not exist.
    """
    folder = registry.run_dir("base", config.tag)
    steps = find_steps(folder) if config.resume else []
    if not steps:
        return False

    # The text that the run has read, and the one that the config names.
    meta, frozen = read_meta(folder, steps[-1]), read_frozen(folder, type(config))
    identifier, moved = f"base/{config.tag}", config.corpus != frozen.corpus
    try:
        stamp = identify()
    except DataError as error:
        advice = f"If the text of {identifier} has moved, name its new place: --corpus PATH."
        raise DataError(f"{error} {advice}") from None

    # The same text, though perhaps in another place.
    emit = on_event or (lambda event: None)
    if is_known_text(meta, describe_text(config.corpus, stamp), tokenizer, open_train):
        if moved:
            said = f"The text of {identifier} is read from {config.corpus} now; it is the same."
            emit(NoteEvent(text=said))
        return False

    # A different text.
    changed = f"the text in {config.corpus!r} has changed since step {steps[-1]} of {identifier}"
    if moved:
        before = f"the text that {identifier} has read so far, {frozen.corpus!r}"
        changed = f"corpus={config.corpus!r} is not {before}"
    if not config.allow_changed_corpus:
        raise ConfigError(
            f"{changed}; restore it, name the place of the same text (--corpus PATH), or go on with this "
            "one: --allow_changed_corpus."
        )
    emit(NoteEvent(text=f"{changed[0].upper()}{changed[1:]}: it is read from its beginning."))
    return True


def is_known_text(
    meta: dict[str, Any],
    text: dict[str, str],
    tokenizer: Tokenizer,
    open_train: Callable[[], TokenCache],
) -> bool:
    """Return whether a text is the one recorded in a checkpoint's metadata.

    Earlier versions recorded the paths, sizes and times of its files. If these differ, the tokens that the
    run has read are compared, provided they are still in the cache.
    """
    if "corpus_content" in meta:
        return bool(meta["corpus_content"] == text["corpus_content"])
    if meta.get("corpus") == text["corpus"]:
        return True
    before = find_cache(
        registry.base_dir() / "token_cache", f"train-{meta.get('corpus')}", tokenizer
    )
    return before is not None and same_tokens(before, open_train())
