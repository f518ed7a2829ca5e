"""The instruments of lab 03: every view and measure follows the model that is picked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from primechat import capture
from primechat.errors import ConfigError
from primechat.interp.embeddings import maps, tables
from primechat.labkit import lab
from primechat.labkit.instruments.explorer import TRENDS, Explorer
from primechat.views.widgets.controls import Live


@pytest.fixture
def explorer(base_dir: Path) -> Explorer:
    return Explorer(lab.pick_model(first="shipped/sft"))


def read_parts(live: Any) -> list[dict[str, Any]]:
    return live.output["parts"]


def test_views_follow_the_picker(explorer: Explorer) -> None:
    before, kept = explorer.view.places, explorer.kept
    made = explorer.compare_maps()
    text = explorer.read_text()
    figure, states = read_parts(made), text.places
    explorer.picker.identifier = "shipped/base"
    assert explorer.view.places != before and explorer.kept != kept
    assert read_parts(made) != figure and text.places != states
    table = tables.read_table(lab.borrow_model("shipped/base")[0], "input")
    assert np.array_equal(explorer.atlas.norms["input"], np.linalg.norm(table, axis=1))
    explorer.picker.identifier = "base/none"
    assert "none" in explorer.view.problem and explorer.view.notice == ""


def test_a_word_is_one_token_or_explained(explorer: Explorer) -> None:
    text = explorer.tokenizer.decode([explorer.choose_token()])
    assert explorer.find_token(text) == explorer.find_token(text.strip()) == explorer.choose_token()
    with pytest.raises(ConfigError, match=r"is not one token of this model but .* \| "):
        explorer.find_token("qzxwvkj")


def test_analogies_stand_beside_their_controls(explorer: Explorer) -> None:
    form = explorer.ask_analogy()
    (part,) = read_parts(form)
    assert part["kind"] == "table" and len(part["columns"]) == 3 and len(part["rows"]) == 5
    form.values = {"question": "one : two", "#": 1}
    assert read_parts(form)[0]["kind"] == "error" and "three words" in read_parts(form)[0]["text"]
    assert [part["kind"] for part in read_parts(explorer.score_rules())] == ["image"]


def test_figures_of_lengths_and_directions(explorer: Explorer) -> None:
    trend, said = explorer.find_trend()
    real = maps.rank_correlation(explorer.atlas.counts, explorer.atlas.norms["input"])
    assert trend in TRENDS and f"{real:+.2f}" in said
    assert (trend == TRENDS[2]) == (abs(real) < 0.15)
    figure, words = read_parts(explorer.draw_lengths())
    assert figure["kind"] == "image" and words["text"] == explorer.describe_lengths("input")
    assert [part["kind"] for part in read_parts(explorer.draw_evenness())] == ["image", "image"]


def test_rows_of_tokens_never_seen_are_short_coming_in_and_long_going_out(
    explorer: Explorer,
) -> None:
    model, unseen = explorer.model, explorer.atlas.counts == 0
    medians, said = {}, {}
    for space in ("input", "output"):
        norms = np.linalg.norm(tables.read_table(model, space), axis=1)
        medians[space] = float(np.median(norms[unseen])), float(np.median(norms[~unseen]))
        said[space] = explorer.describe_lengths(space)
        for value in medians[space]:
            assert f"{value:.1f} for the " in said[space]
        assert f"{unseen.sum()} tokens that the sample never holds" in said[space]
    assert medians["input"][0] < medians["input"][1] and medians["output"][0] > medians["output"][1]
    logits = capture(model, explorer.draw_text(), points=("logits",))["logits"].astype(float)
    length = np.linalg.norm(tables.read_table(model, "output"), axis=1)
    loud = maps.rank_correlation(length, logits.mean(axis=0))
    assert loud < -0.5, "the longest rows are the quietest"
    assert f"{loud:+.2f}; with shuffled lengths" in said["output"]
    assert "logit" not in said["input"]


def test_no_snapshots_is_a_sentence(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("primechat.labkit.instruments.timelapse.list_models", lambda: [])
    told, course = explorer.travel()
    assert (
        isinstance(told, Live)
        and "primechat pretrain" in read_parts(told)[0]["text"]
        and not read_parts(course)
    )
