"""A lab as a folder that runs on a rented machine: script, frozen settings, launcher, the library itself.

Hides: which cells are the program. They are those whose code the lab shows; prose becomes comments, cells
with hidden code only display and stay behind. Reference: marimo's file format; SkyPilot's task YAML.
"""

from __future__ import annotations

import ast
import builtins
import json
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from primechat.cloud.plan import Plan, describe_plan, format_hours
from primechat.config import (
    AutochatConfig,
    DistillConfig,
    FinetuneConfig,
    LookConfig,
    LoRAConfig,
    PretrainConfig,
    RuntimeConfig,
    encode_config,
)
from primechat.errors import ConfigError
from primechat.names import ADAPTER_FOLDER, FAMILIES, parse_identifier

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "runpod/pytorch:1.0.2-cu1281-torch280-ubuntu2404"
POD_BASE = "/workspace/cache/nanochat"
SCRIPT_NAMES = {"settings", "stage", "summary"}  # what desk/pods/script.py offers of a lab's tools
STAGE_OF = {
    "06": FinetuneConfig,
    "07": LoRAConfig,
    "08": DistillConfig,
    "09": AutochatConfig,
}  # the others pretrain
TOP_FILES = ("pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Cell:
    """A cell of a lab: prose, program or display."""

    kind: str
    text: str
    line: int


def find_lab(number: str, folder: Path = ROOT / "labs") -> Path:
    """Return the file of a lab by its number.

    Raises:
        ConfigError: there is none.
    """
    found = sorted(folder.glob(f"{number.zfill(2)[:2]}_*.py")) if number.isdecimal() else []
    if not found:
        there = ", ".join(path.name[:2] for path in sorted(folder.glob("[0-9][0-9]_*.py")))
        raise ConfigError(f"lab={number!r} must be the number of a lab: {there}; try 05.")
    return found[0]


def read_cells(text: str) -> Iterator[Cell]:
    """Yield the cells of a marimo file in their order."""
    for node in ast.parse(text).body:
        if not isinstance(node, ast.FunctionDef) or not node.decorator_list:
            continue
        mark = node.decorator_list[0]
        if not ast.unparse(mark).startswith("app.cell"):
            continue
        hidden = isinstance(mark, ast.Call) and any(
            word.arg == "hide_code" and ast.unparse(word.value) == "True" for word in mark.keywords
        )
        body = [part for part in node.body if not isinstance(part, ast.Return)]
        prose = read_prose(body)
        if prose is not None:
            yield Cell("prose", prose, node.lineno)
        elif hidden or any(
            "exercise" == ast.unparse(c.func) for c in ast.walk(node) if isinstance(c, ast.Call)
        ):
            yield Cell("display", "", node.lineno)
        else:
            yield Cell("program", write_program(body, text), node.lineno)


def read_prose(body: list[ast.stmt]) -> str | None:
    """Return the Markdown of a cell that is nothing but `mo.md("...")`, else None."""
    if len(body) != 1 or not isinstance(body[0], ast.Expr) or not isinstance(body[0].value, ast.Call):
        return None
    call = body[0].value
    if ast.unparse(call.func) != "mo.md" or not call.args or not isinstance(call.args[0], ast.Constant):
        return None
    return textwrap.dedent(str(call.args[0].value)).strip()


def write_program(body: list[ast.stmt], text: str) -> str:
    """Return a cell's code without what only shows something: marimo, bare names, calls of `show`."""
    lines = text.splitlines()
    kept = []
    for part in body:
        if isinstance(part, ast.Import) and any(alias.name == "marimo" for alias in part.names):
            continue
        if isinstance(part, ast.Expr) and not isinstance(part.value, ast.Constant):
            called = ast.unparse(part.value.func) if isinstance(part.value, ast.Call) else ""
            if not called or called.partition(".")[0] in ("mo", "show"):
                continue
        if isinstance(part, ast.ImportFrom) and part.module == "primechat.lab":
            names = [alias.name for alias in part.names]
            strange = sorted(set(names) - SCRIPT_NAMES - {"show"})
            if strange:
                raise ConfigError(
                    f"a shown cell imports {', '.join(strange)} from primechat.lab, a script has "
                    f"{', '.join(sorted(SCRIPT_NAMES))}; import it in a cell with hidden code."
                )
            kept.append(
                f"from primechat.desk.pods.script import {', '.join(n for n in names if n in SCRIPT_NAMES)}"
            )
            continue
        kept.append(textwrap.dedent("\n".join(lines[part.lineno - 1 : part.end_lineno])))
    return "\n".join(kept)


def write_script(lab: Path, origin: str = "") -> str:
    """Return a lab as a plain script: the cells that are its program, its prose as comments.

    Raises:
        ConfigError: the program needs a name that only hidden cells define.
    """
    parts = [
        f'"""{lab.stem}: the program of labs/{lab.name}, written by `primechat export`.\n\n'
        f"{origin or 'Settings are flags.'} `python run.py --help` lists them.\n"
        '"""\n\nfrom __future__ import annotations'
    ]
    known = set(dir(builtins)) | {"__file__"}
    program = False
    for cell in read_cells(lab.read_text(encoding="utf-8")):
        if cell.kind == "prose":
            parts.append(
                "\n".join(
                    f"# {line}".rstrip() for part in cell.text.splitlines() for line in wrap_prose(part)
                )
            )
        elif cell.kind == "program" and cell.text:
            tree, program = ast.parse(cell.text), True
            names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
            made = {node.id for node in names if not isinstance(node.ctx, ast.Load)} | set(list_bound(tree))
            text, tree = drop_keywords(cell.text, tree, known | made)
            missing = sorted(list_loaded(tree) - known - made)
            if missing:
                raise ConfigError(
                    f"{lab.name} line {cell.line} needs {', '.join(missing)}, which only hidden cells "
                    "define; show the code of those."
                )
            known |= made
            parts.append(text)
    if not program:
        raise ConfigError(f"{lab.name} has no cell whose code is shown, so nothing to export; try 05.")
    return "\n\n".join(parts) + "\n"


def wrap_prose(line: str) -> list[str]:
    """Return a line of prose as lines that fit behind a comment sign."""
    return textwrap.wrap(line, 106, break_long_words=False, break_on_hyphens=False) or [""]


def drop_keywords(text: str, tree: ast.Module, known: set[str]) -> tuple[str, ast.Module]:
    """Return a cell without the keywords, each in a line of its own, that need unknown names: what a widget
    sets is frozen in config.json, or has its default.
    """
    lines = text.splitlines()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        for word in call.keywords:
            alone = lines[word.lineno - 1].strip().startswith(f"{word.arg}=")
            if alone and list_loaded(word.value) - known:
                lines[word.lineno - 1 : word.end_lineno] = [""] * (word.end_lineno - word.lineno + 1)  # type: ignore[operator]
    text = "\n".join(line for line in lines if line)
    return text, ast.parse(text)


def list_loaded(tree: ast.AST) -> set[str]:
    """Return the names that a piece of code reads."""
    return {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }


def list_bound(tree: ast.AST) -> Iterator[str]:
    """Yield the names that imports, functions, classes and arguments bind."""
    for node in ast.walk(tree):
        if isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0]
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg


