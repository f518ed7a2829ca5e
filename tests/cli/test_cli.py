"""The command line: help without torch, flags into configs, refusals, stops, and what a terminal shows."""

from __future__ import annotations

import dataclasses
import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import primechat
from primechat.cli import main as cli
from primechat.cli.progress import BarView, ProgressView, clean_text, open_view
from primechat.config import (
    FinetuneConfig,
    GPTConfig,
    PretrainConfig,
    RuntimeConfig,
    encode_config,
    recipes,
)
from primechat.errors import CheckpointError
from primechat.events import (
    CheckpointEvent,
    DoneEvent,
    Event,
    LossEvent,
    NoteEvent,
    PhaseEvent,
    ProgressEvent,
    QuickstartResult,
    SampleEvent,
    SpeedrunResult,
    StepEvent,
    TokenizerResult,
    TrainResult,
)


def make_result(**changes: Any) -> TrainResult:
    fields: dict[str, Any] = dict(
        identifier="base/d4@60",
        path="base_checkpoints/d4",
        step=60,
        stopped=False,
        val_bpb=1.4321,
        n_params=7_340_032,
        tokens=491_520,
        tokens_per_s=24_512.0,
        train_s=20.0,
        total_s=25.0,
    )
    return TrainResult(**{**fields, **changes})


class FakeStage:
    """Stands for a stage: notes what it is called with."""

    def __init__(self, result: Any = None, error: Exception | None = None) -> None:
        self.result, self.error, self.configs = result or make_result(), error, []

    def __call__(self, config: Any, *, on_event: Any = None, stop: Any = None) -> Any:
        self.configs.append(config)
        assert stop is not None and not stop.is_set()
        self.on_event = on_event
        if self.error:
            raise self.error
        return self.result


@pytest.fixture
def pretrain(monkeypatch: pytest.MonkeyPatch) -> FakeStage:
    return put_stage(monkeypatch, "pretrain", FakeStage())


def put_stage(monkeypatch: pytest.MonkeyPatch, name: str, stage: FakeStage) -> FakeStage:
    monkeypatch.setitem(vars(primechat), name, stage)
    return stage


def run_python(code: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **settings
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, primechat; from primechat.cli.main import main; code = main(['--help'])\n"
        "heavy = {'torch', 'tyro', 'rich', 'numpy', 'tiktoken', 'primechat.config'}\n"
        "print(code, sorted(heavy & set(sys.modules)))"
    )
    done = run_python(code)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "0 []", (
        done.stdout + done.stderr
    )


