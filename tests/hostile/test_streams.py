"""Whatever becomes of the streams: a training saves, and a verb that only prints ends quietly."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_training import STEPS, make_config, make_corpus

import primechat
from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import find_steps
from primechat.checkpoint.run_dir import MetricsFile, read_metrics
from primechat.cli import main as cli
from primechat.cli.output import SafeStream, guard_streams
from primechat.cli.progress import ProgressView
from primechat.config import (
    encode_config,
)
from primechat.events import NoteEvent, PhaseEvent
from primechat.stages.pretrain import pretrain


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return make_corpus(tmp_path)


@pytest.fixture
def words(corpus: Path, tmp_path: Path) -> list[str]:
    """The command line of a tiny training."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps(encode_config(make_config(corpus))))
    return [sys.executable, "-m", "primechat", "pretrain", "--config", str(path)]


def list_saved() -> list[int]:
    return find_steps(registry.run_dir("base", "tiny"))


@pytest.mark.slow
def test_a_training_whose_reader_leaves_goes_on_and_saves(words: list[str]) -> None:
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(words, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 0 and list_saved()[-1] == STEPS, said
    assert said.count("\n") == 1 and "nobody reads the output any more; the work goes on" in said


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">/dev/full", ">&- 2>&- <&-"])
def test_a_training_saves_with_its_output_full_or_closed(
    redirection: str, words: list[str]
) -> None:
    line = f'exec "$@" {redirection}'
    done = subprocess.run(["sh", "-c", line, "sh", *words], capture_output=True, text=True)
    assert done.returncode == 0 and list_saved()[-1] == STEPS, done.stderr
    events = read_metrics(registry.run_dir("base", "tiny") / "metrics.jsonl")
    assert [e["step"] for e in events if e["kind"] == "step"] == [*range(1, STEPS + 1)], (
        "nothing that is printed may land in a file that took a closed stream's number"
    )
    if redirection == ">/dev/full":
        assert done.stderr.count("\n") == 1 and "(No space left on device)" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_training_prints_in_any_encoding(encoding: str, words: list[str]) -> None:
    with narrow_streams(encoding) as raw:
        assert cli.main(words[3:]) == 0
        said = raw.getvalue()
    assert list_saved()[-1] == STEPS and b"writes: The most important thing about -> " in said


WAITER = """
import sys, time, primechat
from primechat.cli import main as cli
from primechat.events import TrainResult
def stage(config, *, on_event, stop):
    print("ready", flush=True)
    while not stop.is_set():
        time.sleep(0.01)
    time.sleep(0.3)  # the second SIGHUP comes while it saves
    open(sys.argv[1], "w").close()
    return TrainResult(identifier="base/d4@1", path="", step=1, stopped=True, val_bpb=1.0, n_params=1,
                       tokens=1, tokens_per_s=1.0, train_s=1.0, total_s=1.0)
vars(primechat)["pretrain"] = stage
sys.exit(cli.main(["pretrain"]))
"""