LAUNCH = """\
#!/usr/bin/env bash
# On the machine with the GPUs:
#   bash launch.sh install     once; keeps the torch that is there
#   bash launch.sh preflight   a minute; refuses before money is spent
#   bash launch.sh start       in tmux, so that it outlives the connection
#   tmux attach -t primechat   look at it; Ctrl-B D leaves it alone, Ctrl-C saves and stops
# `start` again goes on where a stopped run was saved. Words after `start` or `run` are flags of run.py.
# Several machines: NODES=2 HEAD=10.0.0.1:29500 bash launch.sh run, on each of them.
set -euo pipefail
cd "$(dirname "$0")"
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-@BASE@}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1 PYTHONPATH="$PWD/src"
config="${CONFIG:-config.json}"
place=(--standalone)
if [ -n "${HEAD:-}" ]; then
    place=(--nnodes="${NODES:-2}" --rdzv_backend=c10d --rdzv_id=primechat --rdzv_endpoint="$HEAD")
fi
verb="${1:-start}"
shift || true
case "$verb" in
install)
    python -c 'import torch; print("torch==" + torch.__version__.partition("+")[0])' > constraints.txt
    pip install -c constraints.txt -e src
    ;;
preflight) @PREFLIGHT@ ;;
data) @DATA@ ;;
run)
    resume=()
    if [ -e "$NANOCHAT_BASE_DIR/@FAMILY@/${TAG:-@TAG@}/config.json" ]; then resume=(--resume); fi
    python -m torch.distributed.run "${place[@]}" --nproc_per_node="${RANKS:-@RANKS@}" \\
        run.py --config "$config" ${resume[@]+"${resume[@]}"} "$@"
    ;;
start)
    tmux new-session -d -s primechat "bash launch.sh run $* 2>&1 | tee -a run.log"
    echo "Started. Look at it: tmux attach -t primechat, or tail -f run.log"
    ;;
*) echo "launch.sh knows install, preflight, data, run and start, not $verb" >&2; exit 2 ;;
esac
"""
# verbs of the launcher: of a pretraining run, and of a stage that goes on from a model
PREFLIGHT = 'python -m primechat.cli preflight --gpus "${GPUS:-@GPUS@}" --config "$config" "$@"'
DATA = 'python -m primechat.cli download --shards "@CORPUS@:@SHARDS@"'
TRY = """\
python -m torch.distributed.run "${place[@]}" --nproc_per_node="${RANKS:-@RANKS@}" \\
        run.py --config "$config" --tag "preflight-$$" --steps 4 \\
        --look.last_eval_tokens 20480 "$@" && rm -rf "$NANOCHAT_BASE_DIR/@FAMILY@/preflight-$$\""""
