"""Registry of models: lists the models and runs on this disk and opens them by name.

A model is opened by its identifier (`primechat.config.names`); an empty one means the default model: sft,
else rl, mid, base. The models that ship with primechat (`shipped/sft`, `shipped/base`, ...) are used when the
user has no checkpoint of that family and gives neither tag nor step. A tag is a plain name, so no path leaves
the root; symbolic links are followed, because large checkpoints often live on another disk. Names that begin
with `hf:` are opened by model.huggingface.
Reference: nanochat's layout below $NANOCHAT_BASE_DIR.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from primechat.checkpoint.checkpoint import (
    Loaded,
    explain_steps,
    find_steps,
    list_snapshots,
    load_checkpoint,
    read_meta,
)
from primechat.checkpoint.nanochat_format import detect_era
from primechat.checkpoint.run_dir import read_metrics
from primechat.config import GPTConfig, decode_config
from primechat.config.names import (
    ADAPTER,
    BY_PRODUCT,
    FAMILIES,
    FOLDERS,
    IDENTIFIER,
    ModelName,
    parse_identifier,
)
from primechat.config.options import name_options
from primechat.config.stages import check_tag
from primechat.errors import CheckpointError, ConfigError
from primechat.events import NoteEvent, OnEvent, TrainResult
from primechat.files.hub import count_gguf, count_stored_params, find_package, list_cached
from primechat.files.paths import (
    CLONE,
    explain_copy,
    is_clone,
    make_folder,
    measure_file,
    resolve_path,
    write_file,
)
from primechat.files.weights import inspect_model, read_json

if TYPE_CHECKING:
    from primechat.model.gpt import GPT
    from primechat.text.tokenizer import Tokenizer

MAKERS = {"base": "primechat pretrain", "sft": "primechat finetune"}
# Recommended sampling for the chat model that ships, and who recommends it; data/README.md explains why. No
# other model has a recommendation, because the metadata of its checkpoint is not trusted.
ADVICE = (
    {"temperature": 0.6},
    "primechat",
)
MARK = "by_product"  # file in the folder of a by-product, with one line on what it belongs to
SHIPPED = CLONE / "data" / "nanochat"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One model on this disk; `identifier` opens its newest step.

    A `by_product` is one of many small runs that a lab trained for a comparison: it can be opened by name but
    is never a default.
    """

    identifier: str
    family: str
    tag: str
    steps: tuple[int, ...]
    snapshots: tuple[int, ...]
    n_bytes: int
    architecture: str
    n_params: int
    val_bpb: float | None
    tokenizer_identity: str | None
    path: str
    shipped: bool = False
    by_product: bool = False
    val_tokens: int = 0  # number of tokens scored for val_bpb; 0 is unknown


def base_dir() -> Path:
    """Return the base directory of all models: $NANOCHAT_BASE_DIR, read at each call, or ~/.cache/nanochat.

    Raises:
        ConfigError: The path is a file, or not a valid path.
    """
    given = os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat"
    return resolve_path(given, "NANOCHAT_BASE_DIR", folder=True)


def run_dir(family: str, tag: str) -> Path:
    """Return the run directory of a family and tag; it need not exist.

    Raises:
        ConfigError: The family is unknown, or the tag is not a plain name.
    """
    if family not in FOLDERS:
        raise ConfigError(f"source={family!r} must be one of {', '.join(FOLDERS)}; try base.")
    check_tag(tag)
    return base_dir() / FOLDERS[family] / tag


def list_tags(root: Path, family: str) -> list[Path]:
    """Return the run directories of a family that hold a usable checkpoint or snapshot, sorted by name."""
    parent = root / FAMILIES[family]
    folders = sorted(parent.iterdir()) if parent.is_dir() else []
    return [f for f in folders if is_run(f) and (find_steps(f) or list_snapshots(f))]


