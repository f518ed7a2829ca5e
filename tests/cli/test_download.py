"""`primechat download` against a Hub on this machine, with the faults of networks, disks and repositories."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_server import COMMIT, Hub, open_hub
from tiny import byte_tokenizer

import primechat
from primechat.checkpoint import download
from primechat.checkpoint.download import Parcel, download_files, is_safe, plan_download
from primechat.cli import download as desk
from primechat.cli import main as cli
from primechat.cli.download import DownloadConfig, build_parcels
from primechat.cli.progress import BarView, ProgressView
from primechat.errors import ConfigError, DataError, HubError, PrimechatError
from primechat.events import Event, NoteEvent, PhaseEvent, ProgressEvent
from primechat.files import hub as hub_room

FIXTURES = Path(__file__).parents[1] / "fixtures" / "nanochat"
DIEGO, D32, OTHER = "shiptoday101/nanochat-d20-base", "karpathy/nanochat-d32", "someone/nanochat-d3"
DIEGO_FILES = ("model_021400.pt", "meta_021400.json", "optim_021400.pt")
SHOW_CHECK = desk.show_check  # the fixture puts a short one in its place
ONE = Parcel(repo=OTHER, folder=Path(), patterns=("model_000010.pt", "meta_000010.json"))


def read_fixture(era: str, tag: str) -> dict[str, bytes]:
    folder = FIXTURES / era
    paths = [*(folder / "base_checkpoints" / tag).iterdir(), *(folder / "tokenizer").iterdir()]
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants
    import huggingface_hub.file_download

    with open_hub() as state:
        classic, modern = read_fixture("oct2025", "d2"), read_fixture("head_d3", "d3")
        state.files[DIEGO] = {
            "README.md": b"# d20",
            **{
                n: classic[f"{n.partition('_')[0]}_000010.{n[-4:].lstrip('.0')}"]
                for n in DIEGO_FILES
            },
        }
        state.files[D32] = {
            "model_000650.pt": modern["model_000010.pt"],
            "meta_000650.json": modern["meta_000010.json"],
            **{name: classic[name] for name in ("tokenizer.pkl", "token_bytes.pt")},
        }
        state.files[OTHER] = {".gitattributes": b"* lfs", "notes/a.md": b"a", **modern}
        monkeypatch.setenv("HF_ENDPOINT", state.url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
        monkeypatch.setattr(
            huggingface_hub.file_download, "time", SimpleNamespace(sleep=lambda _: None)
        )
        monkeypatch.setattr(hub_room, "RETRY_WAITS_S", (0.0, 0.0))
        monkeypatch.setattr(hub_room, "PROBE_WAITS_S", (0.0, 0.0))
        monkeypatch.setattr(
            desk, "show_check", lambda identifier: int(bool(print(f"checked {identifier}")))
        )
        yield state


def list_base(base: Path) -> dict[str, bytes]:
    """Return every file below the base directory; what primechat notes for itself is left out."""
    files = {str(path.relative_to(base)): path for path in base.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in sorted(files.items())
        if name != ".download/run.lock" and path.name != "download.json"
    }


def fetch(base: Path, *parcels: Parcel, on_event: Any = None) -> list[Event]:
    events: list[Event] = []
    download_files(plan_download([*parcels]), base, on_event or events.append)
    return events


def place(base: Path, **changes: Any) -> Parcel:
    return Parcel(**{**vars(ONE), "folder": base / "base_checkpoints" / "d3", **changes})


# What is fetched, and where it goes


def test_default(hub: Hub, base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["download"]) == 0
    out = capsys.readouterr().out
    tokenizer = {name: hub.files[D32][name] for name in ("token_bytes.pt", "tokenizer.pkl")}
    folder = "base_checkpoints/diego-d20-base"
    assert list_base(base_dir) == {
        **{f"{folder}/{name}": hub.files[DIEGO][name] for name in DIEGO_FILES},
        **{f"{folder}/tokenizer/{name}": data for name, data in tokenizer.items()},
        **{f"tokenizer/{name}": data for name, data in tokenizer.items()},
    }
    note = json.loads((base_dir / folder / "download.json").read_text())
    model = next(row for row in note["files"] if row["name"] == "model_021400.pt")
    data = hub.files[DIEGO]["model_021400.pt"]
    assert (model["repo"], model["revision"], model["size"]) == (DIEGO, COMMIT, len(data))
    assert model["sha256"] == hashlib.sha256(data).hexdigest() and len(note["files"]) == 3
    total = sum(map(len, list_base(base_dir).values()))
    assert f"{total / 1e6:,.3f} MB to fetch" in out and "download 7 file(s)" in out
    assert out.splitlines()[-1] == "checked base/diego-d20-base"
    model_, tokenizer_, meta = primechat.load_model(
        "base", "cpu", model_tag="diego-d20-base", step=21400
    )
    assert model_.config.architecture == "classic" and tokenizer_.vocab_size == 600
    hub.log.clear()
    assert cli.main(["download"]) == 0
    assert all(line.startswith("list ") for line in hub.log), "whole files are not fetched again"
    assert capsys.readouterr().out.count(": is here") == 7


def test_ends_with_the_check(hub: Hub, base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["download"]) == 0
    capsys.readouterr()
    assert SHOW_CHECK("base/diego-d20-base") == 0
    assert re.search(
        r"base/diego-d20-base@21400\n(.*\n)+(ok|suspicious): ", capsys.readouterr().out
    )
    model = base_dir / "base_checkpoints" / "diego-d20-base" / "model_021400.pt"
    model.write_bytes(model.read_bytes()[:-99_999])
    assert SHOW_CHECK("base/diego-d20-base") == 1 and "broken: " in capsys.readouterr().out
    assert SHOW_CHECK("base/none") == 1
    assert "base/none is here, but could not be checked: " in capsys.readouterr().out


def test_two_tokenizers_side_by_side(hub: Hub, base_dir: Path) -> None:
    own = byte_tokenizer()
    own.save(base_dir / "tokenizer")
    before = list_base(base_dir)
    assert cli.main(["download", "--no-optim"]) == 0
    extra = f"{OTHER}::chatsft_checkpoints/d3::model_*,meta_*,tokenizer.pkl,token_bytes.pt"
    assert cli.main(["download", "--bundle", "d32", "--extra", extra]) == 0
    after = list_base(base_dir)
    assert {name: data for name, data in after.items() if name.startswith("tokenizer/")} == before
    assert "base_checkpoints/diego-d20-base/optim_021400.pt" not in after
    assert (
        "chatsft_checkpoints/d3/tokenizer/tokenizer.pkl" in after
        and "chatsft_checkpoints/d3/tokenizer.pkl" not in after
    )
    for identifier in ("base/diego-d20-base", "sft/d32", "sft/d3"):
        model, tokenizer, meta = primechat.open_model(identifier)
        assert model.vocab_size == tokenizer.vocab_size == 600 and meta["identifier"].startswith(
            identifier
        )
    assert primechat.load_tokenizer().identity == own.identity
    assert {entry.identifier for entry in primechat.list_models() if not entry.shipped} == {
        "base/diego-d20-base",
        "sft/d32",
        "sft/d3",
    }


def test_flags(base_dir: Path) -> None:
    def places(**flags: Any) -> list[tuple[str, str, str | None]]:
        parcels = build_parcels(DownloadConfig(**flags))
        return [(p.repo, str(p.folder.relative_to(base_dir)), p.revision) for p in parcels]

    d20 = "base_checkpoints/diego-d20-base"
    tokens = [(D32, f"{d20}/tokenizer", None), (D32, "tokenizer", None)]
    assert places() == [(DIEGO, d20, None), *tokens], "what is named comes first"
    assert places(revision="v1") == [(DIEGO, d20, "v1"), *tokens]
    assert places(skip_tokenizer=True) == [(DIEGO, d20, None)]
    assert places(skip_diego_base=True, revision="v1") == [(D32, "tokenizer", "v1")]
    assert places(skip_diego_base=True, skip_tokenizer=True) == []
    assert places(bundle=("d32", "d32")) == [(D32, "chatsft_checkpoints/d32", None)]
    assert places(bundle=("sdobson-d20",), skip_tokenizer=True, skip_diego_base=True) == [
        ("sdobson/nanochat", "chatsft_checkpoints/sdobson-d20", None)
    ]
    extra = (("a/b::x/y::m*, n*",), ("c/d::tokenizer::tokenizer.pkl",))
    got = [*build_parcels(DownloadConfig(extra=extra, skip_tokenizer=True, skip_diego_base=True))]
    assert [p.patterns for p in got] == [("m*", "n*"), ("tokenizer.pkl",)]
    assert [p.beside for p in got] == [False, False]


def test_extra_as_the_old_script_takes_it(hub: Hub, base_dir: Path) -> None:
    skip = ["--skip-tokenizer", "--skip-diego-base"]
    one, two, three = (
        f"{OTHER}::there/{n}::{p}" for n, p in enumerate(("notes/*", "meta*", "*.pkl"))
    )
    assert (
        cli.main(["download", *skip, "--extra", one, two, "--extra", three, "--token", "hf_secret"])
        == 0
    )
    assert list(list_base(base_dir)) == [
        "there/0/notes/a.md",
        "there/1/meta_000010.json",
        "there/2/tokenizer.pkl",
    ]
    assert hub.tokens == {"Bearer hf_secret"}


def test_dry_run(hub: Hub, base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["download", "--dry-run", "--revision", COMMIT]) == 0
    out = capsys.readouterr().out
    assert not base_dir.exists() and f"list {DIEGO}@{COMMIT}" in hub.log
    assert not [line for line in hub.log if not line.startswith("list")]
    for name in DIEGO_FILES:
        size = f"{len(hub.files[DIEGO][name]) / 1e6:,.3f} MB"
        assert f"{size}  base_checkpoints/diego-d20-base/{name}  from {DIEGO}@c0ffee0: fetch" in out
    assert "MB free" in out and "checked" not in out


def test_dry_run_of_shards(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(desk, "shard_paths", None)  # what fetches
    monkeypatch.setattr(desk, "probe_sizes", lambda repo, names: dict.fromkeys(names, 100_000_000))
    assert cli.main(["download", "--shards", "fineweb-edu:2", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.startswith("    100.000 MB  base_data") for line in lines)
    assert (
        "shard_00001.parquet" in lines[1] and lines[1].endswith(": fetch") and not base_dir.exists()
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["download", "--shards", "fineweb-edu:2", "--dry-run"]) == 2
    assert "cannot be looked at (HF_HUB_OFFLINE is set)" in capsys.readouterr().err


def test_space_of_a_folder_that_is_to_come(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert (
        0.5 < download.measure_space(tmp_path / "a" / "b") / free < 2
        and not (tmp_path / "a").exists()
    )


def test_progress(hub: Hub, base_dir: Path) -> None:
    first, *rest = fetch(base_dir, place(base_dir))
    total = sum(len(hub.files[OTHER][name]) for name in ONE.patterns)
    assert first == PhaseEvent(name="download 2 file(s)", total=total, unit="bytes")
    done = [event.done for event in rest if isinstance(event, ProgressEvent)]
    assert len(done) == len(rest) and done == sorted(done) and done[-1] == total


def test_speed_and_time_left() -> None:
    now, stream = [0.0], io.StringIO()
    views = [
        ProgressView(stream, period_s=1, clock=lambda: now[0]),
        BarView(io.StringIO(), clock=lambda: now[0]),
    ]
    for event, now[0] in (
        (PhaseEvent(name="download 2 file(s)", total=80e6, unit="bytes"), 100.0),
        (ProgressEvent(done=0), 102.0),
        (ProgressEvent(done=16e6), 104.0),
    ):
        for view in views:
            view(event)
    assert stream.getvalue().splitlines() == [
        "download 2 file(s) (80.0 MB)",
        "download 2 file(s): 0.0 of 80.0 MB · 0.0 MB/s · -:-- left",
        "download 2 file(s): 16.0 of 80.0 MB · 4.0 MB/s · 0:16 left",
    ]
    (task,) = views[1].bars.tasks  # type: ignore[attr-defined]
    assert task.completed == 16e6 and task.fields["figures"] == "16.0 of 80.0 MB · 4.0 MB/s"


def test_bytes_of_a_failed_try_do_not_count(tmp_path: Path) -> None:
    traffic = hub_room.Traffic()
    for n in (3, 5):
        bar = traffic.make_bar(tmp_path)(total=9)
        bar.update(n)
        bar.update_transfer(n)
        assert traffic.received == {tmp_path: n}
    traffic.stop.set()
    with pytest.raises(KeyboardInterrupt):
        bar.update(1)


# Faults


def test_cut_connections(hub: Hub, base_dir: Path) -> None:
    key = f"{OTHER}/model_000010.pt"
    hub.cut[key], hub.cuts = 300_000, 2
    fetch(base_dir, place(base_dir))
    assert hub.ranges == ["", "bytes=300000-", "bytes=600000-", ""], (
        "a broken download goes on where it broke"
    )
    assert (base_dir / "base_checkpoints/d3/model_000010.pt").read_bytes() == hub.files[OTHER][
        "model_000010.pt"
    ]


def test_connection_that_always_breaks(hub: Hub, base_dir: Path) -> None:
    hub.cut[f"{OTHER}/model_000010.pt"] = 0
    parcel = place(base_dir, patterns=("meta_000010.json", "model_000010.pt"))
    with pytest.raises(
        HubError, match=r"model_000010.pt of .* could not be fetched .*check the network, then run"
    ):
        fetch(base_dir, parcel)
    assert list(list_base(base_dir)) == ["base_checkpoints/d3/meta_000010.json"], (
        "what is whole stays"
    )
    assert primechat.list_models() == [] or all(entry.shipped for entry in primechat.list_models())
    hub.cut.clear()
    hub.log.clear()
    fetch(base_dir, parcel)
    assert "meta_000010.json" not in hub.log and "model_000010.pt" in hub.log


REFUSED = [
    (
        "",
        401,
        "RepoNotFound",
        "HTTP 401: no such repository, or a private one.*--token or HF_TOKEN",
    ),
    ("", 401, "", "HTTP 401: it wants a token that the Hub knows.*hf auth login"),
    ("", 404, "RepoNotFound", "HTTP 404: no such repository.*correct its name"),
    (
        "",
        403,
        "GatedRepo",
        "HTTP 403: its owner grants access on request.*accept the terms on its page",
    ),
    ("", 403, "", "HTTP 403: access is not granted.*token that may read it"),
    ("", 404, "RevisionNotFound", "HTTP 404: it has no such revision.*correct --revision"),
    ("", 429, "", "HTTP 429: too many requests.*wait some minutes"),
    ("", 500, "", "HTTP 500: the Hub is out of order.*wait a little"),
    (
        "/model_000010.pt",
        403,
        "GatedRepo",
        "could not be fetched .*grants access on request.*accept the terms",
    ),
    (
        "/model_000010.pt",
        401,
        "GatedRepo",
        "could not be fetched .*grants access on request.*accept the terms",
    ),
    ("/model_000010.pt", 403, "", "could not be fetched .HTTP 403: access is not granted"),
    (
        "/model_000010.pt",
        404,
        "EntryNotFound",
        "could not be fetched .HTTP 404: it has no such file",
    ),
    ("/model_000010.pt", 503, "", "could not be fetched .*finished files are kept"),
]


@pytest.mark.parametrize(("where", "status", "code", "words"), REFUSED)
def test_refusals(
    hub: Hub,
    base_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    status: int,
    code: str,
    words: str,
) -> None:
    import huggingface_hub.utils._http as hf_http

    monkeypatch.setattr(hf_http.time, "sleep", lambda _: None)
    hub.refuse[OTHER + where] = (status, code)
    with pytest.raises(HubError, match=words) as caught:
        fetch(base_dir, place(base_dir))
    if where and status == 403:
        assert hub.heads.count("model_000010.pt") == 1, "a refusal is final"
    assert str(caught.value).count(";") == 1 and "\n" not in str(caught.value)
    assert list(list_base(base_dir)) in ([], ["base_checkpoints/d3/meta_000010.json"])


def test_names_that_are_not_there(hub: Hub, base_dir: Path) -> None:
    with pytest.raises(
        HubError, match=r"no file like 'model_9.pt', it has .*model_000010.pt.*; correct the name"
    ):
        plan_download([place(base_dir, patterns=("model_9.pt",))])
    with pytest.raises(HubError, match="nobody/nothing at main cannot be looked at .HTTP 404"):
        plan_download([place(base_dir, repo="nobody/nothing")])
    with pytest.raises(
        HubError, match=f"{OTHER} at v9 cannot be looked at .HTTP 404: it has no such revision"
    ):
        plan_download([place(base_dir, revision="v9")])
    with pytest.raises(HubError, match="no name of a repository.*owner/name"):
        plan_download([place(base_dir, repo="a/..")])


def test_no_network(base_dir: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError, match="cannot be looked at .*check the network, then run"):
        plan_download([place(base_dir)])
    monkeypatch.setattr(download, "ASK_S", 0.05)
    ended = threading.Event()
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: ended.wait(30))
    with pytest.raises(HubError, match="no answer in 0 s.*check the network"):
        plan_download([place(base_dir)])
    ended.set()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set.; unset it"):
        plan_download([place(base_dir)])


@pytest.mark.parametrize("size", [-1, 1])
def test_wrong_size(hub: Hub, base_dir: Path, size: int) -> None:
    name = "model_000010.pt"
    hub.announce[f"{OTHER}/{name}"] = len(hub.files[OTHER][name]) + size
    with pytest.raises(HubError, match="bytes arrived that are not the"):
        fetch(base_dir, place(base_dir, patterns=(name,)))
    assert list_base(base_dir) == {}


def test_wrong_hash(hub: Hub, base_dir: Path) -> None:
    name = "model_000010.pt"
    hub.hashes[f"{OTHER}/{name}"] = "1" * 64
    with pytest.raises(HubError, match="bytes arrived that are not the"):
        fetch(base_dir, place(base_dir, patterns=(name,)))
    assert list_base(base_dir) == {}


def test_full_disk(hub: Hub, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, spare = plan_download([place(base_dir)]), download.SPARE_BYTES
    room, left = [plan.n_bytes + spare - 1], base_dir / ".download" / "files"
    left.mkdir(parents=True)

    def measure(_: Path) -> int:
        assert not left.exists(), "what a killed download left is cleared away before"
        return room[0]

    monkeypatch.setattr(download, "measure_space", measure)
    with pytest.raises(
        DataError, match=r"has room for 1 MB, the download needs 1 MB; free some, .*--no-optim"
    ):
        download_files(plan, base_dir, print)
    assert list_base(base_dir) == {} and hub.log == [f"list {OTHER}@main"]
    room[0] += 1
    download_files(plan, base_dir, lambda _: None)
    assert len(list_base(base_dir)) == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_disk_that_refuses(
    hub: Hub, base_dir: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def replace(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(hub_room.os, "replace", replace)
    with pytest.raises(
        DataError, match=rf"model_000010.pt: .* MB cannot be written .{os.strerror(number)}.; free"
    ):
        fetch(base_dir, place(base_dir))
    assert list_base(base_dir) == {}


CHILD = """
import sys
from pathlib import Path
import huggingface_hub.constants
from primechat.checkpoint.download import Parcel, plan_download, download_files
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 50_000
base = Path(sys.argv[1])
def tell(event):
    print(getattr(event, "done", -1), flush=True)
