"""The tokenizer against tiktoken itself, the fixtures of both nanochat generations, and hostile files."""

import builtins
import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from primechat.config import TokenizerConfig
from primechat.errors import DataError, PrimechatError
from primechat.stages.tokenizer import train_tokenizer
from primechat.text import pickles
from primechat.text.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "nanochat"
GENERATIONS = ("head", "head_d3", "oct2025")
TEXT = [
    "the cat sat on the mat, the bat and the rat sat too. " * 3,
    "naïve café 日本語 12345 don't\n\n\tyes! " * 3,
]


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer.train(TEXT, 300)


def make_text(rng: random.Random) -> str:
    pools = [
        "abc dE'sx\n\r\t ",
        "0123456789",
        "éüßſ̈ŉ",
        "日本語テキスト",
        "👩‍👧🇫🇷😀𝕏",
        "\x00\x7f\xa0\u3000\u2028﻿",
        "<|bos|>",
    ]
    return "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(0, 60)))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_fixture_agrees(generation: str) -> None:
    expected = json.loads((FIXTURES / generation / "expected.json").read_text())
    tokenizer = Tokenizer.load(FIXTURES / generation / "tokenizer")
    assert tokenizer.vocab_size == expected["vocab_size"]
    assert tokenizer.specials == expected["special_tokens"]
    assert tokenizer.bos_id == expected["bos"]
    assert tokenizer.stop_ids == (
        tokenizer.special("<|bos|>"),
        tokenizer.special("<|assistant_end|>"),
    )
    assert [tokenizer.encode(case["text"]) for case in expected["encode"]] == [
        c["ids"] for c in expected["encode"]
    ]
    assert tokenizer.byte_lengths().tolist() == expected["token_bytes"]
    assert tokenizer.byte_lengths().dtype == np.int32


@pytest.mark.parametrize("generation", GENERATIONS)
def test_saves_nanochat_bytes(generation: str, tmp_path: Path) -> None:
    folder = FIXTURES / generation / "tokenizer"
    tokenizer = Tokenizer.load(folder)
    tokenizer.save(tmp_path / "t")
    for name in ("tokenizer.pkl", "token_bytes.pt"):
        assert (tmp_path / "t" / name).read_bytes() == (folder / name).read_bytes()
    again = Tokenizer.load(tmp_path / "t")
    assert again == tokenizer and hash(again) == hash(tokenizer)
    assert again.byte_lengths().tolist() == tokenizer.byte_lengths().tolist()
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == [
        "primechat_tokenizer.json",
        "token_bytes.pt",
        "tokenizer.pkl",
    ]


def test_equals_tiktoken(small: Tokenizer) -> None:
    encoding = tiktoken.Encoding(
        "x", pat_str=SPLIT_PATTERN, mergeable_ranks=small.ranks, special_tokens=small.specials
    )
    rng = random.Random(0)
    texts = [make_text(rng) for _ in range(400)] + ["\ud800 lone", ""]
    for text in texts:
        ids = small.encode(text)
        assert ids == encoding.encode_ordinary(text)
        assert max(ids, default=0) < len(small.ranks)
        if "\ud800" not in text:
            assert small.decode(ids) == text
        assert small.decode_bytes(ids) == encoding.decode_bytes(ids)
    assert small.encode_batch(texts, threads=3) == [small.encode(text) for text in texts]
    assert small.encode_batch([]) == []


def test_pieces_of_characters(small: Tokenizer) -> None:
    ids = small.encode("😀")
    assert len(ids) == 4 and small.decode(ids[:3]) == "�"
    assert small.token_bytes(ids[0]) == "😀".encode()[:1]
    assert small.token_bytes(small.bos_id) == b"<|bos|>"


def test_byte_lengths_count_raw_bytes(small: Tokenizer) -> None:
    lengths = small.byte_lengths()
    assert lengths[:256].tolist() == [1] * 256
    assert lengths.tolist() == [len(t) for t in small.ranks] + [0] * 9
    with pytest.raises(ValueError, match="read-only"):
        lengths[0] = 2


