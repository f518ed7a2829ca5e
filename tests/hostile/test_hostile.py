"""Files made to harm: each is refused by one sentence, nothing runs, and little memory is taken."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import explain_steps, load_checkpoint, save_checkpoint
from primechat.checkpoint.nanochat_format import list_shapes
from primechat.config import GPTConfig
from primechat.errors import CheckpointError, PrimechatError
from primechat.files.weights import inspect_archive, inspect_model, load_tensors, read_json
from primechat.text.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

CONFIG = GPTConfig(sequence_len=32, vocab_size=265, n_layer=1, n_head=1, n_kv_head=1, n_embd=64)
CANARY = "canary-of-hostile-files"
MEMORY = 64 * 2**20


class Runs:
    """Unpickles to a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def harmful_pickles() -> dict[str, bytes]:
    """Return pickles that run something, or eat memory or time, when they are unpickled freely."""
    touch = f"open({CANARY!r}, 'w').close()"
    system, evaluate = Runs(os.system, f"touch {CANARY}"), Runs(eval, touch)
    nested = Runs(dict, [("a", Runs(list, (Runs(exec, touch),)))])
    values = {
        "system": system,
        "eval": evaluate,
        "nested": nested,
        "in a dict": {"transformer.wte.weight": system},
        "as a key": {evaluate: 1},
        "in OrderedDict": OrderedDict([("lm_head.weight", nested)]),
        "bytearray": Runs(bytearray, 10**12),
        "tensor": Runs(torch.FloatTensor, 10**12),
        "getattr": Runs(getattr, dict, "fromkeys"),
    }
    made = {name: pickle.dumps(value, protocol=2) for name, value in values.items()}
    made["persistent id"] = b"\x80\x02cposix\nsystem\nX\x05\x00\x00\x00touchQ."
    made["second global"] = (
        b"\x80\x02ccollections\nOrderedDict\n)R0cposix\nsystem\nX\x05\x00\x00\x00touch\x85R."
    )
    made["tiktoken, then os"] = (
        pickle.dumps(values["system"])[:-1] + b"0ctiktoken.core\nEncoding\n)\x81}b."
    )
    made["inst"] = b"(S'touch " + CANARY.encode() + b"'\niposix\nsystem\n."
    made["obj"] = b"(cposix\nsystem\nS'touch " + CANARY.encode() + b"'\no."
    made["extension"] = b"\x80\x02\x82\x01."
    made["hash"] = (
        b"\x80\x02})" + 60 * b"q\x00h\x00\x86" + b"K\x01s."
    )  # as a key, ((..)) takes 2 ** 60 steps
    made["far memo"] = b"\x80\x02}r\xff\xff\xff\xff."
    made["long claim"] = b"\x80\x02X\xff\xff\xff\x7fabc."
    made["no stop"] = b"\x80\x02}"
    made["empty"] = b""
    made["number"] = b"\x80\x02K\x01."
    made["names"] = b"\x80\x02ctorch\n\x1b[31mFloatStorage\n."
    return made


def write_pt(
    path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, method: int = 0
) -> None:
    """Write an archive as torch does, around any pickle."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")


def tensor_pickle(
    shape: tuple[int, ...], stride: tuple[int, ...], start: int = 0, claim: int = 16
) -> bytes:
    """Return the pickle of {"a": tensor, "b": tensor} over storage 0, as torch.save would write it."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return (
                ("storage", torch.FloatStorage, "0", "cpu", claim)
                if isinstance(value, Storage)
                else None
            )

    rebuild = torch._utils._rebuild_tensor_v2
    tensor = Runs(rebuild, Storage(), start, shape, stride, False, OrderedDict())
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"a": tensor})
    return buffer.getvalue()