@pytest.mark.parametrize("verb", list(cli.STAGES))
def test_stage_help_comes_from_the_config_without_torch(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = f"import sys; from primechat.cli.main import main; main(['{verb}', '--help'])"
    done = run_python(f"{code}; print('torch' in sys.modules)")
    assert done.stdout.splitlines()[-1] == "False", done.stderr

    def list_names(config: Any, prefix: str = "") -> Iterator[str]:
        for item in dataclasses.fields(config):
            value = getattr(config, item.name)
            if dataclasses.is_dataclass(value):
                yield from list_names(value, f"{prefix}{item.name}.")
            else:
                yield prefix + item.name

    for name in list_names(getattr(primechat, cli.STAGES[verb][1])()):
        head, dot, last = name.rpartition(".")
        assert f"--{name} " in done.stdout or f"--{head}{dot}no_{last} " in done.stdout, name
    assert "--device cpu|mps|cuda" in " ".join(done.stdout.split())


def test_help_starts_with_what_a_newcomer_types(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert text.index("primechat quickstart") < text.index("Verbs:")
    verbs = [*cli.STAGES, *cli.PROGRAMS]
    table = text[text.index("Verbs:") :].splitlines()[1 : len(verbs) + 1]
    assert [line.split()[0] for line in table] == verbs
    assert all(len(line) <= 80 and line[17] == " " and line[19] != " " for line in table)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"primechat {primechat.__version__}\n"


def test_flags_become_a_config(pretrain: FakeStage, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--tag mine --model.n_layer 2 --optim.matrix-lr 0.5 --model.no_smear "
        "--eval.sample_every -1 --resume"
    )
    assert cli.main(["pretrain", *words.split()]) == 0
    (config,) = pretrain.configs
    assert (
        config.tag == "mine"
        and config.resume
        and config.model.n_layer == 2
        and not config.model.smear
    )
    assert (
        config.optim.matrix_lr == 0.5
        and config.eval.sample_every == -1
        and config.batch_tokens == 8192
    )
    assert config.model.vocab_size == 4096 and config.model.sequence_len == 256
    out = capsys.readouterr().out
    assert "base/d4@60" in out and "1.4321 bits per byte" in out and "Stopped" not in out


def test_shortcuts(pretrain: FakeStage) -> None:
    assert cli.main(["--device", "cpu", "pretrain", "--depth", "6"]) == 0
    assert cli.main(["pretrain", "--arch=classic", "--device=mps"]) == 0
    assert cli.main(["pretrain", "--depth", "2", "--model.sequence_len", "64", "--tag", "x"]) == 0
    assert cli.main(["pretrain", "--device", "cpu", "--runtime.device", "cuda"]) == 0
    six, classic, two, last = pretrain.configs
    assert (
        six.model == GPTConfig.modern(6, vocab_size=4096, sequence_len=256, head_dim=64)
        and six.tag == "d6"
    )
    assert six.runtime.device == "cpu"
    assert (
        classic.model == GPTConfig.classic(4, vocab_size=4096, sequence_len=256)
        and classic.tag == "d4"
    )
    assert classic.runtime.device == "mps"
    assert two.model.sequence_len == 64 and two.model.n_layer == 2 and two.tag == "x"
    assert last.runtime.device == "cuda"
    assert (
        cli.main(["pretrain", "--max-dollars=4", "--dollars-per-hour", "8", "--max-hours", "2"])
        == 0
    )
    assert pretrain.configs[-1].runtime.budget_s == 1800, "the nearer of both limits"


def test_recipes_are_named(pretrain: FakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe is where the flags start from; speedrun's is october2025, and --arch names one for it."""
    assert cli.main(["pretrain", "--recipe", "nanochat2026", "--depth", "12", "--device=cpu"]) == 0
    assert cli.main(["pretrain", "--recipe=quickstart", "--optim.x0_lr", "0.5", "--tag", "q"]) == 0
    modern, quick = pretrain.configs
    shards = {"n_shards": modern.n_shards, "runtime": RuntimeConfig(device="cpu")}
    assert modern == dataclasses.replace(recipes.nanochat2026(12), **shards)
    assert quick.optim == dataclasses.replace(recipes.quickstart().optim, x0_lr=0.5)
    result = SpeedrunResult(base=pretrain.result, chat=None, evaluation=None)
    stage = put_stage(monkeypatch, "speedrun", FakeStage(result))
    for words in ([], ["--recipe", "nanochat2026"], ["--arch", "modern", "--depth", "12"]):
        assert cli.main(["speedrun", *words]) == 0
    found = [(c.pretrain.tag, c.pretrain.optim.orthogonalize) for c in stage.configs]
    assert found == [("d20", "newton-schulz"), ("d20", "polar-express"), ("d12", "polar-express")]


def test_config_file_is_the_start(pretrain: FakeStage, tmp_path: Path) -> None:
    saved = PretrainConfig(tag="old", steps=7, runtime=RuntimeConfig(threads=2))
    (tmp_path / "config.json").write_text(json.dumps(encode_config(saved)))
    assert cli.main(["pretrain", "--config", str(tmp_path / "config.json"), "--steps", "9"]) == 0
    assert cli.main(["pretrain", f"--config={tmp_path}"]) == 0
    assert pretrain.configs == [dataclasses.replace(saved, steps=9), saved]


def test_both_spellings_of_a_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = TokenizerResult(
        path="tokenizer",
        identity="0" * 64,
        vocab_size=300,
        trained_chars=9,
        elapsed_s=0.1,
        bytes_per_token=3.6,
    )
    stage = put_stage(monkeypatch, "train_tokenizer", FakeStage(result))
    for verb in ("train-tokenizer", "train_tokenizer"):
        assert cli.main([verb, "--vocab-size", "300", "--device", "cpu"]) == 0
    assert [config.vocab_size for config in stage.configs] == [300, 300]
    assert "3.60 bytes a token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("pretrian", ["'pretrian'", "`primechat pretrain`"]),
        ("fly", ["'fly'", "primechat --help"]),
        ("pretrain --model.n_embd 321", ["model.n_embd=321", "model.n_head=4", "320"]),
        ("pretrain --batch_tokens 8000", ["batch_tokens=8000", "7936"]),
        ("pretrain --device tpu", ["runtime.device='tpu'", "cuda"]),
        ("pretrain --device", ["--device", "value"]),
        ("pretrain --depth x", ["--depth x", "try 4"]),
        ("pretrain --depth 0", ["depth=0"]),
        ("pretrain --arch gpt2", ["--arch gpt2", "classic"]),
        ("pretrain --recipe gpt2", ["recipe='gpt2'", "october2025, nanochat2026, quickstart"]),
        ("pretrain --recipe october2025 --arch modern", ["--recipe october2025", "--arch", "drop"]),
        ("plan --recipe october2025 --arch modern", ["--recipe october2025", "--arch", "drop"]),
        ("plan --recipe gpt2", ["recipe='gpt2'", "october2025, nanochat2026, quickstart"]),
        ("pretrain --optim.scalar_lr 0.5", ["optim.scalar_lr", "residual_lr, x0_lr and smear_lr"]),
        ("pretrain --tag ../x", ["tag='../x'"]),
        ("pretrain --config nowhere.json", ["nowhere.json", "No such file"]),
        ("pretrain --config FINETUNE", ["FinetuneConfig", "PretrainConfig"]),
        ("pretrain --config BROKEN", ["no JSON"]),
    ],
)
def test_refusals_are_one_sentence(
    words: str,
    expected: list[str],
    pretrain: FakeStage,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "f.json").write_text(json.dumps(encode_config(FinetuneConfig())))
    (tmp_path / "b.json").write_text('{"tag": ')
    argv = (
        words.replace("FINETUNE", str(tmp_path / "f.json"))
        .replace("BROKEN", str(tmp_path / "b.json"))
        .split()
    )
    assert cli.main(argv) == 2
    seen = capsys.readouterr()
    assert seen.out == "" and not pretrain.configs
    assert (
        seen.err.startswith("primechat: ")
        and seen.err.count("\n") == 1
        and "Traceback" not in seen.err
    )
    assert all(word in seen.err for word in expected), seen.err


@pytest.mark.parametrize("words", ["--stepz 3", "--steps many", "stray"])
def test_wrong_flags_are_explained(
    words: str, pretrain: FakeStage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pretrain", *words.split()]) == 2
    seen = capsys.readouterr()
    assert words.split()[0] in seen.err and "primechat pretrain --help" in " ".join(
        seen.err.split()
    )
    assert not pretrain.configs


def test_a_stage_that_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_stage(
        monkeypatch,
        "finetune",
        FakeStage(error=CheckpointError("base/d4 is not there; run pretrain.")),
    )
    assert cli.main(["finetune"]) == 2
    assert capsys.readouterr().err == "primechat: base/d4 is not there; run pretrain.\n"
    put_stage(monkeypatch, "finetune", FakeStage(error=ZeroDivisionError("a defect")))
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback
        cli.main(["finetune"])


def test_other_ranks_are_silent(
    pretrain: FakeStage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["pretrain"]) == 0
    assert pretrain.on_event is None and capsys.readouterr().out == ""
    assert cli.main(["pretrain", "--tag", ".."]) == 2
    assert capsys.readouterr().err.startswith("primechat (rank 1): ")


def test_a_stop_tells_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_stage(monkeypatch, "pretrain", FakeStage(make_result(stopped=True)))
    assert cli.main(["--device", "cpu", "pretrain", "--corpus", "my text.txt", "--depth", "2"]) == 0
    again = "primechat pretrain --corpus 'my text.txt' --depth 2 --device cpu --resume\n"
    assert capsys.readouterr().out.endswith(f"Stopped and saved. To go on: {again}")
    assert cli.main(["pretrain", "--resume"]) == 0
    assert capsys.readouterr().out.endswith("primechat pretrain --resume\n")


def make_quickstart(stopped: bool = False) -> QuickstartResult:
    tokenizer = TokenizerResult(
        path="tokenizer",
        identity="0" * 64,
        vocab_size=300,
        trained_chars=9,
        elapsed_s=0.1,
        bytes_per_token=3.6,
    )
    return QuickstartResult(
        tokenizer=tokenizer,
        base=make_result(identifier="base/quickstart-2@60", stopped=stopped),
        chat=make_result(identifier="sft/quickstart-2@60"),
        dialogue=(
            dict(role="user", content="Hi"),
            dict(role="assistant", content="hey \x1b[31mthere"),
        ),
        total_s=120.0,
    )


def test_quickstart_ends_in_a_dialogue(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_stage(monkeypatch, "quickstart", FakeStage(make_quickstart()))
    assert cli.main(["quickstart", "--fast"]) == 0
    out = capsys.readouterr().out
    assert "you  Hi\n" in out and "it  hey �[31mthere\n" in out and "\x1b" not in out
    assert (
        "primechat chat sft/quickstart-2@60" in out
        and "--model base/quickstart-2 " in out
        and "2.0 minutes" in out
    )
    put_stage(monkeypatch, "quickstart", FakeStage(make_quickstart(stopped=True)))
    assert cli.main(["quickstart", "--seconds", "9"]) == 0
    assert capsys.readouterr().out.endswith(
        "primechat quickstart --seconds 9 --tag quickstart-2 --resume\n"
    )


STOPPER = """
import sys, time, primechat
from primechat.cli import main as cli
from primechat.events import TrainResult
def stage(config, *, on_event, stop):
    print("ready", flush=True)
    for _ in range(6000):
        if stop.is_set() and sys.argv[1] == "obeys":
            return TrainResult(identifier="base/d4@1", path="", step=1, stopped=True, val_bpb=1.0, n_params=1,
                               tokens=1, tokens_per_s=1.0, train_s=1.0, total_s=1.0)
        time.sleep(0.01)
vars(primechat)["pretrain"] = stage
sys.exit(cli.main(["pretrain"]))
"""


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_stops_cleanly_second_at_once(kind: signal.Signals) -> None:
    def start(manner: str) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = dict(
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        )
        process = subprocess.Popen([sys.executable, "-c", STOPPER, manner], **pipes)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(kind)
        return process

    out, err = start("obeys").communicate(timeout=60), ""
    assert "To go on: primechat pretrain --resume" in out[0] and "again quits at once" in out[1], (
        out
    )
    stubborn = start("ignores")
    assert stubborn.stderr is not None
    while "again quits" not in err:
        err += stubborn.stderr.readline()
    stubborn.send_signal(kind)
    stubborn.communicate(timeout=60)
    assert stubborn.returncode == -kind


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with cli.stop_on_signal() as stop:
        assert signal.getsignal(signal.SIGINT) != before and not stop.is_set()
    assert signal.getsignal(signal.SIGINT) == before


@dataclasses.dataclass(frozen=True)
class Entry:
    identifier: str = "sft/d4"
    steps: tuple[int, ...] = (20, 60)
    snapshots: tuple[int, ...] = (0, 16, 32)
    n_bytes: int = 14_680_064
    architecture: str = "modern"
    n_params: int = 7_340_032
    val_bpb: float | None = None
    path: str = "chatsft_checkpoints/d4"
    shipped: bool = False
    val_tokens: int = 0
    by_product: bool = False


def test_models(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def list_entries(*entries: Entry) -> None:
        monkeypatch.setattr("primechat.cli.models.list_models", lambda: list(entries))

    list_entries()
    assert cli.main(["models"]) == 0
    assert "primechat quickstart" in capsys.readouterr().out
    d20 = Entry(identifier="base/d20", steps=(21400,), val_bpb=0.8123, path="x" * 300)
    mine = Entry(identifier="base/mine", path=str(base_dir / "base_checkpoints" / "mine"))
    list_entries(Entry(shipped=True), d20, mine)
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    assert "snaps " not in out and "modern" in out and max(map(len, out.splitlines())) <= 100, (
        "a narrow terminal"
    )
    monkeypatch.setenv("COLUMNS", "140")
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    assert "modern  base_checkpoints/mine " in out and out.endswith(
        f"--json lists all.\nIn {base_dir}/\n"
    )
    assert "7,340,032" in out and "0.8123" in out and "14.7" in out and "base/d20" in out
    assert "21400" in out and "60      3" in out and "ships with primechat" in " ".join(out.split())
    assert cli.main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1]["val_bpb"] == 0.8123


def test_chat_takes_a_model_by_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from primechat.chat import terminal

    seen: list[terminal.ChatConfig] = []
    monkeypatch.setattr(terminal, "run_chat", lambda config: seen.append(config) or 0)
    assert cli.main(["chat", "sft/d4@600", "--temperature", "0"]) == 0
    assert cli.main(["chat", "--model", "base/d4", "--device", "cpu"]) == 0
    assert cli.main(["chat"]) == 0
    assert [(c.model, c.device) for c in seen] == [
        ("sft/d4@600", "auto"),
        ("base/d4", "cpu"),
        ("", "auto"),
    ]


def make_events(steps: int = 40) -> list[Event]:
    events: list[Event] = [
        PhaseEvent(name="Tokenizer: reading", total=100, unit="documents"),
        ProgressEvent(done=50),
    ]
    events += [DoneEvent(step=0, elapsed_s=1.0), NoteEvent(text="2 threads, bfloat16")]
    events += [PhaseEvent(name="Pretraining", total=steps)]
    for step in range(1, steps + 1):
        numbers = dict(
            lr_ratio=1.0, grad_norm=1.0, update_norm=1.0, tokens=step, tokens_per_s=24_512.0
        )
        events.append(
            StepEvent(step=step, steps=steps, loss_nats=3.0, elapsed_s=step / 10, **numbers)
        )  # type: ignore[arg-type]
        if step % 20 == 0:
            events += [PhaseEvent(name="Validation", total=10, unit="rows"), ProgressEvent(done=5)]
            events.append(
                LossEvent(
                    step=step, val_bpb=1.5, val_loss_nats=3.0, whole=True, elapsed_s=step / 10
                )
            )
            events.append(SampleEvent(step=step, prompt="A: Hi", text=" there\nB: \x1b[2Jyes"))
    return [
        *events,
        CheckpointEvent(step=steps, path="p", snapshot=True),
        CheckpointEvent(step=steps, path="q"),
    ]


def test_plain_view_is_no_flood() -> None:
    now = iter(range(10_000))
    stream = io.StringIO()
    with ProgressView(stream, period_s=12, clock=lambda: next(now)) as view:
        for event in make_events(400):
            view(event)
    lines = stream.getvalue().splitlines()
    steps = [line for line in lines if line.startswith("Pretraining: step")]
    assert 2 < len(steps) < 40 and steps[-1].startswith("Pretraining: step 400/400")
    assert (
        "1.500 bpb" in steps[-1] and "24,512 tok/s" in steps[-1] and steps[-1].endswith("0:00 left")
    )
    assert "\x1b" not in stream.getvalue() and "step 20 writes: A: Hi → there B: �[2Jyes" in lines
    assert (
        "2 threads, bfloat16" in lines
        and "step 400: saved q" in lines
        and "step 400: saved p" not in lines
    )
    assert not any(line.startswith("Validation (") for line in lines)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_view_keeps_finished_phases_and_drops_interruptions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    view = open_view(stream)
    assert isinstance(view, BarView) and type(open_view(io.StringIO())) is ProgressView
    with view:
        for event in make_events():
            view(event)
        assert [task.description for task in view.bars.tasks] == [
            "Tokenizer",
            "Pretraining",
            "Validation",
        ]
        view(DoneEvent(step=40, elapsed_s=4.0))
        assert [(task.description, task.finished) for task in view.bars.tasks] == [
            ("Tokenizer", True),
            ("Pretraining", True),
        ]
        view(PhaseEvent(name="Chat fine-tuning", total=10))
        view(DoneEvent(step=3, elapsed_s=4.0, stopped=True))
        assert not view.bars.tasks[-1].finished  # a bar that was stopped does not claim to be full
    assert "loss 3.000" in stream.getvalue() and "[2Jyes" in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue()


def test_model_text_cannot_steer_the_terminal() -> None:
    assert clean_text("a\x1b]0;title\x07b\rc\x9bd\u202ee") == "a�]0;title�b�c�d�e"
    assert clean_text("täglich 日本 🙂\n\tx") == "täglich 日本 🙂\n\tx"


def test_broken_pipe_is_no_traceback() -> None:
    code = "import sys; from primechat.cli.main import main; sys.exit(main(['--help']))"
    command = f'{sys.executable} -c "{code}" | true'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