parcel = Parcel(repo=sys.argv[2], folder=base / "base_checkpoints" / "d3", patterns=("meta_*", "model_*"))
download_files(plan_download([parcel]), base, tell)
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_killed(hub: Hub, base_dir: Path, kind: signal.Signals) -> None:
    hub.cut[f"{OTHER}/model_000010.pt"], hub.stall = 500_000, threading.Event()
    env = {**os.environ, "HF_HUB_OFFLINE": "0"}
    words = [sys.executable, "-c", CHILD, str(base_dir), OTHER]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, text=True
    ) as child:
        assert child.stdout
        for line in child.stdout:
            if float(line) >= 400_000:
                break
        else:
            pytest.fail("the download ended by itself")
        child.send_signal(kind)
        if kind == signal.SIGINT:
            hub.stall.set()
        assert child.wait(60) != 0
    hub.stall.set()
    left = list_base(base_dir)
    whole = [name for name in left if not name.startswith(".download/")]
    assert whole == ["base_checkpoints/d3/meta_000010.json"]
    assert bool(left.keys() - whole) == (kind == signal.SIGKILL), (
        "only kill -9 leaves rubbish, below .download"
    )
    assert not [entry for entry in primechat.list_models() if not entry.shipped]
    hub.cut.clear()
    hub.log.clear()
    fetch(base_dir, place(base_dir))
    assert hub.log == [f"list {OTHER}@main", "model_000010.pt"]
    assert {Path(name).name for name in list_base(base_dir)} == {*ONE.patterns}, (
        "and the next one clears it away"
    )


