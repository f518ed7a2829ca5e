"""Readers of the public dialogue sets, one per schema, for CSV, zipped JSON and parquet files.

A reader yields `Raw` conversations as they are stored; `primechat.text.dialogues` cleans them. No set needs a
loading script.
Reference: the sets' pages on the Hub: google/Synthetic-Persona-Chat, ConvLab/dailydialog,
lmsys/lmsys-chat-1m, argilla/magpie-ultra-v1.0, HuggingFaceTB/smol-smoltalk.
"""

from __future__ import annotations

import csv
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from primechat.errors import DataError
from primechat.files.paths import parse_json

MARKER = re.compile(r"^[ \t]*User ([12])[ \t]*:[ \t]*", re.M)
# A name that was never filled in.
NAME_SLOT = re.compile(r"\[\s*user [12](?:['’`]?s)? name\s*\]", re.I)
CALLED = re.compile(
    r",\s*" + NAME_SLOT.pattern + r"|(?<=\b(?:hi|ey|lo|ye|ks))\s+" + NAME_SLOT.pattern, re.I
)
# `How are you ?` -> `How are you?`
LOOSE = re.compile(r"(?<!\s)\s+(?=[,.?!;:](?:\s|$))|(?<=\w)\s+(?=['’]\s?\w)")
# `it' s` -> `it's`
APART = re.compile(r"(?<=\w['’])\s+(?=(?:s|t|m|d|re|ve|ll)\b)")
PERSONA_SPLITS = (
    ("_train", "train"),
    ("_valid", "val"),
    ("_test", "val"),
    ("New-Persona", "train"),
)


@dataclass(frozen=True)
class Raw:
    """A conversation as stored in a file.

    `split` is "" if the set does not define one; `personas` is (the user's, the assistant's).
    """

    turns: list[tuple[str, Any]]
    split: str = ""
    language: str = "English"
    personas: tuple[str, str] = ("", "")


def read_personas(folder: Path, counts: Counter[str]) -> Iterator[Raw]:
    """Yield Synthetic-Persona-Chat: CSV files with one conversation per cell and turns like `User 1: ...`."""
    for path in find_named(folder, ".csv"):
        split = next((split for part, split in PERSONA_SPLITS if part in path.stem), "train")
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                # The text before the first marker, then a speaker (1 or 2) and a text for each turn.
                text = pick_column(path, row, "Best Generated Conversation")
                pieces = MARKER.split(text or "")
                counts["text before the first speaker"] += bool(pieces[0].strip())

                # Remove unfilled names of persons addressed; drop the conversation if others are left.
                turns = []
                for speaker, said in zip(pieces[1::2], pieces[2::2], strict=True):
                    filled, n = CALLED.subn("", said)
                    counts["unfilled names removed"] += n
                    turns.append(("user" if speaker == "1" else "assistant", filled))
                if any(NAME_SLOT.search(said) for _, said in turns):
                    counts["conversations with an unfilled name"] += 1
                    continue

                facts = tuple((row.get(f"user {n} personas") or "").strip() for n in (1, 2))
                yield Raw(turns, split, personas=(facts[0], facts[1]))


def read_dailydialog(folder: Path, counts: Counter[str]) -> Iterator[Raw]:
    """Yield DailyDialog: one zipped JSON list for all splits; its spaces before punctuation are removed."""
    for path in find_named(folder, ".zip"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = [n for n in archive.namelist() if n.rpartition("/")[2] == "dialogues.json"]
                if not names:
                    raise DataError(f"{path} holds no dialogues.json; fetch it again.")
                rows = parse_json(archive.read(names[0]))
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise DataError(
                f"{path} is damaged or no zip of JSON ({error!s:.60}); fetch it again."
            ) from None
        for row in rows:
            said = [(str(t["speaker"]), LOOSE.sub("", str(t["utterance"]))) for t in row["turns"]]
            turns = [
                ("assistant" if who == "system" else who, APART.sub("", text)) for who, text in said
            ]
            yield Raw(turns, "train" if row.get("data_split") == "train" else "val")


def read_lmsys(folder: Path, counts: Counter[str]) -> Iterator[Raw]:
    """Yield LMSYS-Chat-1M, with each conversation cut before the first exchange that moderation flagged."""
    columns = ("conversation", "language", "openai_moderation", "redacted")
    for row in read_parquet_rows(folder, columns):
        turns = [(m["role"], m["content"]) for m in row["conversation"]]
        flags = [bool(m and m.get("flagged")) for m in row.get("openai_moderation") or []]
        if any(flags):
            first = flags.index(True)
            first -= bool(first < len(turns) and turns[first][0] == "assistant" and first)
            counts["moderated turns"] += len(turns) - first
            turns = turns[:first]
        counts["conversations with redacted names"] += bool(row.get("redacted"))
        yield Raw(turns, language=row.get("language") or "unknown")


def read_message_columns(folder: Path, counts: Counter[str]) -> Iterator[Raw]:
    """Yield the conversations of parquet files with a column `messages` or `conversation`."""
    for row in read_parquet_rows(folder, ("messages|conversation",)):
        turns = [(m.get("role"), m.get("content")) for m in row["messages"]]
        yield Raw(turns, split=row["split"])


def read_parquet_rows(folder: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the rows of parquet files with only the given columns, plus `split`.

    The first column is required, and `a|b` accepts either name; the others are optional. `split` is val in
    files named test or validation, else "".
    """
    import pyarrow.parquet as pq

    for path in find_named(folder, ".parquet"):
        held_out = path.name.startswith(("test", "valid"))
        try:
            with pq.ParquetFile(path) as file:
                there = set(file.schema_arrow.names)
                either = columns[0].split("|")
                first = next((name for name in either if name in there), None)
                if first is None:
                    has, wanted = ", ".join(sorted(there)[:8]), " or ".join(either)
                    raise DataError(
                        f"{path} has no column {wanted} (it has {has}); fetch it again."
                    )
                names = [first, *(name for name in columns[1:] if name in there)]
                for batch in file.iter_batches(batch_size=512, columns=names):
                    for row in batch.to_pylist():
                        row[either[0]] = row[first] or []
                        yield {**row, "split": "val" if held_out else ""}
        except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
            raise DataError(
                f"{path} is damaged or no parquet file ({error!s:.80}); replace it."
            ) from None


def find_named(folder: Path, suffix: str) -> list[Path]:
    """Return the files with a suffix below a folder in sorted order.

    Raises:
        DataError: There is no such file.
    """
    files = sorted(p for p in folder.rglob(f"*{suffix}") if ".download" not in p.parts)
    if not files:
        raise DataError(
            f"{folder} holds no {suffix} file; fetch the set again, or copy its files there."
        )
    return files


def pick_column(path: Path, row: dict[str, Any], name: str) -> str:
    """Return a cell of a CSV row by the name of its column."""
    if name not in row:
        has = ", ".join(map(str, row))[:80]
        raise DataError(f"{path} has no column {name!r} (it has {has}); replace it.")
    return str(row[name] or "")
