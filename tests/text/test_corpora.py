"""Corpora: the embedded chats, local files and the Hub's shards from a local server."""

import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs

import pytest
from waiting import wait_until

from primechat.errors import DataError, HubError
from primechat.events import PhaseEvent, ProgressEvent
from primechat.files import hub as hub_room
from primechat.text import corpora, shards
from primechat.text.corpora import (
    corpus_identity,
    find_files,
    is_local,
    read_conversations,
    read_documents,
)
from primechat.text.shards import shard_paths
from primechat.text.tokens import list_groups

REPO = "datasets/karpathy/climbmix-400b-shuffle"


def write_parquet(path: Path, texts: Any, *, column: str = "text", group: int = 3) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({column: texts}), path, row_group_size=group)
    return path


# The embedded chats


def test_chitchat_documents() -> None:
    train, val = list(read_documents("chitchat", "train")), list(read_documents("chitchat", "val"))
    assert (len(train), len(val)) == (6810, 358)
    assert sum(len(text.encode()) for text in val) == 699_021
    assert train[0].startswith(
        "A: Hello How are you doing today?\nB: whats up MD im doing good how are you doing?\nA: Im alright"
    )
    for text in (*train, *val):
        lines = text.split("\n")
        assert all(line[:3] in ("A: ", "B: ") and line[3:] for line in lines)
        assert lines[0].startswith("A: ") and text == "\n".join(
            " ".join(line.split()) for line in lines
        )


