"""Shards of the big corpora, brought from the Hugging Face Hub into a folder.

Hides: which shards are asked for. A finished one is not fetched again, its size is compared with the Hub's
where there is a network. Without one, what is missing is said within 5 s.
Reference: nanochat's dataset.py: its names and folders.
"""

from __future__ import annotations

import os
from pathlib import Path

from primechat.errors import DataError, HubError
from primechat.hub import HubFile, ask_hub, explain, fetch_files
from primechat.records import OnEvent

# corpus: (repository, folder in the base directory, number of the last shard, which is validation)
HUB_CORPORA = {
    "fineweb-edu": ("karpathy/fineweb-edu-100b-shuffle", "base_data", 1822),
    "climbmix": ("karpathy/climbmix-400b-shuffle", "base_data_climbmix", 6542),
}


def list_shards(corpus: str, split: str, n_shards: int) -> list[str]:
    """Return the file names of a split: the first `n_shards` for train, the last shard for val."""
    last = HUB_CORPORA[corpus][2]
    if split == "val":
        return [f"shard_{last:05d}.parquet"]
    if not 1 <= n_shards <= last:
        raise DataError(
            f"n_shards={n_shards} must be from 1 to {last}, all shards of {corpus} but the last; try 8."
        )
    return [f"shard_{i:05d}.parquet" for i in range(n_shards)]


def shard_paths(
    corpus: str, split: str, n_shards: int, on_event: OnEvent | None = None, *, base_dir: Path | None
) -> list[Path]:
    """Return the local paths of a split's shards, fetching those that are missing.

    Args:
        corpus: fineweb-edu or climbmix.
        split: train or val.
        n_shards: How many shards train takes.
        on_event: Hears the phase and its progress, in bytes.
        base_dir: Holds base_data and base_data_climbmix.

    Raises:
        HubError: A shard is missing and cannot be fetched.
    """
    if base_dir is None:
        raise DataError(
            f"corpus={corpus!r} needs base_dir, the folder to keep its shards in; give $NANOCHAT_BASE_DIR."
        )
    repo, subfolder, _ = HUB_CORPORA[corpus]
    names = list_shards(corpus, split, n_shards)
    folder = Path(base_dir) / subfolder
    missing = [name for name in names if not (folder / name).is_file()]
    sizes: dict[str, int] = {}
    try:
        sizes = ask_hub(lambda: probe_sizes(repo, names))
    except Exception as error:
        reason, _ = explain(error)
    if missing and not sizes:
        raise HubError(
            f"{missing[0]} and {len(missing) - 1} more of {corpus} are not in {folder} and the Hub cannot "
            f"be asked ({reason}); check the network, or train on chitchat, which needs none."
        )
    wanted = [
        HubFile(repo=repo, name=name, path=folder / name, size=sizes[name], repo_type="dataset")
        for name in names
        if sizes and (name in missing or (folder / name).stat().st_size != sizes[name])
    ]
    if wanted:
        fetch_files(wanted, folder / ".download", on_event or (lambda _: None))
    return [folder / name for name in names]


def probe_sizes(repo: str, names: list[str]) -> dict[str, int]:
    """Return the sizes in bytes that the Hub has of a repository's files, in one question."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    found = api.get_paths_info(repo, names, repo_type="dataset")
    sizes = {item.path: int(getattr(item, "size", 0)) for item in found}
    for name in names:
        if not sizes.get(name):
            raise HubError(f"{repo} has no file {name} on the Hub; ask for fewer shards.")
    return sizes
