"""Inspection of untrusted .pt files without torch.

Hides: the layout of a torch archive. Its zip directory and its pickle are checked here before torch reads the
file, so that a file can neither run code nor claim more memory than it has bytes. Every fault is reported as
a ValueError with a printable message. Reference: torch.serialization; pickletools (protocol 2).
"""

from __future__ import annotations

import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from primechat.files.safe_load import PickleReader

MAX_PICKLE_BYTES = 4 * 2**20  # a 256-layer model takes 0.5 MB
MAX_DIRECTORY_BYTES = 4 * 2**20
ITEM_BYTES = {
    "DoubleStorage": 8,
    "LongStorage": 8,
    "FloatStorage": 4,
    "IntStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "ShortStorage": 2,
    "ByteStorage": 1,
    "CharStorage": 1,
    "BoolStorage": 1,
}
FLOATS = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
}
ORDERED_DICT, REBUILD = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
NAMES = {ORDERED_DICT, REBUILD, *(f"torch {kind}" for kind in ITEM_BYTES)}
DAMAGE = (  # what reading a damaged archive may raise
    zipfile.BadZipFile,
    struct.error,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,
    EOFError,
)


@dataclass(frozen=True)
class Name:
    """A global that a pickle mentions; it is never imported."""

    text: str


@dataclass(frozen=True)
class Storage:
    """A storage of the archive, which tensors view."""

    kind: str
    key: str
    n_items: int


@dataclass(frozen=True)
class TensorSpec:
    """Location and shape of a tensor in an archive."""

    storage: Storage
    start: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """The dtype: float64, float32, float16 or bfloat16; else the name of the storage type."""
        return FLOATS.get(self.storage.kind, self.storage.kind)


class TensorReader(PickleReader):
    """Reader of the data.pkl of a torch archive: plain containers with a `TensorSpec` for each tensor."""

    opcodes = frozenset(
        "PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE EMPTY_DICT "
        "SETITEM SETITEMS EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 BINPUT "
        "LONG_BINPUT BINGET LONG_BINGET GLOBAL REDUCE BUILD BINPERSID".split()
    )

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes  # size of each storage in bytes

    def admit(self, name: str) -> Name:
        """Return the placeholder of a global, if a file of weights may need it."""
        if name not in NAMES:
            wish = ascii(name.replace(" ", ".")[:80])
            raise ValueError(f"it asks for {wish}, weights need tensors and plain containers only")
        return Name(name)

    def find(self, claim: Any) -> Storage:
        """Return the storage that a persistent id names, if the archive holds exactly that many bytes."""
        word, name, key, _, n_items = claim
        kind = name.text.removeprefix("torch ") if isinstance(name, Name) else ""
        if (
            word != "storage"
            or kind not in ITEM_BYTES
            or type(key) is not str
            or type(n_items) is not int
        ):
            raise ValueError("a storage is described wrongly")
        if self.sizes[key] != n_items * ITEM_BYTES[kind]:
            raise ValueError(
                f"a storage claims {n_items:,} numbers, it has {self.sizes[key]:,} bytes"
            )
        return Storage(kind, key, n_items)

    def call(self, function: Any, args: Any) -> Any:
        """Return {} for OrderedDict(), or the spec of a contiguous tensor that lies within its storage."""
        if function == Name(ORDERED_DICT) and args == ():
            return {}
        if function != Name(REBUILD):
            raise ValueError("it calls something that rebuilds no tensor")

        # Check the types of the arguments.
        match args:
            case (
                Storage() as storage,
                int() as start,
                tuple() as shape,
                tuple() as stride,
                _,
                _,
                *_,
            ):
                pass
            case _:
                raise ValueError("a tensor is described wrongly")
        if any(type(n) is not int or n < 0 for n in (start, *shape, *stride)) or len(shape) > 8:
            raise ValueError("a tensor has a size or stride that is no whole number")

        # Check the bounds, then the strides.
        n_items = math.prod(shape)
        if start + n_items > storage.n_items:
            raise ValueError(
                f"a tensor of shape {shape} looks into {storage.n_items:,} stored numbers"
            )
        expected = 1
        for length, step in zip(reversed(shape), reversed(stride), strict=True):
            if n_items > 0 and length > 1 and step != expected:
                raise ValueError(
                    f"the numbers of a tensor of shape {shape} do not lie in a row: {stride}"
                )
            expected *= length
        return TensorSpec(storage, start, shape)

    def build(self, target: Any, state: Any) -> None:
        """Ignore the `_metadata` of a state_dict."""
        if type(target) is not dict or type(state) is not dict:
            raise ValueError("it sets the state of an object")


