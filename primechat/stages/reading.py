"""Whether a run that is resumed reads the text that it has read so far.

The text may have moved; another one, or one that was edited, has to be allowed, and is then read from its
beginning, as a place in one text means nothing in another.
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
    """Return what a checkpoint records of the text that its run reads; `stamp` is its `corpus_identity`."""
    content = content_identity(corpus, stamp, registry.base_dir() / "token_cache")
    return {"corpus": stamp, "corpus_content": content}


def check_resumed_text(
    config: PretrainConfig | DistillConfig,
    tokenizer: Tokenizer,
    identify: Callable[[], str],
    open_train: Callable[[], TokenCache],
    on_event: OnEvent | None,
) -> bool:
    """Return whether a resumed run goes on with another text than it has read so far, as the config allows.

    Args:
        identify: gives the `corpus_identity` of the text.
        open_train: gives the token cache of the training split.

    Raises:
        ConfigError: it is another text, and the config does not allow that.
        DataError: there is no such text.
    """
    folder = registry.run_dir("base", config.tag)
    steps = find_steps(folder) if config.resume else []
    if not steps:
        return False
    meta, frozen = read_meta(folder, steps[-1]), read_frozen(folder, type(config))
    identifier, moved = f"base/{config.tag}", config.corpus != frozen.corpus
    try:
        stamp = identify()
    except DataError as error:
        advice = f"If the text of {identifier} has moved, name its new place: --corpus PATH."
        raise DataError(f"{error} {advice}") from None

    tell = on_event or (lambda event: None)
    if is_known_text(meta, describe_text(config.corpus, stamp), tokenizer, open_train):
        if moved:
            said = f"The text of {identifier} is read from {config.corpus} now; it is the same."
            tell(NoteEvent(text=said))
        return False

    changed = f"the text in {config.corpus!r} has changed since step {steps[-1]} of {identifier}"
    if moved:
        before = f"the text that {identifier} has read so far, {frozen.corpus!r}"
        changed = f"corpus={config.corpus!r} is not {before}"
    if not config.allow_changed_corpus:
        raise ConfigError(
            f"{changed}; restore it, name the place of the same text (--corpus PATH), or go on with this "
            "one: --allow_changed_corpus."
        )
    tell(NoteEvent(text=f"{changed[0].upper()}{changed[1:]}: it is read from its beginning."))
    return True


def is_known_text(
    meta: dict[str, Any],
    text: dict[str, str],
    tokenizer: Tokenizer,
    open_train: Callable[[], TokenCache],
) -> bool:
    """Return whether a text is the one that a checkpoint's metadata record.

    Earlier versions recorded paths, sizes and times of its files. Where these differ, the tokens that the
    run has read are compared, if they are still in the cache.
    """
    if "corpus_content" in meta:
        return bool(meta["corpus_content"] == text["corpus_content"])
    if meta.get("corpus") == text["corpus"]:
        return True
    before = find_cache(
        registry.base_dir() / "token_cache", f"train-{meta.get('corpus')}", tokenizer
    )
    return before is not None and same_tokens(before, open_train())
