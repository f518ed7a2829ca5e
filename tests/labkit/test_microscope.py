"""The instruments of lab 02: a view gets what `capture` gives, and views move together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VOCAB_SIZE, byte_tokenizer
from traitlets import HasTraits, Unicode

from primechat import capture
from primechat.config import GPTConfig
from primechat.interp.circuits import list_parts, scan_ablations, score_heads
from primechat.labkit import lab
from primechat.labkit.instruments import scene as scenes
from primechat.labkit.instruments import survey
from primechat.labkit.instruments.microscope import Microscope, Trial, patch_prompts
from primechat.labkit.instruments.scene import Scene, pool_weights, save_copying
from primechat.metrics.intervals import estimate_mean
from primechat.model.gpt import GPT
from primechat.views.widgets.controls import Prediction


class Picker(HasTraits):
    """Stands in for the picker of models."""

    identifier = Unicode("base/one")


def make_model(seed: int = 1, **changes: Any) -> GPT:
    shape = dict(vocab_size=VOCAB_SIZE, sequence_len=48, head_dim=8) | changes
    model = GPT(GPTConfig.modern(1, **shape))
    config = GPTConfig(
        **{**vars(model.config), "n_layer": 3, "n_embd": 32, "n_head": 4, "n_kv_head": 4}
    )
    model, generator = GPT(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.normal_(mean=float(key == "resid_lambdas"), std=0.3, generator=generator)
    return GPT.from_state(model.config, dict(model.state_dict()))


MODELS = {"base/one": 1, "base/two": 2}


@pytest.fixture
def scope(monkeypatch: pytest.MonkeyPatch) -> Microscope:
    def borrow(identifier: str = "", **_: Any) -> Any:
        from primechat.errors import CheckpointError

        if identifier not in MODELS:
            raise CheckpointError(f"{identifier} is missing; train it.")
        return make_model(MODELS[identifier]), byte_tokenizer(), {"identifier": identifier}

    monkeypatch.setattr(lab, "borrow_model", borrow)
    return Microscope(Picker(), "ab abc ab")


def test_look_shows_the_weights(scope: Microscope) -> None:
    view = scope.look()
    seen = capture(scope.model, scope.scene.ids, points=["layer.*.attn.weights"]).stack(
        "attn.weights"
    )
    n = len(scope.scene.ids)
    assert view.tokens == ["<|bos|>", *"ab abc ab"] and view.at == n - 1
    thumbs = np.frombuffer(view.thumbs, np.uint8).reshape(3, 4, n, n)
    assert np.abs(thumbs / 255 - seen).max() < 0.003
    for head in ([0, 0], [2, 3]):
        view.head = head
        pattern = np.frombuffer(view.pattern, np.uint16).reshape(n, n) / 65535
        assert np.abs(pattern - seen[head[0], head[1]]).max() < 1e-4
    trained = view.pattern
    view.control = True
    assert view.pattern != trained and len(view.pattern) == len(trained)


def test_long_texts_are_read_in_slices(scope: Microscope, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, scores = scope.scene.overview
    monkeypatch.setattr(scenes, "WEIGHT_ROOM", 1)
    again = Scene(scope.model, scope.tokenizer, scope.scene.ids)
    assert [start for start, _ in again.walk_weights()] == [0, 1, 2]
    assert np.array_equal(again.overview[0], whole)
    assert np.array_equal(again.overview[1].entropy, scores.entropy)
    assert np.array_equal(again.read_head(0, 1), scope.scene.read_head(0, 1)), (
        "a layer no longer held"
    )
    weights = np.zeros((1, 70, 70))
    weights[0, 69, 3] = 0.7
    small = pool_weights(weights)
    assert small.shape == (1, 24, 24) and small[0, 23, 1] == 0.7 and small.sum() == 0.7


def test_switches_show_what_is_lost(scope: Microscope) -> None:
    view = scope.ablate()
    assert view.data["loss"] == view.data["base"] and not any(view.data["deltas"])
    assert all(row["value"] == row["before"] for row in view.data["guesses"]), (
        "nothing off, nothing moved"
    )
    view.off = ["layer.1.head.2", "layer.0.mlp"]
    cut = capture(scope.model, scope.scene.ids, points=["logits"], ablate=view.off)
    assert view.data["loss"] == pytest.approx(float(cut.losses.mean()))
    probs = torch.from_numpy(cut["logits"][-1]).softmax(-1).numpy()
    shown = {row["label"]: row["value"] for row in view.data["guesses"]}
    best = scope.tokenizer.token_bytes(int(probs.argmax())).decode("utf-8", "replace")
    assert shown[best] == pytest.approx(float(probs.max()), abs=1e-6)
    view.test = "copy"
    ids = scope.copy_scene.ids
    assert len(ids) % 2 and np.array_equal(ids[1 : len(ids) // 2 + 1], ids[len(ids) // 2 + 1 :])
    cut = capture(scope.model, ids, ablate=view.off)
    assert view.data["saved"] == pytest.approx(save_copying(cut.losses))
    n = len(cut.losses) // 2
    assert save_copying(cut.losses) == pytest.approx(
        float(np.mean([cut.losses[i] - cut.losses[n + i] for i in range(1, n)])), abs=1e-5
    )


def test_trial_goes_on_slice_by_slice(scope: Microscope, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("primechat.labkit.instruments.microscope.SLICE_S", -1.0)
    view, parts = scope.ablate(), list_parts(scope.scene.body)
    for turn in range(1, len(parts) + 1):
        view.wish = turn
        assert len(view.data["scan"]) == turn and bool(view.data["scanning"]) == (turn < len(parts))
        assert view.data["turn"] == turn
    whole = capture(scope.model, scope.scene.ids).losses.mean()
    for part in ("layer.0.head.3", "layer.2.mlp"):
        alone = capture(scope.model, scope.scene.ids, ablate=[part]).losses.mean()
        assert view.data["scan"][part] == pytest.approx(float(alone - whole), abs=1e-6)
    assert view.data["control"] > 0
    view.wish += 1
    assert len(view.data["scan"]) == 1, "a wish after the end begins anew"
    view.wish = -1
    assert not view.data["scanning"], "stopped"
    view.test = "copy"
    assert view.data["scan"] is None, "another text, another trial"
    view.wish = 1
    lost = save_copying(capture(scope.model, scope.copy_scene.ids).losses) - save_copying(
        capture(scope.model, scope.copy_scene.ids, ablate=[parts[0]]).losses
    )
    assert view.data["scan"][parts[0]] == pytest.approx(lost, abs=1e-6)
    while view.data["scanning"]:
        view.wish += 1
    random = capture(scope.control.model, scope.copy_scene.ids).losses
    assert view.data["control"] == pytest.approx(save_copying(random), abs=1e-6)
    assert Trial(scope).report(scope.scene, 0)["scan"] is None


def test_views_move_together(scope: Microscope) -> None:
    heads, board, lens, scores = scope.look(), scope.ablate(), scope.lens(), scope.scores()
    lens.at = 3
    assert heads.at == board.at == scope.at == 3
    heads.head = [1, 2]
    assert scope.head == [1, 2] and scores.data == {}, "a view that is closed costs nothing"
    scores.opened = True
    assert scores.head == [1, 2] and len(scores.data["strips"]) == 5
    scores.head = [2, 0]
    assert heads.head == [2, 0]
    scope.prompt.text = "xyz"
    assert heads.tokens == lens.data["tokens"] == board.data["tokens"] == ["<|bos|>", *"xyz"]
    assert heads.at == lens.at == 3, "the last token of a new text"
    scope.prompt.text = ""
    assert "at least two" in scope.prompt.problem and heads.tokens == ["<|bos|>", *"xyz"]
    scope.prompt.text = "q" * 100
    assert len(heads.tokens) == 48 and "only the first 48 are read" in scope.prompt.status


def test_another_model(scope: Microscope) -> None:
    heads = scope.look()
    first = heads.pattern
    scope.picker.identifier = "base/two"
    assert heads.pattern != first and not scope.prompt.problem
    second = heads.pattern
    scope.picker.identifier = "base/none"
    assert scope.prompt.problem == "base/none is missing; train it." and heads.pattern == second


def test_lens_and_shares(scope: Microscope) -> None:
    lens, shares = scope.lens(), scope.shares()
    logits = capture(scope.model, scope.scene.ids, points=["logits"])["logits"]
    spell = [scope.tokenizer.token_bytes(i).decode("utf-8", "replace") for i in range(VOCAB_SIZE)]
    assert [cell["top"][0][0] for cell in lens.data["cells"][-1]] == [
        spell[i] for i in logits.argmax(-1)
    ]
    assert lens.data["stages"] == [
        "embedding",
        *(f"after layer {i}" for i in range(3)),
        "whole model",
    ]
    shares.opened = True
    assert sum(shares.data["values"]) == pytest.approx(shares.data["logit"], abs=1e-4)
    assert shares.data["capped"] == pytest.approx(float(logits[-1, shares.token]), abs=1e-3)
    other = shares.data["guesses"][2]
    shares.token = other["id"]
    assert shares.data["label"] == other["label"]
    assert shares.data["capped"] == pytest.approx(float(logits[-1, other["id"]]), abs=1e-3)
    lens.control = True
    assert [cell["top"][0] for cell in lens.data["cells"][-1]] != [
        spell[i] for i in logits.argmax(-1)
    ]


def test_neurons_add_up(scope: Microscope) -> None:
    view = scope.neurons()
    view.opened = True
    scope.look().head = [1, 3]
    view.key = 4
    q, k, product = (np.array(view.data["bands"][i]["values"]) for i in (1, 3, 4))
    assert np.allclose(q * k, product) and view.data["product"] == pytest.approx(
        product.sum(), abs=1e-4
    )
    scores = []
    for key in range(len(scope.scene.ids)):
        view.key = key
        scores.append(view.data["score"])
    shares = np.exp(np.array(scores) - max(scores))
    view.key = 4
    assert view.data["weight"] == pytest.approx(shares[4] / shares.sum(), abs=1e-5)
    assert view.data["weight"] == pytest.approx(float(scope.scene.read_head(1, 3)[-1, 4]), abs=1e-6)


def test_patching_in_words(scope: Microscope) -> None:
    view = scope.patching()
    view.opened = True
    view.clean, view.corrupt = "abcd", "abcde"
    assert "5 and 6 tokens" in view.data["problem"]
    view.corrupt = "xbcd"
    grid = np.array(view.data["grid"])
    assert view.data["problem"] == "" and grid.shape == (4, 5)
    assert grid[0, 1] == pytest.approx(1, abs=0.05), "all but what the smear gave the next token"
    assert np.abs(grid[0, 2]) > 1e-3 and np.abs(grid[0, 3:]).max() < 1e-5
    assert view.data["tokens"][1] == ["a", "x"]
    assert "expects the same" in patch_prompts(scope, "abcd", "abcd")["problem"]


def test_time_machine(scope: Microscope, monkeypatch: pytest.MonkeyPatch) -> None:
    from primechat.labkit.instruments import timelapse

    entries: list[Any] = []
    opened: list[str] = []

    def open_snapshot(name: str) -> Any:
        opened.append(name)
        return make_model(int(name.partition(":")[2])), byte_tokenizer(), {}

    monkeypatch.setattr(timelapse, "list_models", lambda: entries)
    monkeypatch.setattr(timelapse, "open_model", open_snapshot)
    view = scope.time_machine()
    view.opened = True
    assert "has snapshots" in view.data["problem"] and not view.steps
    kind = dict(family="base", shipped=False, by_product=False)
    entries += [
        SimpleNamespace(identifier="base/d4", tag="d4", snapshots=(), **kind),
        SimpleNamespace(
            identifier="shipped/base", tag="lapse", snapshots=(1, 8), **{**kind, "shipped": True}
        ),
        SimpleNamespace(identifier="base/one", tag="one", snapshots=(3, 5, 9), **kind),
    ]
    scope.update_views()
    assert view.steps == [3, 5, 9] and view.moment == 2, "the run that is looked at, at its end"
    last = (view.data["lens"], view.data["guesses"], view.thumbs, view.data["loss"])
    view.moment = 0
    now = (view.data["lens"], view.data["guesses"], view.thumbs, view.data["loss"])
    assert all(a != b for a, b in zip(now, last, strict=True)), "attention, lens and guesses move"
    assert view.data["loss"] == pytest.approx(
        float(capture(make_model(3), scope.scene.ids).losses.mean())
    )
    view.moment = 2
    assert opened == ["base/one@snap:9", "base/one@snap:3"], "each is opened once"
    view.at = 2
    lens = view.data["lens"]
    view.at = 5
    assert view.data["lens"] != lens
    scope.picker.identifier = "base/two"
    assert view.steps == [1, 8] and opened[-1] == "shipped/base/lapse@snap:8", (
        "else the one that ships"
    )


def test_guesses_are_about_passages_and_told_beside_chance(scope: Microscope) -> None:
    passages = scope.passages
    assert passages.shape == (30, 48) and len({tuple(row) for row in passages}) == 30
    assert (passages[:, 0] == scope.tokenizer.bos_id).all()
    answer, said = survey.find_favourite(scope.scene, passages)
    shares = []
    for row in passages:
        w = capture(scope.model, row, points=["*.weights"]).stack("attn.weights")[:, :, 3:]
        shares.append(np.mean([w[:, :, t, t + 2].mean() for t in range(w.shape[2])]))
    mean, low, _ = estimate_mean(shares)
    assert answer in survey.PLACES and f"the token before it {mean:.1%} ± {mean - low:.1%}" in said
    alike = np.mean([1 / (t + 1) for t in range(3, 48)])
    assert f"({alike:.1%})" in said and f"({1 - 3 * alike:.1%})" in said, "what counting gives"

    effect, said = survey.find_worst(scope.scene, passages)
    changes = dict(scan_ablations(scope.model, scope.scene.ids))
    head = max((part for part in changes if "head" in part), key=lambda part: changes[part])
    whole = np.array([capture(scope.model, row).losses.mean() for row in passages])
    cut = np.array([capture(scope.model, row, ablate=[head]).losses.mean() for row in passages])
    mean, low, _ = estimate_mean(cut - whole)
    assert f"the loss grows by {mean:+.2f} ± {mean - low:.2f} without it" in said
    bounds = [-np.inf, 0.02, 0.1, 0.5, np.inf]
    place = survey.EFFECTS.index(effect)
    assert bounds[place] <= mean < bounds[place + 1], "the passages decide, not the text"
    assert "of all heads" in said or "They miss another head most" in said
    assert "of all heads" not in survey.find_worst(scope.scene, passages, search=False)[1]

    stage, said = survey.find_settling(scope.scene, passages)
    assert stage in survey.STAGES and said.count("±") == said.count("%") / 2 == 4


def test_a_model_that_reads_all_alike_has_no_favourite() -> None:
    """With equal weights each place gets what counting gives it: most lies in between by itself."""
    n = 27
    even = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    scene: Any = SimpleNamespace(
        ids=np.zeros(n),
        body=SimpleNamespace(n_layer=1, n_head=1),
        walk_weights=lambda: iter([(0, even[None, None])]),
    )
    np.testing.assert_allclose(survey.measure_places(scene), survey.count_places(n))
    assert survey.count_places(n)[3] == pytest.approx(0.743, abs=0.001)


def test_an_answer_is_about_the_text_at_the_time_of_the_guess(scope: Microscope) -> None:
    find = survey.find_favourite
    why = "Measured: {}."
    guess = Prediction("?", survey.PLACES, lambda: find(scope.scene, scope.passages), why=why)
    scope.prompt.text = "I like the dog. The dog likes me."
    answer, said = find(scope.scene, scope.passages)
    assert guess.answer_settle() == {"answer": answer, "why": f"Measured: {said}."}


def test_copying_stands_beside_words_in_other_orders(scope: Microscope) -> None:
    view = scope.ablate()
    assert "mixed" not in view.data
    view.test = "copy"
    rows = scope.mixed_rows
    n = (rows.shape[1] - 1) // 2
    for row in rows:
        assert np.array_equal(row[: n + 1], scope.copy_scene.ids[: n + 1])
        assert sorted(row[n + 1 :]) == sorted(row[1 : n + 1])
    assert any(not np.array_equal(row, scope.copy_scene.ids) for row in rows)
    view.off = ["layer.1.head.2"]
    for name, off in (("mixed_base", []), ("mixed", view.off)):
        saved = [save_copying(capture(scope.model, row, ablate=off).losses) for row in rows]
        assert view.data[name] == pytest.approx(np.mean(saved), abs=1e-4)


def test_strips_are_means_over_passages(scope: Microscope) -> None:
    view = scope.scores()
    view.opened = True
    strips = {strip["name"]: strip for strip in view.data["strips"]}
    assert view.data["passages"] == 30
    found = []
    for row in scope.passages:
        weights = capture(scope.model, row, points=["*.weights"]).stack("attn.weights")
        found.append(score_heads(weights, row).previous)
    back = strips["Looks one back"]
    np.testing.assert_allclose(back["values"], np.mean(found, axis=0))
    mean, low, _ = estimate_mean([scores[1, 2] for scores in found])
    assert back["halves"][1][2] == pytest.approx(mean - low)
    assert strips["Looks for what came next last time"]["values"][0][0] is not None
    n = scope.passages.shape[1]
    even = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    alike = score_heads(even[None, None], scope.passages[0])
    assert strips["Spreads its attention"]["hi"] == pytest.approx(alike.entropy[0, 0])
    before = view.data["strips"]
    scope.prompt.text = "another text"
    assert view.data["strips"] == before, "they are about the model, not about one text"
    scope.picker.identifier = "base/two"
    assert view.data["strips"] != before