# What is here already


def test_torn_file_is_fetched_again(hub: Hub, base_dir: Path) -> None:
    folder = base_dir / "base_checkpoints" / "d3"
    folder.mkdir(parents=True)
    (folder / "model_000010.pt").write_bytes(b"torn")
    events = fetch(base_dir, place(base_dir))
    assert (folder / "model_000010.pt").read_bytes() == hub.files[OTHER]["model_000010.pt"]
    assert (folder / "model_000010.pt.old").read_bytes() == b"torn"
    assert any(
        isinstance(event, NoteEvent) and "shorter than the Hub's" in event.text for event in events
    )


def test_others_files_stay(hub: Hub, base_dir: Path) -> None:
    folder = base_dir / "base_checkpoints" / "d3"
    folder.mkdir(parents=True)
    size = len(hub.files[OTHER]["model_000010.pt"])
    for data in (b"x" * size, b"x" * (size + 1)):
        (folder / "model_000010.pt").write_bytes(data)
        with pytest.raises(
            DataError, match="model_000010.pt is another file than the Hub's.*move it away"
        ):
            plan_download([place(base_dir)])
        assert (folder / "model_000010.pt").read_bytes() == data
    (folder / "model_000010.pt").rename(folder / "model_000600.pt")
    with pytest.raises(DataError, match="holds another run's model_000600.pt, which stays"):
        plan_download([place(base_dir)])
    (folder / "download.json").write_text("{}")
    plan_download([place(base_dir)])
    (folder / "model_000010.pt").mkdir()
    with pytest.raises(DataError, match="is another file"):
        plan_download([place(base_dir)])