@pytest.fixture
def run(base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a sound run to spoil; afterwards no canary may exist and little memory may have been taken."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "SHIPPED", tmp_path / "nothing")
    ranks = {bytes([i]): i for i in range(256)}
    Tokenizer(SPLIT_PATTERN, ranks, {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}).save(
        base_dir / "tokenizer"
    )
    folder = base_dir / "base_checkpoints" / "d1"
    state = {key: torch.ones(shape) for key, shape in list_shapes(CONFIG).items()}
    optim = {"step": 1, "exp_avg": torch.ones(4)}
    save_checkpoint(folder, 1, model_state=state, config=CONFIG, optim_state=optim, meta={})
    assert load_checkpoint(folder, want_optim=True).step == 1
    assert registry.open_model("base/d1@1")[2]["step"] == 1
    tracemalloc.start()
    yield folder
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY
    assert not list(tmp_path.rglob(CANARY))


def refuse(call: Callable[[], Any], match: str | None = None) -> None:
    """Assert that a call ends in one sentence."""
    with pytest.raises(PrimechatError, match=match) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and text.isprintable() and len(text) < 900, text


def spoil(folder: Path, name: str, write: Callable[[Path], Any], foreign: bool = False) -> Path:
    """Replace one file of the run and make its meta agree."""
    path, meta_path = folder / name, folder / "meta_000001.json"
    write(path)
    meta = read_json(meta_path)
    meta["files"][name] = {"bytes": path.stat().st_size, "sha256": "0" * 64}
    if foreign:
        meta = {"model_config": meta["model_config"]}
    meta_path.write_text(json.dumps(meta))
    return path


def refuse_run(folder: Path, monkeypatch: pytest.MonkeyPatch, match: str | None = None) -> None:
    """Assert that no way in accepts the spoiled model, and that torch never sees it."""

    def seen(*_: Any, **__: Any) -> Any:
        raise AssertionError("torch was shown a hostile file")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", seen)
        for call in (
            lambda: registry.open_model("base/d1@1"),
            lambda: registry.open_model("base/d1"),
            lambda: registry.load_model("base"),
            lambda: load_checkpoint(folder, 1),
            lambda: load_checkpoint(folder),
            lambda: registry.open_model(""),
        ):
            refuse(call, match)
        assert all(entry.architecture == "unreadable" for entry in registry.list_models())
        explain_steps(folder)


@pytest.mark.parametrize("name", harmful_pickles())
def test_harmful_pickles(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = harmful_pickles()[name]
    spoil(run, "model_000001.pt", lambda path: write_pt(path, data))
    refuse_run(
        run, monkeypatch, {"system": "asks for 'posix.system'", "names": "asks for"}.get(name)
    )
    raw = spoil(run, "model_000001.pt", lambda path: path.write_bytes(data))
    refuse_run(run, monkeypatch)
    refuse(lambda: load_tensors(raw))
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.pkl").write_bytes(data)
    refuse(lambda: Tokenizer.load(folder))
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "tokenizer.pkl").write_bytes(data)
    refuse(lambda: registry.load_tokenizer("base/d1"))


@pytest.mark.parametrize("name", harmful_pickles())
def test_harmful_optimizers(name: str, run: Path) -> None:
    path = spoil(run, "optim_000001_rank0.pt", lambda path: write_pt(path, harmful_pickles()[name]))
    if name == "far memo":
        return  # nothing but {} to torch, whose memo is a dict
    for verify in (None, False):
        refuse(lambda verify=verify: load_checkpoint(run, 1, want_optim=True, verify=verify))
    if name != "number":
        refuse(lambda: load_tensors(path))
    assert load_checkpoint(run, 1).step == 1, "the model itself is sound"


LIES = {
    "shape beyond storage": tensor_pickle((10**6, 10**6), (10**6, 1)),
    "zero strides": tensor_pickle((4, 4), (0, 0)),
    "one zero stride": tensor_pickle((2, 8), (0, 1)),
    "overlapping rows": tensor_pickle((2, 8), (4, 1)),
    "start beyond storage": tensor_pickle((4, 4), (4, 1), start=8),
    "negative start": tensor_pickle((4,), (1,), start=-4),
    "negative size": tensor_pickle((-4, -4), (4, 1)),
    "storage beyond file": tensor_pickle((10**6, 10**6), (10**6, 1), claim=10**12),
    "negative storage": tensor_pickle((0,), (1,), claim=-16),
    "sizes that are no numbers": tensor_pickle((4.0, 4), (4, 1)),  # type: ignore[arg-type]
    "true as size": tensor_pickle((True, 4), (4, 1)),
    "other rank of strides": tensor_pickle((4, 4), (1,)),
    "many dimensions": tensor_pickle((1,) * 1000, (1,) * 1000),
    "huge product": tensor_pickle((2**62,) * 8, (1,) * 8),
}


@pytest.mark.parametrize("name", LIES)
def test_shapes_that_lie(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = spoil(run, "model_000001.pt", lambda path: write_pt(path, LIES[name], {"0": bytes(64)}))
    refuse_run(run, monkeypatch, "no sound weight file")
    refuse(lambda: load_tensors(path))


def test_honest_hand_made_archive(tmp_path: Path) -> None:
    numbers = struct.pack("<16f", *range(16))
    write_pt(tmp_path / "a.pt", tensor_pickle((4, 4), (4, 1)), {"0": numbers})
    assert inspect_model(tmp_path / "a.pt")["a"].shape == (4, 4), (
        "the lies above differ in what they say they do"
    )
    assert load_tensors(tmp_path / "a.pt")["a"].tolist()[3] == [12, 13, 14, 15]


def test_shared_storages(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = torch.zeros(265 * 64)
    shapes = list_shapes(CONFIG)
    state = {key: big[: shape[0] * shape[1]].view(shape) for key, shape in shapes.items()}
    spoil(run, "model_000001.pt", lambda path: torch.save(state, path))
    refuse_run(run, monkeypatch, "share stored numbers")


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 10**12},
        {"n_layer": 10**9},
        {"n_embd": 2**50},
        {"sequence_len": 2**60},
        {"n_layer": 256},
        {"vocab_size": 2**20},
        {"n_embd": 65_536, "n_head": 512, "n_kv_head": 512},
        {"sequence_len": 2**20, "n_head": 1, "n_embd": 4096},
    ],
)
def test_absurd_sizes(change: dict[str, int], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run / "meta_000001.json"
    meta = read_json(path)
    for ours in (True, False):
        if not ours:
            del meta["gpt_config"], meta["writer"]
        spoiled = {**meta, "model_config": {**meta["model_config"], **change}}
        if ours:
            spoiled["gpt_config"] = {**meta["gpt_config"], **change}
        path.write_text(json.dumps(spoiled))
        refuse_run(run, monkeypatch)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"not json",
        b"[1, 2]",
        b"null",
        b"3",
        b'"text"',
        b"{",
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"model_config": ' + b"9" * 100_000 + b"}",
        b"{}",
        b'{"model_config": "d20"}',
        b'{"writer": "primechat", "schema": 1}',
        b'{"writer": "primechat", "schema": 99}',
        b'{"writer": "primechat", "schema": 1, "step": 1, "files": [1]}',
        b'{"writer": "primechat", "schema": 1, "step": 1, "files": {"model_000001.pt": 3}}',
        b'{"writer": "primechat", "schema": 1, "step": 1, "files": {"model_000001.pt": {"bytes": 1e999}}}',
        b'{"writer": "primechat", "schema": 1, "step": 1, "files": {"model_000001.pt": {}, '
        b'"../../x": {"bytes": 1}}}',
        b'{"model_config": {"n_layer": "\\u001b[2J"}}',
        b'{"model_config": {"vocab_size": NaN}}',
    ],
)
def test_meta_that_is_none(text: bytes, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "meta_000001.json").write_bytes(text)
    refuse_run(run, monkeypatch)


