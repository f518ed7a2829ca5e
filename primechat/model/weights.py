"""Reading .pt and .json files that anyone may have made.

Hides: how a torch archive is laid out. Before torch sees a file, its zip directory and its pickle are read
here by an interpreter that knows 30 opcodes and calls nothing: so a file can neither run code nor claim
more memory than it has bytes. Torch is imported to read tensors only. Reference: torch.serialization;
pickletools (protocol 2).
"""

from __future__ import annotations

import json
import math
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from primechat.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

MAX_JSON_BYTES = 16 * 2**20
MAX_MAPPED_BYTES = 128 * 2**20  # of a file's pages held while its tensors are cast
MERGED = ("c_q.weight", "c_k.weight", "c_v.weight")  # GPT.from_state copies them: not from mapped pages
MAX_PICKLE_BYTES = 4 * 2**20  # a 256-layer model takes 0.5 MB
MAX_DIRECTORY_BYTES = 4 * 2**20
ITEM_BYTES = {
    "DoubleStorage": 8, "LongStorage": 8, "FloatStorage": 4, "IntStorage": 4, "HalfStorage": 2,
    "BFloat16Storage": 2, "ShortStorage": 2, "ByteStorage": 1, "CharStorage": 1, "BoolStorage": 1,
}  # fmt: skip
FLOATS = {"FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"}
VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE")
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
REBUILD = "torch._utils _rebuild_tensor_v2"


@dataclass(frozen=True)
class Name:
    """A global that a pickle mentions; it is never looked up."""

    text: str


@dataclass(frozen=True)
class Storage:
    """Bytes of the archive that tensors look into."""

    kind: str
    key: str
    n_items: int


@dataclass(frozen=True)
class TensorSpec:
    """Where a tensor lies and what shape it claims."""

    storage: Storage
    start: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """float32, float16 or bfloat16; other kinds keep the storage's name."""
        return FLOATS.get(self.storage.kind, self.storage.kind)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of at most 16 MB.

    Raises:
        CheckpointError: missing, too large, not JSON, or not an object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} has {size:,} bytes, a file of settings has at most {MAX_JSON_BYTES:,}; restore it."
            )
        data = json.loads(path.read_bytes())
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read ({e.strerror}); restore it from a backup.") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not JSON; restore it from a backup.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, it must hold an object; restore it.")
    return data


def inspect_archive(path: Path) -> Any:
    """Return what a .pt file holds, with a `TensorSpec` in place of each tensor, without torch.

    Raises:
        CheckpointError: it is damaged, wants to call something, or claims more bytes than it has.
    """
    try:
        data, sizes = read_directory(path)
        value = interpret_pickle(data, sizes)
        check_overlaps(value)
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read ({e.strerror}); restore it from a backup.") from None
    except (
        zipfile.BadZipFile,
        struct.error,
        ValueError,
        LookupError,
        TypeError,
        ArithmeticError,
        RuntimeError,
        EOFError,
    ) as e:
        raise CheckpointError(
            f"{path} is no sound weight file ({cut_reason(e)}); fetch or save it again."
        ) from None
    return value


def cut_reason(error: Exception) -> str:
    """Return the first words of an error that may quote a hostile file, printable."""
    return "".join(c if c.isprintable() else " " for c in str(error)[:160]) or type(error).__name__