def test_a_closed_terminal_saves(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    master, slave = os.openpty()
    words = [sys.executable, "-c", WAITER, str(saved)]
    process = subprocess.Popen(
        words, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    said = b""
    while b"ready" not in said:
        said += os.read(master, 1000)
    os.close(master)  # from now on the program's output fails, as after an ssh that broke
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0 and saved.exists()


def test_nohup_keeps_its_meaning() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cli.stop_on_signal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_set() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_watcher_that_fails_does_not_end_a_training(corpus: Path) -> None:
    seen: list[str] = []

    def watch(event: Any) -> None:
        seen.append(event.kind)
        if event.kind == "step":
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    result = pretrain(make_config(corpus), on_event=watch)
    assert result.step == STEPS and not result.stopped and seen.count("step") == 1
    with pytest.raises(ZeroDivisionError):  # a defect of the watcher is still told
        pretrain(replace(make_config(corpus), tag="other"), on_event=lambda event: 1 / 0)


def test_a_full_disk_under_the_log(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls, notes = MetricsFile.append, [0], []

    def refuse(self: Any, line: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def append(self: MetricsFile, event: dict[str, Any]) -> bool:
        calls[0] += 1
        with monkeypatch.context() as patch:
            if 4 <= calls[0] < 8:
                patch.setattr("primechat.checkpoint.run_dir.append_line", refuse)
            return whole(self, event)

    monkeypatch.setattr(MetricsFile, "append", append)
    result = pretrain(
        make_config(corpus),
        on_event=lambda e: notes.append(e.text) if isinstance(e, NoteEvent) else None,
    )
    assert result.step == STEPS and len(result.events) == calls[0] - 4
    said = [note for note in notes if "metrics.jsonl" in note]
    assert len(said) == 1 and "No space left on device" in said[0] and "goes on" in said[0]


class TinyDisk(io.BytesIO):
    """A file on a disk with room for so many bytes."""

    room = 30

    def write(self, data: Any) -> int:
        fits = bytes(data)[: self.room - self.tell()]
        if not fits:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(fits)


def test_a_line_of_the_log_is_whole_or_absent() -> None:
    from primechat.checkpoint.run_dir import append_line

    disk: Any = TinyDisk()
    append_line(disk, b"x" * 19 + b"\n")
    for _ in range(2):  # ten bytes fit, then none: the line before stays the last
        with pytest.raises(OSError, match="No space left"):
            append_line(disk, b"y" * 19 + b"\n")
        assert disk.getvalue() == b"x" * 19 + b"\n"
    disk.room = 60
    append_line(disk, b"z" * 19 + b"\n")
    assert disk.getvalue().splitlines() == [b"x" * 19, b"z" * 19]


def test_a_stop_tells_what_is_true_of_its_phase() -> None:
    view = ProgressView(io.StringIO())
    assert "preparation and one step are finished and saved" in view.describe_stop()
    view(PhaseEvent(name="tokenizer", unit="characters"))
    assert "nothing is saved" in view.describe_stop()
    view(PhaseEvent(name="autochat", unit="turns"))
    assert view.describe_stop() == "this turn is finished and saved"
    view(PhaseEvent(name="validation", unit="tokens"))
    assert "has been scored" in view.describe_stop()
    view(PhaseEvent(name="training base/d4", total=9, unit="steps"))
    view(PhaseEvent(name="validation", unit="tokens"))  # interrupts the training
    assert view.describe_stop() == "this step is finished and saved"


def test_a_tokenizer_stopped_in_a_pretraining_saves_nothing(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)

    def interrupt(self: ProgressView, event: Any) -> None:
        self.phase = event if isinstance(event, PhaseEvent) else self.phase
        if self.phase.unit == "characters" and signal.getsignal(signal.SIGINT) != signal.SIG_DFL:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ProgressView, "__call__", interrupt)
    words = ["--tag", "fresh", "--corpus", str(corpus), "--model.vocab_size", "270"]
    assert cli.main(["pretrain", *words, "--model.n_layer", "1"]) == 130
    said = capfd.readouterr().err
    assert "finished and saved" not in said and said.count("nothing is saved") == 2, said
    assert signal.getsignal(signal.SIGINT) == before
    assert not (registry.run_dir("base", "fresh") / "tokenizer").exists()


# verbs that print


@contextlib.contextmanager
def narrow_streams(encoding: str = "ascii") -> Iterator[io.BytesIO]:
    """Let the process have streams of a narrow, strict encoding; yield what is written to stdout."""
    raw = io.BytesIO()
    before = sys.stdin, sys.stdout, sys.stderr
    sys.stdin = io.TextIOWrapper(io.BytesIO("Hi → ü\n".encode()), encoding)
    sys.stdout = io.TextIOWrapper(raw, encoding, "strict")
    sys.stderr = io.TextIOWrapper(io.BytesIO(), encoding, "strict")
    try:
        yield raw
        sys.stdout.flush()
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


def test_a_printing_verb_ends_quietly_when_its_reader_leaves() -> None:
    line = f"{sys.executable} -m primechat --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.stdout.split() == ["141"] and done.stderr == ""


def test_a_printing_verb_tells_that_its_result_is_lost() -> None:
    line = f"{sys.executable} -m primechat --version > /dev/full"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr and "the result is lost" in done.stderr
    line = f"{sys.executable} -m primechat --version >&- 2>&- <&-"
    assert subprocess.run(["bash", "-c", line]).returncode == 0, "somebody wanted no output"


def test_streams_are_given_back() -> None:
    with narrow_streams() as raw:
        out, err = sys.stdout, sys.stderr
        with guard_streams():
            assert isinstance(sys.stdout, SafeStream)
            with guard_streams():  # a stage within a verb
                print("a → b")
            assert isinstance(sys.stdout, SafeStream)
        assert (sys.stdout, sys.stderr) == (out, err) and sys.stdout.errors == "strict"
        assert raw.getvalue() == b"a -> b\n"


def list_verbs() -> dict[str, list[str]]:
    """Return a short command line of each verb; FOLDER stands for a new one, FILE for a text."""
    tiny = ["--steps", "2", "--batch_tokens", "512", "--runtime.compile", "off"]
    tiny += ["--runtime.device", "cpu", "--runtime.threads", "1", "--runtime.dtype", "float32"]
    evaluation = ["--eval.tokens", "256", "--eval.last_tokens", "256"]
    shape = ["--model.n_layer", "1", "--model.n_embd", "32", "--model.n_head", "2"]
    shape += ["--model.n_kv_head", "2", "--model.vocab_size", "280", "--model.sequence_len", "64"]
    talks = ["--dialogues", "style:pirate", "--general", "none"]
    return {
        "train-tokenizer": ["--corpus", "FILE", "--vocab_size", "280"],
        "pretrain": ["--corpus", "FILE", "--arch", "classic", *shape, *tiny, *evaluation],
        "finetune": [*talks, *tiny, *evaluation],
        "lora": ["--tag", "pirate", *talks, *tiny, *evaluation],
        "distill": ["--teacher", "base/d4", "--corpus", "FILE", *tiny, *evaluation],
        "evaluate": ["--model", "base/d4", "--corpus", "FILE", "--max_tokens", "256"],
        "autochat": ["--n_conversations", "1", "--turns", "2", "--max_new_tokens", "4"],
        "quickstart": [],
        "speedrun": [],
        "report": ["base/d4"],
        "convert": ["base/d4", "FOLDER"],
        "check": ["base/d4"],
        "models": [],
        "chat": ["base/d4", "--max_new_tokens", "4", "--device", "cpu"],
        "plan": [],
        "export": ["05", "-o", "FOLDER"],
        "lab": ["--list"],
        "bench": ["--help"],
        "preflight": ["--help"],
        "download": ["--dry-run"],
        "pull": ["nowhere"],
    }


@contextlib.contextmanager
def closed_streams() -> Iterator[io.BytesIO]:
    """Let the process have no streams, as after `<&- >&- 2>&-`; yield what is written: nothing."""
    before = sys.stdin, sys.stdout, sys.stderr
    sys.stdin = sys.stdout = sys.stderr = None  # type: ignore[assignment]
    try:
        yield io.BytesIO()
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


@contextlib.contextmanager
def unread_streams() -> Iterator[io.BytesIO]:
    """Let the reader of stdout have gone; yield what is written to stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    with narrow_streams(), open(writer, "w") as unread:
        before, sys.stdout = sys.stdout, unread
        yield sys.stderr.buffer  # type: ignore[misc]
        sys.stdout = before


CODES = {"download": 2, "pull": 2, "check": 1}  # no network here; two steps make a poor model
PRINTED = {"chat", "check", "models", "plan", "lab", "evaluate", "bench", "preflight"}


@pytest.mark.slow
@pytest.mark.parametrize("streams", [narrow_streams, closed_streams, unread_streams])
def test_every_verb_runs_whatever_its_streams(
    streams: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = Path(primechat.__file__).parent / "cli" / "README.md"
    verbs = list_verbs()
    assert {*re.findall(r"^\| `primechat ([\w-]+)", guide.read_text("utf-8"), re.M)} == {*verbs}
    monkeypatch.setitem(vars(primechat), "speedrun", lambda config, **rest: None)
    monkeypatch.setitem(vars(primechat), "quickstart", lambda config, **rest: None)
    for verb, rest in verbs.items():
        out = str(tmp_path / f"{verb}-out")
        places = {"FILE": str(corpus), "FOLDER": out}
        with streams() as raw:
            code = cli.main([verb, *(places.get(word, word) for word in rest)])
            if streams is narrow_streams:
                sys.stdout.flush()
                raw.write(sys.stderr.buffer.getvalue())  # type: ignore[attr-defined]
            text = raw.getvalue()
        gone = streams is unread_streams and verb in PRINTED
        assert code == (141 if gone else CODES.get(verb, 0)), (verb, text.decode())
        assert b"Traceback" not in text and text.isascii(), verb
        if streams is narrow_streams:
            assert text or verb in ("quickstart", "speedrun"), verb
    made = [registry.run_dir(family, tag) for family, tag in (("base", "d4"), ("lora", "pirate"))]
    made += [tmp_path / "convert-out", tmp_path / "export-out", made[0] / "report" / "index.html"]
    assert all(path.exists() for path in made), "what is made does not depend on its output"