def explain_tags(root: Path, family: str) -> list[str]:
    """Return what is wrong with each run directory of a family that has steps but no complete one."""
    parent = root / FAMILIES[family]
    folders = [f for f in sorted(parent.iterdir()) if is_run(f)] if parent.is_dir() else []
    return [fault for f in folders if not find_steps(f) for _, fault in explain_steps(f)[-1:]]


def is_run(folder: Path) -> bool:
    """Return whether a folder is readable and its name is a valid tag."""
    try:
        check_tag(folder.name)
        next(folder.iterdir(), None)
    except (ConfigError, OSError):
        return False
    return True


def is_by_product(folder: Path) -> bool:
    """Return whether a run directory holds a by-product of a lab, judged by its mark or its name."""
    return (folder / MARK).is_file() or BY_PRODUCT.fullmatch(folder.name) is not None


def mark_by_product(folder: Path, origin: str) -> None:
    """Mark a run directory, created if needed, as a by-product; `origin` says in words what it belongs to."""
    write_file(make_folder(folder) / MARK, f"{origin}\n")


def choose_tag(root: Path, family: str) -> Path | None:
    """Return the run directory of the largest `d<number>`, else the most recently written one, else None.

    By-products of labs are never chosen.
    """
    steps = {folder: find_steps(folder) for folder in list_tags(root, family)}
    folders = [folder for folder in steps if steps[folder] and not is_by_product(folder)]
    if not folders:
        return None

    # The largest depth.
    depths = {
        folder: int(folder.name[1:]) for folder in folders if re.fullmatch(r"d\d{1,9}", folder.name)
    }
    if depths:
        return max(depths, key=lambda folder: depths[folder])

    # The most recent write, by the meta file of the newest step, which is never pruned.
    newest = {folder: folder / f"meta_{steps[folder][-1]:06d}.json" for folder in folders}
    return max(folders, key=lambda folder: newest[folder].stat().st_mtime_ns)


def locate_model(name: ModelName) -> tuple[Path, ModelName]:
    """Return the checkpoint folder of a model name, and the name completed with its tag.

    Raises:
        CheckpointError: There is no such model.
    """
    if name.family == "hf":
        raise CheckpointError(
            f"{name} is another project's, to talk to and to look into; for this name one of primechat's own."
        )
    if name.shipped and not is_clone():
        raise CheckpointError(explain_copy("The models that ship"))

    # With a tag: that run, or its snapshots.
    root = SHIPPED if name.shipped else base_dir()
    if name.tag:
        folder = root / FAMILIES[name.family] / name.tag
        if not folder.is_dir():
            there = ", ".join(f.name for f in list_tags(root, name.family)[:8]) or "none yet"
            kind = f"shipped/{name.family}" if name.shipped else name.family
            raise CheckpointError(
                f"{folder} is missing, the tags of {kind} are: {there}; name one of those or train it."
            )
        return (folder / "snapshots" if name.snapshot else folder), name

    # Without a tag: the user's default run of the family, else the one that ships.
    own = None if name.shipped else choose_tag(base_dir(), name.family)
    faults = explain_tags(root, name.family)
    for fault in faults:
        logger.warning("skipped %s", fault)
    if own is not None:
        return own, replace(name, tag=own.name)
    shipped = choose_tag(SHIPPED, name.family)
    if shipped is not None:
        return shipped, replace(name, shipped=True)

    # Neither exists: explain why.
    if faults:
        raise CheckpointError(f"No {name.family} model can be used: {faults[-1]}")
    maker = f"run `{MAKERS[name.family]}`" if name.family in MAKERS else "copy one there"
    also = "" if is_clone() else f" {explain_copy('The models that ship')}"
    raise CheckpointError(
        f"{root / FAMILIES[name.family]} holds no checkpoint; {maker} or see `primechat models`.{also}"
    )


def pin_step(name: ModelName, step: int) -> ModelName:
    """Return a name with the opened step added; a name without a tag (the shipped default) is unchanged."""
    return replace(name, step=step) if name.tag else name