def test_training_is_deterministic(small: Tokenizer) -> None:
    assert Tokenizer.train(iter(TEXT), 300) == small
    assert small.vocab_size == 300 and small.pattern == SPLIT_PATTERN
    assert tuple(small.specials) == SPECIAL_TOKENS and small.special("<|output_end|>") == 299
    assert Tokenizer.train(["a\ud800b"], 265).vocab_size == 265


def test_too_little_text() -> None:
    with pytest.raises(
        DataError, match=r"vocab_size=5000 needs more text.*set vocab_size to 26\d or less"
    ):
        Tokenizer.train(["aaaa"], 5000)
    with pytest.raises(DataError, match="vocab_size=264 must be at least 265"):
        Tokenizer.train(["a"], 264)


def test_half_a_character_in_a_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON may hold lone surrogates, which are no UTF-8: the tokens a byte are measured all the same."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    path = tmp_path / "half.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": f"{text} \ud83d {i}"}) for i in range(30) for text in TEXT)
    )
    made = train_tokenizer(TokenizerConfig(tag="half", corpus=str(path), vocab_size=290))
    assert 1 < made.bytes_per_token < 10


def test_identity_covers_everything(small: Tokenizer) -> None:
    ranks = dict(small.ranks)
    last, before = list(ranks)[-1], list(ranks)[-2]
    swapped = {**ranks, last: ranks[before], before: ranks[last]}
    renamed = {name.replace("bos", "b0s"): i for name, i in small.specials.items()}
    others = [
        Tokenizer("\\s|.", ranks, small.specials),
        Tokenizer(small.pattern, swapped, small.specials),
    ]
    others += [Tokenizer(small.pattern, ranks, renamed)]
    assert len({t.identity for t in [small, *others]}) == 4
    shuffled = dict(sorted(ranks.items()))
    assert Tokenizer(small.pattern, shuffled, small.specials).identity == small.identity


def test_save_keeps_another(small: Tokenizer, tmp_path: Path) -> None:
    small.provenance = {"corpus": "x"}
    small.save(tmp_path)
    assert Tokenizer.load(tmp_path).provenance == {"corpus": "x"}
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}
    small.save(tmp_path)
    with pytest.raises(DataError, match="holds another tokenizer"):
        Tokenizer.train(TEXT, 290).save(tmp_path)
    assert before == {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir()}
    (tmp_path / "tokenizer.pkl").write_bytes(b"junk")
    with pytest.raises(DataError):
        small.save(tmp_path)
    assert (tmp_path / "tokenizer.pkl").read_bytes() == b"junk"


