"""Whatever path a person names, in whatever verb: a sentence where it cannot be used, and nothing lost."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import make_config, make_corpus

from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import find_steps, save_checkpoint
from primechat.cli import main as cli
from primechat.config import GPTConfig, PretrainConfig, TokenizerConfig, encode_config
from primechat.errors import CheckpointError, ConfigError, PrimechatError
from primechat.files.paths import explain_refusal, make_folder, resolve_path, write_file
from primechat.model.gpt import GPT
from primechat.stages.pretrain import pretrain
from primechat.stages.tokenizer import train_tokenizer
from primechat.text.tokenizer import Tokenizer
from primechat.train.distill import TeacherCache


def make_long(place: Path) -> Path:
    return place / ("x" * 300)


def make_loop(place: Path) -> Path:
    (place / "a").symlink_to(place / "b")
    (place / "b").symlink_to(place / "a")
    return place / "a"


def make_dangling(place: Path) -> Path:
    (place / "link").symlink_to(place / "gone")
    return place / "link"


def make_below_dangling(place: Path) -> Path:
    return make_dangling(place) / "x"


def make_below_file(place: Path) -> Path:
    (place / "file").write_text("a text\n")
    return place / "file" / "x"


def make_stranger(place: Path) -> Path:
    return Path("~nosuchuser/x")


def make_file(place: Path) -> Path:
    (place / "file").write_text("a text\n")
    return place / "file"


KINDS: dict[str, Callable[[Path], Path]] = {
    make.__name__.removeprefix("make_"): make
    for make in (
        make_long,
        make_loop,
        make_dangling,
        make_below_dangling,
        make_below_file,
        make_stranger,
    )
}
# verb and options; PATH is the bad path, and `folder` of those where a file is bad too
OPTIONS = {
    "corpus of a tokenizer": "train-tokenizer --corpus PATH",
    "corpus of a base model": "pretrain --corpus PATH --model.vocab_size 280",
    "corpus of an evaluation": "evaluate --model shipped/base --corpus PATH",
    "corpus of a student": "distill --teacher shipped/base --corpus PATH",
    "config": "pretrain --config PATH",
    "tokenizer of a base model": "pretrain --tokenizer PATH",
    "tokenizer of a chat": "chat shipped/sft --tokenizer PATH",
    "tokenizer of a check": "check shipped/sft --tokenizer PATH",
    "dialogues": "finetune --base shipped/base --dialogues PATH.jsonl",
    "questions": "finetune --base shipped/base --dialogues faq:PATH",
    "openings": "autochat --model shipped/sft --openings PATH",
    "run": "report PATH",
    "output of a report": "report shipped/base --output PATH folder",
    "model to import": "convert PATH sft/mine --to nanochat",
    "output of an import": "convert IMPORTED PATH --to nanochat folder",
    "output of an export": "convert base/tiny PATH folder",
    "output of a lab": "export 05 -o PATH folder",
    "pages": "lab render PATH 00 folder",
}
BASE = (
    "train-tokenizer --corpus CORPUS --vocab_size 280",
    "pretrain",
    "finetune",
    "lora",
    "distill",
    "evaluate",
    "autochat --model shipped/sft",
    "quickstart",
    "speedrun",
    "models",
    "chat",
    "check",
    "report base/d4",
    "convert base/d4 out",
    "download",
    "pull root@203.0.113.7:base/d4",
    "preflight --cpu_ranks 1",
)


def run_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must be refused; return its sentence."""
    code, seen = cli.main(words), capsys.readouterr()
    if words[0] == "check" and code == 1:  # it reports what is wrong with a model: that is its work
        assert "Traceback" not in seen.out
        return seen.out
    sentences = [line for line in seen.err.splitlines() if line.startswith("primechat: ")]
    assert code in (1, 2) and len(sentences) == 1, (words, code, seen.err)
    assert "Traceback" not in seen.err and sentences[0] == seen.err.splitlines()[-1], seen.err
    assert sentences[0].endswith(".") and len(sentences[0]) < 600, sentences[0]
    return sentences[0]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return make_corpus(tmp_path)


@pytest.fixture
def classic(corpus: Path, tmp_path: Path) -> Path:
    """A classic base model of this base directory, and its Hugging Face folder, which is returned."""
    config = make_config(corpus, steps=1)
    shape = config.model
    model = replace(
        GPTConfig.classic(1, vocab_size=280, sequence_len=16), n_embd=32, n_head=2, n_kv_head=2
    )
    assert shape.vocab_size == model.vocab_size
    pretrain(replace(config, model=model))
    assert cli.main(["convert", "base/tiny", str(tmp_path / "imported")]) == 0
    return tmp_path / "imported"


