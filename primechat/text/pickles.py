"""Reads the two pickled files of a tokenizer folder without unpickling anything.

Hides: the pickle machine. `read_encoding` interprets the few opcodes that `pickle.dump(tiktoken.Encoding)`
needs, on inert values only: no import, no call, no instance, so a hostile file has nothing to run; any other
opcode is refused by name. Memory stays within a small multiple of the file, whose size is bounded.
Reference: the opcode table of CPython's `pickletools`.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from primechat.errors import DataError

MAX_FILE_BYTES = 32 * 2**20  # a 65,536-token file is 1.3 MB, a million tokens are 20
_OPCODE_NAMES = {ord(op.code): op.name for op in pickletools.opcodes}
_CLASS, _ARGS, _OBJECT = object(), object(), object()  # stand for tiktoken.core.Encoding, () and the instance


def read_bounded(path: Path) -> bytes:
    """Return a file's bytes, unless it is missing, empty or larger than any tokenizer."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}); check that it is a readable file."
        ) from None
    if not data:
        raise DataError(f"{path} has 0 bytes, so it holds no tokenizer; copy it again from where it came.")
    if len(data) > MAX_FILE_BYTES:
        raise DataError(
            f"{path} is larger than {MAX_FILE_BYTES >> 20} MB, the most a tokenizer file may have; "
            "give a nanochat tokenizer."
        )
    return data


def read_encoding(path: Path) -> dict[str, Any]:
    """Return the state of the one `tiktoken.core.Encoding` that a pickle holds, running nothing.

    Args:
        path: A `tokenizer.pkl` in nanochat's layout.

    Returns:
        The fields `name`, `pat_str`, `mergeable_ranks`, `special_tokens`, their contents unchecked.

    Raises:
        DataError: The file is anything else than such a pickle.
    """
    data = read_bounded(path)
    try:
        state = _interpret(data)
    except _RefusedError as refusal:
        reason = str(refusal)
    except (IndexError, KeyError, UnicodeDecodeError):
        reason = "it is truncated or damaged"
    else:
        return state
    raise DataError(
        f"{path} is not a plain tiktoken tokenizer: {reason}; nothing in it was run, "
        "replace it with a file that you trust."
    )


class _RefusedError(Exception):
    """Why a pickle was refused."""


