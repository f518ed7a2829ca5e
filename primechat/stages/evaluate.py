"""Evaluate a model: bits per byte on the validation split of a text.

Windows may overlap, but every target is scored once. Reference: metrics.bits.
"""

from __future__ import annotations

import threading
import time

import torch

from primechat.checkpoint import registry
from primechat.config import EvaluateConfig
from primechat.errors import ConfigError
from primechat.events import EvaluateResult, OnEvent, OverlapResult, PhaseEvent, ProgressEvent
from primechat.metrics.bits import measure_bits
from primechat.metrics.contamination import measure_overlap
from primechat.stages.pretrain import cache_text
from primechat.text.batches import validation_windows
from primechat.text.corpora import read_documents
from primechat.text.dialogues import DialogueOptions, stream_dialogues
from primechat.train.autotune import count_cores, list_devices


def evaluate(
    config: EvaluateConfig, *, on_event: OnEvent | None = None, stop: threading.Event | None = None
) -> EvaluateResult:
    """Return a model's bits per byte on a text; if stopped early, of the part scored so far.

    Raises:
        ConfigError: the window is longer than the model's context, or the stride longer than the window.
        PrimechatError: the model or the text cannot be used.
    """
    # Model.
    t_start, emit = time.perf_counter(), on_event or (lambda event: None)
    device = list_devices(config.runtime.device)[0]
    dtype = config.runtime.dtype
    model, tokenizer, _ = registry.open_model(
        config.model, device=device, dtype=dtype, on_event=on_event
    )

    # Windows of the text.
    window = config.window or model.sequence_len
    stride = config.stride or window
    if window > model.max_context or stride > window:
        raise ConfigError(
            f"window={window} and stride={stride} must obey stride <= window <= {model.max_context}; try "
            f"window={model.sequence_len}."
        )
    separator = config.corpus_separator
    cache = cache_text(config.corpus, "val", tokenizer, 1, on_event, separator=separator)
    batches = validation_windows(
        cache, window, stride, rows=config.batch_rows, max_tokens=config.max_tokens
    )
    total = config.max_tokens or cache.tokens
    emit(PhaseEvent(name="validation: text it did not learn", total=total, unit="tokens"))

    # Overlap with a training text, then the score.
    overlap = find_overlap(config, on_event) if config.contamination else None
    threads = torch.get_num_threads()
    torch.set_num_threads(config.runtime.threads or count_cores())
    try:
        bits = measure_bits(
            lambda x, y: model.loss(x, y, "none"),
            batches,
            tokenizer.byte_lengths(),
            device=device,
            on_batch=lambda n: emit(ProgressEvent(done=n)),
            stop=stop,
        )
    finally:
        torch.set_num_threads(threads)
    return EvaluateResult(
        identifier=config.model or str(registry.choose_model()),
        corpus=config.corpus,
        bpb=bits.bpb,
        loss_nats=bits.loss_nats,
        scored_tokens=bits.tokens,
        scored_bytes=bits.n_bytes,
        window=window,
        stride=stride,
        elapsed_s=time.perf_counter() - t_start,
        overlap=overlap,
    )


def find_overlap(config: EvaluateConfig, on_event: OnEvent | None) -> OverlapResult:
    """Return the overlap of the evaluation text with the training split of a dialogue mixture."""
    options = DialogueOptions(language="", base_dir=registry.base_dir())
    training = stream_dialogues(config.contamination, "train", options, on_event=on_event)
    said = (
        "\n".join(str(m["content"]) for m in conversation["messages"]) for conversation in training
    )
    evaluation = read_documents(
        config.corpus, "val", base_dir=registry.base_dir(), separator=config.corpus_separator
    )
    return measure_overlap(evaluation, said)
