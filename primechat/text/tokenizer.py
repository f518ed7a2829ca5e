"""Byte-pair tokenizer: text to token ids and back.

rustbpe learns the merges, tiktoken applies them, and a folder in nanochat's layout stores them. Loading a
folder neither imports torch nor unpickles anything. The identity of a tokenizer is the SHA-256 of its
pattern, its ranks in order and its special tokens.
Reference: Sennrich, Haddow & Birch 2016, Neural Machine Translation of Rare Words with Subword Units, 3.2.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from primechat.errors import DataError
from primechat.files.paths import make_folder, parse_json, write_file
from primechat.protocols import Conversation
from primechat.text import chat_format as talk
from primechat.text.pickles import read_bounded, read_encoding, read_lengths
from primechat.text.pieces import (
    SPLIT_PATTERN,
    cut_long_spaces,
    has_long_space,
    replace_surrogates,
    split_pieces,
)

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
SCHEMA = 1


class Tokenizer:
    """Byte-pair tokenizer whose special tokens follow the learned ones; immutable and thread-safe."""

    def __init__(
        self, pattern: str, ranks: dict[bytes, int], specials: dict[str, int], *, source: str = ""
    ) -> None:
        """Build a tokenizer from a vocabulary after checking it.

        Args:
            pattern: Regular expression that splits text into pieces; merges never cross a split.
            ranks: Id of each token, by its bytes; ids run from 0 to n-1 and the first 256 are single bytes.
            specials: Id of each special token, by its name; they follow the ranks without a gap.
            source: File or name to mention in error messages.

        Raises:
            DataError: The vocabulary breaks one of these rules, or the pattern does not compile.
        """
        if fault := find_broken_rule(pattern, ranks, specials):
            raise DataError(f"{source or 'This'} is no tokenizer: {fault}; use nanochat's or ours.")
        self.pattern = pattern
        self.ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
        self.specials = dict(sorted(specials.items(), key=lambda item: item[1]))
        self.vocab_size = len(ranks) + len(specials)
        self.identity = hash_vocabulary(pattern, self.ranks, self.specials)
        self.provenance: dict[str, Any] = {}
        self._tokens = [*self.ranks, *(name.encode() for name in self.specials)]
        self._lengths_path: Path | None = None
        try:
            self._encoding = tiktoken.Encoding(
                "rustbpe", pat_str=pattern, mergeable_ranks=self.ranks, special_tokens=self.specials
            )
        except ValueError as error:
            raise DataError(
                f"The split pattern does not compile ({error}); use SPLIT_PATTERN."
            ) from None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Return a tokenizer of `vocab_size` tokens learned from texts, including the nine special tokens.

        Raises:
            DataError: `vocab_size` is below 265, or the text has too few pairs to merge.

        Source: Sennrich, Haddow & Birch 2016, algorithm 1, on bytes within the pieces of SPLIT_PATTERN.
        """
        import rustbpe

        if type(vocab_size) is not int or vocab_size < 265:  # 256 bytes and 9 special tokens
            raise DataError(f"vocab_size={vocab_size!r} must be at least 265; try 4096.")

        # Learn the merges.
        trainer = rustbpe.Tokenizer()
        parts = (part for text in texts for part in cut_long_spaces(replace_surrogates(text)))
        trainer.train_from_iterator(parts, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}

        # A short text runs out of pairs before the vocabulary is full.
        size = len(ranks) + len(SPECIAL_TOKENS)
        if size < vocab_size:
            raise DataError(
                f"vocab_size={vocab_size} needs more text; give more or set vocab_size to {size} or less."
            )
        return cls(
            SPLIT_PATTERN, ranks, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Return the tokenizer stored in a folder of nanochat's layout, without unpickling anything.

        Reads `tokenizer.pkl` and, where present, `token_bytes.pt` and `primechat_tokenizer.json`.

        Raises:
            DataError: The folder has no tokenizer, or a file is damaged, unsafe or of another kind.
        """
        folder = Path(folder)
        path = folder / "tokenizer.pkl"
        if not path.is_file():
            found = sorted(item.name for item in folder.iterdir())[:5] if folder.is_dir() else []
            there = (
                f"the folder has {', '.join(found)}"
                if found
                else "the folder is empty or not there"
            )
            remedy = "train one with `primechat train-tokenizer` or give another folder"
            raise DataError(f"{path} is missing ({there}); {remedy}.")

        # The vocabulary.
        state = read_encoding(path)
        if set(state) != {"name", "pat_str", "mergeable_ranks", "special_tokens"}:
            raise DataError(f"{path} has other fields than a tiktoken tokenizer's; replace it.")
        tokenizer = cls(
            state["pat_str"], state["mergeable_ranks"], state["special_tokens"], source=str(path)
        )
        tokenizer._lengths_path = folder / "token_bytes.pt"

        # The note on its origin, if it describes this file.
        note_path = folder / "primechat_tokenizer.json"
        note = read_note(note_path, hashlib.sha256(read_bounded(path)).hexdigest())
        if note and note.get("identity") != tokenizer.identity:
            raise DataError(
                f"{note_path} names another tokenizer than {path.name} has; delete {note_path}."
            )
        tokenizer.provenance = note.get("provenance") or {}
        return tokenizer

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer to a folder in nanochat's layout; do nothing if the folder already holds it.

        Each file is written atomically, `tokenizer.pkl` last.

        Raises:
            DataError: The folder holds another tokenizer, or one that cannot be read.
            PrimechatError: The files cannot be written.
        """
        folder = Path(folder)
        path = folder / "tokenizer.pkl"
        if path.exists():
            there = Tokenizer.load(folder)
            if there.identity != self.identity:
                raise DataError(
                    f"{folder} holds another tokenizer (identity {there.identity[:12]}, vocab_size "
                    f"{there.vocab_size}) that models may need; write to another folder, for example with "
                    "--tag, or move it away."
                )
            return
        import torch

        make_folder(folder)
        pickled = pickle.dumps(self._encoding, protocol=4)
        note = {
            "schema": SCHEMA,
            "identity": self.identity,
            "pkl_sha256": hashlib.sha256(pickled).hexdigest(),
            "vocab_size": self.vocab_size,
            "pattern": self.pattern,
            "specials": self.specials,
            "provenance": self.provenance,
        }
        lengths = io.BytesIO()
        torch.save(torch.from_numpy(self.byte_lengths().copy()), lengths)
        write_file(folder / "token_bytes.pt", lengths.getvalue())
        text = json.dumps(note, indent=2, ensure_ascii=False) + "\n"
        write_file(folder / "primechat_tokenizer.json", text)
        write_file(path, pickled)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text; special tokens that occur in it are encoded as plain text.

        The time is linear in the length of any text. tiktoken is linear too, but very long runs of white
        space overflow its stack: a text with such a run is split at the same places by `split_pieces`, and
        tiktoken merges one piece at a time.
        """
        if type(text) is not str:
            raise DataError(
                f"text={text!r:.40} must be a str, not {type(text).__name__}; decode it."
            )
        if has_long_space(text):
            return self._encode_pieces(text)
        try:
            return self._encoding.encode_ordinary(text)
        except BaseException as error:
            # A failure in Rust code reaches Python as a PanicException.
            if type(error).__name__ != "PanicException":
                raise
            return self._encode_pieces(text)  # a foreign pattern that needs more stack

    def _encode_pieces(self, text: str) -> list[int]:
        """Return the ids of a text, with tiktoken merging one piece at a time and splitting none."""
        merge = self._merging.encode_ordinary
        return [token for piece in split_pieces(text, self.pattern) for token in merge(piece)]

    @cached_property
    def _merging(self) -> tiktoken.Encoding:
        """The same vocabulary with a pattern that treats any text as one piece."""
        return tiktoken.Encoding(
            "whole pieces", pat_str="(?s:.+)", mergeable_ranks=self.ranks, special_tokens={}
        )

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[list[int]]:
        """Return the ids of each text, encoded by `threads` threads (0: one per core)."""
        texts = list(texts)
        threads = min(threads or os.cpu_count() or 1, max(1, len(texts)))
        if threads == 1:
            return [self.encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            parts = split_evenly(texts, 4 * threads)
            found = pool.map(lambda part: [self.encode(text) for text in part], parts)
            return [ids for part in found for ids in part]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are not valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids; the bytes of a special token are its name."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one id; the bytes of a special token are its name."""
        if not 0 <= token_id < self.vocab_size:
            last = self.vocab_size - 1
            raise DataError(
                f"token id {token_id!r} must be from 0 to {last}; use the model's tokenizer."
            )
        return self._tokens[token_id]

    def byte_lengths(self) -> np.ndarray:
        """Return the number of text bytes of each id: int32, (vocab_size,), 0 for special tokens.

        A loaded tokenizer uses its own `token_bytes.pt`: files of October 2025 count non-ASCII tokens
        differently.
        """
        return self._byte_lengths

    @cached_property
    def _byte_lengths(self) -> np.ndarray:
        if self._lengths_path is not None and self._lengths_path.exists():
            lengths = read_lengths(self._lengths_path, self.vocab_size)
        else:
            lengths = np.array([*map(len, self.ranks), *([0] * len(self.specials))], dtype=np.int32)
        lengths.setflags(write=False)
        return lengths

    def special(self, name: str) -> int:
        """Return the id of a special token."""
        if name not in self.specials:
            there = ", ".join(self.specials) or "none"
            raise DataError(f"special token {name!r:.60} is not in this tokenizer; it has {there}.")
        return self.specials[name]

    @property
    def bos_id(self) -> int:
        """Id of the token that begins every document."""
        return self.special("<|bos|>")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end a reply."""
        return (self.special("<|bos|>"), self.special("<|assistant_end|>"))

    def render_conversation(
        self, conversation: Conversation, max_tokens: int = 2048
    ) -> tuple[list[int], list[int]]:
        """Return the ids and the loss mask of a conversation; see `primechat.text.chat_format.render`."""
        return talk.render(self, conversation, max_tokens)

    def render_for_completion(self, conversation: Conversation) -> list[int]:
        """Return the prompt ids for the assistant's next message; an assistant's last message is dropped."""
        return talk.render_prompt(self, conversation)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, identity={self.identity[:12]!r})"


def find_broken_rule(pattern: object, ranks: object, specials: object) -> str:
    """Return the rule of `Tokenizer` that a vocabulary breaks, or an empty string."""
    if type(pattern) is not str:
        return f"the split pattern must be text, not {type(pattern).__name__}"
    if (
        type(ranks) is not dict
        or {*map(type, ranks)} != {bytes}
        or {*map(type, ranks.values())} != {int}
    ):
        return "the ranks must map bytes to whole numbers"
    if len(ranks) < 256 or set(ranks.values()) != set(range(len(ranks))):
        return f"the {len(ranks)} ranks must be 0, 1, 2 ... each once, 256 or more"
    if any(ranks.get(bytes([byte]), 256) > 255 for byte in range(256)) or b"" in ranks:
        return "the first 256 ranks must be the single bytes, and no token empty"
    if (
        type(specials) is not dict
        or {*map(type, specials)} - {str}
        or {*map(type, specials.values())} - {int}
    ):
        return "the special tokens must map names to whole numbers"
    if "" in specials or sorted(specials.values()) != list(
        range(len(ranks), len(ranks) + len(specials))
    ):
        return (
            f"the special tokens must follow the {len(ranks)} ranks without a gap, each with a name"
        )
    return ""


def hash_vocabulary(pattern: str, ranks: dict[bytes, int], specials: dict[str, int]) -> str:
    """Return the identity of a vocabulary as a hex SHA-256; both dictionaries must be sorted by id.

    The hash covers a header, then three lists: [pattern], the tokens, the names of the special tokens. Each
    list is preceded by its length, and each item by its size in bytes (4 bytes each, little-endian).
    """
    digest = hashlib.sha256(b"primechat tokenizer 1\n")
    for group in (
        [pattern.encode("utf-8", "surrogatepass")],
        [*ranks],
        [name.encode() for name in specials],
    ):
        digest.update(len(group).to_bytes(4, "little"))
        digest.update(b"".join(len(item).to_bytes(4, "little") + item for item in group))
    return digest.hexdigest()


def read_note(path: Path, pkl_sha256: str) -> dict[str, Any]:
    """Return primechat's JSON note on a `tokenizer.pkl`, or {} if it is missing or describes another file."""
    if not path.is_file():
        return {}
    try:
        note = parse_json(read_bounded(path))
    except ValueError:
        return {}
    ours = (
        isinstance(note, dict)
        and note.get("schema") == SCHEMA
        and note.get("pkl_sha256") == pkl_sha256
    )
    return note if ours and isinstance(note.get("provenance", {}), dict) else {}


def split_evenly(texts: Sequence[str], parts: int) -> Iterator[Sequence[str]]:
    """Yield at most `parts` consecutive slices with about the same number of characters each."""
    share = sum(map(len, texts)) // parts + 1
    start = size = 0
    for i, text in enumerate(texts):
        size += len(text)
        if size >= share:
            yield texts[start : i + 1]
            start, size = i + 1, 0
    if start < len(texts):
        yield texts[start:]