TRY_TALK = """\
python run.py --config "$config" --tag "preflight-$$" --n_talks 4 --turns 3 --generations 0 "$@" \\
        && rm -rf "$NANOCHAT_BASE_DIR/autochat/preflight-$$"*"""
STAGE_PLAN = """\
    @CONFIG@

It goes on from `@MODELS@`, which must lie in $NANOCHAT_BASE_DIR over there: it does where that model was
trained on the machine; else bring it, with its tokenizer, as here:

    rsync -a --exclude='optim_*' ~/.cache/nanochat/@FOLDER@ root@POD:@BASE@/@FOLDER@/

`bash launch.sh preflight` tries it in a minute, and tells the tokens a second."""
READ_ME = """\
# @TAG@: from @LAB@ to @GPUS@

@PLAN@

`run.py` is the lab without its display cells, `config.json` its frozen settings, `src/` the library that
wrote it. Expected: @COST@.

## Over ssh

On a pod of the image `@IMAGE@`:

```sh
rsync -a ./ root@POD:/workspace/@TAG@/          # from here; add -e "ssh -p PORT" as the pod says
ssh root@POD                                  # then, on the pod:
export NANOCHAT_BASE_DIR=@BASE@
cd /workspace/@TAG@
bash launch.sh install                        # keeps the image's torch
bash launch.sh preflight
bash launch.sh start
tmux attach -t primechat
```

`bash launch.sh start --max_dollars @LIMIT@ --dollars_per_hour @PRICE@` saves and stops before more is
spent. When it is done, from here: `primechat pull root@POD:@MODEL@`, then stop the pod.

## With SkyPilot

`sky launch sky.yaml --secret HF_TOKEN` does the same and takes the machine down when it is idle.
"""


