"""Checks before a model is opened: does it fit in memory, and does it match its tokenizer?

Hides: the text used for the check. A model only knows the ids of its own tokenizer. With another tokenizer
of the same size, plain English is noise to it, which shows in the bits per byte.
Reference: primechat.metrics.bits.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from primechat.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from primechat.model.gpt import GPT
    from primechat.text.tokenizer import Tokenizer

KNOWN_TEXT = """\
The house stood at the end of a long road, and in the morning you could see the river from its windows. My \
sister and I lived there with our mother until I was ten years old. She worked in a small school in the \
town, and every day she came home with a story about the children. Some of them were very funny. Others \
made us think for a long time before we went to sleep.
In the summer we had a garden full of apples, beans and flowers. I like to remember how we sat outside \
after dinner and talked about what we wanted to do when we were older. I said that I would travel around \
the world, learn to play the guitar, and write a book about it. My sister just wanted to have a dog. "Do \
you know how much work that is?" my mother asked. "Yes," she said, "but I will take good care of him, I \
promise!"
People often say that water is the most important thing for life on the earth, because plants, animals and \
human beings are mostly made of it. It falls as rain, it runs down to the sea, and the sun takes it up \
into the sky again. Most of it is salt water, so we must be careful with the rest. How are you today? I am \
doing well, thank you. I have two cats and I really love pizza, but my favorite food is the soup that we \
ate then.
"""
QUICK_TOKENS = 128  # read when a model is opened: under 2 s for a d20 on two cores
# A model that needs more than this share of the bits per byte of noise has not been shown to
# understand the text.
GOOD_SHARE = 0.85
logger = logging.getLogger(__name__)
_warned: set[tuple[Path, str, str]] = set()


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The bits per byte of a model on the known text; `noise_bpb` is the value of a uniform distribution."""

    bpb: float
    noise_bpb: float

    @property
    def is_good(self) -> bool:
        """Whether the model is clearly better than noise."""
        return self.bpb <= GOOD_SHARE * self.noise_bpb


def read_text(
    model: GPT, tokenizer: Tokenizer, *, limit: int = 0, order: Sequence[int] | None = None
) -> Reading:
    """Return the bits per byte of a model on the known text.

    Args:
        model: takes ids from 0 to the tokenizer's vocab_size - 1.
        tokenizer: the tokenizer to try.
        limit: number of tokens to read; 0 reads the whole text.
        order: the id that replaces each id, to try shuffled ids.

    Source: bpb = sum of nats / (ln 2 * bytes), in windows of sequence_len.
    """
    ids = [tokenizer.bos_id, *tokenizer.encode(KNOWN_TEXT)][: limit + 1 if limit else None]
    n_bytes, nats, width = len(tokenizer.decode_bytes(ids[1:])), 0.0, model.sequence_len
    row = torch.tensor([order[i] for i in ids] if order else ids, device=model.device)[None]
    with torch.no_grad():
        for start in range(0, len(ids) - 1, width):
            window = row[:, start : start + width + 1]
            nats += float(model.loss(window[:, :-1], window[:, 1:], "sum"))
    noise = (len(ids) - 1) * math.log2(tokenizer.vocab_size) / n_bytes
    return Reading(bpb=nats / math.log(2) / n_bytes, noise_bpb=noise)


def warn_unrecorded(name: str, folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Log, once per process, how well a model that records no tokenizer matches this one."""
    key = (folder, name, tokenizer.identity)
    if key in _warned or os.environ.get("RANK", "0") != "0":
        return
    _warned.add(key)
    found = read_text(model, tokenizer, limit=QUICK_TOKENS)
    verdict = f"noise needs {found.noise_bpb:.2f}: it is untrained or this is not its tokenizer;"
    if found.is_good:
        verdict = "they go together; if its replies are gibberish,"
    logger.warning(
        "%s does not record its tokenizer; with this one plain English takes %.2f bits per byte, %s "
        "give its own by --tokenizer PATH.",
        name,
        found.bpb,
        verdict,
    )


def find_memory(device: str = "cpu") -> tuple[int, int]:
    """Return the free and the total memory of a device in bytes; the total twice if free is unknown.

    Raises:
        ConfigError: the device is not available.
    """
    kinds = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not kinds.get(device.partition(":")[0]):
        raise ConfigError(f"device={device!r} is not on this machine; try cpu.")
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # macOS
        return total, total
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return free[0] if free else total, total


def describe_memory(name: str, n_bytes: int, device: str = "cpu") -> str:
    """Return a sentence about the memory that a model's weights need and the memory that is free.

    Raises:
        CheckpointError: the weights need more than the total memory of the device.
    """
    free, total = find_memory(device)
    needs = f"{name} needs {format_bytes(n_bytes)} of memory for its weights"
    if n_bytes > total:
        remedy = "take a smaller model or, in Python, dtype='bfloat16'"
        raise CheckpointError(f"{needs}, {device} has {format_bytes(total)} in all; {remedy}.")
    there = (
        f"{format_bytes(free)} are free"
        if free < total
        else f"there are {format_bytes(total)} in all"
    )
    return (
        f"{needs}, {there}{': it will be slow, close other programs.' if n_bytes > free else '.'}"
    )


def format_bytes(n_bytes: int) -> str:
    """Return a number of bytes in MB or GB.

    >>> format_bytes(2_243_952_640), format_bytes(770_264)
    ('2.24 GB', '0.8 MB')
    """
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