def test_huge_meta(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (run / "meta_000001.json").open("wb") as f:
        f.truncate(2**40)  # a sparse terabyte
    refuse_run(run, monkeypatch, "1,099,511,627,776 bytes")


def make_bomb(path: Path) -> None:
    write_pt(path, bytes(50 * 2**20), method=zipfile.ZIP_DEFLATED)


def make_data_bomb(path: Path) -> None:
    write_pt(
        path, tensor_pickle((2**22,), (1,), claim=2**22), {"0": bytes(2**24)}, zipfile.ZIP_DEFLATED
    )


def make_twins(path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as archive:
        for data in (tensor_pickle((4, 4), (4, 1)), harmful_pickles()["system"]):
            archive.writestr("archive/data.pkl", data)


def make_liar(path: Path) -> None:
    """Claim a terabyte in the directory: 16-byte storage, its two sizes patched to 4 GB."""
    write_pt(path, tensor_pickle((4, 4), (4, 1)), {"0": bytes(64)})
    data = path.read_bytes()
    at = data.rindex(b"archive/data/0") - 46
    path.write_bytes(data[: at + 20] + struct.pack("<II", 2**32 - 2, 2**32 - 2) + data[at + 28 :])


def make_wide_directory(path: Path) -> None:
    """Claim a directory of 4 GB."""
    write_pt(path, tensor_pickle((4, 4), (4, 1)), {"0": bytes(64)})
    data = path.read_bytes()
    path.write_bytes(data[:-10] + struct.pack("<I", 2**32 - 2) + data[-6:])


def make_foreign_names(path: Path) -> None:
    write_pt(path, tensor_pickle((4, 4), (4, 1)), {"0": bytes(64)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../escape", "x")


def make_big_endian(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", tensor_pickle((4, 4), (4, 1)))
        archive.writestr("archive/byteorder", "big")
        archive.writestr("archive/data/0", bytes(64))


def make_integers(path: Path) -> None:
    torch.save(
        {key: torch.zeros(shape, dtype=torch.int32) for key, shape in list_shapes(CONFIG).items()},
        path,
    )


def make_twice(path: Path) -> None:
    state = {key: torch.zeros(shape) for key, shape in list_shapes(CONFIG).items()}
    torch.save({**state, "_orig_mod.lm_head.weight": torch.zeros(265, 64)}, path)


def make_old_format(path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)


OTHER_KINDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bomb": (make_bomb, "compressed"),
    "data bomb": (make_data_bomb, "compressed"),
    "twins": (make_twins, "share a name"),
    "liar": (make_liar, "claim more bytes"),
    "wide directory": (make_wide_directory, "directory is too large"),
    "foreign names": (make_foreign_names, "not what torch.save writes"),
    "big-endian": (make_big_endian, "not little-endian"),
    "integers": (make_integers, "no floating-point tensor"),
    "twice": (make_twice, "twice"),
    "old format": (make_old_format, "do not end as a torch archive"),
    "empty": (lambda path: path.write_bytes(b""), "its 0 bytes do not end"),
    "page": (lambda path: path.write_bytes(b"<html>Not found, try again</html>"), "do not end"),
    "empty zip": (lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)), "one data.pkl"),
    "list": (lambda path: torch.save([torch.zeros(3)], path), "no dictionary"),
    "tensor": (lambda path: torch.save(torch.zeros(3), path), "no dictionary"),
    "nothing": (lambda path: torch.save({}, path), "no dictionary"),
    "number as name": (
        lambda path: torch.save({1: torch.zeros(3)}, path),
        "no floating-point tensor",
    ),
    "long pickle": (lambda path: write_pt(path, b"\x80\x02" + b"N" * 2**23 + b"."), "at most 4 MB"),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_archives_of_other_kinds(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, match = OTHER_KINDS[name]
    spoil(run, "model_000001.pt", make)
    refuse_run(run, monkeypatch, match)


def test_huge_sparse_model(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stretch(path: Path) -> None:
        with path.open("wb") as f:
            f.truncate(2**40)

    spoil(run, "model_000001.pt", stretch)
    refuse_run(run, monkeypatch, "1,099,511,627,776 bytes do not end as a torch archive")


def test_truncated_at_any_place(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (run / "model_000001.pt").read_bytes()
    places = [
        1,
        4,
        21,
        22,
        100,
        len(whole) // 2,
        len(whole) - 22,
        len(whole) - 1,
        *range(200, len(whole), len(whole) // 10),
    ]
    for place in places:
        (run / "model_000001.pt").write_bytes(whole[:place])
        refuse(lambda: load_checkpoint(run, 1), "bytes, its meta says")
        refuse(lambda: inspect_archive(run / "model_000001.pt"), "no sound weight file")
    spoil(
        run,
        "model_000001.pt",
        lambda path: path.write_bytes(whole[: len(whole) // 2]),
        foreign=True,
    )
    refuse_run(run, monkeypatch, "no sound weight file")


def test_flipped_bytes(tmp_path: Path) -> None:
    path, rng = tmp_path / "a.pt", random.Random(0)
    write_pt(path, pickle_of_state(), {"0": bytes(64)})
    whole = path.read_bytes()
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 2, 5))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            assert isinstance(load_tensors(path), object)
        except CheckpointError as e:
            assert "\n" not in str(e)


def pickle_of_state() -> bytes:
    """Return a pickle with all that an honest optimizer's state has."""
    return tensor_pickle((4, 4), (4, 1))


@pytest.mark.parametrize(
    "tag",
    [
        "../x",
        "..",
        ".",
        "/etc",
        "a/b",
        "d1/../d1",
        "",
        ".hidden",
        "d1\n",
        "d1\x00",
        "~",
        "a" * 101,
        "d1@1",
    ],
)
def test_tags_stay_in_the_root(tag: str, run: Path, base_dir: Path) -> None:
    outside = base_dir / "x"
    outside.mkdir()
    for path in run.iterdir():
        (outside / path.name).write_bytes(path.read_bytes())
    before = sorted(base_dir.rglob("*"))
    refuse(lambda: registry.load_model("base", model_tag=tag))
    refuse(lambda: registry.run_dir("base", tag))
    refuse(lambda: registry.run_dir("../base", "d1"))
    if tag not in ("", "d1@1"):
        refuse(lambda: registry.open_model(f"base/{tag}"))
    assert sorted(base_dir.rglob("*")) == before


def test_cleaning_stays_in_the_folder(run: Path, base_dir: Path) -> None:
    victim = base_dir / "tokenizer" / "tokenizer.pkl"
    meta = {
        "writer": "primechat",
        "files": {"../../tokenizer/tokenizer.pkl": {"bytes": 1}, "model_000001.pt": {}},
    }
    (run / "meta_000009.json.tmp").write_text(json.dumps(meta))
    state = {key: torch.ones(shape) for key, shape in list_shapes(CONFIG).items()}
    save_checkpoint(run, 2, model_state=state, config=CONFIG, optim_state=None, meta={})
    assert victim.exists() and load_checkpoint(run, 1).step == 1 and not list(run.glob("*.tmp"))


def test_custom_models_are_checked_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    larger = dataclasses.replace(CONFIG, n_layer=2)
    state = {key: torch.ones(shape) for key, shape in list_shapes(larger).items()}
    spoil(run, "model_000001.pt", lambda path: torch.save(state, path))
    refuse_run(run, monkeypatch, "have transformer.h.1")