def write_sky(config: Any, plan: Plan) -> str:
    """Return a SkyPilot task for RunPod."""
    kind = plan.machine.name.partition("x")[2]
    accelerator = {"H200": "H200-SXM", "H100": "H100-SXM", "4090": "RTX4090"}[kind]
    disk = max(80, int(plan.disk_bytes / 1e9 * 1.2) + 10)
    return f"""\
# sky launch sky.yaml --secret HF_TOKEN: about {format_hours(plan.train_s)}, ${plan.dollars:,.0f}
name: primechat-{config.tag.lower().replace("_", "-").replace(".", "-")}
resources:
  infra: runpod
  accelerators: {accelerator}:{plan.machine.n_gpus}
  image_id: docker:{IMAGE}
  disk_size: {disk}
  autostop:
    idle_minutes: 10
    down: true  # RunPod cannot stop a pod, only take it down: pull the results first
workdir: .
envs:
  NANOCHAT_BASE_DIR: {POD_BASE}
secrets:
  HF_TOKEN: null
setup: |
  bash launch.sh install
run: |
  bash launch.sh preflight
  bash launch.sh run
"""


def full_stage(lab: Path, run: PretrainConfig) -> Any:
    """Return what a lab exports beside a full pretraining run: that run, or a stage that goes on from it."""
    kind, tag = STAGE_OF.get(lab.name[:2]), run.tag
    if kind is FinetuneConfig:
        return FinetuneConfig(
            tag=tag, base=f"base/{tag}", dialogues="smol-smoltalk, persona", batch_tokens=131_072
        )
    if kind is LoRAConfig:
        return LoRAConfig(tag=f"pirate-{tag}", base=f"sft/{tag}", batch_tokens=32_768)
    if kind is DistillConfig:  # 20 tokens for each of 100 million parameters
        size = dict(size="100m", n_shards=40, steps=3815, batch_tokens=524_288)
        return DistillConfig(tag=f"{tag}-100m", teacher=f"base/{tag}", corpus=run.corpus, **size)  # type: ignore[arg-type]
    if kind is AutochatConfig:  # three generations, each twice through what the one before has said
        size = dict(n_talks=64, max_new_tokens=96, batch_rows=64, generations=3, tune_steps=100)
        return AutochatConfig(tag=tag, model=f"sft/{tag}", resume=True, **size)  # type: ignore[arg-type]
    return run


def name_family(config: Any) -> str:
    """Return the family of the model that a config's stage makes."""
    if isinstance(config, (LoRAConfig, DistillConfig)):
        plain = isinstance(config, DistillConfig) and not config.dialogues
        return "base" if plain else "lora" if isinstance(config, LoRAConfig) else "sft"
    return "sft" if isinstance(config, (FinetuneConfig, AutochatConfig)) else "base"


def name_source(config: Any) -> str:
    """Return the model that a stage goes on from."""
    named = config.model if isinstance(config, AutochatConfig) else getattr(config, "teacher", "")
    return named or config.base or f"base/{config.tag}"


def describe_stage(config: Any) -> str:
    """Return in one line what a stage does."""
    if isinstance(config, AutochatConfig):
        learned = f", and learns from itself {config.generations} times" if config.generations else ""
        return f"AutochatConfig: {config.n_talks} conversations of {config.turns} turns{learned}"
    length = f"{config.steps:,} steps" if config.steps else "one pass"
    text = config.dialogues or getattr(config, "corpus", "")
    return f"{type(config).__name__}: {length} of {config.batch_tokens:,} tokens a step over {text}"


