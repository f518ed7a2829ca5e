"""Export of a lab to a folder that runs on a rented machine: script, frozen settings, launcher and library.

Decides which cells form the program: those whose code the lab shows. Prose becomes comments; cells with
hidden code only display something and are omitted. Reference: marimo's file format.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import json
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from primechat.cloud.plan import Plan, describe_plan, find_recipe, format_hours
from primechat.config import (
    AutochatConfig,
    DistillConfig,
    EvalConfig,
    FinetuneConfig,
    LoRAConfig,
    PretrainConfig,
    RuntimeConfig,
    encode_config,
)
from primechat.config.names import FOLDERS, parse_identifier
from primechat.config.recipes import FULL_RECIPES
from primechat.errors import ConfigError
from primechat.files.paths import explain_copy

ROOT = Path(__file__).resolve().parents[2]
SCRIPT_NAMES = {"settings", "stage", "summary"}  # the names of labkit that cli/script.py provides
STAGE_OF = {
    "06": FinetuneConfig,
    "07": LoRAConfig,
    "08": DistillConfig,
    "09": AutochatConfig,
}  # 05 pretrains
STAGE_VERBS = {
    PretrainConfig: "pretrain",
    FinetuneConfig: "finetune",
    LoRAConfig: "lora",
    DistillConfig: "distill",
    AutochatConfig: "autochat",
}
IMAGE = "runpod/pytorch:1.0.2-cu1281-torch280-ubuntu2404"
POD_BASE = "/workspace/cache/nanochat"
TEMPLATES = Path(__file__).with_name("templates")
PLACEHOLDER = re.compile("__([A-Z_]+?)__")
COPIED = "copied.sha256"  # in the folder of a copied library: its hash when it was copied
TOP_FILES = ("pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Cell:
    """A cell of a lab: prose, program or display."""

    kind: str
    text: str
    line: int


def find_lab(number: str) -> Path:
    """Return the file of a lab that trains something, by its number.

    Raises:
        ConfigError: there is no such lab.
    """
    number = number.zfill(2)
    found = sorted((ROOT / "labs").glob(f"{number}_*.py")) if number in ("05", *STAGE_OF) else []
    if not found and not [*(ROOT / "labs").glob("05_*.py")]:
        raise ConfigError(explain_copy("The labs"))
    if not found:
        raise ConfigError(f"lab={number!r} cannot be exported, only labs 05 to 09 can; try 05.")
    return found[0]


def read_cells(text: str) -> Iterator[Cell]:
    """Yield the cells of a marimo file in order."""
    for node in ast.parse(text).body:
        if not isinstance(node, ast.FunctionDef) or not node.decorator_list:
            continue
        mark = node.decorator_list[0]
        if not ast.unparse(mark).startswith("app.cell"):
            continue
        body = [part for part in node.body if not isinstance(part, ast.Return)]
        prose = read_prose(body)
        if prose is not None:
            yield Cell("prose", prose, node.lineno)
        elif is_folded(mark) or any(
            "exercise" == ast.unparse(c.func) for c in ast.walk(node) if isinstance(c, ast.Call)
        ):
            yield Cell("display", "", node.lineno)
        else:
            yield Cell("program", write_program(body, text), node.lineno)


def is_folded(mark: ast.expr) -> bool:
    """Return whether the decorator of a cell, such as `@app.cell(hide_code=True)`, hides its code."""
    words = mark.keywords if isinstance(mark, ast.Call) else []
    return any(word.arg == "hide_code" and ast.unparse(word.value) == "True" for word in words)


def read_prose(body: list[ast.stmt]) -> str | None:
    """Return the Markdown of a cell that consists only of `mo.md("...")`, else None."""
    if (
        len(body) != 1
        or not isinstance(body[0], ast.Expr)
        or not isinstance(body[0].value, ast.Call)
    ):
        return None
    call = body[0].value
    if (
        ast.unparse(call.func) != "mo.md"
        or not call.args
        or not isinstance(call.args[0], ast.Constant)
    ):
        return None
    return textwrap.dedent(str(call.args[0].value)).strip()


def write_program(body: list[ast.stmt], text: str) -> str:
    """Return a cell's code without statements that only display: marimo, bare names, calls of `show`."""
    lines = text.splitlines()
    kept = []
    for part in body:
        if isinstance(part, ast.Import) and any(alias.name == "marimo" for alias in part.names):
            continue
        if isinstance(part, ast.Expr) and not isinstance(part.value, ast.Constant):
            called = ast.unparse(part.value.func) if isinstance(part.value, ast.Call) else ""
            if not called or called.partition(".")[0] in ("mo", "show"):
                continue
        if isinstance(part, ast.ImportFrom) and part.module == "primechat.labkit.lab":
            names = [alias.name for alias in part.names]
            strange = sorted(set(names) - SCRIPT_NAMES - {"show"})
            if strange:
                raise ConfigError(
                    f"a shown cell imports {', '.join(strange)} from primechat.labkit.lab, a script has "
                    f"{', '.join(sorted(SCRIPT_NAMES))}; import it in a cell with hidden code."
                )
            kept.append(
                f"from primechat.cli.script import {', '.join(n for n in names if n in SCRIPT_NAMES)}"
            )
            continue
        kept.append(textwrap.dedent("\n".join(lines[part.lineno - 1 : part.end_lineno])))
    return "\n".join(kept)


