"""Pictures of a plan: what fills a GPU and a disk, and what a run costs.

Hides: which colours mean what. Reference: primechat.cloud.plan, whose numbers these are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from primechat.cloud.plan import (
    GPUS,
    USABLE,
    Machine,
    Plan,
    choose_rows,
    estimate_memory,
    find_machine,
    format_hours,
    full_config,
    make_plan,
)
from primechat.config import PretrainConfig
from primechat.views.theme import INK, SERIES, open_figure

MACHINES = ["8xH200", "8xH100", "1xH100", "4090"]
# What to rent instead, the cheapest per hour first.
LARGER = ("8x4090", "1xH100", "8xH100", "8xH200")


def describe_run(depth: int, machine: str, tokens_per_parameter: int, evict: bool) -> list[Any]:
    """Return the figures of a full run, and a picture of its memory and disk."""
    config = replace(full_config(depth), tokens_per_param=float(tokens_per_parameter))
    config = replace(config, keep_shards=24 if evict else 0, n_shards=1822)
    plan = make_plan(config, find_machine(machine))
    figures = {
        "parameters": f"{config.model.n_params / 1e6:,.0f} million",
        "tokens to read": f"{plan.tokens / 1e9:,.1f} billion",
        "work: sums and products": f"{plan.total_flops:.2g} FLOPs",
        "time": format_hours(plan.train_s) if plan.fits else "does not fit",
        "cost": f"${plan.dollars:,.0f}" if plan.fits else "does not fit",
    }
    return [figures, *judge_room(plan), draw_parts(plan.memory, plan.disk, plan.machine)]


def judge_room(plan: Plan) -> list[str]:
    """Return whether a run fits its machine and disk; where it does not, by how much, and what would."""
    said = []
    name = plan.machine.name
    if not plan.micro_batch_rows:
        need, room = sum(plan.memory.values()) / 1e9, USABLE * plan.machine.memory_bytes / 1e9
        said.append(
            f"It does not fit {name}: with one row at a time it needs {need:,.0f} GB of each GPU, which "
            f"has {room:,.0f} GB for it. {find_room(plan.config, plan.machine)}"
        )
    if plan.disk_bytes > plan.disk_limit_bytes:
        need, room = plan.disk_bytes / 1e9, plan.disk_limit_bytes / 1e9
        remedy = (
            "a larger disk" if plan.config.keep_shards else "removing shards that have been read"
        )
        said.append(
            f"It needs {need:,.0f} GB of disk, and there are {room:,.0f} GB: {remedy} helps."
        )
    return said or [f"It fits {name} and {plan.disk_limit_bytes / 1e9:,.0f} GB of disk."]


def find_room(config: PretrainConfig, machine: Machine) -> str:
    """Return, in a sentence, what would hold a run that does not fit: less depth, or other machines."""
    depths = range(config.model.n_layer - 1, 0, -1)
    depth = next((n for n in depths if choose_rows(full_config(n), machine)), 0)
    roomy = [name for name in LARGER if choose_rows(config, find_machine(name))]
    ways = [f"a depth of {depth} here"] if depth else []
    ways += [f"this depth on {find_machine(name).name}" for name in roomy]
    return (
        f"What fits: {', or '.join(ways)}." if ways else "No machine of this list is large enough."
    )


def draw_parts(memory: dict[str, float], disk: dict[str, float], machine: Machine) -> Any:
    """Return two bars cut into their parts, each with the line that it must not cross."""
    with open_figure(8.4, 3.0 if disk else 1.9) as (figure, axes):
        gpu = f"One GPU, {machine.memory_bytes / 1e9:.0f} GB"
        both = [("Disk, 80 GB", disk, 80e9), (gpu, memory, machine.memory_bytes)]
        bars = [bar for bar in both if bar[1]]
        widest = max(max(sum(parts.values()), limit) for _, parts, limit in bars)
        for row, (_, parts, limit) in enumerate(bars):
            draw_bar(axes, row, parts, limit, widest)
        axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
        axes.set(xlabel="gigabytes", ylim=(-0.55, len(bars) - 0.6))
        axes.grid(axis="y", visible=False)
    return figure


def draw_bar(axes: Any, row: int, parts: dict[str, float], limit: float, widest: float) -> None:
    """Draw one bar of parts, their names below it in their colours, and its limit."""
    left = 0.0
    for i, ((name, value), colour) in enumerate(zip(parts.items(), SERIES, strict=False)):
        axes.barh(row, value / 1e9, left=left / 1e9, height=0.4, color=colour, alpha=0.9)
        said = f"{name.replace(' of checkpoints', '')} {value / 1e9:,.1f}"
        axes.text(i * 0.21 * widest / 1e9, row - 0.38, said, color=colour, fontsize=8.5)
        left += value
    axes.plot([limit / 1e9] * 2, [row - 0.26, row + 0.26], color=INK, linewidth=2)


def draw_rows(depth: int, rows: int, recompute: bool) -> list[Any]:
    """Return what one GPU of 8 holds while it reads so many rows at a time."""
    config = full_config(depth)
    config = replace(config, runtime=replace(config.runtime, checkpoint_blocks=recompute))
    machine = find_machine("8xH100")
    need = estimate_memory(config, 2**rows, n_gpus=8)
    total = sum(need.values())
    verdict = "fits" if total <= USABLE * machine.memory_bytes else "does not fit"
    figures = {
        "rows at a time": f"{2**rows}",
        "memory": f"{total / 1e9:,.1f} GB of {machine.memory_bytes / 1e9:.0f}",
        "verdict": verdict,
    }
    return [figures, draw_parts(need, {}, machine)]


def price_ratio() -> float:
    """Return how many times the dollars of a d20 a d32 costs."""
    first, second = (make_plan(full_config(depth), find_machine("8xH200")) for depth in (20, 32))
    return second.dollars / first.dollars


def compare_machines(depth: int = 20) -> list[dict[str, str]]:
    """Return a table of machines for one run."""
    rows = []
    for name in (*MACHINES, *(f"8x{kind}" for kind in GPUS if kind == "4090")):
        plan = make_plan(full_config(depth), find_machine(name))
        rows.append(
            {
                "machine": plan.machine.name,
                "time": format_hours(plan.train_s) if plan.micro_batch_rows else "does not fit",
                "dollars": f"{plan.dollars:,.0f}" if plan.micro_batch_rows else "",
                "share of its peak": f"{plan.machine.mfu:.0%}",
                "which is": plan.machine.mfu_source,
            }
        )
    return rows
