"""Safe readers of the two pickled files in a tokenizer folder, which unpickle nothing.

They accept only what `pickle.dump(tiktoken.Encoding)` and `torch.save` write, as inert values; anything else
is refused by name. The size of the files is bounded.
Reference: tiktoken.core.Encoding.__getstate__; `primechat.files.safe_load`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from primechat.errors import DataError
from primechat.files.archives import TensorSpec, inspect_tensors, read_storage
from primechat.files.safe_load import PickleReader

MAX_FILE_BYTES = 32 * 2**20  # a vocabulary of 65,536 tokens takes 1.3 MB, one of a million 20 MB


def read_bounded(path: Path) -> bytes:
    """Return the bytes of a file.

    Raises:
        DataError: The file is missing, empty or larger than any tokenizer file.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"{path} cannot be read ({reason}); check that it is a readable file."
        ) from None
    if 0 < len(data) <= MAX_FILE_BYTES:
        return data
    size = (
        f"is larger than {MAX_FILE_BYTES >> 20} MB, the most a tokenizer file may have"
        if data
        else "has 0 bytes"
    )
    raise DataError(f"{path} {size}; copy it again from where it came.")


class EncodingReader(PickleReader):
    """Reader of the pickle of one tiktoken Encoding; its state is appended to `states`."""

    opcodes = frozenset(
        "PROTO FRAME STOP MARK EMPTY_DICT SETITEM SETITEMS EMPTY_TUPLE BININT BININT1 BININT2 BINUNICODE "
        "SHORT_BINUNICODE BINBYTES SHORT_BINBYTES MEMOIZE BINGET LONG_BINGET STACK_GLOBAL NEWOBJ "
        "BUILD".split()
    )
    max_containers = 3  # the state, its ranks and its special tokens

    def __init__(self) -> None:
        self.names: list[str] = []
        self.objects: list[object] = []
        self.states: list[dict[str, Any]] = []

    def admit(self, name: str) -> str:
        """Accept the name of the class, once."""
        self.names.append(name)
        if self.names != ["tiktoken.core Encoding"]:
            raise ValueError(
                f"it names {'a second' if self.names[1:] else 'the'} global {name[:80]!r}"
            )
        return name

    def call(self, function: Any, args: Any) -> object:
        """Return a placeholder for the instance, once."""
        if self.objects or function is not self.names[0] or args != ():
            raise ValueError("it makes an object in an unknown way")
        self.objects.append(object())
        return self.objects[0]

    def build(self, target: Any, state: Any) -> None:
        """Record the state of the instance, once."""
        if self.states or target not in self.objects or type(state) is not dict:
            raise ValueError("it sets an object's state in an unknown way")
        self.states.append(state)


def read_encoding(path: Path) -> dict[str, Any]:
    """Return the state of the one `tiktoken.core.Encoding` in a pickle, without running anything.

    A state has the keys `name`, `pat_str`, `mergeable_ranks` and `special_tokens`; it is not checked here.

    Raises:
        DataError: The file is not such a pickle.
    """
    data, reader = read_bounded(path), EncodingReader()
    try:
        if reader.read(data) not in reader.objects or not reader.states:
            raise ValueError("it holds more or less than one tokenizer")
    except ValueError as error:
        raise DataError(
            f"{path} is not a plain tiktoken tokenizer: {error}; nothing in it was run, "
            "replace it with a file that you trust."
        ) from None
    return reader.states[0]


def read_lengths(path: Path, vocab_size: int) -> np.ndarray:
    """Return the byte lengths in a `token_bytes.pt`, int32 (vocab_size,), read from its raw storage.

    Raises:
        DataError: The file does not hold such a tensor.
    """
    try:
        spec = inspect_tensors(path)
        plain = (
            isinstance(spec, TensorSpec)
            and spec.dtype == "IntStorage"
            and spec.shape == (vocab_size,)
        )
        if not plain or spec.storage.n_items != vocab_size:
            raise ValueError(f"it must be a plain int32 tensor of {vocab_size} numbers")
        lengths = np.frombuffer(read_storage(path, spec.storage), dtype="<i4").astype(np.int32)
        if lengths.min() < 0:
            raise ValueError("a length in it is negative")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is no table of byte lengths for {vocab_size} tokens ({error}); "
            "delete it, the lengths then come from the tokens."
        ) from None
    return lengths