def write_script(lab: Path, origin: str = "") -> str:
    """Return a lab as a plain script: the cells of its program, with its prose as comments.

    Raises:
        ConfigError: the program needs a name that only hidden cells define.
    """
    parts = [
        f'"""{lab.stem}: the program of labs/{lab.name}, written by `primechat export`.\n\n'
        f"{origin or 'Settings are flags.'} `python run.py --help` lists them.\n"
        '"""\n\nfrom __future__ import annotations'
    ]
    known = set(dir(builtins)) | {"__file__"}
    prose = textwrap.TextWrapper(106, break_long_words=False, break_on_hyphens=False)
    program = False
    for cell in read_cells(lab.read_text(encoding="utf-8")):
        if cell.kind == "prose":
            lines = [line for part in cell.text.splitlines() for line in prose.wrap(part) or [""]]
            parts.append("\n".join(f"# {line}".rstrip() for line in lines))
        elif cell.kind == "program" and cell.text:
            tree, program = ast.parse(cell.text), True
            names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
            made = {node.id for node in names if not isinstance(node.ctx, ast.Load)} | set(
                list_bound(tree)
            )
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
        raise ConfigError(
            f"{lab.name} has no cell whose code is shown, so nothing to export; try 05."
        )
    return "\n\n".join(parts) + "\n"


def drop_keywords(text: str, tree: ast.Module, known: set[str]) -> tuple[str, ast.Module]:
    """Return a cell without keyword lines that need unknown names, as config.json has those settings."""
    lines = text.splitlines()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        for word in call.keywords:
            first, last = word.lineno - 1, word.end_lineno or word.lineno
            alone = lines[first].strip().startswith(f"{word.arg}=")
            if alone and list_loaded(word.value) - known:
                lines[first:last] = [""] * (last - first)
    text = "\n".join(line for line in lines if line)
    return text, ast.parse(text)


def list_loaded(tree: ast.AST) -> set[str]:
    """Return the names that a piece of code reads."""
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, ast.Load)}


def list_bound(tree: ast.AST) -> Iterator[str]:
    """Yield the names that imports, functions, classes and arguments bind."""
    for node in ast.walk(tree):
        if isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0]
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg


def full_stage(lab: Path, run: PretrainConfig) -> Any:
    """Return the full-size config of a lab: a pretraining run, or a stage that continues from it."""
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
    if kind is AutochatConfig:
        # Three generations, each trained for two passes over the text of the one before.
        size = dict(
            n_conversations=64, max_new_tokens=96, batch_rows=64, generations=3, tune_steps=100
        )
        return AutochatConfig(tag=tag, model=f"sft/{tag}", resume=True, **size)  # type: ignore[arg-type]
    return run


def name_family(config: Any) -> str:
    """Return the family of the model that a config's stage trains."""
    if isinstance(config, LoRAConfig):
        return "lora"
    plain = isinstance(config, DistillConfig) and not config.dialogues
    return "base" if plain or isinstance(config, PretrainConfig) else "sft"


def name_source(config: Any) -> str:
    """Return the identifier of the model that a stage starts from."""
    named = config.model if isinstance(config, AutochatConfig) else getattr(config, "teacher", "")
    return named or config.base or f"base/{config.tag}"


def describe_stage(config: Any) -> str:
    """Return a one-line description of a stage."""
    if isinstance(config, AutochatConfig):
        learned = (
            f", and learns from itself {config.generations} times" if config.generations else ""
        )
        return f"AutochatConfig: {config.n_conversations} conversations of {config.turns} turns{learned}"
    length = f"{config.steps:,} steps" if config.steps else "one pass"
    text = config.dialogues or getattr(config, "corpus", "")
    return f"{type(config).__name__}: {length} of {config.batch_tokens:,} tokens a step over {text}"


def name_job(config: Any) -> str:
    """Return the name of a run's folder and machine, different for each stage of a tag."""
    ends = {FinetuneConfig: "-chat", LoRAConfig: "-lora", AutochatConfig: "-autochat"}
    return f"{config.tag}{ends.get(type(config), '')}"


