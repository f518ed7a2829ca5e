"""Estimates of what a pretraining run needs: parameters, FLOPs, memory, disk, hours and dollars.

Counts are exact. Memory is what this code allocates, tensor by tensor, in eager mode (less when compiled),
without fragmentation of the allocator. Time is FLOPs / (peak x MFU), where MFU is the share of the peak that
comparable runs reached. Reference: Kaplan et al. 2020, section 2.1 (6 FLOPs per matrix parameter and token);
Chowdhery et al. 2022, appendix B (MFU).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from primechat.config import GPTConfig, PretrainConfig
from primechat.config.model import count_parts
from primechat.config.recipes import RECIPES, make_recipe
from primechat.errors import ConfigError
from primechat.events import count_noun
from primechat.files.paths import parse_json
from primechat.text.packing import KEPT_SHARE
from primechat.text.shards import HUB_CORPORA

# Of nanochat's tokenizer of 65,536 tokens on FineWeb-Edu; smaller vocabularies have fewer.
CHARS_A_TOKEN = 4.8
SHARD_CHARS, SHARD_BYTES = 250e6, 100e6
POD_DISK_BYTES = 80e9
USABLE = 0.92  # share of a GPU's memory: the rest goes to CUDA itself and to fragmentation
LOGITS_BYTES = {"cpu": 8 * 2**20, "cuda": 512 * 2**20}  # one chunk of model/losses.py
BLOCK = 128  # queries per block of attention on a CPU
BENCH_FILE = "bench.json"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Hardware to train on; `mfu` is the share of `peak_flops` (bf16, dense, one GPU) that a run reaches."""

    name: str
    n_gpus: int
    memory_bytes: float
    peak_flops: float
    mfu: float
    mfu_source: str
    dollars_per_hour: float
    device: str = "cuda"

    @property
    def flops_per_s(self) -> float:
        """FLOPs per second of all GPUs in a run."""
        return self.n_gpus * self.peak_flops * self.mfu


GPUS = {  # one GPU: memory, peak, MFU, its source, $/h (RunPod's list, late 2025)
    "H200": (141e9, 989e12, 0.465, "a d20 on 8 of them took 2.96 h", 3.59),
    "H100": (80e9, 989e12, 0.50, "nanochat's leaderboard, d24 on 8 of them", 2.69),
    "4090": (24e9, 165e12, 0.40, "a guess, none was measured", 0.69),
}


def find_machine(name: str, base_dir: Path | None = None) -> Machine:
    """Return a machine by its name: a count and a GPU, such as `8xH200` or `4090`, or `here`.

    `here` is this machine as measured by `primechat bench train`, whose result is kept in `base_dir`.

    Raises:
        ConfigError: no such machine exists, or this one was not measured.
    """
    if name == "here":
        return read_bench(base_dir)
    match = re.fullmatch(r"(?:(\d{1,3})x)?(\w+)", name)
    if not match or match[2].upper() not in GPUS or int(match[1] or 1) == 0:
        raise ConfigError(
            f"gpus={name!r} must be a count and one of {', '.join(GPUS)}, or here; try 8xH200."
        )
    count, kind = int(match[1] or 1), match[2].upper()
    memory, peak, mfu, source, price = GPUS[kind]
    return Machine(
        name=f"{count}x{kind}",
        n_gpus=count,
        memory_bytes=memory,
        peak_flops=peak,
        mfu=mfu,
        mfu_source=source,
        dollars_per_hour=round(count * price, 2),
    )


def read_bench(base_dir: Path | None) -> Machine:
    """Return this machine, with the speed that `primechat bench train` measured on the depth-4 model."""
    path = (base_dir or Path()) / BENCH_FILE
    try:
        found = parse_json(path.read_bytes())
        speed, memory = float(found["flops_per_s"]), float(found["memory_bytes"])
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        raise ConfigError(f"gpus='here' needs {path}; run `primechat bench train` once.") from None
    if not (0 < speed < math.inf and 0 < memory < math.inf):
        raise ConfigError(
            f"{path} says {speed:g} FLOP/s and {memory:g} bytes of memory, both must be above 0; run "
            "`primechat bench train` again."
        )
    return Machine(
        name="here",
        n_gpus=1,
        memory_bytes=memory,
        peak_flops=speed,
        mfu=1.0,
        device="cpu",
        mfu_source="as `primechat bench train` measured it",
        dollars_per_hour=0.0,
    )