def choose_model() -> ModelName:
    """Return the name of the default model: the user's own before shipped ones, sft before rl, mid, base."""
    for root in (base_dir(), SHIPPED):
        for family in ("sft", "rl", "mid", "base"):
            if choose_tag(root, family) is not None:
                return ModelName(family=family, shipped=root is SHIPPED)
    return ModelName(family="base")


def read_name(text: str) -> ModelName:
    """Return the parsed name of an identifier; empty means the default model.

    An adapter without a model is combined with the base model that it records.
    """
    if alone := ADAPTER.fullmatch(text):
        from primechat.model.lora import read_base

        text = f"{text}+{read_base(run_dir('lora', alone[1])) or 'sft'}"
    return parse_identifier(text) if text else choose_model()


@name_options
def open_model(
    identifier: str = "",
    *,
    device: str = "cpu",
    dtype: str = "float32",
    tokenizer: Any = None,
    phase: str = "eval",
    on_event: OnEvent | None = None,
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Return a model, its tokenizer and its metadata.

    The metadata is the checkpoint's, with `identifier`, `path`, `skipped` and `sampling` (recommended
    sampling settings and who recommends them) added.

    Args:
        identifier: Name of the model, see the module's docstring; empty means the default model.
        dtype: Dtype of the parameters: float32, bfloat16, or auto (bfloat16 on CUDA, float32 elsewhere).
        tokenizer: Tokenizer or its folder, instead of the one with the model or in the base directory.
        on_event: Called before the weights are read with the memory that they need; None logs it.

    Raises:
        CheckpointError: The model does not exist, does not match its tokenizer, or is too large.
        ConfigError: An argument has an invalid value.
    """
    from primechat.infer.admission import warn_unrecorded

    if dtype not in ("float32", "bfloat16", "auto"):
        raise ConfigError(f"dtype={dtype!r} must be float32, bfloat16 or auto; try float32.")
    if phase not in ("eval", "train"):
        raise ConfigError(f"phase={phase!r} must be eval or train; try eval.")
    name = read_name(identifier)
    if dtype == "auto":
        dtype = "bfloat16" if "cuda" in device else "float32"
    announce = Announcement(device=device, dtype=dtype, on_event=on_event)
    if name.family == "hf" and phase == "eval":
        return open_from_hub(name, tokenizer, announce)

    # Find the checkpoint and its tokenizer; the weights are memory-mapped, so none are in memory yet.
    folder, name = locate_model(name)
    loaded = load_checkpoint(folder, name.step)
    found = find_tokenizer(folder, tokenizer)
    check_pair(loaded.config, loaded.meta, found, str(name))

    # Load the weights, then the adapters.
    full = pin_step(name, loaded.step)
    announce.say_memory(full, loaded.config.n_params)
    model = read_weights(folder, loaded, device, dtype)
    add_adapters(model, name, found)
    if not loaded.meta.get("tokenizer_identity"):
        warn_unrecorded(str(full), folder, model, found)
    if phase == "train":
        model.requires_grad_(True).train()
    known = {"identifier": str(full), "path": str(folder), "skipped": loaded.skipped}
    advice = ADVICE if name.shipped and name.family == "sft" else ({}, "")
    return model, found, {**loaded.meta, **known, "sampling": advice}


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """Says, before a model is opened with this dtype on this device, what memory it needs."""

    device: str
    dtype: str
    on_event: OnEvent | None

    def say(self, text: str) -> None:
        """Send a sentence to the listener, or log it if there is none."""
        if self.on_event:
            self.on_event(NoteEvent(text=text))
        else:
            logger.info("%s", text)

    def say_memory(self, name: ModelName, n_params: int) -> None:
        """Say how much memory the weights need.

        Raises:
            CheckpointError: the device has less.
        """
        from primechat.infer.admission import describe_memory

        n_bytes = n_params * (4 if self.dtype == "float32" else 2)
        self.say(describe_memory(str(name), n_bytes, self.device))


def open_from_hub(
    name: ModelName, tokenizer: Any, announce: Announcement
) -> tuple[Any, Any, dict[str, Any]]:
    """Return a model of the Hugging Face Hub, its tokenizer and its metadata.

    The two implement the protocols of GPT and Tokenizer that the engine uses.
    """
    import torch

    from primechat.model.huggingface import open_foreign

    if tokenizer:
        raise ConfigError(f"{name} has a tokenizer of its own; leave out --tokenizer.")
    on_size = partial(announce.say_memory, name)
    dtype = getattr(torch, announce.dtype)
    return open_foreign(name.tag, announce.device, dtype, on_size, announce.say)


def read_weights(folder: Path, loaded: Loaded, device: str, dtype: str) -> GPT:
    """Return the model of a checkpoint with its weights read into memory."""
    import torch

    from primechat.model.gpt import GPT

    state = load_checkpoint(folder, loaded.step, dtype=dtype).model_state
    return GPT.from_state(loaded.config, state, device=device, dtype=getattr(torch, dtype))


def add_adapters(model: GPT, name: ModelName, tokenizer: Tokenizer) -> None:
    """Add the adapters that a name asks for, each at its scale."""
    from primechat.model.lora import open_adapter

    for adapter, scale in name.adapters:
        open_adapter(model, adapter, run_dir("lora", adapter), tokenizer.identity, scale)


@name_options
def load_model(
    source: str,
    device: str = "cpu",
    phase: str = "eval",
    model_tag: str | None = None,
    step: int | None = None,
    dtype: str = "float32",
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Return a model, its tokenizer and its metadata, selected as in nanochat's `load_model`.

    Without a tag, the largest d<number> is opened, else the most recently written run; without a step, the
    newest complete one.

    Raises:
        CheckpointError: The model does not exist, or does not match its tokenizer.
        ConfigError: An argument has an invalid value.
    """
    if source not in FAMILIES:
        raise ConfigError(f"source={source!r} must be one of {', '.join(FAMILIES)}; try base.")
    if model_tag is None and step is not None:
        if (own := choose_tag(base_dir(), source)) is None:
            raise CheckpointError(
                f"{FAMILIES[source]} holds no step {step}; see `primechat models`."
            )
        model_tag = own.name
    if model_tag is not None:
        check_tag(model_tag)
    name = ModelName(family=source, tag=model_tag or "", step=step)
    return open_model(str(name), device=device, phase=phase, dtype=dtype)