def export_lab(
    lab: Path, config: Any, plan: Plan, folder: Path, *, base_dir: Path, force: bool = False
) -> list[Path]:
    """Write a lab's folder and return the files written.

    Args:
        lab: file of the lab.
        config: settings of its stage.
        plan: plan of the pretraining, for its cost; for other stages only its machine is used.
        folder: output folder; the library of an earlier export of these settings is replaced, unless edited.
        base_dir: base directory that holds the models to upload.
        force: overwrite a folder that holds something else.

    Returns:
        The files written, without those of the library.

    Raises:
        ConfigError: the folder holds something else or was edited, or the machine cannot be rented.
    """
    if plan.machine.name == "here":
        raise ConfigError("gpus='here' must be a machine to rent; try 8xH200.")
    script = write_script(lab, "Its settings are frozen in config.json; flags override them.")
    settings = json.dumps(encode_config(config), indent=2) + "\n"
    files = {
        "run.py": script,
        "config.json": settings,
        **fill_in(lab, config, plan, base_dir.expanduser().resolve()),
    }
    if not force:
        check_folder(folder, files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "launch.sh").chmod(0o755)
        copy_library(folder / "src")
    except OSError as error:
        reason = f"cannot be written ({error.strerror or str(error)[:200]})"
        raise ConfigError(f"output={str(folder)!r} {reason}; choose another output.") from None
    return [folder / name for name in files]