def export_lab(lab: Path, config: Any, plan: Plan, folder: Path) -> list[Path]:
    """Write a lab's folder.

    Args:
        lab, config: the lab's file, the settings to freeze.
        plan: of the pretraining, for what it costs; of another stage only its machine counts.
        folder: where to; files of an earlier export are replaced.

    Returns:
        The files that were written, the library's not counted.
    """
    script = write_script(lab, "Its settings are frozen in config.json; flags override them.")
    folder.mkdir(parents=True, exist_ok=True)
    family = name_family(config)
    folders = {**FAMILIES, "lora": ADAPTER_FOLDER}
    first, talks = type(config) is PretrainConfig, isinstance(config, AutochatConfig)
    source = parse_identifier("base/d20" if first else name_source(config))
    cost = f"{format_hours(plan.train_s)} and ${plan.dollars:,.0f}"
    place = {"lora": f"{POD_BASE}/{ADAPTER_FOLDER}"}.get(family, f"{POD_BASE}/autochat" if talks else family)
    words = {
        "@PREFLIGHT@": PREFLIGHT if first else TRY_TALK if talks else TRY,
        "@DATA@": DATA if hasattr(config, "corpus") else 'echo "The run fetches its dialogues itself."',
        "@PLAN@": "\n".join(f"    {line}".rstrip() for line in describe_plan(plan)) if first else STAGE_PLAN,
        "@CONFIG@": "" if first else describe_stage(config),
        "@MODELS@": str(source), "@FOLDER@": f"{folders[source.family]}/{source.tag}",
        "@BASE@": POD_BASE, "@GPUS@": plan.machine.name, "@RANKS@": str(1 if talks else plan.machine.n_gpus),
        "@FAMILY@": folders[family], "@TAG@": config.tag, "@LAB@": lab.name, "@IMAGE@": IMAGE,
        "@COST@": cost if first else f"less than the {cost} of its model's pretraining; preflight tells",
        "@LIMIT@": f"{plan.dollars * (1.25 if first else 0.25):.0f}",
        "@PRICE@": f"{plan.machine.dollars_per_hour:.2f}",
        "@MODEL@": place if talks else f"{place}/{config.tag}",
        "@CORPUS@": str(getattr(config, "corpus", "fineweb-edu")),
        "@SHARDS@": str(min(8, getattr(config, "n_shards", 8))),
    }  # fmt: skip
    files = {
        "run.py": script, "config.json": json.dumps(encode_config(config), indent=2) + "\n",
        "launch.sh": fill_words(LAUNCH, words), "sky.yaml": write_sky(config, plan),
        "README.md": fill_words(READ_ME, words),
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "launch.sh").chmod(0o755)
    copy_library(folder / "src")
    return [folder / name for name in files]


def fill_words(text: str, words: dict[str, str]) -> str:
    """Return a text with its placeholders filled."""
    for mark, word in words.items():
        text = text.replace(mark, word)
    return text


def copy_library(target: Path) -> None:
    """Copy the library as it is, so that the run is of this very code."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(
        ROOT / "primechat", target / "primechat", ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
    )
    for name in TOP_FILES:
        shutil.copy(ROOT / name, target / name)


def shrink_config(config: Any) -> Any:
    """Return a rehearsal: the same switches, 20 steps of a tiny model on a CPU; a stage takes base/small."""
    changes: dict[str, Any] = dict(dialogues="faq", base="base/small", general="none")
    if isinstance(config, PretrainConfig):
        model = replace(
            config.model, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, vocab_size=400, sequence_len=64
        )
        changes = dict(model=model, corpus="chitchat", tokenizer="")
    elif isinstance(config, AutochatConfig):
        runtime = RuntimeConfig(device="cpu", dtype="float32", threads=1, compile="off", micro_batch_rows=4)
        changes = dict(model="base/small", n_talks=4, turns=4, max_new_tokens=8, generations=1, tune_steps=20)
        return replace(config, **changes, tag="rehearsal", runtime=runtime)
    elif isinstance(config, DistillConfig):
        changes = dict(teacher="base/small", size="half", corpus="chitchat", n_shards=1)
    return replace(
        config, **changes, tag="rehearsal", batch_tokens=16 * 64, steps=20, seconds=0.0,
        look=LookConfig(eval_every=10, eval_tokens=1024, last_eval_tokens=4096, save_every=10,
                        snapshots=False),
        runtime=RuntimeConfig(
            device="cpu", dtype="float32", threads=1, compile="off", micro_batch_rows=4,
            checkpoint_blocks=config.runtime.checkpoint_blocks,
        ),
    )  # fmt: skip