def find_tokenizer(folder: Path, given: Any = None) -> Tokenizer:
    """Return the tokenizer of a checkpoint: the given one, else its run's, else its base directory's."""
    from primechat.text.tokenizer import Tokenizer

    if isinstance(given, Tokenizer):
        return given
    if given:
        return Tokenizer.load(resolve_path(given, "tokenizer"))
    run = folder.parent if folder.name == "snapshots" else folder
    beside = run / "tokenizer"
    return Tokenizer.load(
        beside if (beside / "tokenizer.pkl").is_file() else run.parent.parent / "tokenizer"
    )


def check_pair(config: GPTConfig, meta: dict[str, Any], tokenizer: Tokenizer, name: str) -> None:
    """Raise CheckpointError if a model was not trained with a tokenizer."""
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{name} has vocab_size={config.vocab_size}, its tokenizer {tokenizer.vocab_size}; give the "
            "folder of the tokenizer that it was trained with by --tokenizer."
        )
    identity = meta.get("tokenizer_identity")
    if identity and identity != tokenizer.identity:
        raise CheckpointError(
            f"{name} was trained with the tokenizer {str(identity)[:12]}, this is {tokenizer.identity[:12]}; "
            "give the folder of its own by --tokenizer."
        )


def load_tokenizer(identifier: str = "") -> Tokenizer:
    """Return the tokenizer of a model; empty means that of the base directory, else of the default model.

    Raises:
        DataError: The tokenizer is missing or cannot be read.
        CheckpointError: The model does not exist.
    """
    from primechat.text.tokenizer import Tokenizer

    if not identifier and (base_dir() / "tokenizer" / "tokenizer.pkl").is_file():
        return Tokenizer.load(base_dir() / "tokenizer")
    name = read_name(identifier)
    if name.family == "hf":
        from primechat.model.huggingface import open_tokenizer

        other: Any = open_tokenizer(name.tag)
        return other
    return find_tokenizer(locate_model(name)[0])


