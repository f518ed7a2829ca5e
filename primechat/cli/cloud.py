"""Commands for runs on rented machines: `primechat plan`, `export`, `preflight` and `pull`.

Flags become a run, a machine and a folder here. Reference: primechat.cloud.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import tyro

from primechat.checkpoint.registry import base_dir, run_dir
from primechat.checkpoint.run_dir import read_metrics
from primechat.cli.main import parse_flags, read_config_file, take_option, take_shape
from primechat.cloud.export import (
    POD_BASE,
    STAGE_OF,
    export_lab,
    find_lab,
    full_stage,
    name_family,
    name_job,
    shrink_config,
)
from primechat.cloud.plan import Plan, describe_plan, find_machine, full_config, make_plan
from primechat.config import AutochatConfig, PretrainConfig, encode_config
from primechat.config.names import FOLDERS
from primechat.config.recipes import RECIPE_OF_ARCH
from primechat.config.runtime import check_number
from primechat.errors import ConfigError, PrimechatError
from primechat.files.paths import make_folder, resolve_path, write_file
from primechat.labkit import copies


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
    """The run; --recipe october2025|nanochat2026 names it, --depth its size."""

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


@dataclass(frozen=True, kw_only=True)
class ExportFlags(PlanFlags):
    """Write a lab as a folder that runs on rented GPUs: script, settings, launcher, the library."""

    lab: tyro.conf.Positional[str] = "05"
    """Number of the lab, 05 to 09."""
    output: str = ""
    """Folder to write; empty is runs/ and the run's name."""
    force: bool = False
    """Replace what is in that folder."""
    rehearse: bool = False
    """Run what was written for 20 steps of a tiny model with 2 processes on this machine."""


@dataclass(frozen=True, kw_only=True)
class PullFlags:
    """Bring a run's metrics and weights home over ssh."""

    source: tyro.conf.Positional[str] = ""
    """USER@HOST:RUN, the run as base/d20, sft/d20 or the path of its folder there."""
    optim: bool = False
    """Bring the optimizer's states too, to train on here."""
    port: int = 0
    """Port of ssh; RunPod shows it. 0 takes what ~/.ssh/config says of the host, else 22."""
    base_dir: str = POD_BASE
    """Base directory over there."""


def run_cloud(verb: str, argv: list[str]) -> int:
    """Run one of the cloud verbs and return its exit code."""
    if verb == "pull":
        return run_pull(parse_flags(verb, PullFlags, argv, PullFlags()))
    if verb == "preflight":
        from primechat.cli.preflight import PreflightFlags, run_preflight

        flags = PreflightFlags(run=full_run(argv))
        return run_preflight(parse_flags(verb, PreflightFlags, argv, flags))
    if verb == "plan":
        return run_plan(parse_flags(verb, PlanFlags, argv, PlanFlags(run=full_run(argv))))
    output, stage = take_option(argv, "-o") or "", cast(Any, None)
    kind = STAGE_OF.get(argv[0].zfill(2)) if argv else None
    if kind and (file := take_option(argv, "--config")):
        stage = read_config_file(Path(file), kind)
    start = ExportFlags(run=full_run(argv), output=output)
    return run_export(parse_flags(verb, ExportFlags, argv, start), stage)


def full_run(argv: list[str]) -> PretrainConfig:
    """Return the run that --recipe (or --arch), --depth and --config name, and remove them from the words."""
    file, (depth, arch, recipe) = take_option(argv, "--config"), take_shape(argv)
    if recipe and (file or arch):
        raise ConfigError(
            f"--recipe {recipe} sets all of a run, {'--config' if file else '--arch'} too; drop one."
        )
    if file:
        return read_config_file(Path(file), PretrainConfig)
    return full_config(depth, recipe or RECIPE_OF_ARCH[arch or "classic"])


def run_plan(flags: PlanFlags) -> int:
    """Print a plan; return 1 if the run does not fit on the machine, else 0."""
    plan = flags.plan()
    if flags.json:
        found = asdict(plan)
        found["config"] = encode_config(plan.config)
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(describe_plan(plan)))
    return 0 if plan.fits else 1


def run_export(flags: ExportFlags, stage: Any = None) -> int:
    """Write the folder, and rehearse it if asked; return 1 if the rehearsal fails, else 0.

    Args:
        flags: lab, run, machine and folder.
        stage: config of the stage for labs 06 to 09; None takes that of a full run.
    """
    lab, plan = copies.choose_source(find_lab(flags.lab)), flags.plan()
    if lab.parent.name == "mine":
        print(f"The cells are those of your own copy, {copies.name_path(lab)}.")
    config = stage or full_stage(lab, flags.run)
    folder = resolve_path(flags.output or f"runs/{name_job(config)}", "output", folder=True)
    for path in export_lab(lab, config, plan, folder, base_dir=base_dir(), force=flags.force):
        print(path)
    if not plan.fits and config is flags.run:
        print(f"It will not fit on {plan.machine.name} as planned; `primechat plan` tells why.")
    if flags.rehearse:
        return rehearse(folder, kind=type(config))
    print(f"How to start it stands in {folder / 'README.md'}; --rehearse tries it here first.")
    return 0