def _interpret(data: bytes) -> dict[str, Any]:
    stack: list[Any] = []
    marks: list[int] = []
    memo: list[Any] = []
    state: dict[str, Any] | None = None
    seen_class = seen_object = False
    dicts = 0
    position, end = 0, len(data)
    if data[:1] != b"\x80":
        raise _RefusedError("it does not begin like a pickle of protocol 2 or later")

    def take(count: int) -> bytes:
        nonlocal position
        if position + count > end:
            raise _RefusedError(f"it is cut off after {end} bytes")
        position += count
        return data[position - count : position]

    while position < end:
        code = data[position]
        position += 1
        if code == 0x94:  # MEMOIZE
            memo.append(stack[-1])
        elif code == 0x43:  # SHORT_BINBYTES
            stack.append(take(take(1)[0]))
        elif code == 0x4D:  # BININT2
            stack.append(int.from_bytes(take(2), "little"))
        elif code == 0x4B:  # BININT1
            stack.append(take(1)[0])
        elif code == 0x4A:  # BININT
            stack.append(int.from_bytes(take(4), "little", signed=True))
        elif code == 0x42:  # BINBYTES
            stack.append(take(int.from_bytes(take(4), "little")))
        elif code == 0x8C:  # SHORT_BINUNICODE
            stack.append(take(take(1)[0]).decode("utf-8"))
        elif code == 0x58:  # BINUNICODE
            stack.append(take(int.from_bytes(take(4), "little")).decode("utf-8"))
        elif code == 0x68:  # BINGET
            stack.append(memo[take(1)[0]])
        elif code == 0x6A:  # LONG_BINGET
            stack.append(memo[int.from_bytes(take(4), "little")])
        elif code == 0x28:  # MARK
            if len(marks) == 2:
                raise _RefusedError("its dictionaries are nested too deeply")
            marks.append(len(stack))
        elif code == 0x7D:  # EMPTY_DICT
            dicts += 1
            if dicts > 3:
                raise _RefusedError("it holds more than three dictionaries")
            stack.append({})
        elif code in (0x73, 0x75):  # SETITEM, SETITEMS
            start = marks.pop() if code == 0x75 else len(stack) - 2
            keys, values = stack[start::2], stack[start + 1 :: 2]
            target = stack[start - 1] if start > 0 else None
            if type(target) is not dict or len(keys) != len(values):
                raise _RefusedError("it fills something that is no dictionary")
            if not all(type(key) in (str, bytes) for key in keys):
                raise _RefusedError("a dictionary key in it is neither text nor bytes")
            target.update(zip(keys, values, strict=True))
            del stack[start:]
        elif code == 0x93:  # STACK_GLOBAL
            name, module = stack.pop(), stack.pop()
            if (module, name) != ("tiktoken.core", "Encoding") or seen_class:
                which = "a second global" if seen_class else "the global"
                raise _RefusedError(f"it names {which} {f'{module} {name}'[:80]!r}")
            seen_class = True
            stack.append(_CLASS)
        elif code == 0x29:  # EMPTY_TUPLE
            stack.append(_ARGS)
        elif code == 0x81:  # NEWOBJ
            args, cls = stack.pop(), stack.pop()
            if cls is not _CLASS or args is not _ARGS or seen_object:
                raise _RefusedError("it makes an object in an unknown way")
            seen_object = True
            stack.append(_OBJECT)
        elif code == 0x62:  # BUILD
            built = stack.pop()
            if stack != [_OBJECT] or type(built) is not dict or state is not None:
                raise _RefusedError("it sets an object's state in an unknown way")
            state = built
        elif code == 0x2E:  # STOP
            if state is None or stack != [_OBJECT] or marks or position != end:
                raise _RefusedError("it holds more or less than one tokenizer")
            return state
        elif code == 0x80:  # PROTO
            if take(1)[0] not in (2, 3, 4, 5):
                raise _RefusedError("its pickle protocol is unknown")
        elif code == 0x95:  # FRAME: only a hint for buffering
            take(8)
        else:
            raise _RefusedError(f"it uses the pickle opcode {_OPCODE_NAMES.get(code, hex(code))}")
    raise _RefusedError(f"it is cut off after {end} bytes")


def read_lengths(path: Path, vocab_size: int) -> np.ndarray:
    """Return the numbers of a `token_bytes.pt`, taken from its raw storage.

    Args:
        path: What `torch.save` wrote of a one-dimensional int32 tensor.
        vocab_size: How many numbers it must hold.

    Returns:
        int32 (vocab_size,).

    Raises:
        DataError: The file holds anything else.
    """
    read_bounded(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {name.partition("/")[2]: archive.getinfo(name) for name in archive.namelist()}
            if "byteorder" in entries and archive.read(entries["byteorder"])[:16] != b"little":
                raise ValueError("it is not little-endian")
            if entries["data.pkl"].file_size > 4096 or entries["data/0"].file_size != 4 * vocab_size:
                raise ValueError(f"it must hold {vocab_size} numbers of 4 bytes")
            described = list(pickletools.genops(archive.read(entries["data.pkl"])))
            globals_ = {str(arg) for op, arg, _ in described if op.name in ("GLOBAL", "INST")}
            numbers = [arg for op, arg, _ in described if op.name.startswith("BININT")]
            if not globals_ <= {
                "torch._utils _rebuild_tensor_v2", "torch IntStorage", "collections OrderedDict"
            } or numbers != [vocab_size, 0, vocab_size, 1]:  # fmt: skip
                raise ValueError(f"it must be a plain int32 tensor of {vocab_size} numbers")
            lengths = np.frombuffer(archive.read(entries["data/0"]), dtype="<i4").astype(np.int32)
        if lengths.min() < 0:
            raise ValueError("a length in it is negative")
        return lengths
    except (
        zipfile.BadZipFile,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        RuntimeError,
        NotImplementedError,
    ) as error:
        raise DataError(
            f"{path} is no table of byte lengths for {vocab_size} tokens ({error}); "
            "delete it, the lengths then come from the tokens."
        ) from None