def test_the_note_keeps_what_came_before(hub: Hub, base_dir: Path) -> None:
    """Files of a folder that came one by one are all in its note; one that was damaged is begun anew."""
    note = base_dir / "base_checkpoints" / "d3" / "download.json"
    for pattern, names in (("meta_*", ["meta_000010.json"]), ("model_*", [])):
        fetch(base_dir, place(base_dir, patterns=(pattern,)))
        names = names or ["meta_000010.json", "model_000010.pt"]
        assert [row["name"] for row in json.loads(note.read_text())["files"]] == names
    note.write_text('{"files": [3]}')
    fetch(base_dir, place(base_dir, patterns=("optim_*", "m*_000010.*")))
    assert len(json.loads(note.read_text())["files"]) == 3


def test_tokenizers_of_others_stay(
    hub: Hub, base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = base_dir / "tokenizer"
    folder.mkdir(parents=True)
    (folder / "tokenizer.pkl").write_bytes(b"x" * len(hub.files[D32]["tokenizer.pkl"]))
    before = list_base(base_dir)
    assert cli.main(["download", "--skip-diego-base"]) == 0
    assert list_base(base_dir) == before, "neither file of another tokenizer is touched"
    assert capsys.readouterr().out.count("another one is here and stays") == 2
    (folder / "tokenizer.pkl").write_bytes(hub.files[D32]["tokenizer.pkl"])
    (folder / "token_bytes.pt").write_bytes(b"torn")
    backwards = f"{D32}::tokenizer::token_bytes.pt,tokenizer.pkl"
    assert (
        cli.main(["download", "--skip-diego-base", "--skip-tokenizer", "--extra", backwards]) == 0
    )
    assert (folder / "token_bytes.pt").read_bytes() == hub.files[D32]["token_bytes.pt"]


def test_one_downloader_at_a_time(hub: Hub, base_dir: Path) -> None:
    def tell(event: Event) -> None:
        if isinstance(event, PhaseEvent):
            with pytest.raises(PrimechatError, match="is being written by this very process"):
                fetch(base_dir, place(base_dir, folder=base_dir / "x"))

    fetch(base_dir, place(base_dir), on_event=tell)
    assert len(list_base(base_dir)) == 2


# Names that would leave the base directory


@pytest.mark.parametrize(
    "name",
    [
        "../x.pt",
        "a/../../x.pt",
        "/etc/x.pt",
        "a//x.pt",
        ".ssh/x.pt",
        "~/x.pt",
        "a\\x.pt",
        "a\nx.pt",
        ".",
    ],
)
def test_names_stay_inside(hub: Hub, base_dir: Path, name: str) -> None:
    assert not is_safe(name)
    hub.files[OTHER] = {name: b"x", "model.pt": b"y"}
    with pytest.raises(HubError, match="which leaves its folder; do not use it"):
        plan_download([place(base_dir, patterns=("*",))])
    with pytest.raises(ConfigError, match="must be repository::folder::pattern"):
        [*build_parcels(DownloadConfig(extra=((f"{OTHER}::{name}::*",),)))]
    assert not base_dir.exists()


@pytest.mark.parametrize(
    "text",
    ["a/b::c", "a/b::c::", "a/b::c:: , ", "a/b::::x", "b::c::x", "a/b::c::x::y", "", "a/b/c::d::e"],
)
def test_malformed_extras(base_dir: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="must be repository::folder::pattern,pattern"):
        [*build_parcels(DownloadConfig(extra=((text,),)))]


def test_nothing_left(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["download", "--skip-tokenizer", "--skip-diego-base"]) == 2
    assert "Nothing is left to download" in capsys.readouterr().err


def test_two_files_for_one_place(hub: Hub, base_dir: Path) -> None:
    hub.files["a/b"] = dict(hub.files[OTHER])
    with pytest.raises(
        ConfigError, match=r"someone/nanochat-d3 and a/b both bring .*model_000010.pt"
    ):
        plan_download([place(base_dir), place(base_dir, repo="a/b")])
    assert len(plan_download([place(base_dir), place(base_dir)]).fetch) == 2


def test_nothing_is_run(hub: Hub, base_dir: Path, tmp_path: Path) -> None:
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    hub.files[OTHER] = {"tokenizer.pkl": pickle.dumps(Bomb()), "setup.py": b"raise SystemExit"}
    fetch(base_dir, place(base_dir, patterns=("*",), beside=True))
    assert len(list_base(base_dir)) == 2 and not (tmp_path / "ran").exists()
