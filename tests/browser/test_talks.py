"""Lab 09's instrument and pictures: measures turn by turn, controls, heat strips, what is exported."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from primechat.checkpoint import registry
from primechat.events import Turn
from primechat.labkit import start_stop
from primechat.labkit.instruments import talks
from primechat.labkit.lab import borrow_model
from primechat.metrics.intervals import measure_kappa
from primechat.metrics.loops import MEASURES, find_loop, measure_transcript, measure_turns
from primechat.views import conversations
from primechat.views.widgets.controls import Live

ROOT = Path(__file__).resolve().parents[2]
plotly = pytest.importorskip("plotly", reason="needs the extra labs")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> talks.Study:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("base")))
        return talks.Study(
            SimpleNamespace(identifier="shipped/sft"), borrow_model, n_conversations=3, turns=10
        )


def test_turns_are_measured_by_hand() -> None:
    turns = [
        Turn(speaker=0, model="human", text="I like red cats."),
        Turn(
            speaker=1,
            model="x",
            text="I like red dogs!",
            ids=[1, 2],
            entropy=[1, 3],
            logprob=[-1, -2],
        ),
        Turn(speaker=0, model="x", text="I like red cats."),
        Turn(speaker=1, model="x", text=""),
    ]
    found = measure_turns(turns)
    assert set(found) == set(MEASURES)
    assert (
        found["entropy"][1] == 2 and found["surprise"][1] == 1.5 and np.isnan(found["entropy"][2])
    )
    ended = Turn(
        speaker=0,
        model="x",
        text="Yes.",
        ids=[1, 2, 9],
        entropy=[1, 3, 8],
        logprob=[-1, -2, -6],
        stopped=True,
    )
    silent = Turn(speaker=1, model="x", text="", ids=[9], entropy=[8], logprob=[-6], stopped=True)
    spoken = measure_turns([ended, silent])
    assert spoken["entropy"][0] == 2 and spoken["surprise"][0] == 1.5, "the end is not a word"
    assert np.isnan(spoken["entropy"][1]) and np.isnan(spoken["surprise"][1])
    # i-like-red was said, like-red-dogs and red-dogs-! were not
    assert found["said before"][1] == pytest.approx(1 / 3) and found["said before"][2] == 1
    assert found["new words"][1] == pytest.approx(2 / 5) and found["new words"][2] == 0
    assert (
        found["like its last"][2] == 1
        and found["like its last"][3] == 0
        and np.isnan(found["like its last"][1])
    )
    assert found["words"].tolist() == [5, 5, 5, 0]


def test_reading_measures_what_the_engine_would() -> None:
    model, tokenizer, _ = registry.open_model("shipped/sft")
    texts = ["Hi there!", "Hello, how are you?", "Fine."]
    turns = measure_transcript(model, tokenizer, texts)
    prompt = tokenizer.render_for_completion(
        {"messages": [{"role": "user", "content": "Hello, how are you?"}]}
    )
    ids = tokenizer.encode("Fine.")
    with torch.inference_mode():
        logp = model(torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert turns[2].logprob == pytest.approx(
        [float(logp[i, t]) for i, t in enumerate(ids)], abs=1e-4
    )
    assert not turns[0].ids and turns[1].ids == tokenizer.encode(texts[1])
    long = measure_transcript(
        model, tokenizer, ["word " * 300, "more " * 400, "end"]
    )  # beyond the context
    assert len(long[1].ids) < model.sequence_len and long[2].entropy


def test_a_study_has_its_controls(study: talks.Study) -> None:
    assert list(study.groups) == list(talks.ABOUT)
    assert sorted(t.text for one in study.groups["people"] for t in one) == sorted(
        t.text for one in study.groups["shuffled"] for t in one
    )
    widget = study.show_strips(*talks.ABOUT)
    assert [row["name"] for row in widget.rows] == list(MEASURES)
    ready = [group["name"] for group in widget.groups if group["talks"]]
    assert ready == [talks.SURE], "the first look comes soon"
    widget.answer_settle()
    loops = {group["name"]: [one["loop"] for one in group["talks"]] for group in widget.groups}
    assert all(loop >= 4 for loop in loops["planted loop"])
    sure, chance = ([loop >= 0 for loop in loops[name]] for name in (talks.SURE, "the model"))
    assert sum(sure) >= 2 > sum(chance) and study.tell_loops() == "Fewer", (
        "what the first look is there to show"
    )
    turn = widget.groups[0]["talks"][0]["turns"][1]
    assert turn["who"].startswith("shipped/sft") and len(turn["values"]) == len(MEASURES)
    assert "".join(token[0] for token in turn["tokens"]) == turn["text"] or "\ufffd" in str(
        turn["tokens"]
    )
    word, said = study.tell_trend()
    assert word in ("It rises", "It stays", "It falls") and said.count("nats") == 1
    spread = study.compare_groups()
    assert spread["planted loop"]["self-BLEU"][0] > spread["people"]["self-BLEU"][2]
    assert all(
        low <= mean <= high for group in spread.values() for mean, low, high in group.values()
    )


def test_pictures_show_what_they_are_given(study: talks.Study) -> None:
    bands = conversations.draw_bands(study.trace("entropy"), "Entropy")
    assert {note.text for note in bands.layout.annotations} == {*talks.ABOUT} - {"planted loop"}
    expected = np.nanmean(
        [measure_turns(one)["entropy"][1:] for one in study.groups["people"]], axis=0
    )
    assert next(line for line in bands.data if line.name == "people").y == pytest.approx(expected)
    repeats = study.trace_repeats()
    assert conversations.draw_repeats(repeats, "x").data[0].y == pytest.approx(
        repeats["this model"]
    )
    assert max(repeats["random weights"]) < 0.01  # all tokens alike
    drift = conversations.draw_drift(study.map_drift())
    assert len(drift.data) == 4 and drift.data[0].customdata[0] == pytest.approx(0, abs=1e-6)
    x, y = (np.asarray(drift.data[0][axis], float) for axis in "xy")
    hop = np.hypot(np.diff(x), np.diff(y)).mean()
    assert any(note.text.endswith(f", mean hop {hop:.1f}") for note in drift.layout.annotations)
    spreads = study.compare_groups()
    assert len(conversations.draw_spreads(spreads, "x").data) == len(spreads) * len(talks.KEPT)
    generations = {"own": [spreads["people"], spreads["planted loop"]]}
    drawn = conversations.draw_generations(generations, spreads["people"], "Vendi")
    assert drawn.data[0].y == pytest.approx(
        [spreads[name]["Vendi"][0] for name in ("people", "planted loop")]
    )
    assert (
        "press Start"
        in conversations.draw_generations({}, spreads["people"], "Vendi").layout.title.text
    )


def test_detector_agrees_with_labels_as_published() -> None:
    rows = [json.loads(line) for line in talks.LABELLED.read_text(encoding="utf-8").splitlines()]
    assert [row["number"] for row in rows] == list(range(1, 101))
    verdicts = [int(find_loop(row["turns"]) is not None) for row in rows]
    assert verdicts == [row["detector"] for row in rows], "the detector has changed: label anew"
    yes = {
        name: sum(x)
        for name, x in zip("ab", zip(*(row["labels"] for row in rows), strict=True), strict=True)
    }
    kappas, shares = talks.judge_detector()
    lines = (ROOT / "labs" / "experiments.md").read_text(encoding="utf-8").splitlines()
    told = [line for line in lines if "kappa of each pair" in line][-1]
    for name, spread in kappas.items():
        mean, low, high = spread["Cohen's kappa"]
        assert low <= mean <= high and f"{name} {mean:.2f}" in told, (name, mean)
    assert f"{yes['a']} and {yes['b']}" in told and f"{sum(verdicts)} by the detector" in told
    unseen = [row for row in rows if row["number"] % 2 == 0]  # the rule was chosen by the others
    expected = measure_kappa(
        [row["detector"] for row in unseen], [row["labels"][0] for row in unseen]
    )
    assert kappas["unseen half, first labeller"]["Cohen's kappa"][0] == pytest.approx(expected)
    both = list(zip(*(row["labels"] for row in rows), strict=True))
    p = sum(x == y for x, y in zip(*both, strict=True)) / 100  # Cohen's formula by hand
    chance = (yes["a"] * yes["b"] + (100 - yes["a"]) * (100 - yes["b"])) / 10_000
    assert kappas["the two labellers"]["Cohen's kappa"][0] == pytest.approx(
        (p - chance) / (1 - chance)
    )
    assert shares["people (13)"]["the detector"][0] == 0 and len(shares) == 7


def test_collapse_is_as_published() -> None:
    found = talks.read_recorded()
    told = (ROOT / "labs" / "experiments.md").read_text(encoding="utf-8")
    for name, said in (
        ("only its own talk", "alone"),
        ("half of it people's", "half of it people's"),
    ):
        word, figures = talks.tell_change(found, name, "distinct-2")
        first, low, high = found[name][0]["distinct-2"]
        last = found[name][-1]["distinct-2"]
        assert word == "It falls" and f"{first:.3f} [{low:.3f}, {high:.3f}]" in figures
        assert f"{last[0]:.3f} [{last[1]:.3f}, {last[2]:.3f}]" in told, said
    assert found["only its own talk"][-1]["Vendi"][2] < found["half of it people's"][-1]["Vendi"][0]


def test_a_figures_numbers_are_all_that_is_sent() -> None:
    shown = start_stop.show(conversations.draw_repeats({"this model": [0.1, 0.2]}, "x"))
    assert shown.figure == {}, "and not before it is wanted"
    shown.answer_settle()
    assert (
        shown.figure["data"][0]["y"] == [0.1, 0.2]
        and len(json.dumps(shown.get_state("figure"))) < 50_000
    )
    widget = plotly.graph_objects.FigureWidget()
    assert start_stop.show(widget) is widget, "what changes later stays plotly's own"


def test_export(study: talks.Study, tmp_path: Path) -> None:
    files = study.export(tmp_path / "out")
    assert [file.name for file in files] == ["turns.csv", "strip.png", "strip.svg"]
    rows = list(csv.DictReader(files[0].read_text(encoding="utf-8").splitlines()))
    assert len(rows) == sum(len(one) for group in study.groups.values() for one in group)
    assert files[1].read_bytes()[:4] == b"\x89PNG" and b"<svg" in files[2].read_bytes()[:600]


def test_variants_and_generations_are_measured(
    study: talks.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    from dataclasses import replace

    small = replace(study.config, tag="ab", n_conversations=2, turns=3, max_new_tokens=4)
    side = talks.run_models(replace(small, tag="side"))
    assert side.paths == {"shipped/sft": (("autochat/side-shipped-sft",),)}
    found = talks.run_variants(small)
    measured = found.measure(("distinct-2",))
    assert list(measured) == list(talks.VARIANTS) and not found.stopped
    ran, waits = SimpleNamespace(result=found), SimpleNamespace(result=None)
    assert list(study.compare_groups(ran)) == [*talks.VARIANTS, "people", "shuffled"]
    assert list(study.compare_groups(waits)) == list(talks.ABOUT)
    assert list(study.compare_groups(waits, only=True)) == ["people", "shuffled"]
    assert all(len(one) == 1 and 0 < one[0]["distinct-2"][0] <= 1 for one in measured.values())


@pytest.mark.slow
def test_strips_on_a_page(shared: Callable[..., str], lab_page: Callable[..., Any]) -> None:
    """Cells, keys and the reading below, in Chromium, without a model."""
    found = lab_page(shared("run", ROOT / "tests" / "support" / "labs" / "strips.py"))
    page = found.page
    page.get_by_text("guess above first").wait_for(timeout=60_000)
    assert not page.locator(".pc-strips-cell").first.is_visible(), (
        "the answer is not beside the guess"
    )
    page.get_by_text("right", exact=True).click()
    assert not page.locator(".pc-strips-cell").first.is_visible(), "nor before it is asked for"
    page.get_by_role("button", name="Show the answer").click()
    page.locator(".pc-strips-cell").first.wait_for(timeout=60_000)
    assert page.get_by_text("guess above first").is_hidden()
    assert page.locator(".pc-strips-cell").count() == 6
    assert (
        "1 of 1 conversations goes round to its end; this one does from turn 1 on"
        in page.inner_text(".pc-strips")
    )
    assert page.locator("[data-chosen=true][data-t='1']").count() == 2, (
        "it opens where the loop begins"
    )
    page.locator(".pc-strips-cell[data-t='2'][data-r='0']").click()
    assert "<b>third</b>" in page.locator(".pc-strips-text").inner_text()
    assert page.locator(".pc-strips-text b").count() == 0
    page.keyboard.press("ArrowLeft")
    assert "second" in page.locator(".pc-strips-text").inner_text()
    assert "goes round from turn 1 on" in page.locator(".pc-strips-reading").inner_text()
    page.get_by_role("tab", name="other").click()
    assert page.locator(".pc-strips-cell").count() == 2
    found.check()


def test_a_folder_that_is_typed_is_not_written_letter_by_letter() -> None:
    study, written = object.__new__(talks.Study), list[str]()
    study.export = lambda folder: written.append(str(folder)) or [Path(folder)]  # type: ignore
    form = Live(study.save, folder="runs/talks", write=False)
    for i, folder in enumerate(("runs/talks", "runs", "runs/a", "runs/ab")):
        form.values = {"folder": folder, "write": True, "#": i}
    assert written == ["runs/talks"] and "set it again" in str(form.output)
    for i, write in enumerate((False, True)):
        form.values = {"folder": "runs/ab", "write": write, "#": 10 + i}
    assert written == ["runs/talks", "runs/ab"]
