"""Corpora by name: the embedded chats (chitchat), local files, and shards from the Hugging Face Hub.

It also decides which part of a corpus is held out for validation: the last 5 % of documents in file order for
the embedded chats and local files, the last shard for corpora from the Hub. The order never changes.
Reference: the package chitchat-dataset (Myers, BYU-PCCL): the conversations of the Chit-Chat Challenge.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from primechat.errors import DataError
from primechat.events import NoteEvent, OnEvent
from primechat.files.paths import parse_json
from primechat.protocols import Conversation
from primechat.text.plain import MarkCounts, describe_marks, read_lines, read_plain
from primechat.text.shards import HUB_CORPORA, list_shards, shard_paths

SUFFIXES = (".txt", ".jsonl", ".parquet")
# Least held-out text of a local corpus: bits per byte of a few words mean nothing.
MIN_VAL_CHARS = 20
CHITCHAT_INSTALL = "pip install --force-reinstall chitchat-dataset==0.9.0"
CHITCHAT_FIGURES = (7_168, 358, 699_021)  # conversations, held-out ones, bytes of the held-out ones

# One conversation: (speaker, text) per turn; the speaker is 0 or 1 by order of appearance.
Turns = tuple[tuple[int, str], ...]


def is_local(corpus: str) -> bool:
    """Return whether a corpus is read from this machine rather than from shards of the Hub."""
    return corpus not in HUB_CORPORA


def read_documents(
    corpus: str,
    split: str,
    *,
    n_shards: int = 8,
    base_dir: Path | None = None,
    separator: str = "auto",
    on_event: OnEvent | None = None,
) -> Iterator[str]:
    """Yield the documents of a corpus.

    Args:
        corpus: chitchat, fineweb-edu, climbmix, or the path of a .txt, .jsonl (field `text`) or .parquet
            (column `text`) file or of a folder of such files; `text.plain` splits a .txt into documents.
        split: train or val.
        n_shards: Number of training shards of a corpus from the Hub, about 100 MB each.
        base_dir: Folder of the shards from the Hub, stored in base_data or base_data_climbmix.
        separator: Mark between the documents of a .txt, as in `text.plain.read_plain`.
        on_event: Called with a note on the marks found in a local corpus, for the train split.

    Raises:
        DataError: The corpus does not exist, cannot be read, or is too short to hold out a part.
        HubError: A shard is missing and cannot be downloaded.
    """
    check_split(split)
    if corpus == "chitchat":
        for turns in read_chats(split):
            yield "\n".join(f"{'AB'[speaker]}: {text}" for speaker, text in turns)
    elif not is_local(corpus):
        for path in shard_paths(corpus, split, n_shards, on_event, base_dir=base_dir):
            yield from read_parquet(path)
    else:
        files, marks = find_files(corpus), Counter[tuple[str, bool]]()
        total, held_out = measure_split(corpus, read_files(files, separator, marks))
        said = describe_marks(corpus, separator, marks)
        if said and on_event and split == "train":
            on_event(NoteEvent(text=said))
        cut = (total - held_out, None) if split == "val" else (0, total - held_out)
        yield from islice(read_files(files, separator), *cut)


def read_conversations(dialogues: str, split: str) -> Iterator[Conversation]:
    """Yield the embedded chats (chitchat) as conversations that a user begins and an assistant ends.

    The split is the same as in `read_documents`. Other sets are read and cleaned by `text.dialogues`.
    """
    check_split(split)
    if dialogues != "chitchat":
        raise DataError(f"dialogues={dialogues!r} must be chitchat; correct it.")
    for turns in read_chats(split):
        messages = assign_roles(turns)
        if messages:
            yield {"messages": messages}


def measure_split(corpus: str, documents: Iterable[str]) -> tuple[int, int]:
    """Return the number of documents in a local corpus and how many of the last ones are held out.

    Raises:
        DataError: There are fewer than two documents, or the held-out text is too short to measure a loss.
    """
    # Lengths of the last documents: MIN_VAL_CHARS documents always have enough characters.
    total = 0
    lengths: deque[int] = deque(maxlen=MIN_VAL_CHARS)
    for text in documents:
        total += 1
        lengths.append(len(text))
    if total < 2:
        rule = "must hold at least 2, one of them for validation; add some"
        raise DataError(f"{corpus} holds {total} document(s) and {rule}.")

    held_out = max(1, total // 20)
    chars = sum(list(lengths)[-held_out:])
    if chars < MIN_VAL_CHARS:
        part = "last document" if held_out == 1 else f"last {held_out} documents"
        raise DataError(
            f"{corpus} holds out {chars} characters for validation (its {part} of {total}), it must be at "
            f"least {MIN_VAL_CHARS}; add text, or put a longer document at the end."
        )
    return total, held_out


def corpus_identity(corpus: str, split: str, *, n_shards: int = 8, separator: str = "auto") -> str:
    """Return a hex SHA-256 that changes when a corpus changes.

    For local files it covers their paths, sizes and modification times, and the mark between documents if
    one of them is a .txt.
    """
    if corpus == "chitchat":
        facts: list[Any] = [chitchat_path().stat().st_size, "turns 1"]
    elif is_local(corpus):
        stats = [(path, path.stat()) for path in find_files(corpus)]
        facts = [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        if separator != "none" and any(path.suffix == ".txt" for path, _ in stats):
            facts.append(["separator", separator])
    else:
        facts = list_shards(corpus, split, n_shards)
    return hashlib.sha256(json.dumps([corpus, split, facts]).encode()).hexdigest()


def check_split(split: str) -> None:
    """Raise DataError for a split other than train and val."""
    if split not in ("train", "val"):
        raise DataError(f"split={split!r} must be train or val; the last part of a corpus is val.")


def split_last(items: tuple[Any, ...], split: str) -> tuple[Any, ...]:
    """Return the last 5 % of items (at least one) for val, the others for train."""
    first_val = len(items) - max(1, len(items) // 20)
    return items[first_val:] if split == "val" else items[:first_val]


# The embedded chats


def read_chats(split: str) -> tuple[Turns, ...]:
    """Return the embedded conversations of a split in file order.

    This is the only place that decides which conversations are held out: the pretraining text, the dialogue
    set, every recipe and every evaluation read from here, so that none trains on what another holds out.
    """
    check_split(split)
    return split_last(load_chitchat(), split)


def chitchat_path() -> Path:
    """Return the path of the data file in the package chitchat-dataset, without importing the package."""
    origin = getattr(find_spec("chitchat_dataset"), "origin", None)
    path = Path(origin or "none").with_name("dataset.json")
    if not origin or not path.is_file():
        raise DataError(f"the text chitchat is not installed; run `{CHITCHAT_INSTALL}`.")
    return path


@lru_cache(maxsize=1)
def load_chitchat() -> tuple[Turns, ...]:
    """Return the embedded conversations in file order; published results refer to exactly this version."""
    try:
        conversations = json.loads(chitchat_path().read_bytes()).values()
        loaded = tuple(read_turns(conversation["messages"]) for conversation in conversations)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{chitchat_path()} cannot be read ({error!r:.80})"
        raise DataError(f"{reason}; run `{CHITCHAT_INSTALL}`.") from None

    # Any other version of the package would change every result.
    held_out = split_last(loaded, "val")
    val_bytes = sum(sum(len(text.encode()) + 4 for _, text in turns) - 1 for turns in held_out)
    found = (len(loaded), len(held_out), val_bytes)
    if found != CHITCHAT_FIGURES:
        said = f"has (documents, held out, their bytes) {found} where version 0.9.0 has {CHITCHAT_FIGURES}"
        raise DataError(f"chitchat-dataset as installed {said}; run `{CHITCHAT_INSTALL}`.")
    return loaded


def read_turns(messages: list[list[dict[str, str]]]) -> Turns:
    """Return (speaker, text) of each turn that has text, with white space collapsed."""
    speakers: dict[str, int] = {}
    turns = []
    for utterances in messages:
        text = " ".join(" ".join(utterance["text"] for utterance in utterances).split())
        if text:
            turns.append((speakers.setdefault(utterances[0]["sender"], len(speakers)), text))
    if len(speakers) > 2:
        raise ValueError("a conversation has more than two speakers")
    return tuple(turns)


def assign_roles(turns: Turns) -> list[dict[str, str]]:
    """Return alternating messages, from the first speaker's first turn to the second speaker's last."""
    messages: list[dict[str, str]] = []
    for speaker, text in turns:
        role = "assistant" if speaker else "user"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f" {text}"
        else:
            messages.append({"role": role, "content": text})
    return messages[: len(messages) // 2 * 2]


# Local files


def find_files(corpus: str) -> list[Path]:
    """Return the text files at a path, a file or a folder, in sorted order."""
    # The functions of os.path, unlike those of pathlib, raise for no name, however odd or long.
    root = Path(os.path.expanduser(corpus))
    if os.path.isdir(root):
        names = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
        shown = (name for name in names if not any(part.startswith(".") for part in name.parts))
        files = [root / name for name in shown if name.suffix in SUFFIXES]
        if files:
            return files
        raise DataError(f"{corpus} holds no {', '.join(SUFFIXES)} file; give a folder that does.")
    if os.path.isfile(root) and root.suffix in SUFFIXES:
        return [root]
    problem = f"is no {', '.join(SUFFIXES)} file" if os.path.isfile(root) else "is not there"
    raise DataError(
        f"corpus={corpus!r} {problem}; give chitchat, {', '.join(HUB_CORPORA)} or the path of such a file."
    )


def read_files(
    files: list[Path], separator: str = "auto", marks: MarkCounts | None = None
) -> Iterator[str]:
    """Yield the non-blank documents of text files; `marks` counts the marks found in .txt files."""
    for path in files:
        if path.suffix == ".txt":
            documents = read_plain(path, separator, marks)
        else:
            documents = read_texts(path) if path.suffix == ".jsonl" else read_parquet(path)
        yield from (text for text in documents if text.strip())


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of each non-blank line of a .jsonl file."""
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                raise DataError(
                    f"{path} line {number} is not JSON ({error}); fix or remove it."
                ) from None