def test_chitchat_conversations() -> None:
    train, val = (
        list(read_conversations("chitchat", "train")),
        list(read_conversations("chitchat", "val")),
    )
    for conversation in (*train, *val):
        roles = [message["role"] for message in conversation["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
    with pytest.raises(DataError, match="must be chitchat"):
        next(read_conversations("talk.jsonl", "train"))
    held_out = "\n".join(read_documents("chitchat", "val"))
    assert all(message["content"] in held_out for c in val for message in c["messages"][:2])
    assert corpus_identity("chitchat", "val") != corpus_identity("chitchat", "train")


def test_roles_of_odd_turns() -> None:
    turns = ((0, "a"), (0, "b"), (1, "c"), (0, "d"), (1, "e"), (0, "f"))
    assert [m["content"] for m in corpora.assign_roles(turns)] == ["a b", "c", "d", "e"]
    assert corpora.assign_roles(((0, "a"), (0, "b"))) == []
    said = [
        [{"sender": s, "text": t} for t in texts]
        for s, texts in (("x", [" a\tb ", "c\n"]), ("y", [" "]), ("z", ["d"]))
    ]
    assert corpora.read_turns(said) == ((0, "a b c"), (1, "d"))


def test_other_chitchat_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dataset.json"
    monkeypatch.setattr(corpora, "chitchat_path", lambda: path)
    corpora.load_chitchat.cache_clear()
    talk = {"messages": [[{"sender": "x", "text": "hello"}]]}
    for content in (
        json.dumps({str(i): talk for i in range(40)}),
        "{",
        '{"a": {"messages": 3}}',
        "[]",
    ):
        path.write_text(content)
        with pytest.raises(DataError, match="chitchat-dataset==0.9.0"):
            next(read_documents("chitchat", "train"))
    monkeypatch.undo()
    monkeypatch.setattr(corpora, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="chitchat is not installed"):
        corpora.chitchat_path()


# Local files


def test_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    paragraphs = [f"{i} " + "word " * 100 for i in range(50)]
    path.write_text("\ufeff" + "\n\n".join(paragraphs), encoding="utf-8")
    train, val = list(read_documents(str(path), "train")), list(read_documents(str(path), "val"))
    assert len(val) == 1 and len(train) == 12
    assert "\n\n".join([*train, *val]) == "\n\n".join(paragraphs)
    path.write_text("\n".join(["x" * 99] * 500))
    documents = [*read_documents(str(path), "train"), *read_documents(str(path), "val")]
    assert [len(text) for text in documents] == [19_999, 19_999, 9_999]


def test_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("hidden")
    (tmp_path / "c.md").write_text("no text file")
    (tmp_path / "b" / "1.jsonl").write_text(
        '{"text": "two"}\n\n{"text": " ", "id": 3}\n{"text": "three"}\n'
    )
    (tmp_path / "a.txt").write_text("one\n")
    numbers = [f"n{i}" + "." * 100 for i in range(36)]
    write_parquet(tmp_path / "z.parquet", ["four", None, "", *numbers])
    train, val = (
        list(read_documents(str(tmp_path), "train")),
        list(read_documents(str(tmp_path), "val")),
    )
    assert train == ["one", "two", "three", "four", *numbers[:34]]
    assert val == numbers[34:]
    before = corpus_identity(str(tmp_path), "val")
    assert corpus_identity(str(tmp_path), "val") == before
    (tmp_path / "a.txt").write_text("one more\n")
    assert corpus_identity(str(tmp_path), "val") != before


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "holds 0 document"),
        ("a.txt", b"only one", "holds 1 document"),
        ("a.txt", b"abc\xff\xfe", r"byte 0xff at offset 3 \(line 1\)"),
        (
            "a.txt",
            "ä\n".encode() * 9_999 + b"\xe4\n",
            r"byte 0xe4 at offset 29,997 \(line 10,000\)",
        ),
        ("a.txt", "aä".encode()[:-1], r"byte 0xc3 at offset 1 \(line 1\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', r"byte 0xe9 at offset 24 \(line 2\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}', "line 2 has a int in `text`; it must be"),
        ("a.jsonl", b'{"body": "a", "id": 1}', "line 1 is an object with body, id; it must be"),
        ("a.jsonl", b'{"messages": []}', "line 1 is a conversation, which `primechat finetune"),
        ("a.jsonl", b'{"text": "a"}\n\n{"texts', "line 3 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'["text"]', "line 1 is a list; it must be an object"),
        ("a.parquet", b"PAR1 no parquet PAR1", "is damaged or no parquet file"),
        ("a.parquet", b"", "is damaged or no parquet file"),
        ("a.csv", b"text", r"is no .txt, .jsonl, .parquet file"),
        ("b/a.csv", b"text", "is not there"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    if path.parent == tmp_path:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(read_documents(str(path), "train"))


def test_too_little_is_held_out(tmp_path: Path) -> None:
    """Bits per byte of nine characters say nothing."""
    path = tmp_path / "a.txt"
    path.write_text(("word " * 450 + "\n\n") * 3 + "only nine")
    for split in ("train", "val"):
        with pytest.raises(DataError, match=r"holds out 9 characters .*\(its last document of 4\)"):
            next(read_documents(str(path), split))
    path.write_text(path.read_text() + " " + "more " * 40)
    assert len(list(read_documents(str(path), "val"))) == 1
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' * 380)
    with pytest.raises(DataError, match="holds out 19 characters .* last 19 documents of 380"):
        next(read_documents(str(path), "train"))


@pytest.mark.parametrize(
    ("values", "kind"),
    [([1, 2], "int64"), ([b"a", b"b"], "binary"), ([["a"], ["b"]], "list"), ([{"a": 1}], "struct")],
)
def test_a_column_of_another_type(tmp_path: Path, values: list[Any], kind: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", values)
    message = f"column `text` of type {kind}.*must be string"
    with pytest.raises(DataError, match=message):
        next(read_documents(str(path), "train"))
    with pytest.raises(DataError, match=message):
        list_groups(path)


def test_text_in_codes_is_text(tmp_path: Path) -> None:
    import pyarrow as pa

    texts = ["long " * 50, "longer " * 50]
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        path = write_parquet(tmp_path / "a.parquet", pa.array(texts).cast(kind))
        assert [*read_documents(str(path), "train"), *read_documents(str(path), "val")] == texts


def test_bad_corpora(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no column `text` \(it has content\)"):
        list(
            read_documents(
                str(write_parquet(tmp_path / "a.parquet", ["x"], column="content")), "train"
            )
        )
    for odd in ("~nobody-here/a.txt", "word " * 100):
        with pytest.raises(DataError, match="is not there"):
            find_files(odd)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no .txt"):
        list(read_documents(str(tmp_path / "empty"), "train"))
    with pytest.raises(DataError, match="split='test' must be train or val"):
        list(read_documents("chitchat", "test"))
    assert is_local("chitchat") and is_local("x.txt") and not is_local("climbmix")


# The Hub's shards, from a local server that speaks as much of its API as is needed


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        hub = self.server.state  # type: ignore[attr-defined]
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        hub.log.append("sizes")
        if hub.failures:
            hub.failures -= 1
            return self.reply(503, b"{}")
        if hub.refuse:
            return self.reply(hub.refuse, b"{}")
        assert self.path == f"/api/{REPO}/paths-info/main"
        found = [
            {"type": "file", "path": p, "size": len(hub.files[p]), "oid": "0" * 40}
            for p in asked
            if p in hub.files
        ]
        self.reply(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def do_GET(self) -> None:
        hub = self.server.state  # type: ignore[attr-defined]
        name = self.path.rsplit("/", 1)[1]
        if self.command == "GET":
            hub.log.append(name)
            if hub.cut:
                hub.cut -= 1
                return self.reply(500, b"")
        self.reply(
            200,
            hub.files[name],
            {"ETag": f'"{name}-{len(hub.files[name])}"', "X-Repo-Commit": "1" * 40},
        )

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    import huggingface_hub.constants

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    files = {f"shard_{i:05d}.parquet": b"%d" % i * (1000 + i) for i in (0, 1, 2, 6542)}
    server.state = state = SimpleNamespace(files=files, log=[], failures=0, refuse=0, cut=0)  # type: ignore[attr-defined]
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_room, "RETRY_WAITS_S", (0.0, 0.0))
    monkeypatch.setattr(hub_room, "PROBE_WAITS_S", (0.0, 0.0))
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def test_fetch_and_skip(hub: SimpleNamespace, tmp_path: Path) -> None:
    events: list[Any] = []
    paths = shard_paths("climbmix", "train", 3, events.append, base_dir=tmp_path)
    folder = tmp_path / "base_data_climbmix"
    assert paths == [folder / f"shard_{i:05d}.parquet" for i in range(3)]
    assert [path.read_bytes() for path in paths] == [hub.files[path.name] for path in paths]
    total = sum(len(hub.files[path.name]) for path in paths)
    assert isinstance(events[0], PhaseEvent) and (events[0].total, events[0].unit) == (
        total,
        "bytes",
    )
    assert isinstance(events[-1], ProgressEvent) and events[-1].done == total
    assert sorted(p.name for p in folder.glob("*.parquet*")) == [path.name for path in paths]
    hub.log.clear()
    assert shard_paths("climbmix", "train", 3, base_dir=tmp_path) == paths
    assert hub.log == ["sizes"], "finished shards are not fetched again"
    paths[1].write_bytes(b"torn")
    shard_paths("climbmix", "train", 3, base_dir=tmp_path)
    assert (
        hub.log == ["sizes", "sizes", paths[1].name]
        and paths[1].read_bytes() == hub.files[paths[1].name]
    )
    assert [p.name for p in shard_paths("climbmix", "val", 3, base_dir=tmp_path)] == [
        "shard_06542.parquet"
    ]


def test_retries(hub: SimpleNamespace, tmp_path: Path) -> None:
    hub.failures, hub.cut = 1, 1
    (path,) = shard_paths("climbmix", "train", 1, base_dir=tmp_path)
    assert path.read_bytes() == hub.files[path.name]
    hub.cut = 10**6
    with pytest.raises(
        HubError, match=r"shard_06542.parquet .* could not be fetched .*run the same command again"
    ):
        shard_paths("climbmix", "val", 1, base_dir=tmp_path)
    assert not (tmp_path / "base_data_climbmix" / "shard_06542.parquet").exists()


def test_refusals(hub: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="has no file shard_00003.parquet"):
        shard_paths("climbmix", "train", 4, base_dir=tmp_path)
    hub.log.clear()
    hub.refuse = 403
    with pytest.raises(HubError, match="HTTP 403: access is not granted"):
        shard_paths("climbmix", "train", 1, base_dir=tmp_path)
    assert hub.log == ["sizes"], "a refusal is final"
    for count in (0, 6543):
        with pytest.raises(DataError, match=f"n_shards={count} must be from 1 to 6542"):
            shard_paths("climbmix", "train", count, base_dir=tmp_path)


def test_offline(hub: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard_paths("climbmix", "train", 1, base_dir=tmp_path)
    hub.log.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert len(shard_paths("climbmix", "train", 1, base_dir=tmp_path)) == 1
    with pytest.raises(
        HubError,
        match="shard_00001.parquet and 0 more of climbmix are not in .*HF_HUB_OFFLINE is set",
    ):
        shard_paths("climbmix", "train", 2, base_dir=tmp_path)
    assert hub.log == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert len(shard_paths("climbmix", "train", 1, base_dir=tmp_path)) == 1, (
        "what is here serves without a network"
    )
    with pytest.raises(HubError, match="the Hub cannot be asked"):
        shard_paths("climbmix", "train", 2, base_dir=tmp_path)


def test_feed_fetches_ahead(
    hub: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "POLL_S", 0.01)
    monkeypatch.setattr(shards, "RETRY_S", 0.05)
    folder = tmp_path / "base_data_climbmix"
    feed = shards.open_feed("climbmix", 3, tmp_path, fetches=True, keep=2)
    follower = shards.open_feed("climbmix", 3, tmp_path, fetches=False)
    hub.refuse = 503  # the Hub is down at first: training waits, the feed tries again
    feed.begin(0)
    wait_until(lambda: feed.reason)
    hub.refuse = 0
    assert follower.wait(0).read_bytes() == hub.files["shard_00000.parquet"], (
        "another rank waits for it"
    )
    assert feed.wait(1).read_bytes() == hub.files["shard_00001.parquet"]
    wait_until(
        lambda: not feed.reason
    )  # cleared once the whole fetch has returned, after its files are seen
    time.sleep(0.1)
    assert not (folder / "shard_00002.parquet").exists(), "no more than two at once"
    follower.release(1)
    assert (folder / "shard_00000.parquet").exists(), "only the one that fetches removes"
    feed.release(1)
    assert not (folder / "shard_00000.parquet").exists()
    feed.wait(2)
    feed.release(2)  # the epoch's end: the first shard comes again
    feed.wait(0)
    assert hub.log.count("shard_00000.parquet") == 2
    feed.close()
    assert feed.thread is not None
    feed.thread.join(10)
    assert not feed.thread.is_alive()


def test_feed_gives_up(
    hub: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "POLL_S", 0.01)
    monkeypatch.setattr(shards, "RETRY_S", 0.01)
    monkeypatch.setattr(shards, "PATIENCE_S", 0.5)
    hub.refuse = 403
    feed = shards.open_feed("climbmix", 3, tmp_path, fetches=True)
    feed.begin(0)
    with pytest.raises(
        HubError, match=r"shard_00000.parquet did not come .*access is not granted.*resume"
    ):
        feed.wait(0)
    feed.close()


def test_silent_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub_room, "PROBE_S", 0.05)
    monkeypatch.setattr(shards, "probe_sizes", lambda *_: ended.wait(30) and {})
    with pytest.raises(HubError, match="no answer in"):
        shard_paths("climbmix", "val", 1, base_dir=tmp_path)
    ended.set()
