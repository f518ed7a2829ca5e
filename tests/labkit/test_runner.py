"""A stage behind Start and Stop, its settings as a form and as a command line, and its summary."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

import primechat as pc
from primechat.checkpoint import registry
from primechat.cli import main as cli
from primechat.config import (
    DistillConfig,
    FinetuneConfig,
    LoRAConfig,
    PretrainConfig,
    encode_config,
)
from primechat.errors import ConfigError
from primechat.events import (
    CheckpointEvent,
    DoneEvent,
    LossEvent,
    NoteEvent,
    PhaseEvent,
    ProgressEvent,
    SampleEvent,
    StepEvent,
    TrainResult,
)
from primechat.labkit import lab, twins
from primechat.labkit import start_stop as desk_runner
from primechat.labkit.forms import (
    build_config,
    build_form,
    list_fields,
    renew_config,
    write_command,
)
from primechat.labkit.start_stop import Runner, find_free
from primechat.views.widgets.runs import RunHistory, StageControl, thin_points


def make_step(step: int, steps: int = 100) -> StepEvent:
    return StepEvent(
        step=step,
        steps=steps,
        loss_nats=8 - step / 50,
        lr_ratio=1.0,
        grad_norm=1.0,
        update_norm=1.0,
        tokens=512,
        tokens_per_s=5000.0,
        elapsed_s=step / 10,
    )


def make_result(stopped: bool = False, events: tuple[dict[str, Any], ...] = ()) -> TrainResult:
    return TrainResult(
        identifier="base/d2",
        path="base_checkpoints/d2",
        step=3,
        stopped=stopped,
        val_bpb=1.5,
        n_params=1000,
        tokens=1536,
        tokens_per_s=100.0,
        train_s=15.4,
        total_s=20.0,
        events=events,
    )


def train_slowly(config: PretrainConfig, *, on_event: Any, stop: threading.Event) -> TrainResult:
    """A stage that goes on until it is stopped."""
    if config.tag == "taken" and not config.resume:
        raise ConfigError(
            "tag='taken' has a base model; resume it (--resume) or choose another tag."
        )
    on_event(PhaseEvent(name="training base/d2", total=100, unit="steps"))
    for step in range(1, 101):
        on_event(make_step(step))
        if stop.is_set():
            on_event(CheckpointEvent(step=step, path="model"))
            on_event(DoneEvent(step=step, elapsed_s=1.0, stopped=True))
            return make_result(stopped=True)
        time.sleep(0.02)
    return make_result()


def start_runner(function: Any, config: Any) -> tuple[Runner, Any]:
    runner = Runner(function, config)
    return runner, runner.join("Train")


def test_start_stop_and_go_on() -> None:
    runner, control = start_runner(train_slowly, PretrainConfig(tag="d2"))
    assert (
        control.state == "ready"
        and control.actions == [["start", "Start"]]
        and control.result is None
    )
    control.answer_act("start")
    control.answer_act("start")  # pressed twice: one run
    wait_until(lambda: len(control.view.get("train", [])) > 3)
    assert control.state == "running" and control.actions == [["stop", "Stop and save"]]
    assert control.view["figures"][0][1] == "steps" and control.view["left_s"] > 0
    control.answer_act("stop")
    wait_until(lambda: control.state == "stopped")
    assert control.result.stopped and "Stopped and saved after" in control.message
    assert [word for word, _ in control.actions] == ["resume", "afresh"]
    assert runner not in desk_runner._runners
    seen: list[PretrainConfig] = []
    runner.function = lambda config, **_: seen.append(config) or make_result()
    control.answer_act("resume")
    wait_until(lambda: control.state == "done")
    control.answer_act("again")
    wait_until(lambda: len(seen) == 2 and control.state == "done")
    assert [config.resume for config in seen] == [True, False]


def test_failure_is_told_and_resume_offered() -> None:
    runner, control = start_runner(train_slowly, PretrainConfig(tag="taken"))
    runner.act("start")
    wait_until(lambda: control.state == "failed")
    assert "resume it" in control.message and control.actions[0] == ["resume", "Go on"]

    def break_down(config: Any, **_: Any) -> None:
        raise RuntimeError("out of ink")

    runner, control = start_runner(break_down, PretrainConfig())
    runner.act("start")
    wait_until(lambda: control.state == "failed")
    assert control.message.startswith("RuntimeError: out of ink. Run again makes a new run, base/")
    assert control.actions == [["again", "Run again"]]


def test_run_of_an_earlier_day_is_taken_up(base_dir: Path) -> None:
    folder = base_dir / "base_checkpoints" / "lab05"
    folder.mkdir(parents=True)
    told = [make_step(1), make_step(2), DoneEvent(step=2, elapsed_s=1.0, stopped=True)]
    lines = [*map(asdict, told), {"kind": "of another version"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked: list[PretrainConfig] = []

    def go_on(config: PretrainConfig, *, on_event: Any, stop: threading.Event) -> TrainResult:
        asked.append(config)
        on_event(PhaseEvent(name="training base/lab05", total=100, unit="steps"))
        on_event(make_step(3))
        return make_result()

    runner, control = start_runner(go_on, PretrainConfig(tag="lab05"))
    assert control.state == "stopped" and control.message == (
        "base/lab05 is here already, stopped after 2 steps. Go on continues base/lab05. Start afresh makes a "
        "new run, base/lab05."
    )
    assert [word for word, _ in control.actions] == [
        "resume",
        "afresh",
    ] and control.result.step == 2
    assert len(control.view["train"]) == 2
    runner.act("resume")
    wait_until(lambda: control.state == "done")
    assert asked[0].resume and [x for x, _ in control.view["train"]] == [1, 2, 3], (
        "the curve goes on"
    )
    assert start_runner(go_on, PretrainConfig(tag="other"))[1].state == "ready"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (PretrainConfig(tag="lab05", steps=40), "base/lab05"),
        (FinetuneConfig(tag="my-mix", steps=40), "sft/my-mix"),
        (LoRAConfig(tag="pirate", steps=40), "lora:pirate"),
        (DistillConfig(tag="student", steps=40), "base/student"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_second_start_is_continued_or_numbered_and_that_is_said(
    config: Any, name: str, base_dir: Path
) -> None:
    """What a stage would refuse, as a run of this name is here, is not asked of it."""
    asked: list[Any] = []

    def train(config: Any, **_: Any) -> TrainResult:
        asked.append(config)
        return make_result()

    runner, control = start_runner(train, config)
    assert control.message == f"Start makes a new run, {name}."
    folder = registry.run_dir(desk_runner.RUNS[type(config).__name__], config.tag)
    shutil.copytree(registry.SHIPPED / "base_checkpoints" / "d4", folder)
    frozen = encode_config(config)
    (folder / "config.json").write_text(json.dumps(frozen))
    runner.act("start")  # the page was open when another one made the run
    wait_until(lambda: control.state == "done")
    assert asked.pop().tag == f"{config.tag}-2"
    done = [asdict(make_step(40)), asdict(DoneEvent(step=40, elapsed_s=1.0, stopped=True))]

    def write_log() -> None:
        text = "".join(json.dumps(line) + "\n" for line in done)
        (folder / "metrics.jsonl").write_text(text)

    write_log()
    _, control = start_runner(train, config)
    assert f"Go on continues {name}." in control.message
    assert f"Start afresh makes a new run, {name}-2." in control.message
    _, control = start_runner(train, replace(config, steps=60))
    assert "Steps of training: 40 then, 60 now" in control.message and "--" not in control.message
    assert control.actions == [["again", "Run again"]]
    assert f"Run again makes a new run, {name}-2." in control.message
    done[-1]["stopped"] = False
    write_log()
    _, control = start_runner(train, config)
    assert control.state == "done" and f"Run again makes a new run, {name}-2." in control.message


def test_nothing_to_learn_from_is_refused_before_start() -> None:
    """Lab 06 with every slider at zero trained on chitchat all the same."""
    form = build_form(FinetuneConfig(dialogues=""), ("dialogues",), "")
    runner, control = start_runner(train_slowly, form.config)
    assert control.state == "refused" and control.actions == []
    assert "nothing to learn from" in control.message and "Start" not in control.message
    runner.act("start")
    assert runner.thread is None and control.state == "refused"
    form.answer_change({"dialogues": "faq*0"})
    assert "weight above 0" in control.message and control.actions == []
    form.answer_change({"dialogues": "faq"})
    assert control.state == "ready" and control.actions == [["start", "Start"]]
    lab06 = (twins.LABS / "06_chat_finetuning.py").read_text(encoding="utf-8")
    assert "dialogues=shelf.mixture," in lab06, "the lab passes on what the sliders say"


def test_what_start_does_follows_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    form = build_form(PretrainConfig(tag="one"), ("tag",), "")
    _, control = start_runner(train_slowly, form.config)
    assert "base/one" in control.message
    form.answer_change({"tag": "two"})
    assert control.message == "Start makes a new run, base/two."


def test_run_ends_with_its_cell_and_at_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(desk_runner, "watch_cell", lambda: over.is_set)
    runner, control = start_runner(train_slowly, PretrainConfig())
    runner.act("start")
    wait_until(lambda: len(runner.log.steps) > 2)
    over.set()
    wait_until(lambda: control.state == "stopped")
    over.clear()
    runner, control = start_runner(train_slowly, PretrainConfig())
    runner.act("start")
    wait_until(lambda: len(runner.log.steps) > 2)
    desk_runner.end_runs()
    assert control.state == "stopped", "the kernel exits: stopped and saved"


def test_jupyter_cell_that_runs_again_stops_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_runner, "find_cell", lambda: "cell-1")
    one = desk_runner.open_control(train_slowly, PretrainConfig(), "Train")
    one.answer_act("start")
    two = desk_runner.open_control(train_slowly, PretrainConfig(), "Train")
    wait_until(lambda: one.state == "stopped")
    assert two.state == "ready"


def test_page_that_opens_again_joins_the_run() -> None:
    runner, first = start_runner(train_slowly, PretrainConfig())
    first.answer_act("start")
    second = runner.join("Train")
    assert second.state == "running"
    wait_until(lambda: len(second.view["train"]) > 3)
    second.answer_act("stop")
    wait_until(lambda: first.state == second.state == "stopped")
    assert first.result is second.result and first.result.stopped
    assert runner.join("Train").state == "stopped", "one that comes later sees how it ended"


def test_press_takes_the_newest_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PretrainConfig] = []

    def train(config: PretrainConfig, **given: Any) -> TrainResult:
        seen.append(config)
        return train_slowly(config, **given)

    form = build_form(PretrainConfig(steps=100), ("steps",), "")
    first = desk_runner.open_control(train, form.config, "Train")
    form.answer_change({"steps": "120"})
    form.answer_change({"steps": "130"})
    first.answer_act("start")
    wait_until(lambda: len(seen) == 1)
    assert seen[0].steps == 130 and seen[0] is form.config
    assert renew_config(PretrainConfig(steps=100)) == PretrainConfig(steps=100), (
        "equal, but of no form"
    )
    first.answer_act("stop")
    wait_until(lambda: first.state == "stopped")
    # In marimo the cell is about to run again with those settings: its old control is over, the run is not.
    over = [threading.Event() for _ in range(4)]
    left = iter(over)
    monkeypatch.setattr(desk_runner, "in_marimo", lambda: True)
    monkeypatch.setattr(desk_runner, "in_app", lambda: False)
    monkeypatch.setattr(desk_runner, "watch_cell", lambda: next(left).is_set)
    second = desk_runner.open_control(train, form.config, "Train")
    form.answer_change({"steps": "140"})
    second.answer_act("start")
    over[0].set()
    wait_until(lambda: len(second.view.get("train", [])) > 3)
    third = desk_runner.open_control(train, form.config, "Train")
    assert third.state == "running" and third.place == second.place and seen[-1].steps == 140
    form.answer_change({"steps": "150"})  # once more: this time nobody has pressed
    over[1].set()
    fourth = desk_runner.open_control(train, form.config, "Train")
    assert fourth.state == "ready"
    wait_until(lambda: third.state == "stopped")
    other = desk_runner.open_control(train, form.config, "Another place")
    assert other.state == "ready" and other.place != fourth.place


def test_free_tag(base_dir: Path) -> None:
    assert find_free("d4") == "d4" and find_free("d4-2") == "d4-2"
    (base_dir / "base_checkpoints").mkdir(parents=True)
    from primechat.checkpoint import registry

    (base_dir / "base_checkpoints" / "d4").symlink_to(registry.SHIPPED / "base_checkpoints" / "d4")
    assert find_free("d4") == "d4-2" and find_free("d4-2") == "d4-2"


def test_events_become_one_state() -> None:
    log = RunHistory()
    log.add(NoteEvent(text="one thread"))
    log.add(PhaseEvent(name="download", total=100, unit="bytes"))
    log.add(ProgressEvent(done=50))
    assert log.describe()["done"] == 50 and log.describe()["left_s"] is not None
    log.add(PhaseEvent(name="training", total=100, unit="steps"))
    for step in range(1, 51):
        log.add(make_step(step))
    log.add(PhaseEvent(name="validation", total=10, unit="tokens"))
    log.add(LossEvent(step=50, val_bpb=1.6, val_loss_nats=7.1, whole=True, elapsed_s=5))
    log.add(SampleEvent(step=50, prompt="A:", text="hi"))
    log.add(make_step(51))
    view = log.describe()
    log.add(
        PhaseEvent(name="last check", total=2048, unit="tokens")
    )  # before the last step: an interruption
    assert abs(log.describe()["left_s"] - 4.9) < 1e-6
    log.add(PhaseEvent(name="training", total=100, unit="steps"))
    log.add(make_step(60, steps=120))  # the first tenth of a timed run settles its steps
    assert log.describe()["total"] == log.describe()["steps"] == 120
    log.add(make_step(100))
    log.add(PhaseEvent(name="last check", total=2048, unit="tokens"))
    assert log.describe()["left_s"] is None
    log.add(ProgressEvent(done=1024))
    after = log.describe()
    assert (after["phase"], after["done"], after["total"]) == ("last check", 1024, 2048) and after[
        "left_s"
    ] > 0
    assert view["phase"] == "training" and view["done"] == 51 and abs(view["left_s"] - 4.9) < 1e-6
    assert (
        view["val"] == [[50, 7.1, 1.6]]
        and view["samples"] == [[50, "A:", "hi"]]
        and len(view["train"]) == 51
    )
    assert view["figures"][:2] == [["51 of 100", "steps"], ["1.600", "bits per byte on new text"]]
    log.add(PhaseEvent(name="training sft", total=10, unit="steps"))
    assert log.describe()["train"] == [] and log.describe()["notes"] == ["one thread"]
    points = thin_points([(i, float(i)) for i in range(1, 1001)])
    assert len(points) == 200 and points[0] == [3.0, 3.0]


def test_form_is_the_config() -> None:
    config = PretrainConfig()
    form = build_form(config, ("steps", "model.n_layer"), "")
    names = [field["name"] for field in form.fields]
    assert names[:2] == ["steps", "model.n_layer"] and form.fields[0]["help"]
    assert (
        form.fields[1]["title"] == "Number of blocks" and form.fields[1]["help"] == ""
    )  # said once
    assert {f["name"]: f["form"] for f in form.fields}["runtime.device"] == "choice"
    draft = {**form.values, "steps": "1,200", "optim.matrix_lr": "0.03", "eval.snapshots": False}
    answer = form.answer_change(draft)
    assert answer["values"]["steps"] == 1200 and form.config.optim.matrix_lr == 0.03
    assert (
        answer["command"]
        == "primechat pretrain --steps 1200 --optim.matrix_lr 0.03 --eval.no_snapshots"
    )
    for change, name, word in (
        ({"batch_tokens": "500"}, "batch_tokens", "try 512"),
        ({"steps": "many"}, "steps", "whole number"),
        ({"runtime.threads": "-1"}, "runtime.threads", "at least 0"),
        ({"tag": "a/b"}, "tag", "plain name"),
        ({"model.n_embd": "77"}, "model.n_embd", "divisible"),
    ):
        answer = form.answer_change({**draft, **change})
        assert answer["field"] == name and word in answer["fault"] and form.config.steps == 1200
    assert build_config(config, {}) == config
    student = build_form(DistillConfig(), ("size",), "")
    assert student.fields[0]["form"] == "choice" and "quarter" in student.fields[0]["choices"]
    for field in (
        f for f in student.fields if f["form"] == "choice"
    ):  # what is offered is what is taken
        for word in field["choices"]:
            assert "values" in student.answer_change({**student.values, field["name"]: word})
    assert "size='tiny'" in student.answer_change({**student.values, "size": "tiny"})["fault"]
    for typed in ("0,5", "1,50", "0,500"):  # half, to a reader who writes commas: never five
        for name in ("temperature", "steps"):
            assert "write one" in student.answer_change({**student.values, name: typed})["fault"]


def test_every_config_is_a_form_and_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for verb, (stage_name, config_name, _) in cli.STAGES.items():
        if verb == "speedrun":
            continue  # no form: its flags start from the full run that --depth names
        cls, ran = getattr(pc, config_name), []
        monkeypatch.setitem(vars(pc), stage_name, lambda config, ran=ran, **_: ran.append(config))
        usual = dict((name, value) for name, value, _, _ in list_fields(cls()))
        numbers = [name for name in usual if name in ("seed", "max_chars", "stride", "eval.every")]
        draft = {**usual, **{name: "7" for name in numbers}, "resume": True, "tag": "my-tag"}
        form = build_form(cls(), (), "")
        assert "fault" not in form.answer_change(draft) and form.config != cls()
        words = shlex.split(write_command(form.config))
        assert words[:2] == ["primechat", verb] and cli.main(words[1:]) == 0
        assert ran == [form.config]


SCRIPT = """
    import marimo

    app = marimo.App()

    @app.cell
    def _():
        import primechat as pc
        from primechat.labkit.lab import settings, stage, summary

        def count(config, *, on_event=None, stop=None):
            return config

        form = settings(pc.PretrainConfig(steps=5))
        other = settings(pc.EvaluateConfig())
        run = stage(count, form.config)
        print(run.result.steps, run.state, type(summary(None)).__name__)
        return

    if __name__ == "__main__":
        app.run()
