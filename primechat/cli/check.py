"""`primechat check`: what a model is, and whether it is complete and matches its tokenizer.

A good model needs far fewer bits for plain English than an untrained one, and than itself with the ids of its
tokenizer shuffled. The verdict compares these figures. Reference: infer.admission.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import Loaded, load_checkpoint
from primechat.cli.progress import ProgressView, clean_text
from primechat.config import GPTConfig
from primechat.config.runtime import DEVICES
from primechat.errors import CheckpointError, ConfigError, PrimechatError
from primechat.events import NoteEvent, OnEvent, count_noun, describe_bpb
from primechat.infer.admission import GOOD_SHARE, describe_memory, find_memory, read_text
from primechat.infer.engine import Engine
from primechat.infer.samples import write_continuation, write_reply
from primechat.model.gpt import GPT
from primechat.text.tokenizer import Tokenizer

ERAS = dict(
    classic="nanochat of October 2025", modern="nanochat of 2026", custom="switches of neither era"
)
PROMPT, QUESTION, SAMPLE_TOKENS = "In the summer we had a garden full of", "How are you today?", 20
PART = 2**22  # numbers checked at a time


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """The result of a check; figures are bits per byte of plain English, None if the check ended earlier.

    `verdict` is ok, suspicious or broken; `advice` is the next step; `str()` gives the whole report.
    """

    identifier: str
    verdict: str
    reasons: tuple[str, ...] = ()
    advice: str = ""
    card: tuple[tuple[str, str], ...] = ()
    bpb: float | None = None
    noise_bpb: float | None = None
    fresh_bpb: float | None = None
    shuffled_bpb: float | None = None
    sample: str = ""

    def __str__(self) -> str:
        lines = [self.identifier, *(f"  {name:11}{text}" for name, text in self.card)]
        if self.bpb is not None:
            lines += [
                f"  {'English':11}{self.bpb:.2f} bits per byte; {self.shuffled_bpb:.2f} with its tokenizer's "
                f"ids shuffled, {self.fresh_bpb:.2f} untrained, {self.noise_bpb:.2f} with all ids equally "
                "likely",
                f"  {'sample':11}{clean_text(self.sample, 200)}",
            ]
        return "\n".join([*lines, f"{self.verdict}: {'; '.join((*self.reasons, self.advice))}."])


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Tell what a model is, and whether it is whole and has its own tokenizer."""

    model: str = ""
    """Model to check, for example base/d20 or base/d20@21400; empty is the default model."""
    tokenizer: str = ""
    """Folder of the tokenizer to try with it; empty takes the one that was saved with it."""
    device: str = "cpu"
    """cpu, mps or cuda."""

    def __post_init__(self) -> None:
        if self.device not in DEVICES or self.device == "auto":
            raise ConfigError(f"device={self.device!r} must be cpu, mps or cuda; try cpu.")


def run_check(config: CheckConfig) -> int:
    """Check a model and print the report; return 0 if it is ok, else 1."""

    view, tokenizer = ProgressView(sys.stderr), config.tokenizer or None
    result = check_model(config.model, tokenizer=tokenizer, device=config.device, on_event=view)
    print(result)
    return int(result.verdict != "ok")


def check_model(
    identifier: str = "",
    *,
    tokenizer: Any = None,
    device: str = "cpu",
    on_event: OnEvent | None = None,
) -> CheckResult:
    """Return whether a model is complete and matches its tokenizer.

    Args:
        identifier: as for `open_model`.
        tokenizer: a Tokenizer or its folder, instead of the one beside the model or in the base directory.
        device: cpu, mps or cuda.
        on_event: called, before the weights are read, with a note on the memory that they need.

    Raises:
        ConfigError: the identifier is not valid.
        CheckpointError: there is no such model, or it is too large for this machine.
    """
    # Is it complete, are its numbers finite, and does a tokenizer of its size belong to it?
    name = registry.read_name(identifier)
    folder, name = registry.locate_model(name)
    result = CheckResult(identifier=str(name), verdict="broken")
    try:
        loaded = load_checkpoint(folder, name.step)
        full = registry.pin_step(name, loaded.step)
        result = replace(result, identifier=str(full), card=tuple(describe_design(loaded)))
        check_finite(loaded.model_state)
        found = registry.find_tokenizer(folder, tokenizer)
        registry.check_pair(loaded.config, loaded.meta, found, str(full))
    except PrimechatError as error:
        return blame(result, error)

    # Free the weights, and with them the pages of the file that were read, and report the memory needed.
    loaded.model_state.clear()
    n_params, free = loaded.config.n_params, find_memory(device)[0]
    dtype = "float32" if 4 * n_params <= free else "bfloat16"
    note = describe_memory(str(full), n_params * (4 if dtype == "float32" else 2), device)
    if on_event:
        on_event(NoteEvent(text=note))

    # Read English with an untrained model, to compare with, and with the model itself.
    fresh_bpb = read_text(draw_fresh(loaded.config), found).bpb
    model = registry.read_weights(folder, loaded, device, dtype)
    try:
        registry.add_adapters(model, name, found)
    except PrimechatError as error:
        return blame(result, error)
    measured = measure_english(replace(result, fresh_bpb=fresh_bpb), model, found)
    sample = write_sample(Engine(model, found), name.family in ("sft", "rl"))
    return judge_result(replace(measured, sample=sample), loaded)