def check_folder(folder: Path, files: dict[str, str]) -> None:
    """Raise ConfigError if a folder holds anything but an unedited export of these settings."""
    there = {name: (folder / name).read_bytes() for name in files if (folder / name).is_file()}
    changed = [name for name in there if there[name] != files[name].encode()]
    copied = folder / "src" / COPIED
    if copied.is_file() and copied.read_text(encoding="utf-8") != hash_library(copied.parent):
        changed.append("src/primechat")
    what = f"{', '.join(changed)} with changes, yours or another version's" if changed else ""
    if "config.json" in changed:
        what = "an export of other settings"
    elif (
        "config.json" not in there
        and folder.exists()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        what = "something else than an export"
    if what:
        raise ConfigError(
            f"output={str(folder)!r} holds {what}; choose another output, or --force replaces it."
        )


def fill_template(name: str, words: dict[str, str]) -> str:
    """Return the text of a file in templates/, with each `__WORD__` replaced by `words["word"]`."""
    text = (TEMPLATES / name).read_text(encoding="utf-8")
    return PLACEHOLDER.sub(lambda found: words[found[1].lower()], text)


def fill_in(lab: Path, config: Any, plan: Plan, home: Path) -> dict[str, str]:
    """Return the launcher, the SkyPilot task and the README of a run, by file name.

    Args:
        lab: file of the lab.
        config: settings of its stage.
        plan: plan of the pretraining.
        home: base directory on this machine, which holds the model that a later stage goes on from.
    """
    words = {**name_machine(plan), **name_run(lab, config)}
    cost = f"{format_hours(plan.train_s)} and ${plan.dollars:,.0f}"

    if isinstance(config, PretrainConfig):
        words |= {"cost": cost, "limit": str_dollars(plan.dollars * 1.25)}
        words["plan"] = "\n".join(f"    {line}".rstrip() for line in describe_plan(plan))
        recipe = find_recipe(config)
        if recipe in FULL_RECIPES:
            words["plan"] += "\n\n" + describe_recipe(config, recipe, words)
        bring, mounts = "", ""
    else:
        words["cost"] = f"less than the {cost} of its model's pretraining; preflight tells"
        words |= {"limit": str_dollars(plan.dollars * 0.25), **name_model(config, home)}
        words["plan"] = fill_template("plan_of_stage.md", words).rstrip("\n")
        bring = "\n" + fill_template("bring_model.md", words)
        mounts = list_mounts(words["folder"], home)

    return {
        "launch.sh": fill_template("launch.sh", words),
        "sky.yaml": fill_template("sky.yaml", words) + mounts,
        "README.md": fill_template("README.md", words) + bring,
    }


def str_dollars(dollars: float) -> str:
    """Return a limit in whole dollars, at least one because 0 stands for no limit."""
    return f"{max(1.0, dollars):.0f}"


def name_machine(plan: Plan) -> dict[str, str]:
    """Return the words of the templates that name the rented machine."""
    kind = plan.machine.name.partition("x")[2]
    accelerator = {"H200": "H200-SXM", "H100": "H100-SXM", "4090": "RTX4090"}[kind]
    return {
        "gpus": plan.machine.name,
        "accelerator": f"{accelerator}:{plan.machine.n_gpus}",
        "ranks": str(plan.machine.n_gpus),
        "price": f"{plan.machine.dollars_per_hour:.2f}",
        "disk": str(max(80, int(plan.disk_bytes / 1e9 * 1.2) + 10)),
        "image": IMAGE,
        "base": POD_BASE,
    }


def name_run(lab: Path, config: Any) -> dict[str, str]:
    """Return the words of the templates that name a run, its text and what it makes."""
    family, job = name_family(config), name_job(config)
    words = {
        "lab": lab.name,
        "job": job,
        "name": job.lower().replace("_", "-").replace(".", "-"),
        "stage": STAGE_VERBS[type(config)],
        "family": FOLDERS[family],
        "tag": config.tag,
        "corpus": shlex.quote(str(getattr(config, "corpus", ""))),
        "shards": str(min(8, getattr(config, "n_shards", 8))),
    }
    made = [f"{family}/{config.tag}"]
    if isinstance(config, AutochatConfig):  # the conversations, and each model finetuned on them
        learned = [f"sft/{config.tag}-g{n}" for n in range(1, config.generations + 1)]
        made = [f"{POD_BASE}/autochat", *learned]
        words["ranks"] = "1"  # one process talks

    # The commands that fetch what was made, from a pod and from SkyPilot's machine.
    for word, host in (("pull", "POD"), ("pull_sky", f"primechat-{words['name']}")):
        words[word] = "\n".join(f"primechat pull root@{host}:{one}" for one in made)
    return words


def describe_recipe(config: PretrainConfig, recipe: str, words: dict[str, str]) -> str:
    """Return the paragraphs on the recipe that a pretraining run follows, and on the other one."""
    words = {
        **words,
        "named": recipe,
        "other": next(name for name in FULL_RECIPES if name != recipe),
        "depth": str(config.model.n_layer),
        "vocab": f"{config.model.vocab_size:,}",
        "rows": f"{config.model.sequence_len:,}",
    }
    return fill_template("recipe.md", words).rstrip("\n")


def name_model(config: Any, home: Path) -> dict[str, str]:
    """Return the words of the templates that name the model that a stage goes on from."""
    source = parse_identifier(name_source(config))
    return {
        "config": describe_stage(config),
        "models": str(source),
        "folder": f"{FOLDERS.get(source.family, source.family)}/{source.tag}",
        "home": shlex.quote(str(home)),
    }


def list_mounts(folder: str, home: Path) -> str:
    """Return the lines of a SkyPilot task that send a model, and the tokenizer it shares with others."""
    names = [folder]
    if not (home / folder / "tokenizer").is_dir() and (home / "tokenizer").is_dir():
        names.append("tokenizer")
    lines = [f"  {POD_BASE}/{name}: {json.dumps(str(home / name))}\n" for name in names]
    return "file_mounts:\n" + "".join(lines)


def copy_library(target: Path) -> None:
    """Copy the library, so that the run uses exactly this code."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(
        ROOT / "primechat",
        target / "primechat",
        ignore=shutil.ignore_patterns("__pycache__", "*.pyc"),
    )
    for name in TOP_FILES:
        shutil.copy(ROOT / name, target / name)
    (target / COPIED).write_text(hash_library(target), encoding="utf-8")


def hash_library(target: Path) -> str:
    """Return the SHA-256 of a copied library, to detect changes to it."""
    library = target / "primechat"
    files = sorted(path for path in library.rglob("*") if path.is_file() and path.suffix != ".pyc")
    named = (path.relative_to(library).as_posix().encode() + path.read_bytes() for path in files)
    return hashlib.sha256(b"".join(named)).hexdigest()


def shrink_config(config: Any) -> Any:
    """Return a rehearsal's config: the same switches, 20 steps of a tiny model (or base/small) on a CPU."""
    changes: dict[str, Any] = dict(dialogues="faq", base="base/small", general="none")
    if isinstance(config, PretrainConfig):
        tiny: Any = dict(
            n_layer=2, n_head=2, n_kv_head=2, n_embd=64, vocab_size=400, sequence_len=64
        )
        changes = dict(model=replace(config.model, **tiny), corpus="chitchat", tokenizer="")
    elif isinstance(config, AutochatConfig):
        runtime = RuntimeConfig(
            device="cpu", dtype="float32", threads=1, compile="off", micro_batch_rows=4
        )
        changes = dict(
            model="base/small",
            n_conversations=4,
            turns=4,
            max_new_tokens=8,
            generations=1,
            tune_steps=20,
        )
        return replace(config, **changes, tag="rehearsal", runtime=runtime)
    elif isinstance(config, DistillConfig):
        changes = dict(teacher="base/small", size="half", corpus="chitchat", n_shards=1)
    return replace(
        config,
        **changes,
        tag="rehearsal",
        batch_tokens=16 * 64,
        steps=20,
        seconds=0.0,
        eval=EvalConfig(every=10, tokens=1024, last_tokens=4096, save_every=10, snapshots=False),
        runtime=RuntimeConfig(
            device="cpu",
            dtype="float32",
            threads=1,
            compile="off",
            micro_batch_rows=4,
            checkpoint_blocks=config.runtime.checkpoint_blocks,
        ),
    )