def list_models() -> list[ModelEntry]:
    """Return all models on this disk, the user's own first and foreign ones last, without importing torch."""
    own = [*walk_models(base_dir(), shipped=False), *walk_adapters(base_dir() / FOLDERS["lora"])]
    return [*own, *walk_models(SHIPPED, shipped=True), *walk_foreign()]


def walk_adapters(parent: Path) -> Iterator[ModelEntry]:
    """Yield an entry for each adapter; its identifier includes the base model that it was trained on."""
    for path in sorted(parent.glob("*/adapter_model.safetensors")):
        folder, facts = path.parent, dict[str, Any]()
        with suppress(CheckpointError):
            facts = read_json(folder / "adapter_config.json")
        if is_run(folder) and facts:
            yield ModelEntry(
                identifier=f"lora:{folder.name}+{facts.get('base_model_name_or_path') or 'sft'}",
                family="lora",
                tag=folder.name,
                steps=tuple(find_steps(folder)) or (0,),
                snapshots=(),
                n_bytes=measure_file(path),
                architecture=f"rank {facts.get('r')}",
                n_params=count_stored_params(folder),
                val_bpb=None,
                tokenizer_identity=None,
                path=str(folder),
                by_product=is_by_product(folder),
            )


def walk_models(root: Path, shipped: bool) -> Iterator[ModelEntry]:
    """Yield an entry for each run directory below a base directory that holds a model."""
    for family in FAMILIES:
        # The default shipped model is named without a tag, as in `shipped/sft`.
        default = choose_tag(root, family) if shipped else None
        for folder in list_tags(root, family):
            steps, snapshots = find_steps(folder), list_snapshots(folder)
            if not steps and not snapshots:
                continue  # removed in the meantime

            # The name of the newest step, or of the newest snapshot if no step is left.
            where = folder if steps else folder / "snapshots"
            tag = "" if folder == default else folder.name
            name = ModelName(family=family, tag=tag, shipped=shipped)
            if not steps:
                name = replace(name, step=snapshots[-1], snapshot=True)
            step = (steps or snapshots)[-1]

            config, meta = read_design(where, step)
            bpb, identity = take_number(meta, "val_bpb", math.nan), meta.get("tokenizer_identity")
            yield ModelEntry(
                identifier=str(name),
                family=family,
                tag=folder.name,
                path=str(folder),
                shipped=shipped,
                by_product=is_by_product(folder),
                steps=tuple(steps),
                snapshots=tuple(snapshots),
                n_bytes=sum(max(0, measure_file(path)) for path in folder.rglob("*.pt")),
                architecture=config.architecture if config else "unreadable",
                n_params=config.n_params if config else 0,
                val_bpb=None if math.isnan(bpb) else bpb,
                val_tokens=int(take_number(meta, "val_tokens")),
                tokenizer_identity=identity if isinstance(identity, str) else None,
            )


def walk_foreign() -> Iterator[ModelEntry]:
    """Yield an entry for each foreign model that opens without a network; none if transformers is missing."""
    if not find_spec("transformers"):
        return
    packed = find_package() if find_spec("gguf") and find_spec("accelerate") else None
    places = [("smollm2", packed.parent)] if packed else []
    for tag, folder in [*places, *list_cached()]:
        kind = "gguf" if tag == "smollm2" else "safetensors"
        count = count_gguf(packed) if packed and tag == "smollm2" else count_stored_params(folder)
        yield ModelEntry(
            identifier=f"hf:{tag}",
            family="hf",
            tag=tag,
            path=str(folder),
            steps=(),
            snapshots=(),
            n_bytes=sum(measure_file(path) for path in folder.glob(f"*.{kind}")),
            architecture="foreign",
            n_params=count,
            val_bpb=None,
            tokenizer_identity=None,
        )