def measure_english(result: CheckResult, model: GPT, tokenizer: Tokenizer) -> CheckResult:
    """Return the result with the bits per byte of plain English, also with the tokenizer's ids shuffled."""
    reading, order = read_text(model, tokenizer), list(range(tokenizer.vocab_size))
    random.Random(0).shuffle(order)
    shuffled = read_text(model, tokenizer, order=order)
    return replace(result, bpb=reading.bpb, noise_bpb=reading.noise_bpb, shuffled_bpb=shuffled.bpb)


def blame(result: CheckResult, error: PrimechatError) -> CheckResult:
    """Return the result for a broken model, with reason and advice from an error."""
    reason, _, advice = str(error).rstrip(".").rpartition("; ")
    return replace(result, reasons=(reason,) if reason else (), advice=advice)


def judge_result(result: CheckResult, loaded: Loaded) -> CheckResult:
    """Return the result with verdict, reasons and advice."""
    assert result.bpb is not None and result.noise_bpb is not None, "it has been measured"
    noise = min(result.noise_bpb, result.fresh_bpb or 0.0, result.shuffled_bpb or 0.0)
    reasons, advice = list(loaded.skipped), "give the folder of its own one by --tokenizer PATH"
    if result.bpb <= GOOD_SHARE * noise:
        if not reasons:
            advice = f"talk to it by `primechat chat {result.identifier}`"
            fit = "it is whole, its numbers are finite, and it reads English with this tokenizer"
            return replace(result, verdict="ok", reasons=(fit,), advice=advice)
        advice = "this is an older step, fetch or train the newer one again"
    elif loaded.meta.get("tokenizer_identity"):
        reasons.append(
            "it makes little more of English than noise, with the tokenizer that it records"
        )
        advice = "train it longer, if it is not meant for quite another text"
    else:
        reasons.append(
            "it makes little more of English than noise: it is untrained, or this is not its tokenizer (that "
            "of nanochat's d20 and that of its d32 have the same size and differ)"
        )
    return replace(result, verdict="suspicious", reasons=tuple(reasons), advice=advice)


def describe_design(loaded: Loaded) -> Iterator[tuple[str, str]]:
    """Yield the lines of a model's card as (name, text)."""
    c, bpb = loaded.config, loaded.meta.get("val_bpb")
    yield "era", f"{c.architecture} ({ERAS[c.architecture]}), by the tensors that it has"
    heads = f"{c.n_head} heads of {c.head_dim}"
    if c.n_kv_head != c.n_head:
        heads += f", {c.n_kv_head} of keys and values"
    yield "shape", f"{c.n_layer} layer{'s' * (c.n_layer > 1)}, width {c.n_embd:,}, {heads}"
    yield "vocabulary", f"{c.vocab_size:,} tokens; trained on {c.sequence_len:,} at a time"
    cap = f"{c.logit_softcap:g}" if c.logit_softcap else "off"
    yield "numerics", f"RoPE base {c.rope_base:,.0f}, softcap {cap}"
    yield "parameters", f"{c.n_params:,}, {count_noun(loaded.step, 'step')} of training"
    if isinstance(bpb, float):
        measured = describe_bpb(bpb, int(loaded.meta.get("val_tokens") or 0))
        yield (
            "val_bpb",
            f"{measured}, as stored; comparable only with models measured on the same text",
        )


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Raise an error if weights contain NaN or infinity, reading the mapped file part by part.

    Raises:
        CheckpointError: a tensor is not finite; the message names the first one.
    """
    for key, tensor in state.items():
        for part in tensor.flatten().split(PART):
            if not bool(part.isfinite().all()):
                raise CheckpointError(
                    f"{key} has numbers that are not finite; fetch or train it again."
                )


def draw_fresh(config: GPTConfig) -> GPT:
    """Return an untrained model with one block; before training, more blocks would add nothing."""
    with torch.device("meta"):
        model = GPT(replace(config, n_layer=1))
    model.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(0))
    return model.eval()


def write_sample(engine: Engine, is_chat: bool) -> str:
    """Return a prompt and the model's answer or continuation, of at most 20 tokens."""
    prompt, write = (QUESTION, write_reply) if is_chat else (PROMPT, write_continuation)
    return f"{prompt} → {write(engine, prompt, max_new_tokens=SAMPLE_TOKENS, temperature=0.0)}"