@pytest.mark.parametrize("kind", [*KINDS, "file"])
def test_every_option_refuses_every_bad_path(
    kind: str,
    classic: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for name, line in OPTIONS.items():
        line, is_folder = line.removesuffix(" folder"), line.endswith(" folder")
        if kind == "file" and not is_folder:
            continue  # a file may be right there
        place = tmp_path / name.replace(" ", "-")
        place.mkdir()
        path = (KINDS.get(kind) or make_file)(place)
        words = line.replace("IMPORTED", str(classic)).split()
        words = [word.replace("PATH", str(path)) for word in words]
        said = run_refused(words, capsys)
        assert "PosixPath" not in said and "Errno" not in said, (name, said)


@pytest.mark.parametrize("kind", [*KINDS, "file"])
def test_every_verb_refuses_a_bad_base_directory(
    kind: str,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = tmp_path / "bad"
    place.mkdir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str((KINDS.get(kind) or make_file)(place)))
    for line in BASE:
        said = run_refused(line.replace("CORPUS", str(corpus)).split(), capsys)
        assert "NANOCHAT_BASE_DIR=" in said, (line, said)


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that may be read, but not written to: for root, whom no permission stops, by refusals."""
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    if os.geteuid() == 0:
        real = {os: os.mkdir, io: io.open}

        def refuse(path: Any) -> None:
            if isinstance(path, (str, os.PathLike)) and Path(path).is_relative_to(folder):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        def mkdir(path: Any, *rest: Any, **more: Any) -> None:
            refuse(path)
            real[os](path, *rest, **more)

        def open_file(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if set(mode) & set("wax+"):
                refuse(path)
            return real[io](path, mode, *rest, **more)

        monkeypatch.setattr(os, "mkdir", mkdir)
        monkeypatch.setattr(io, "open", open_file)
    return folder


def test_what_may_not_be_written_is_told(
    classic: Path,
    corpus: Path,
    locked: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capsys.readouterr()
    lines = [f"report base/tiny --output {locked}", f"report base/tiny --output {locked}/x"]
    lines += [f"convert base/tiny {locked}/y/z", f"convert {classic} {locked}/x --to nanochat"]
    lines += [f"export 05 -o {locked}/x", f"lab render {locked}/x 00"]
    for line in lines:
        assert "Permission denied" in run_refused(line.split(), capsys), line
    monkeypatch.setenv("NANOCHAT_BASE_DIR", f"{locked}/base")
    lines = [f"train-tokenizer --corpus {corpus} --vocab_size 280"]
    lines += ["autochat --model shipped/sft", "preflight --cpu_ranks 1"]
    for line in lines:
        assert "Permission denied" in run_refused(line.split(), capsys), line


def test_a_null_character_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="output=.* holds a null character; name another path."):
        resolve_path("a\0b", "output")
    path = tmp_path / "config.json"
    for changes in ({"corpus": "a\0b.txt"}, {"tokenizer": "a\0b"}):
        path.write_text(json.dumps(encode_config(PretrainConfig(**changes))))
        run_refused(["pretrain", "--config", str(path)], capsys)


def test_paths_that_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert resolve_path("~/x") == tmp_path / "x" and resolve_path("./~x") == Path("~x")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert resolve_path("link/new", folder=True) == Path("link/new")
    assert resolve_path("link", folder=True) == Path("link")
    with pytest.raises(
        ConfigError, match=r"^path='x{80}…' cannot be used \(its name is too long\)"
    ):
        resolve_path("x" * 300)


def test_a_file_for_a_person_is_whole_or_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real.txt").write_text("before")
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_file(tmp_path / "link.txt", "after ü \ud800")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text("utf-8") == "after ü ?"
    write_file(tmp_path / ("n" * 255), b"a name may have 255 bytes")

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(
        PrimechatError, match=r"real.txt cannot be used \(No space.*free some space"
    ):
        write_file(tmp_path / "real.txt", "again")
    assert (tmp_path / "real.txt").read_text("utf-8") == "after ü ?"
    assert len([*tmp_path.iterdir()]) == 3, "nothing of the failed write stays"
    with pytest.raises(PrimechatError, match="a file is in its place"):
        make_folder(tmp_path / "real.txt")
    said = str(explain_refusal(OSError(errno.EMFILE, "Too many open files")))
    assert said.startswith("A file cannot be used (Too many open files); close other programs")


def test_what_the_disk_refuses_anywhere_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "there/it.bin")

    monkeypatch.setattr("primechat.cli.models.list_models", refuse)
    said = run_refused(["models"], capsys)
    assert "there/it.bin cannot be used (No space left on device); free some space" in said


@pytest.mark.parametrize("kind", KINDS)
def test_a_save_that_fails_keeps_the_talk(kind: str, tmp_path: Path) -> None:
    from primechat.chat.terminal import ChatConfig, run_chat

    bad = KINDS[kind](tmp_path)
    good = tmp_path / "talk.jsonl"
    lines = f"Hi\n/save {bad}\nHow are you?\n/save {good}\n/save {good}\n/save {tmp_path}\n"
    out, err = io.StringIO(), io.StringIO()
    config = ChatConfig(model="shipped/sft", max_new_tokens=3, device="cpu")
    assert run_chat(config, stdin=io.StringIO(lines), stdout=out, stderr=err) == 0
    assert len(json.loads(good.read_text("utf-8"))["messages"]) == 4
    said = err.getvalue()
    assert said.count("Saved 4 messages") == 2 and "not overwritten" in said
    assert ("name another path." in said) == (kind != "stranger") or "does not exist" in said


# a disk that stays full, and two who write at once


def test_a_save_that_fails_leaves_nothing_and_is_told_again_on_resuming(
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(corpus)
    folder = registry.run_dir("base", "tiny")
    whole = os.fsync

    def refuse(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}") if pathlib.Path("/proc").exists() else ""
        if "optim_" in name or "config.json" in name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(descriptor)

    def fill(state: bool) -> None:
        monkeypatch.setattr(os, "fsync", refuse if state else whole)

    first = threading.Event()

    def fill_later(event: Any) -> None:
        if event.kind == "step" and not first.is_set():
            first.set()
            fill(True)

    with pytest.raises(PrimechatError, match="free some space and resume"):
        pretrain(config, on_event=fill_later)
    assert not [path.name for path in folder.iterdir() if path.suffix == ".tmp"]
    assert not [*folder.glob("model_*")] and find_steps(folder) == []
    with pytest.raises(PrimechatError, match=r"config.json cannot be used \(No space left"):
        pretrain(replace(config, resume=True))
    fill(False)
    assert pretrain(replace(config, resume=True)).step == config.steps


def test_a_full_disk_is_told_by_its_own_reason(tmp_path: Path) -> None:
    """Torch tells of a full disk by a line number of its own."""
    shape = GPTConfig.modern(1, vocab_size=280, sequence_len=16, head_dim=64)
    state = GPT(shape).state_dict()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # bytes of a file
    try:
        with pytest.raises(CheckpointError, match=r"Step 3 .*\(File too large\)") as end:
            save_checkpoint(tmp_path, 3, model_state=state, config=shape, optim_state=None, meta={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "enforce" not in str(end.value) and [*tmp_path.iterdir()] == []


def test_a_teachers_cache_on_a_full_disk_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = torch.arange(48).reshape(6, 8)
    tokens = torch.arange(6 * 8 * 4).reshape(6, 8, 4)
    cache = TeacherCache(tmp_path / "cache", k=4, sequence_len=8)
    cache.add(ids[:2], tokens[:2], -tokens[:2].float())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 8 * 4 * 4, hard))  # room for one row more
    try:
        cache.add(ids[2:], tokens[2:], -tokens[2:].float())
        cache.add(ids[2:], tokens[2:], -tokens[2:].float())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caplog.text.count("the training goes on and asks the teacher each time") == 1
    assert cache.find(ids[2:3]) is None and torch.equal(cache.find(ids[:2])[0], tokens[:2])
    again = TeacherCache(tmp_path / "cache", k=4, sequence_len=8)
    again.add(ids, tokens, -tokens.float())
    found = again.find(ids)
    assert found is not None and torch.equal(found[0], tokens)


def test_of_two_tokenizers_of_a_tag_one_is_refused(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text().replace("ping", "tick").replace("pong", "tock"))
    ends: list[Any] = []
    together = threading.Barrier(2, timeout=60)
    lengths = Tokenizer.byte_lengths

    def wait_for_the_other(self: Tokenizer) -> Any:
        """Hold a save, which has seen that there is no tokenizer yet, until the other has seen it too."""
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait()
        return lengths(self)

    def train(path: Path) -> None:
        try:
            ends.append(
                train_tokenizer(TokenizerConfig(tag="two", corpus=str(path), vocab_size=275))
            )
        except PrimechatError as error:
            ends.append(error)
            together.abort()

    monkeypatch.setattr(Tokenizer, "byte_lengths", wait_for_the_other)
    threads = [threading.Thread(target=train, args=(path,)) for path in (corpus, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [end for end in ends if isinstance(end, PrimechatError)]
    (made,) = [end for end in ends if not isinstance(end, PrimechatError)]
    assert len(refused) == 1, ends
    there = Tokenizer.load(registry.run_dir("base", "two") / "tokenizer")
    assert there.identity == made.identity
    assert "is being written by" in str(refused[0])


# a copy of the library, without its clone


@pytest.mark.slow
def test_a_copy_without_its_clone_says_so(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    shutil.copytree(
        root / "primechat",
        tmp_path / "site" / "primechat",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    code = "import sys; from primechat.cli.main import main\n"
    code += "for line in sys.stdin: print(main(line.split()), flush=True, file=sys.stderr)"
    lines = [
        "lab",
        "lab --list",
        "lab 01",
        "lab sync --check",
        "lab render out",
        "export 05 -o out",
    ]
    lines += [
        "chat",
        "chat shipped/sft",
        "check shipped/base",
        "evaluate --model shipped/base",
        "models",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_HUB_CACHE": str(tmp_path)},
        input="\n".join(lines),
        text=True,
        capture_output=True,
    )
    told = [line for line in done.stderr.splitlines() if "installed without its clone" in line]
    told += [line for line in done.stdout.splitlines() if "installed without its clone" in line]
    assert len(told) == len(lines), done.stderr
    assert all("pip install -e '.[labs]'" in line for line in told)
    codes = [int(line) for line in done.stderr.splitlines() if line.isdecimal()]
    assert codes == [2] * 10 + [0], done.stderr + done.stdout