def read_design(folder: Path, step: int) -> tuple[GPTConfig | None, dict[str, Any]]:
    """Return the config (None if unreadable) and the metadata of a step without loading its weights."""
    meta: dict[str, Any] = {}
    with suppress(CheckpointError):
        meta = read_meta(folder, step)
        specs = inspect_model(folder / f"model_{step:06d}.pt")
        return detect_era({key: spec.shape for key, spec in specs.items()}, meta), meta
    return None, meta


def load_run(path: str | Path) -> TrainResult:
    """Return the result of a run, rebuilt from the files of its directory.

    Args:
        path: Run directory, absolute or relative to the base directory (it may come from another machine), or
            an identifier such as base/d4.

    Raises:
        CheckpointError: There is no run, or one of its files is damaged.
    """
    # Find the run.
    run = resolve_path(base_dir() / os.path.expanduser(path), "run")
    if not run.is_dir() and IDENTIFIER.fullmatch(str(path)):
        run, _ = locate_model(replace(parse_identifier(str(path)), step=None, snapshot=False))
    run, root = run.resolve(), base_dir().resolve()
    events, steps = read_metrics(run / "metrics.jsonl"), find_steps(run)
    if not steps and not events:
        raise CheckpointError(
            f"{run} holds neither checkpoint nor metrics.jsonl; name a run, for example base/d4."
        )

    # The config, from the newest step or from config.json.
    config, meta = read_design(run, steps[-1]) if steps else (None, {})
    if config is None and (run / "config.json").is_file():
        model = read_json(run / "config.json").get("model")
        config = decode_config(model, GPTConfig, f"{run / 'config.json'}: model") if model else None

    # The totals, from the logged events.
    kinds = ("step", "loss", "done")
    trained, losses, done = ([e for e in events if e.get("kind") == kind] for kind in kinds)
    seconds = [
        take_number(e, "tokens") / (take_number(e, "tokens_per_s") or math.inf) for e in trained
    ]
    tokens, train_s = int(sum(take_number(e, "tokens") for e in trained)), sum(seconds)
    end: dict[str, Any] = done[-1] if done else {"stopped": True}

    # The identifier under which the run can be opened.
    family = next((family for family, name in FAMILIES.items() if name == run.parent.name), "run")
    adapter = next((entry for entry in walk_adapters(run.parent) if entry.path == str(run)), None)
    place = "shipped/" if run.is_relative_to(SHIPPED.resolve()) else ""
    return TrainResult(
        identifier=adapter.identifier if adapter else f"{place}{family}/{run.name}",
        path=str(run.relative_to(root)) if run.is_relative_to(root) else str(run),
        step=steps[-1] if steps else int(take_number((trained or [{}])[-1], "step")),
        stopped=bool(end.get("stopped")),
        val_bpb=take_number((losses or [meta])[-1], "val_bpb", math.nan),
        val_tokens=int(
            take_number(losses[-1], "tokens") if losses else take_number(meta, "val_tokens")
        ),
        n_params=config.n_params if config else adapter.n_params if adapter else 0,
        tokens=tokens,
        tokens_per_s=tokens / train_s if train_s else 0.0,
        train_s=train_s,
        total_s=take_number(meta, "spent_s", take_number(end, "elapsed_s", train_s)),
        events=tuple(events),
    )


def take_number(event: dict[str, Any], key: str, otherwise: float = 0.0) -> float:
    """Return a field of an event or of metadata if it is a finite number, else `otherwise`."""
    value = event.get(key)
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else otherwise
