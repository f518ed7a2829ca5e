"""`primechat download`: what to download from the Hub, and where in the base directory to store it.

Named bundles are defined here. Each stores its tokenizer beside its model, so that one base directory can
hold several; the default bundle also fills an empty `tokenizer/`. Reference: nanochat's folders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import UseAppendAction

from primechat.checkpoint.download import (
    ASK_S,
    TOKENIZER_FILES,
    Parcel,
    download_files,
    is_safe,
    measure_space,
    plan_download,
)
from primechat.checkpoint.registry import FAMILIES, base_dir, run_dir
from primechat.cli.progress import open_view
from primechat.errors import ConfigError, HubError, PrimechatError
from primechat.files.hub import ask_hub, explain
from primechat.text.shards import HUB_CORPORA, list_shards, probe_sizes, shard_paths

DEFAULT = "diego-d20-base"
TOKENIZER_REPO = "karpathy/nanochat-d32"
D20_FILES = ("model_021400.pt", "meta_021400.json", "optim_021400.pt")
BUNDLES = {  # name: (repository, family, files)
    DEFAULT: ("shiptoday101/nanochat-d20-base", "base", D20_FILES),
    "d32": (TOKENIZER_REPO, "sft", (*TOKENIZER_FILES, "model_000650.pt", "meta_000650.json")),
    "sdobson-d20": ("sdobson/nanochat", "sft", (*TOKENIZER_FILES, "model_*.pt", "meta_*.json")),
}
FORM = "--extra {!r} must be repository::folder::pattern,pattern, the folder below {}; try {}."
EXAMPLE = "owner/name::chatsft_checkpoints/name::model_*,meta_*,tokenizer.pkl,token_bytes.pt"


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Bring models and their tokenizers from the Hugging Face Hub.

    Without flags: the model diego-d20-base and the tokenizer of karpathy/nanochat-d32. Whole files are
    skipped, so the same command goes on after an interruption.
    """

    bundle: UseAppendAction[tuple[Literal["diego-d20-base", "d32", "sdobson-d20"], ...]] = ()
    """Take these models instead of the default one."""
    extra: UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """Take other files too: repository::folder::pattern,pattern, the folder below the base directory."""
    skip_tokenizer: bool = False
    """Leave out the default tokenizer."""
    skip_diego_base: bool = False
    """Leave out the default model."""
    no_optim: bool = False
    """Leave out optimizers: they are needed only to go on with a training in nanochat."""
    shards: str = ""
    """Fetch pretraining text instead: corpus and number of shards, as in fineweb-edu:8."""
    revision: str = ""
    """Branch, tag or commit of the models' and extras' repositories; main when empty."""
    token: str = ""
    """Token for private and gated repositories; that of `hf auth login` or HF_TOKEN when empty."""
    dry_run: bool = False
    """Show the sizes and move nothing."""


def build_parcels(config: DownloadConfig) -> Iterator[Parcel]:
    """Yield what a config asks for, with what it names explicitly first.

    Offline, the error is about the first parcel, so it should be one that the user has named.

    Raises:
        ConfigError: an --extra has another form, or its folder is outside the base directory.
    """
    revision, base = config.revision or None, base_dir()
    bundles = dict.fromkeys(config.bundle or (() if config.skip_diego_base else (DEFAULT,)))

    # Extra files.
    for text in (text for group in config.extra for text in group):
        repo, place, names = [*(part.strip() for part in text.split("::")), "", ""][:3]
        patterns = tuple(name.strip() for name in names.split(",") if name.strip())
        if text.count("::") != 2 or not patterns or repo.count("/") != 1 or not is_safe(place):
            raise ConfigError(FORM.format(text, base, EXAMPLE))
        is_run = str(Path(place).parent) in FAMILIES.values()
        yield Parcel(
            repo=repo, folder=base / place, patterns=patterns, revision=revision, beside=is_run
        )

    # Models.
    for name in bundles:
        repo, family, patterns = BUNDLES[name]
        folder = run_dir(family, name)
        yield Parcel(repo=repo, folder=folder, patterns=patterns, revision=revision, beside=True)

    # The default tokenizer, beside the default model and in the base directory.
    if not config.skip_tokenizer and (DEFAULT in bundles or not config.bundle):
        for folder in [*(run_dir("base", name) for name in bundles if name == DEFAULT), base]:
            lone = None if bundles else revision
            folder = folder / "tokenizer"
            yield Parcel(
                repo=TOKENIZER_REPO, folder=folder, patterns=TOKENIZER_FILES, revision=lone
            )


