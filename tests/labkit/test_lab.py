"""What labs import: pickers, predictions, exercises, Live; in a script here, in a browser elsewhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from primechat.checkpoint import registry
from primechat.exercises import Exercise, is_stub, require
from primechat.labkit import lab, start_stop
from primechat.labkit.instruments import firststeps
from primechat.labkit.instruments.tokenizers import list_own
from primechat.model import lora
from primechat.views.widgets.controls import (
    Live,
    ModelPicker,
    describe_control,
    describe_output,
)

DOUBLE = Exercise(
    title="Double",
    task="Return **twice** `x`.",
    check=lambda f: require(f(3) == 6, "Doubling", f"double(3) returned {f(3)!r}; twice 3 is 6"),
    hint="Add.",
    solution=6,
    mistakes=(),
    praise="Well.",
)


def test_lab_starts_without_torch() -> None:
    code = "import sys, primechat.labkit.lab as lab; lab.pick_model(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_show_is_plain_outside_marimo() -> None:
    widget = Live(lambda k: k, k=(1, 3))
    assert lab.show(widget) is widget and not lab.in_marimo()


def test_picker_offers_what_is_here(base_dir: Path) -> None:
    every = lab.pick_model()
    assert [model["identifier"] for model in every.models] == [
        e.identifier for e in registry.list_models()
    ]
    assert every.identifier == "shipped/sft" and "million parameters" in every.models[0]["about"]
    chat = lab.pick_model(("sft", "rl"))
    assert chat.models and all("sft" in model["identifier"] for model in chat.models)
    assert (
        lab.pick_model(("mid",)).identifier == ""
        and lab.pick_model(("base",)).identifier == "shipped/base"
    )
    chat.models = []
    assert chat.answer_find() == {} and chat.models


def test_picker_never_begins_with_a_by_product(base_dir: Path) -> None:
    """`sft/lab07-full-0-...` is listed last, behind "more", and chosen by nobody but the learner."""
    found = [
        {"identifier": "sft/lab07-full-0-6cc07e", "about": "", "by_product": True},
        {"identifier": "sft/mine", "about": "", "by_product": False},
    ]
    assert ModelPicker(lambda: found).identifier == "sft/mine"
    assert ModelPicker(lambda: found[:1]).identifier == ""
    assert ModelPicker(lambda: found, found[0]["identifier"]).identifier == found[0]["identifier"]
    run = registry.run_dir("sft", "lab07-full-0-6cc07e")
    shutil.copytree(registry.SHIPPED / "chatsft_checkpoints" / "d4", run)
    listed = lab.find_models(("sft",))
    assert [model["by_product"] for model in listed] == [False, True]
    assert "by-product of a lab" in listed[1]["about"]
    assert lab.pick_model(("sft",)).identifier == "shipped/sft"
    assert all(not choice.key.startswith("sft/lab07") for choice in list_own())
    assert "sft/lab07-full-0-6cc07e" not in str(firststeps.find_facts()["models"])


def test_models_are_opened_once(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = lab.borrow_model("shipped/sft")
    assert lab.borrow_model("shipped/sft")[0] is one[0] and lab.borrow_model()[0] is one[0]
    monkeypatch.setattr(lab, "CACHE_BYTES", 1)
    lab.borrow_model("shipped/base")
    assert lab.borrow_model("shipped/sft")[0] is not one[0], "the older one had to go"


def test_an_adapter_that_was_trained_on_is_opened_anew(base_dir: Path) -> None:
    model, tokenizer, _ = registry.open_model("shipped/sft")
    spec, name = lora.LoraSpec(rank=2), "lora:mine+shipped/sft"
    lora.attach(model, "mine", spec)

    def save(value: float) -> None:
        for _, matrix in sorted(lora.read_state(model, "mine").items()):
            matrix.fill_(value)
        labels = {"base": "shipped/sft", "tokenizer_identity": tokenizer.identity}
        lora.save_adapter(model, "mine", spec, registry.run_dir("lora", "mine"), **labels)

    save(0.01)
    first = lab.borrow_model(name)[0]
    assert lab.borrow_model(name)[0] is first
    save(0.02)
    second = lab.borrow_model(name)[0]
    assert second is not first and lora.read_state(second, "mine").popitem()[
        1
    ].max() == pytest.approx(0.02)


def test_a_lazy_function_waits_to_be_seen() -> None:
    calls: list[int] = []
    live = Live(lambda k: calls.append(k) or k, lazy=True, k=(1, 9, 3))
    live.refresh()
    assert not calls and live.output == {}, "nothing is drawn before the page comes to it"
    live.seen = True
    assert calls == [3] and live.output["parts"][0]["text"] == "3"
    assert Live(lambda k: calls.append(k), k=(1, 9)).seen and calls == [3, 1]


def test_notice_ends() -> None:
    notice = lab.announce("Wait.")
    assert notice.text == "Wait." and not notice.over
    notice.end()
    assert notice.over
    choice = lab.offer_model("shipped/base")
    assert choice.identifier == "shipped/base" and choice.waits == lab.OPENING
    choice.end()
    assert choice.waits == ""


def test_small_models_are_computed_alone(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from threadpoolctl import threadpool_info

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        lab.borrow_model("shipped/base")
        assert torch.get_num_threads() == 1
        assert all(
            pool["num_threads"] == 1 for pool in threadpool_info() if pool["user_api"] == "blas"
        )
    finally:
        torch.set_num_threads(before)


def test_prediction_takes_options_or_a_scale() -> None:
    guess = lab.predict("How many?", ["one", "two"], "two", why="Counted.")
    assert guess.options == ["one", "two"] and guess.scale == [] and not guess.revealed
    scale = lab.predict("How much?", (0, 200), 37, unit="%")
    assert scale.scale == [0, 200] and scale.within == 10 and scale.answer == 37
    with pytest.raises(ValueError, match="'three' must be one of the options"):
        lab.predict("How many?", ["one", "two"], "three")


def test_exercise_names_the_broken_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    def stub(x: Any) -> Any: ...

    def noted(x: Any) -> Any:
        """Not yet."""

    def fail(x: int) -> int:
        raise KeyError("a")

    def nothing(x: int) -> None:
        print(x)

    for attempt in (None, ..., stub, noted):
        assert lab.exercise(DOUBLE, attempt).state == "untried" and is_stub(attempt)
    broken = lab.exercise(DOUBLE, lambda x: x + 1)
    assert (broken.state, broken.rule) == ("broken", "Doubling") and "returned 4" in broken.message
    failed = lab.exercise(DOUBLE, fail)
    assert failed.state == "failed" and failed.message == "It raised KeyError: 'a'"
    assert lab.exercise(DOUBLE, lambda x: 2 * x).state == "passed"
    monkeypatch.setattr(start_stop, "in_app", lambda: True)
    monkeypatch.setitem(globals(), "__file__", "/labs/05_pretraining.py")
    assert "`primechat lab 05 --edit`" in lab.exercise(DOUBLE, stub).message
    assert lab.exercise(DOUBLE, lambda x: 2 * x).message == DOUBLE.praise
    assert not is_stub(nothing) and not is_stub(lambda x: x) and DOUBLE.solution_text == "6"


def test_live_answers_each_change() -> None:
    def play(text: str, k: int, loud: bool, mode: str) -> Any:
        if not text:
            raise ValueError("type something")
        return [text.upper() if loud else text[:k], {"length": len(text), "mode": mode}]

    live = Live(
        play, text="hello", k=(1, 9, 3), loud=False, mode=["a", "b"], labels={"k": "letters"}
    )
    assert [c["form"] for c in live.controls] == ["text", "slider", "toggle", "select"]
    assert live.controls[1]["label"] == "Letters" and live.controls[1]["step"] == 1
    assert live.output["parts"][0] == {"kind": "text", "text": "hel"}
    live.values = {**live.values, "loud": True, "#": 1}
    assert live.output["#"] == 1 and live.output["parts"][0]["text"] == "HELLO"
    assert live.output["parts"][1] == {"kind": "figures", "items": [["length", "5"], ["mode", "a"]]}
    live.values = {**live.values, "text": "", "#": 2}
    assert live.output == {"#": 2, "parts": [{"kind": "error", "text": "type something"}]}


def test_results_become_parts() -> None:
    rows = [{"a": i, "b": 0.5} for i in range(250)]
    (table,) = describe_output(rows)
    assert table["columns"] == ["a", "b"] and len(table["rows"]) == 200 and table["left_out"] == 50
    assert describe_output(None) == [] and describe_output(1234.5678)[0]["text"] == "1,235"
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, _ = plt.subplots()
    assert describe_output(figure)[0]["kind"] == "image"
    plt.close(figure)
    assert describe_control("k", (0.0, 1.0))["step"] == 0.01
    with pytest.raises(TypeError, match="k=7 must be"):
        describe_control("k", 7)


def test_a_model_without_steps_is_described() -> None:
    foreign = registry.ModelEntry(
        identifier="hf:x",
        family="hf",
        tag="x",
        steps=(),
        snapshots=(),
        n_bytes=1,
        architecture="Llama",
        n_params=0,
        val_bpb=None,
        tokenizer_identity=None,
        path="x",
    )
    assert lab.describe_entry(foreign) == "another project's"