def count_flops(model: GPTConfig) -> int:
    """Return the FLOPs per training token, forward and backward.

    Source: 6 x matrix parameters (look-ups are free) + 12 x width x visible tokens per layer. Known error:
        it ignores norms, softmax and the optimizer, below 2 % from d12 on, and counts a causal row in full.

    >>> count_flops(GPTConfig.classic(20))
    3491758080
    """
    counts = count_parts(model)
    matrices = sum(counts.values()) - counts["token embedding"] - counts["value embeddings"]
    seen = sum(
        min(model.window(i) or model.sequence_len, model.sequence_len) for i in range(model.n_layer)
    )
    return 6 * matrices + 12 * model.n_embd * seen


def count_steps(config: PretrainConfig, flops_per_s: float = 0.0) -> int:
    """Return the optimizer steps of a run: as set, as the seconds allow, or by tokens per parameter."""
    if config.steps:
        return config.steps
    step_flops = config.batch_tokens * count_flops(config.model)
    if config.seconds and flops_per_s:
        return max(1, int(config.seconds * flops_per_s / step_flops))
    return config.default_steps


def count_shards(config: PretrainConfig, tokens: float | None = None) -> int:
    """Return the number of shards that a run reads in one pass; 0 for text that is not sharded."""
    if config.corpus not in HUB_CORPORA:
        return 0
    tokens = count_steps(config) * config.batch_tokens if tokens is None else tokens
    tokens /= KEPT_SHARE if config.rows == "best-fit" else 1.0
    return -(-int(tokens * CHARS_A_TOKEN) // int(SHARD_CHARS))


def estimate_memory(
    config: PretrainConfig,
    rows: int,
    *,
    n_gpus: int = 1,
    device: str = "cuda",
    dtype: str = "bfloat16",
) -> dict[str, float]:
    """Return the bytes of one GPU's memory at the peak of a step, by kind.

    Args:
        config: settings of the run.
        rows: rows of sequence_len tokens per micro-batch.
        n_gpus: ranks that share the optimizer's states.
        device: cuda or cpu.
        dtype: number format of the activations.
    """
    model = config.model
    C, L = model.n_embd, model.n_layer
    counts, size = count_parts(model), 4 if dtype == "float32" else 2
    blocks = counts["attention"] + counts["mlp"]
    tables = model.n_params - blocks
    tokens = rows * model.sequence_len
    activations = activation_bytes(config, rows, size, device)
    if size == 2:
        activations += 2 * blocks  # the matrices cast to 16 bit

    # Weights, gradients and optimizer states.
    table = 4 * model.padded_vocab * C
    backward = size * tokens * 10 * C
    muon_share = -(-L // n_gpus) / L  # each matrix belongs to one rank
    largest = 4 * 4 * C * C * L * muon_share
    parts = {
        "weights": 4.0 * model.n_params,
        "gradients": 4.0 * model.n_params,
        "optimizer": 8.0 * tables / n_gpus + 4.0 * blocks * muon_share,
        "activations": float(activations),
        "logits and update": 3.0 * LOGITS_BYTES[device] + table + backward,
    }

    # With a single pass per step, gradients are allocated as activations are freed.
    if n_gpus == 1 and tokens >= config.batch_tokens:
        parts["activations"] = max(0.0, parts["activations"] - parts["gradients"])

    # The peak may also be the optimizer's step.
    update = largest * (4 if n_gpus == 1 else 4 + n_gpus)
    parts["logits and update"] += max(
        0.0, update - parts["activations"] - parts["logits and update"]
    )
    return parts


def activation_bytes(config: PretrainConfig, rows: int, size: int, device: str) -> int:
    """Return the bytes that the forward pass of a micro-batch keeps for the backward pass.

    Args:
        size: bytes of a number.
    """
    model = config.model
    C, kv, L = model.n_embd, model.kv_dim, model.n_layer
    tokens = rows * model.sequence_len

    # A block keeps, per token: the inputs and outputs of its norms, q and k before and after theirs, v,
    # the output of attention, and the input and output of relu^2.
    wide = C if device == "cpu" else kv  # on a CPU, shared key heads are repeated
    a_block = 6 * C + kv + C + 2 * wide + 8 * C + (C if model.residual_scalars else 0)
    ends = 3 + 2 * model.smear + model.backout
    n_tables = sum(model.has_value_embedding(i) for i in range(L))
    norms = (3 * C + kv) * (4 - size)  # in 16 bit, a norm keeps its input in float32
    kept, weights = tokens * (size * a_block + norms), attention_bytes(model, rows, size, device)
    if config.runtime.checkpoint_blocks:
        return size * tokens * C * (L + ends) + kept + max(weights)
    return L * kept + size * tokens * (C * ends + kv * n_tables) + sum(weights)


def attention_bytes(model: GPTConfig, rows: int, size: int, device: str) -> list[int]:
    """Return the bytes of attention weights kept by each layer: above 0 only on a CPU, for short rows."""
    T, found = model.sequence_len, []
    for layer in range(model.n_layer):
        left, n = model.window(layer), 0
        for start in range(0, T if device == "cpu" and T <= 1024 else 0, BLOCK):
            stop = min(start + BLOCK, T)
            lo = 0 if left is None or left >= T - 1 else max(0, start - left)
            n += (stop - start) * (stop - lo)
        found.append(size * rows * model.n_head * n)
    return found


def choose_rows(config: PretrainConfig, machine: Machine) -> int:
    """Return the largest micro-batch that fits, a power of two that divides a rank's rows; 0 if none fits."""
    share = config.batch_tokens // config.model.sequence_len // machine.n_gpus
    for rows in (2**i for i in range(12, -1, -1)):
        if rows <= share and share % rows == 0:
            need = estimate_memory(config, rows, n_gpus=machine.n_gpus, device=machine.device)
            if sum(need.values()) <= USABLE * machine.memory_bytes:
                return rows
    return 0


def estimate_disk(config: PretrainConfig) -> dict[str, float]:
    """Return the largest number of bytes that a run takes on disk, by kind.

    While a checkpoint is written, the `keep_checkpoints` before it still exist.
    """
    model, evaluation = config.model, config.eval
    counts = count_parts(model)
    blocks = counts["attention"] + counts["mlp"]
    n = evaluation.keep_checkpoints + 1
    needed = count_shards(config)
    shards = min(needed, config.n_shards) if needed else 0
    if config.keep_shards:
        shards = min(shards, config.keep_shards)
    small = 2.0 * model.n_params
    steps = count_steps(config)
    snapshots = min(small * (steps.bit_length() + 2), evaluation.snapshot_budget_mb * 1e6)
    return {
        "shards of text": (shards + bool(needed)) * SHARD_BYTES,  # one more for validation
        "weights of checkpoints": n * 4.0 * model.n_params,
        "optimizer states of checkpoints": n * (8.0 * (model.n_params - blocks) + 4.0 * blocks),
        "snapshots": snapshots if evaluation.snapshots else 0.0,
    }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The requirements of a run; bytes, seconds and dollars are estimates, counts are exact."""

    config: PretrainConfig
    machine: Machine
    params: dict[str, int]
    flops_per_token: int
    tokens: int
    steps: int
    total_flops: float
    shards: int
    memory: dict[str, float]
    micro_batch_rows: int
    accumulate: int
    disk: dict[str, float]
    disk_limit_bytes: float
    train_s: float
    dollars: float

    @property
    def memory_bytes(self) -> float:
        """Peak bytes of one GPU's memory."""
        return sum(self.memory.values())

    @property
    def disk_bytes(self) -> float:
        """Largest number of bytes on disk."""
        return sum(self.disk.values())

    @property
    def fits(self) -> bool:
        """Whether memory and disk are large enough."""
        return self.micro_batch_rows > 0 and self.disk_bytes <= self.disk_limit_bytes


def make_plan(
    config: PretrainConfig, machine: Machine, *, disk_limit_bytes: float = POD_DISK_BYTES
) -> Plan:
    """Return the requirements of a run on a machine.

    Raises:
        ConfigError: the batch has fewer rows than the machine has GPUs.
    """
    rows_all = config.batch_tokens // config.model.sequence_len
    if rows_all < machine.n_gpus:
        raise ConfigError(
            f"batch_tokens={config.batch_tokens} is {rows_all} rows, {machine.name} needs at least "
            f"{machine.n_gpus}; try {machine.n_gpus * config.model.sequence_len}."
        )
    rows = config.runtime.micro_batch_rows or choose_rows(config, machine)
    steps, flops = count_steps(config, machine.flops_per_s), count_flops(config.model)
    tokens = steps * config.batch_tokens
    train_s = tokens * flops / machine.flops_per_s
    share = -(-rows_all // machine.n_gpus)
    return Plan(
        config=config,
        machine=machine,
        params=count_parts(config.model),
        flops_per_token=flops,
        tokens=tokens,
        steps=steps,
        total_flops=float(tokens) * flops,
        shards=count_shards(config, tokens),
        memory=estimate_memory(config, max(1, rows), n_gpus=machine.n_gpus, device=machine.device),
        micro_batch_rows=rows,
        accumulate=-(-share // max(1, rows)),
        disk=estimate_disk(config),
        disk_limit_bytes=disk_limit_bytes,
        train_s=train_s,
        dollars=train_s / 3600 * machine.dollars_per_hour,
    )


def full_config(depth: int | None = None, recipe: str = "october2025") -> PretrainConfig:
    """Return the config of a recipe at a depth (default: the recipe's own), with the shards that it reads."""
    config = make_recipe(recipe, depth)
    if config.corpus not in HUB_CORPORA:
        return config
    return replace(
        config, n_shards=max(1, min(count_shards(config), HUB_CORPORA[config.corpus][2]))
    )


def find_recipe(config: PretrainConfig) -> str:
    """Return the name of the recipe that equals a config in every setting, or an empty string."""
    depth = config.model.n_layer
    return next((name for name in RECIPES if config == full_config(depth, name)), "")


def describe_horizon(config: PretrainConfig, tokens: int) -> str:
    """Return a description of the tokens per parameter of a run, and of the parameters counted."""
    counted = config.n_params_counted
    which = "" if config.params_counted == "all" else "of the blocks and the head "
    return f"{tokens / counted:.1f} for each of the {counted:,} parameters {which}".rstrip()


def describe_plan(plan: Plan) -> Iterator[str]:
    """Yield the plan as lines of plain text."""
    config, machine, model = plan.config, plan.machine, plan.config.model
    shape = f"{model.architecture}, {model.n_layer} blocks of width {model.n_embd:,}"
    yield f"{config.tag}: {shape}, vocabulary {model.vocab_size:,}, rows of {model.sequence_len:,} tokens"
    recipe = find_recipe(config)
    if recipe:
        yield f"  recipe {recipe}"
    yield ""
    yield from format_parts(f"Parameters {model.n_params:,}", plan.params, 1e6, "M")
    shards = f", {plan.shards:,} shards" if plan.shards else ""
    yield f"Text {plan.tokens:,} tokens{shards}"
    yield f"  {describe_horizon(config, plan.tokens)}"
    yield f"  {count_noun(plan.steps, 'step')} of {config.batch_tokens:,} tokens"
    yield f"Work {plan.total_flops:.4g} FLOPs, {plan.flops_per_token:,} a token"
    yield "  a FLOP is one addition or multiplication"
    size = f"{plan.memory_bytes / 1e9:,.1f} of {machine.memory_bytes / 1e9:,.0f} GB"
    yield from format_parts(f"Memory {size} of each GPU", plan.memory, 1e9, "GB")
    if plan.micro_batch_rows:
        again = f", {plan.accumulate} times a step" if plan.accumulate > 1 else ", once a step"
        yield f"  {count_noun(plan.micro_batch_rows, 'row')} at a time on each GPU{again}"
    else:
        yield "  DOES NOT FIT, not even one row; try --run.runtime.checkpoint_blocks, more GPUs or less depth"
    yield from format_parts(f"Disk {plan.disk_bytes / 1e9:,.1f} GB", plan.disk, 1e9, "GB")
    room = f"{plan.disk_limit_bytes / 1e9:,.0f} GB"
    if plan.disk_bytes <= plan.disk_limit_bytes:
        yield f"  fits on a disk of {room}"
    else:
        yield f"  DOES NOT FIT on a disk of {room}; --run.keep_shards 24 removes shards that have been read"
    yield ""
    price = f"${plan.dollars:,.0f} at ${machine.dollars_per_hour:,.2f} an hour"
    cost = f" and {price}" if machine.dollars_per_hour else ""
    yield f"{machine.name}: {format_hours(plan.train_s)}{cost}"
    speed = f"{machine.mfu:.1%} MFU" if machine.mfu != 1 else "the speed"
    yield f"  at {speed} ({machine.mfu_source}); tokenizer, validation and finetuning come on top"
    if machine.mfu != 1:
        yield "  MFU is the share of the FLOPs a second on the GPU's data sheet that a real run reaches"


def format_parts(
    title: str, parts: dict[str, float] | dict[str, int], unit: float, name: str
) -> Iterator[str]:
    """Yield a heading and one line per part."""
    yield title
    yield from (f"  {value / unit:10,.2f} {name}  {kind}" for kind, value in parts.items() if value)


def format_hours(seconds: float) -> str:
    """Return a duration in the unit that suits it.

    >>> format_hours(90), format_hours(600), format_hours(10649)
    ('90 s', '10 min', '2.96 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.2f} h"