def run_download(config: DownloadConfig) -> int:
    """Plan, print the plan, download and check the models; return 1 if one cannot be used, else 0."""
    from huggingface_hub import logging

    logging.set_verbosity_error()  # its warnings would break the bars; its errors are reported here
    if config.shards:
        return fetch_shards(config.shards, config.dry_run)
    parcels, token, base = list(build_parcels(config)), config.token or None, base_dir()
    if not parcels:
        raise ConfigError(
            "Nothing is left to download; drop a --skip flag or name a --bundle or an --extra."
        )

    # Plan.
    print("Asking the Hub, and comparing with what is here ...", flush=True)
    plan = plan_download(parcels, token=token, optim=not config.no_optim)
    fates = (
        ("fetch", plan.fetch),
        ("is here", plan.whole),
        ("another one is here and stays", plan.kept),
    )
    for fate, file in ((fate, file) for fate, files in fates for file in files):
        place = file.path.relative_to(base)
        print(
            f"{file.size / 1e6:11,.3f} MB  {place}  from {file.repo}@{str(file.revision)[:7]}: {fate}"
        )
    free = measure_space(base) / 1e6
    print(f"{plan.n_bytes / 1e6:11,.3f} MB to fetch into {base}, which has {free:,.0f} MB free")
    if config.dry_run:
        return 0

    # Download.
    with open_view() as view:
        download_files(plan, base, view, token=token)

    # Check the models.
    models = [
        file.path.parent
        for file in (*plan.fetch, *plan.whole)
        if file.path.name.startswith("model_")
    ]
    places = {base / name: family for family, name in FAMILIES.items()}
    known = [
        f"{places[folder.parent]}/{folder.name}" for folder in models if folder.parent in places
    ]
    return max([show_check(identifier) for identifier in dict.fromkeys(known)], default=0)


def show_check(identifier: str) -> int:
    """Print the report of `primechat check` for a model; return 1 if it cannot be used, else 0."""
    from primechat.cli.check import check_model

    try:
        result = check_model(identifier)
    except PrimechatError as error:
        print(f"{identifier} is here, but could not be checked: {error}")
        return 1
    print(result)
    return int(result.verdict == "broken")


def fetch_shards(wanted: str, dry_run: bool) -> int:
    """Download the first shards of a corpus and its validation shard, or only print their sizes.

    Args:
        wanted: corpus and number of shards, as in fineweb-edu:8.
        dry_run: whether to print only the sizes.

    Raises:
        ConfigError: `wanted` has another form.
        HubError: the Hub cannot be reached.
    """
    corpus, _, count = wanted.partition(":")
    if corpus not in HUB_CORPORA or not count.isdecimal():
        raise ConfigError(
            f"--shards {wanted} must be one of {', '.join(HUB_CORPORA)} and a number; try fineweb-edu:8."
        )
    repo, subfolder, _ = HUB_CORPORA[corpus]
    names = [*list_shards(corpus, "train", int(count)), *list_shards(corpus, "val", 1)]
    try:
        sizes = ask_hub(lambda: probe_sizes(repo, names), ASK_S) if dry_run else {}
    except Exception as error:
        reason, remedy = explain(error)
        raise HubError(f"{repo} cannot be looked at ({reason}); {remedy}.") from None
    for name, size in sizes.items():
        here = (base_dir() / subfolder / name).is_file()
        print(
            f"{size / 1e6:11,.3f} MB  {subfolder}/{name}  from {repo}: {'is here' if here else 'fetch'}"
        )
    if dry_run:
        return 0
    with open_view() as view:
        for split in ("train", "val"):
            paths = shard_paths(corpus, split, int(count), view, base_dir=base_dir())
    print(f"{count} shards of {corpus} and its validation are in {paths[0].parent}")
    return 0