def read_texts(path: Path) -> Iterator[str]:
    """Yield the field `text` of each line of a .jsonl file."""
    for number, row in read_rows(path):
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            rule = "must be an object with the document's text in `text`"
            raise DataError(f"{path} line {number} {describe_row(row)}; it {rule}.")
        yield text


def describe_row(row: Any) -> str:
    """Return a description of a line of a .jsonl file for an error message.

    >>> describe_row({"content": "a", "id": 3})
    'is an object with content, id'
    """
    if isinstance(row, dict):
        if "text" in row:
            return f"has a {type(row['text']).__name__} in `text`"
        if row.keys() & {"messages", "conversations", "conversation"}:
            return "is a conversation, which `primechat finetune --dialogues` reads"
        names = ", ".join(map(str, row))
        return f"is an object with {names:.80}" if row else "is an empty object"
    return f"is a {type(row).__name__}"


def check_column(path: Path, schema: Any) -> None:
    """Raise DataError if a parquet file has no column `text`, or one that does not hold text."""
    if "text" not in schema.names:
        names = ", ".join(schema.names[:8])
        raise DataError(f"{path} has no column `text` (it has {names}); rename the right one.")
    kind = schema.field("text").type
    value = str(getattr(kind, "value_type", kind))  # a dictionary column: the type of its values
    if str(kind).startswith("list") or value not in (
        "string",
        "large_string",
        "string_view",
        "null",
    ):
        raise DataError(
            f"{path} has a column `text` of type {kind}, it must be string; convert the column."
        )


def read_parquet(path: Path) -> Iterator[str]:
    """Yield the non-empty cells of the column `text` of a parquet file."""
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            check_column(path, file.schema_arrow)
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                yield from (
                    text for text in batch.column(0).to_pylist() if isinstance(text, str) and text
                )
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise DataError(
            f"{path} is damaged or no parquet file ({error!s:.80}); replace it."
        ) from None