def inspect_tensors(path: Path) -> Any:
    """Return the value in a .pt file without torch, with a `TensorSpec` in place of each tensor.

    Raises:
        ValueError: The file is damaged, calls a function, or claims more bytes than it has.
        OSError: The file cannot be read.
    """
    try:
        data, sizes = read_directory(path)
        value = TensorReader(sizes).read(data)
        check_overlaps(value)
    except DAMAGE as error:
        raise ValueError(cut_reason(error)) from None
    return value


def cut_reason(error: Exception) -> str:
    """Return the first 160 characters of an error that may quote a hostile file, made printable."""
    return "".join(c if c.isprintable() else " " for c in str(error)[:160]) or type(error).__name__


def read_directory(path: Path) -> tuple[bytes, dict[str, int]]:
    """Return the pickle of a .pt file and the size of each storage in bytes.

    Raises:
        ValueError: The archive is damaged, inconsistent or not as torch.save writes it.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        # The end record bounds the directory before zipfile reads it.
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
            # Entries are unique, uncompressed and no larger than the file.
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if len(set(names)) != len(names):
                raise ValueError("two entries share a name")
            if any(
                e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size
                for e in entries
            ):
                raise ValueError("an entry is compressed, torch stores them plainly")
            if sum(e.file_size for e in entries) > size:
                raise ValueError("its entries claim more bytes than the file has")

            # There is one pickle, and every entry is in its folder.
            pickles = [
                e
                for e in entries
                if e.filename.count("/") == 1 and e.filename.endswith("/data.pkl")
            ]
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
                raise ValueError("it must hold one data.pkl of at most 4 MB")
            stem = pickles[0].filename[: -len("data.pkl")]
            if any(not name.startswith(stem) for name in names) or stem + "constants.pkl" in names:
                raise ValueError("it is not what torch.save writes")

            order = next((e for e in entries if e.filename == stem + "byteorder"), None)
            if order is not None and (order.file_size > 8 or archive.read(order) != b"little"):
                raise ValueError("its numbers are not little-endian")

            prefix = stem + "data/"
            sizes = {
                e.filename[len(prefix) :]: e.file_size
                for e in entries
                if e.filename.startswith(prefix)
            }
            return archive.read(pickles[0]), sizes


def read_storage(path: Path, storage: Storage) -> bytes:
    """Return the bytes of a storage in an archive that has been inspected."""
    with zipfile.ZipFile(path) as archive:
        stem = archive.namelist()[0].partition("/")[0]
        return archive.read(f"{stem}/data/{storage.key}")


def check_overlaps(value: Any) -> None:
    """Raise ValueError if two tensors share stored numbers, by which a small file could seem large."""
    spans: dict[int, tuple[str, int, int]] = {}

    # Where each tensor begins and ends in its storage.
    seen, todo = set(), [value]
    while todo:
        item = todo.pop()
        if isinstance(item, TensorSpec):
            spans[id(item)] = (item.storage.key, item.start, item.start + math.prod(item.shape))
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            todo.extend(item.values() if isinstance(item, dict) else item)

    # Neighbours must not overlap.
    ordered = sorted(span for span in spans.values() if span[1] < span[2])
    for (key, _, end), (other, start, _) in zip(ordered, ordered[1:], strict=False):
        if key == other and start < end:
            raise ValueError("two tensors share stored numbers")