def read_directory(path: Path) -> tuple[bytes, dict[str, int]]:
    """Return the pickle of a .pt file and the bytes of each storage; ValueError where the archive lies."""
    size = path.stat().st_size
    with path.open("rb") as f:
        f.seek(max(0, size - 22))
        tail = f.read(22)
        if len(tail) < 22 or tail[:4] != b"PK\x05\x06":
            raise ValueError(
                f"its {size:,} bytes do not end as a torch archive: empty, cut short, or of another kind"
            )
        if struct.unpack("<I", tail[12:16])[0] > MAX_DIRECTORY_BYTES:
            raise ValueError("its directory is too large")
        f.seek(0)
        with zipfile.ZipFile(f) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if len(set(names)) != len(names):
                raise ValueError("two entries share a name")
            if any(e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size for e in entries):
                raise ValueError("an entry is compressed, torch stores them plainly")
            if sum(e.file_size for e in entries) > size:
                raise ValueError("its entries claim more bytes than the file has")
            pickles = [e for e in entries if e.filename.count("/") == 1 and e.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
                raise ValueError("it must hold one data.pkl of at most 4 MB")
            stem = pickles[0].filename[: -len("data.pkl")]
            if any(not name.startswith(stem) for name in names) or stem + "constants.pkl" in names:
                raise ValueError("it is not what torch.save writes")
            order = next((e for e in entries if e.filename == stem + "byteorder"), None)
            if order is not None and (order.file_size > 8 or archive.read(order) != b"little"):
                raise ValueError("its numbers are not little-endian")
            prefix = stem + "data/"
            sizes = {e.filename[len(prefix) :]: e.file_size for e in entries if e.filename.startswith(prefix)}
            return archive.read(pickles[0]), sizes


def interpret_pickle(data: bytes, sizes: dict[str, int]) -> Any:
    """Follow a pickle of plain containers and tensors, calling nothing; ValueError at anything else."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    def fill(items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int)) or not isinstance(stack[-1], dict):
                raise ValueError(f"a {type(key).__name__} is used as a key")
            stack[-1][key] = value

    def extend(items: list[Any]) -> None:
        if not isinstance(stack[-1], list):
            raise ValueError("something that is no list is appended to")
        stack[-1].extend(items)

    arg: Any
    for opcode, arg, _ in pickletools.genops(data):
        op = opcode.name
        if op in VALUES:
            stack.append(arg)
        elif op in CONSTANTS:
            stack.append(CONSTANTS[op])
        elif op in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif op == "MARK":
            marks.append(len(stack))
        elif op in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[op])
        elif op == "TUPLE":
            stack.append(tuple(since_mark()))
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(op[-1])
            stack[-n:] = [tuple(stack[-n:])]
        elif op == "SETITEMS":
            fill(since_mark())
        elif op == "SETITEM":
            pair = stack[-2:]
            del stack[-2:]
            fill(pair)
        elif op == "APPENDS":
            extend(since_mark())
        elif op == "APPEND":
            extend([stack.pop()])
        elif op == "GLOBAL":
            check_global(arg)
            stack.append(Name(arg))
        elif op == "BINPERSID":
            stack.append(read_storage(stack.pop(), sizes))
        elif op == "REDUCE":
            args, function = stack.pop(), stack.pop()
            stack.append(rebuild_value(function, args))
        elif op == "BUILD":  # the _metadata of a state_dict: nothing that we need
            if not isinstance(stack.pop(), dict) or not isinstance(stack[-1], dict):
                raise ValueError("it sets the state of an object")
        elif op == "STOP":
            if len(stack) != 1:
                raise ValueError("its pickle ends too early")
        elif op != "PROTO":
            raise ValueError(f"its pickle uses the operation {op}")
    return stack[0]


def check_global(name: str) -> None:
    """Refuse a global that no file of weights needs."""
    module, _, attribute = name.partition(" ")
    if name in ("collections OrderedDict", REBUILD) or (module == "torch" and attribute in ITEM_BYTES):
        return
    raise ValueError(
        f"it asks for {name.replace(' ', '.')!r}, weights need tensors and plain containers only"
    )


def read_storage(claim: Any, sizes: dict[str, int]) -> Storage:
    """Return the storage that a persistent id names, if the archive holds exactly its bytes."""
    word, kind, key, _, n_items = claim
    described = isinstance(kind, Name) and isinstance(key, str) and type(n_items) is int
    if word != "storage" or not described or kind.text[6:] not in ITEM_BYTES:
        raise ValueError("a storage is described wrongly")
    storage = Storage(kind.text[6:], key, n_items)
    if sizes[key] != n_items * ITEM_BYTES[storage.kind]:
        raise ValueError(f"storage {key} claims {n_items:,} numbers, the file has {sizes[key]:,} bytes of it")
    return storage


def rebuild_value(function: Any, args: Any) -> Any:
    """Return an empty dict for OrderedDict(), or the spec of a tensor whose numbers lie in its storage."""
    if function == Name("collections OrderedDict") and args == ():
        return {}
    if function != Name(REBUILD) or not isinstance(args, tuple) or not 6 <= len(args) <= 7:
        raise ValueError("it calls something that rebuilds no tensor")
    storage, start, shape, stride = args[:4]
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise ValueError("a tensor is described wrongly")
    if any(type(n) is not int or n < 0 for n in (start, *shape, *stride)) or len(shape) > 8:
        raise ValueError("a tensor has a size or stride that is no whole number")
    n_items = math.prod(shape)
    if start + n_items > storage.n_items:
        raise ValueError(f"a tensor of shape {shape} looks into {storage.n_items:,} stored numbers")
    expected = 1
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        if n_items > 0 and length > 1 and step != expected:
            raise ValueError(f"a tensor of shape {shape} has strides {stride}, its numbers must lie in a row")
        expected *= length
    return TensorSpec(storage, start, shape)


def check_overlaps(value: Any) -> None:
    """Refuse tensors that share stored numbers: a small file could seem large so."""
    spans: dict[int, tuple[str, int, int]] = {}
    seen, todo = set(), [value]
    while todo:
        item = todo.pop()
        if isinstance(item, TensorSpec):
            spans[id(item)] = (item.storage.key, item.start, item.start + math.prod(item.shape))
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            todo.extend(item.values() if isinstance(item, dict) else item)
    ordered = sorted(span for span in spans.values() if span[1] < span[2])
    for (key, _, end), (other, start, _) in zip(ordered, ordered[1:], strict=False):
        if key == other and start < end:
            raise ValueError("two tensors share stored numbers")


def load_tensors(path: Path) -> Any:
    """Return what an inspected .pt file holds, its tensors mapped from the file, on the CPU.

    Raises:
        CheckpointError: as `inspect_archive`, or torch refuses it.
    """
    inspect_archive(path)
    return read_mapped(path)


def read_mapped(path: Path) -> Any:
    """Return what torch reads from a file that was inspected before."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # torch raises whatever a damaged file makes it stumble over
        raise CheckpointError(
            f"{path} is refused by torch ({cut_reason(e)}); fetch or save it again."
        ) from None


def inspect_model(path: Path) -> dict[str, TensorSpec]:
    """Return the tensors of a model file by name, `_orig_mod.` removed, without torch.

    Raises:
        CheckpointError: as `inspect_archive`, or it is no flat dictionary of floating-point tensors.
    """
    value = inspect_archive(path)
    if not isinstance(value, dict) or not value:
        raise CheckpointError(f"{path} holds no dictionary of tensors; it is not a nanochat model.")
    specs: dict[str, TensorSpec] = {}
    for key, spec in value.items():
        name = str(key).removeprefix("_orig_mod.")
        if not isinstance(key, str) or not isinstance(spec, TensorSpec) or spec.dtype not in FLOATS.values():
            raise CheckpointError(
                f"{path}: {name[:80]!r} is no floating-point tensor; it is not a nanochat model."
            )
        if name in specs:
            raise CheckpointError(f"{path} holds {name!r} twice, with and without _orig_mod.; save it again.")
        specs[name] = spec
    return specs


def load_model(path: Path, specs: dict[str, TensorSpec], dtype: str = "") -> dict[str, Tensor]:
    """Return the tensors of a model file by name, `_orig_mod.` removed.

    Args:
        path: the file.
        specs: what `inspect_model` said of it.
        dtype: float32 or bfloat16 to cast to; most tensors that have it already, and all where it is empty,
            stay mapped from the file. Of what is copied, the file's pages are let go: at most 128 MB or one
            tensor of them are in memory at a time.

    Raises:
        CheckpointError: torch refuses it, or reads other shapes than were inspected.
    """
    import torch

    tensors, cast, mapped = map_model(path, specs), {}, 0
    todo = [key for key, spec in specs.items() if dtype and (spec.dtype != dtype or key.endswith(MERGED))]
    for key in sorted(todo, key=lambda key: -tensors[key].nbytes):  # the largest while little else is there
        n_bytes = tensors[key].nbytes
        if mapped and mapped + n_bytes > MAX_MAPPED_BYTES:
            tensors, mapped = map_model(path, specs), 0  # the pages read so far go with the old mapping
        cast[key] = tensors[key].to(getattr(torch, dtype), copy=True)
        mapped += n_bytes
    return {**(map_model(path, specs) if cast else tensors), **cast}


def map_model(path: Path, specs: dict[str, TensorSpec]) -> dict[str, Tensor]:
    """Return the tensors of an inspected model file by name, mapped from it."""
    tensors = {key.removeprefix("_orig_mod."): tensor for key, tensor in dict(read_mapped(path)).items()}
    found = {key: (tuple(t.shape), str(t.dtype)) for key, t in tensors.items()}
    if found != {key: (spec.shape, f"torch.{spec.dtype}") for key, spec in specs.items()}:
        raise CheckpointError(f"{path} reads differently to torch than to its inspection; fetch it again.")
    return tensors