"""


def test_script_runs_in_line_with_its_command_line(tmp_path: Path) -> None:
    path = tmp_path / "lab.py"
    path.write_text(textwrap.dedent(SCRIPT))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, path, *words], capture_output=True, text=True, timeout=120
        )

    assert run().stdout.split() == ["5", "done", "Summary"]
    assert run("--steps", "9").stdout.split()[0] == "9"
    wrong = run("--batch_tokens", "500")
    assert wrong.returncode != 0 and "try 512" in wrong.stderr


def test_summary_shows_figures_and_curves() -> None:
    events = tuple(
        {"schema": 1, **asdict(event)}
        for event in (
            make_step(1),
            LossEvent(step=1, val_bpb=1.6, val_loss_nats=7.1, whole=True, elapsed_s=5),
        )
    )
    found = lab.summary(make_result(events=events), notes=["Talk to it."])
    assert found.title == "base/d2" and found.notes == ["Talk to it."]
    assert ["1.500", "bits per byte on new text"] in found.view["figures"]
    assert found.view["val"] == [[1, 7.1, 1.6]] and len(found.view["train"]) == 1
    assert "press Start above" in lab.summary(None).notes[0]
    control = StageControl("Run", lambda word: None)
    control.state = "running"
    assert "under way" in lab.summary(control).notes[0]