def test_note_must_name_the_pickle(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    note = tmp_path / "primechat_tokenizer.json"
    content = json.loads(note.read_text())
    assert (
        content["pkl_sha256"]
        == hashlib.sha256((tmp_path / "tokenizer.pkl").read_bytes()).hexdigest()
    )
    note.write_text(
        json.dumps({**content, "pkl_sha256": "0" * 64, "identity": "wrong", "provenance": {"a": 1}})
    )
    assert Tokenizer.load(tmp_path).provenance == {}
    note.write_text("[" * 100_000)
    assert Tokenizer.load(tmp_path) == small
    note.write_text(json.dumps({**content, "identity": "wrong"}))
    with pytest.raises(DataError, match="names another tokenizer"):
        Tokenizer.load(tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"tokenizer.pkl is missing \(the folder is empty or not there\); train one"
    ):
        Tokenizer.load(tmp_path / "none")
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(DataError, match="the folder has other.txt"):
        Tokenizer.load(tmp_path)


def test_loading_leaves_torch_out() -> None:
    code = (
        "import sys; from primechat.text.tokenizer import Tokenizer;"
        f"t = Tokenizer.load({str(FIXTURES / 'oct2025' / 'tokenizer')!r}); t.byte_lengths();"
        "t.encode('a'); import primechat.text.corpora; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wrong_arguments(small: Tokenizer) -> None:
    for call, words in (
        (lambda: small.encode(b"x"), "must be a str, not bytes"),
        (lambda: small.decode([300]), "must be from 0 to 299"),
        (lambda: small.token_bytes(-1), "must be from 0 to 299"),
        (lambda: small.special("<|eos|>"), "is not in this tokenizer"),
        (lambda: Tokenizer("(", small.ranks, small.specials), "does not compile"),
    ):
        with pytest.raises(DataError, match=words):
            call()


def test_endless_white_space(small: Tokenizer) -> None:
    text = "a" + " " * 1_200_000 + "b"
    assert small.decode(small.encode(text)) == text


# Hostile files


class Touch:
    """Unpickled freely, this makes a file; nested inside a state as well as on its own."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return (os.mkdir, (self.path,))


class Evaluate(Touch):
    def __reduce__(self) -> tuple:
        return (builtins.eval, (f"__import__('os').mkdir({self.path!r})",))


def encode_state(**changes: object) -> bytes:
    """A pickle of an Encoding whose state is what we like."""
    ranks = {bytes([i]): i for i in range(256)}
    state = {
        "name": "rustbpe",
        "pat_str": ".",
        "mergeable_ranks": ranks,
        "special_tokens": {"<|bos|>": 256},
    }
    shell = tiktoken.Encoding("shell", pat_str=".", mergeable_ranks=ranks, special_tokens={})
    shell.__class__ = type(
        "Encoding", (tiktoken.Encoding,), {"__getstate__": lambda self: {**state, **changes}}
    )
    shell.__class__.__module__ = "tiktoken.core"
    original, tiktoken.core.Encoding = tiktoken.core.Encoding, shell.__class__
    try:
        return pickle.dumps(shell, protocol=4)
    finally:
        tiktoken.core.Encoding = original


def hostile_files(trap: Path) -> dict[str, bytes]:
    good = encode_state()
    ranks = {bytes([i]): i for i in range(256)}
    reduce_ = (
        b"\x80\x04"
        + b"\x8c\x02os\x8c\x06system\x93\x8c\x0btouch "
        + str(trap).encode()[:5]
        + b"\x85R."
    )
    return {
        "reduce": pickle.dumps(Touch(trap)),
        "eval": pickle.dumps(Evaluate(trap)),
        "nested reduce in ranks": encode_state(mergeable_ranks={**ranks, b"ab": Touch(trap)}),
        "nested reduce in specials": encode_state(special_tokens={"x": Evaluate(trap)}),
        "nested reduce as pattern": encode_state(pat_str=Touch(trap)),
        "extra field": encode_state(more=1),
        "list of pickles": pickle.dumps([1, Touch(trap)]),
        "protocol 0": pickle.dumps(Touch(trap), protocol=0),
        "protocol 2": pickle.dumps(Touch(trap), protocol=2),
        "raw system": reduce_,
        "second global": good[:-2] + b"\x8c\x02os\x8c\x06system\x93b.",
        "same global twice": good.replace(
            b"\x8c\x07rustbpe", b"\x8c\x0dtiktoken.core\x8c\x08Encoding\x93"
        ),
        "other global": good.replace(b"Encoding", b"encoding", 1),
        "other module": good.replace(b"tiktoken.core", b"tiktoken.care", 1),
        "inst": b"\x80\x04(ios\nsystem\n.",
        "obj": b"\x80\x04(cos\nsystem\no.",
        "ext": b"\x80\x04\x82\x01.",
        "global opcode": b"\x80\x04ctiktoken.core\nEncoding\n)\x81.",
        "persistent id": b"\x80\x04X\x01\x00\x00\x00aQ.",
        "empty": b"",
        "one byte": b"\x80",
        "text": b"hello, this is no pickle",
        "json": b'{"a": 1}',
        "stop only": b"\x80\x04.",
        "no state": good[: good.index(b"\x81") + 1] + b".",
        "twice": good + good,
        "tail": good + b"x",
        "a dict only": pickle.dumps({"name": "rustbpe"}),
        "set items on nothing": b"\x80\x04(K\x01K\x02u.",
        "set item underflow": b"\x80\x04}s.",
        "unknown memo": b"\x80\x04h\x07.",
        "marks": b"\x80\x04" + b"(" * 1000,
        "dicts": b"\x80\x04" + b"}" * 1000,
        "huge claim": b"\x80\x04B\xff\xff\xff\xffx",
        "bad utf-8": b"\x80\x04\x8c\x02\xff\xfe.",
        "rank is text": encode_state(mergeable_ranks={**ranks, b"ab": "x"}),
        "rank is bool": encode_state(mergeable_ranks={**ranks, b"ab": True}),
        "token is text": encode_state(mergeable_ranks={**ranks, "ab": 256}),
        "rank gap": encode_state(mergeable_ranks={**ranks, b"ab": 257}),
        "rank twice": encode_state(mergeable_ranks={**ranks, b"ab": 3}),
        "rank negative": encode_state(mergeable_ranks={**ranks, b"ab": -1}),
        "byte missing": encode_state(
            mergeable_ranks={(b"zz" if i == 7 else bytes([i])): i for i in range(256)}
        ),
        "empty token": encode_state(mergeable_ranks={**ranks, b"": 256}, special_tokens={}),
        "few ranks": encode_state(mergeable_ranks={b"a": 0}),
        "ranks are a list": encode_state(mergeable_ranks=[1]),
        "special on a rank": encode_state(special_tokens={"<|bos|>": 5}),
        "special gap": encode_state(special_tokens={"<|bos|>": 300}),
        "special twice": encode_state(special_tokens={"a": 256, "b": 256}),
        "special is text": encode_state(special_tokens={"a": "256"}),
        "special is bytes": encode_state(special_tokens={b"a": 256}),
        "pattern is bytes": encode_state(pat_str=b"."),
        "pattern broken": encode_state(pat_str="(?P<"),
    }


def test_hostile_pickles(tmp_path: Path) -> None:
    trap, path = tmp_path / "trap", tmp_path / "tokenizer.pkl"
    path.write_bytes(encode_state())
    assert Tokenizer.load(tmp_path).vocab_size == 257, (
        "the maker of hostile files must also make a good one"
    )
    files = hostile_files(trap)
    words = {
        "same global twice": "a second global",
        "dicts": "more than 3 containers",
        "marks": "nested too deeply",
    }
    with pytest.raises(
        FileExistsError
    ):  # the traps are live: freely unpickled, they make the folder
        for name in ("reduce", "eval"):
            pickle.loads(files[name])
    trap.rmdir()
    for name, data in files.items():
        path.write_bytes(data)
        with pytest.raises(DataError) as caught:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(caught.value) and str(caught.value).endswith("."), name
        assert words.get(name, "") in str(caught.value), name
        assert not trap.exists(), name


def test_every_truncation_and_flip(tmp_path: Path) -> None:
    good = encode_state()
    path = tmp_path / "tokenizer.pkl"
    rng = random.Random(1)
    for cut in [*range(60), *rng.sample(range(60, len(good)), 100)]:
        path.write_bytes(good[:cut])
        with pytest.raises(DataError):
            Tokenizer.load(tmp_path)
    for _ in range(300):
        data = bytearray(good)
        data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            Tokenizer.load(tmp_path)
        except DataError:
            pass


def test_oversized_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_FILE_BYTES", 1000)
    (tmp_path / "tokenizer.pkl").write_bytes(encode_state())
    with pytest.raises(DataError, match="is larger than"):
        Tokenizer.load(tmp_path)


def test_hostile_lengths(small: Tokenizer, tmp_path: Path) -> None:
    import torch

    small.save(tmp_path)
    path, trap = tmp_path / "token_bytes.pt", tmp_path / "trap"
    good = path.read_bytes()
    ones = torch.ones(301, dtype=torch.int32)
    for tensor in (
        ones[:299].clone(),
        ones[:300].float(),
        -ones[:300],
        Touch(trap),
        ones[1:],
        ones[:300].clone().view(20, 15),
    ):
        torch.save(tensor, path)
        with pytest.raises(DataError, match="is no table of byte lengths"):
            Tokenizer.load(tmp_path).byte_lengths()
    for data in (
        b"",
        b"x",
        good[:-30],
        good[: len(good) // 2],
        good.replace(b"IntStorage", b"PntStorage"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError):
            Tokenizer.load(tmp_path).byte_lengths()
    assert not trap.exists()
    path.unlink()
    assert Tokenizer.load(tmp_path).byte_lengths().tolist() == small.byte_lengths().tolist()


def test_save_leaves_no_part(
    small: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(PrimechatError, match="disk full"):
        small.save(tmp_path / "t")
    assert list((tmp_path / "t").iterdir()) == []
    monkeypatch.undo()
    small.save(tmp_path / "t")
    shutil.rmtree(tmp_path / "t")
