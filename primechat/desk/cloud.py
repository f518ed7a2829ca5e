"""What the command line says about a run elsewhere: `primechat plan`, `export`, `preflight`, `pull`.

Hides: how flags become a run and a machine. Reference: primechat.cloud.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

from primechat.cloud.plan import Plan, describe_plan, find_machine, full_config, make_plan  # fmt: skip
from primechat.config import PretrainConfig, encode_config
from primechat.config.runtime import check_number
from primechat.records import encode_record
from primechat.store import base_dir


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """Tell what a full pretraining run needs: parameters, memory, disk, hours, dollars."""

    gpus: str = "8xH200"
    """Machine: 8xH200, 8xH100, 4090 or another count of these, or here, as `primechat bench train` found."""
    disk_gb: float = 80.0
    """Size of its disk."""
    dollars_per_hour: float = 0.0
    """Price of the machine; 0 takes the list price."""
    mfu: float = 0.0
    """Share of the peak FLOPs that training reaches; 0 takes what is known of such machines."""
    json: bool = False
    """Print JSON instead of text."""
    run: PretrainConfig = field(default_factory=lambda: full_config(20))
    """The run; --depth and --arch set its shape."""

    def __post_init__(self) -> None:
        for name, high in (("disk_gb", 1e9), ("dollars_per_hour", 1e6), ("mfu", 1.0)):
            check_number(name, getattr(self, name), low=0, high=high)

    def plan(self) -> Plan:
        """Return the plan that these flags ask for."""
        machine = find_machine(self.gpus, base_dir())
        if self.dollars_per_hour:
            machine = replace(machine, dollars_per_hour=self.dollars_per_hour)
        if self.mfu:
            machine = replace(machine, mfu=self.mfu, mfu_source="as you set it")
        return make_plan(self.run, machine, disk_limit_bytes=self.disk_gb * 1e9)


def run_plan(flags: PlanFlags) -> int:
    """Print a plan.

    Returns:
        The exit code: 1 where the run does not fit.
    """
    plan = flags.plan()
    if flags.json:
        found = encode_record(plan)
        found["config"] = encode_config(plan.config)
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(describe_plan(plan)))
    return 0 if plan.fits else 1
