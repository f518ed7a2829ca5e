"""Train a byte-pair tokenizer on a corpus.

It is saved with the model of its tag, or in the base directory. Reference: Sennrich et al. 2016; nanochat's
split pattern and layout.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from primechat.checkpoint import registry
from primechat.checkpoint.run_dir import RunDirLock
from primechat.config import TokenizerConfig
from primechat.errors import DataError, StoppedError
from primechat.events import NoteEvent, OnEvent, PhaseEvent, ProgressEvent, TokenizerResult
from primechat.text.corpora import read_documents
from primechat.text.tokenizer import Tokenizer

SAMPLE_DOCUMENTS = 200  # of the validation split, to measure bytes per token


def train_tokenizer(
    config: TokenizerConfig, *, on_event: OnEvent | None = None, stop: threading.Event | None = None
) -> TokenizerResult:
    """Train a tokenizer, save it in nanochat's layout and return its result.

    The result holds the folder, relative to the base directory, the identity, and the bytes per token on
    validation text. A run that is stopped saves nothing.

    Raises:
        DataError: the text is too small for the vocabulary, or another tokenizer exists in the folder.
        CheckpointError: another process is saving a tokenizer there.
        StoppedError: training was stopped while the text was read.
    """
    t_start = time.perf_counter()
    emit = on_event or (lambda event: None)
    folder = (
        registry.run_dir("base", config.tag) if config.tag else registry.base_dir()
    ) / "tokenizer"
    read = partial(
        read_documents,
        config.corpus,
        base_dir=registry.base_dir(),
        separator=config.corpus_separator,
        on_event=on_event,
    )
    chars = 0

    def read_texts() -> Iterator[str]:
        nonlocal chars
        for n, text in enumerate(read("train")):
            if stop is not None and stop.is_set():
                raise StoppedError(
                    "The tokenizer was stopped before it was trained, nothing is saved; start it again."
                )
            piece = text[: min(config.max_doc_chars, config.max_chars - chars)]
            chars += len(piece)
            if n % 500 == 0:
                emit(ProgressEvent(done=chars))
            yield piece
            if chars >= config.max_chars:
                return

    emit(PhaseEvent(name="tokenizer: which pieces the words are made of", unit="characters"))
    tokenizer = Tokenizer.train(read_texts(), config.vocab_size)

    save_tokenizer(tokenizer, folder)

    # Measured on text that it was not trained on.
    held_out = list(islice(read("val"), SAMPLE_DOCUMENTS))
    bytes_per_token = measure_bytes_per_token(tokenizer, held_out)
    found = f"{tokenizer.vocab_size:,} tokens, {bytes_per_token:.2f} bytes a token on text it has not seen."
    emit(NoteEvent(text=found))
    return TokenizerResult(
        path=str(folder.relative_to(registry.base_dir())),
        identity=tokenizer.identity,
        vocab_size=tokenizer.vocab_size,
        trained_chars=chars,
        elapsed_s=time.perf_counter() - t_start,
        bytes_per_token=bytes_per_token,
    )


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Save a tokenizer in a folder that holds none, or the same one.

    Raises:
        DataError: another tokenizer exists in the folder.
    """
    try:
        # Of two runs started at once, the second finds the tokenizer of the first.
        with RunDirLock(folder):
            tokenizer.save(folder)
    except DataError as error:
        raise DataError(f"{error} Or give this one a --tag of its own.") from error


def measure_bytes_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    """Return the mean number of UTF-8 bytes per token of these texts."""
    n_tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
    n_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    return n_bytes / max(1, n_tokens)