def rehearse(
    folder: Path, ranks: int = 2, say: Any = print, kind: type[Any] = PretrainConfig
) -> int:
    """Run an exported folder with its own launcher on the local CPU: 20 steps of a tiny model, then a resume.

    For a stage that starts from a model, a tiny one is trained first.

    Args:
        folder: the exported folder.
        ranks: number of processes.
        say: called with each message.
        kind: class of the folder's config.

    Returns:
        0 if everything worked, else 1.
    """
    # A small version of the config.
    config = shrink_config(read_config_file(folder / "config.json", kind))
    write_file(folder / "rehearsal.json", json.dumps(encode_config(config), indent=2))
    say(
        f"Rehearsal: 20 steps of a tiny model with {ranks} processes, by {folder / 'launch.sh'} ..."
    )
    t_start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="primechat-rehearsal-") as place:
        # The environment of one fresh process group, with a base directory of its own.
        keep = {
            k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        env = {
            **keep,
            "NANOCHAT_BASE_DIR": place,
            "CONFIG": "rehearsal.json",
            "RANKS": str(1 if kind is AutochatConfig else ranks),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }

        # The second command finds the run, resumes it, and is done at once.
        launch = ["bash", "launch.sh", "run", "--tag", config.tag]
        commands = [[*launch, "--max_hours", "1"], launch]
        if kind is not PretrainConfig:
            small = replace(shrink_config(full_config(2)), tag="small")
            (Path(place) / "small.json").write_text(json.dumps(encode_config(small)))
            words = ["-m", "primechat", "pretrain", "--config", f"{place}/small.json"]
            commands.insert(0, [sys.executable, *words])
            env["PYTHONPATH"] = str(folder.resolve() / "src")
        for command in commands:
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
            if done.returncode:
                say(f"The rehearsal failed (exit code {done.returncode}):\n{done.stderr[-3000:]}")
                return 1

        # The losses that the run recorded.
        family = name_family(config)
        parent = Path(place) / FOLDERS[family]
        run = next(parent.glob("rehearsal*"), parent)  # for conversations, their first generation
        losses = [
            e["loss_nats"] for e in read_metrics(run / "metrics.jsonl") if e["kind"] == "step"
        ]
    if len(losses) != 20 or losses[-1] >= losses[0]:
        say(f"The rehearsal ran, but its losses are wrong: {losses}.")
        return 1
    spent_s = time.perf_counter() - t_start
    say(
        f"It went well in {spent_s:.0f} s: 20 steps, loss {losses[0]:.2f} to {losses[-1]:.2f}, resumed."
    )
    return 0


def plan_pull(flags: PullFlags) -> tuple[list[str], Path]:
    """Return the rsync command of a pull, and the folder where its files go.

    Raises:
        ConfigError: the source does not have the form USER@HOST:RUN.
    """
    # Where the run is on the other machine.
    host, colon, run = flags.source.partition(":")
    match = re.fullmatch(rf"({'|'.join(FOLDERS)})/([^/@]+)", run)
    path = f"{flags.base_dir}/{FOLDERS[match[1]]}/{match[2]}" if match else run.rstrip("/")
    parent = Path(path).parent.name
    family = (
        match[1] if match else next((f for f, name in FOLDERS.items() if name == parent), "base")
    )
    if not colon or not re.fullmatch(r"\w[\w.-]*@\w[\w.-]*", host) or not path:
        raise ConfigError(
            f"source={flags.source!r} must be USER@HOST:RUN; try root@203.0.113.7:base/d20 --port 22001."
        )

    # Where it goes here.
    talks = Path(path).name == "autochat"  # the folder of all conversations
    target = base_dir() / "autochat" if talks else run_dir(family, Path(path).name)
    skip = [] if flags.optim else ["--exclude=optim_*"]
    ssh = shlex.join(["ssh", *(["-p", str(flags.port)] if flags.port else [])])
    words = ["rsync", "-rt", "--partial", "--info=progress2", *skip, "-e", ssh]
    return [*words, f"{host}:{shlex.quote(path)}/", f"{target}/"], target


def run_pull(flags: PullFlags) -> int:
    """Copy the folder of a run to this machine, and print how to view it.

    Raises:
        PrimechatError: rsync is missing or fails.
    """
    command, target = plan_pull(flags)
    if not shutil.which("rsync"):
        raise PrimechatError(
            "rsync is not installed here, it must be on both machines; install it."
        )
    make_folder(target)
    done = subprocess.run(command)
    if done.returncode:
        raise PrimechatError(
            f"rsync gave {done.returncode}: {shlex.join(command)}; correct host or run."
        )
    print(f"Here: {target}. Look at it: primechat report {target}")
    return 0
