"""What labs 06 to 08 show: the shelf, the lit mask, series that are remembered, replies, the dial."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from primechat.checkpoint import registry
from primechat.checkpoint.run_dir import read_frozen
from primechat.config import EvalConfig, GPTConfig, OptimConfig, PretrainConfig, RuntimeConfig
from primechat.errors import ConfigError
from primechat.events import Event
from primechat.labkit.instruments import ablation, posttrain, pretraining, series, spectra
from primechat.model.gpt import GPT
from primechat.train.optim import Optimizer
from primechat.views.training import draw_lines, draw_tradeoff

FIXED = RuntimeConfig(device="cpu", dtype="float32", threads=1, compile="off", micro_batch_rows=4)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short looks, and no measuring of the machine."""
    evaluation = EvalConfig(tokens=512, last_tokens=512, sample_every=-1, snapshots=False)
    monkeypatch.setattr(series, "QUIET", evaluation)
    monkeypatch.setattr(series, "QUICK", FIXED)


def test_lit_tokens_are_the_assistants() -> None:
    _, tokenizer, _ = posttrain.borrow_model("shipped/base")
    talk = {
        "messages": [
            {"role": "user", "content": "How are you?"},
            {"role": "assistant", "content": "Fine!"},
        ]
    }
    ids, mask = tokenizer.render_conversation(talk)
    parts = posttrain.light_tokens(ids, mask, tokenizer)
    assert [part["role"] for part in parts] == ["start of the text", "user", "assistant"]
    lit = "".join(text for part in parts for text, on in part["pieces"] if on)
    assert lit.startswith("Fine!") and "How" not in lit
    assert "".join(text for part in parts for text, _ in part["pieces"]) == tokenizer.decode(ids)


@pytest.mark.slow
def test_shelf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posttrain, "SHELF", ("faq", "topic:music"))
    _, tokenizer, _ = posttrain.borrow_model("shipped/base")
    desk = posttrain.open_desk(tokenizer, {"faq": 1.0, "topic:music": 0.5})
    here = {s["name"]: s for s in desk.sets if s["here"]}
    assert set(here) == {"faq", "topic:music"} and here["faq"]["conversations"] == 80
    assert {s["name"] for s in desk.sets if not s["here"]} == set(posttrain.SETS)
    assert desk.mixture == "faq, topic:music*0.5"
    first, other = desk.answer_read("faq", 0), desk.answer_read("faq", 1)
    assert first["of"] == 10 and 0 < first["learned"] < first["tokens"] and first != other
    assert posttrain.guess_share("chitchat") == "about half"


@pytest.mark.slow
def test_series_of_adapters_is_remembered() -> None:
    plan = posttrain.SeriesConfig(
        model="shipped/sft", names="2, full", seeds=1, steps=2, batch_tokens=1024
    )
    heard: list[Event] = []
    rows = posttrain.compare_ranks(plan, on_event=heard.append)
    assert [row["name"] for row in rows] == ["2", "full"] and rows[0]["parameters"] < rows[1][
        "parameters"
    ]
    assert all(row["gain"] != 0 and "forgotten" in row for row in rows)
    assert rows[0]["optimizer MB"] < 0.2 * rows[1]["optimizer MB"]
    n_steps = sum(event.kind == "step" for event in heard)
    heard.clear()
    again = posttrain.compare_ranks(plan, on_event=heard.append)
    assert again == [pytest.approx(row) for row in rows]
    assert n_steps == 4 and not any(event.kind == "step" for event in heard)
    table = series.sum_rows(
        [rows[0], {**rows[0], "seed": 1, "gain": rows[0]["gain"] + 0.2}], ("gain",)
    )
    first = rows[0]["gain"]
    assert table == [{"run": "2", "seeds": 2, "gain": f"{first:.3f}, {first + 0.2:.3f}"}]
    three = [{**rows[0], "gain": first + 0.1 * i} for i in range(3)]
    assert (
        series.sum_rows(three, ("gain",))[0]["gain"] == f"{first + 0.1:.3f} ± 0.248"
    )  # 4.303 x 0.1 / 3^0.5
    found = posttrain.find_spectra(rows, plan)
    assert list(found) == ["adapter, rank 2", "full, by AdamW", "full, by Muon", "random numbers"]
    held = {name: points[7][1] for name, points in found.items()}  # by the first eight
    assert (
        found["adapter, rank 2"][1][1] == pytest.approx(100)
        and found["adapter, rank 2"][0][1] < 100
    )
    assert held["full, by AdamW"] > 2 * held["full, by Muon"] > held["random numbers"]
    compared = str(posttrain.compare_with_full(rows).output)
    share = 100 * rows[0]["gain"] / rows[1]["gain"]
    assert f"Rank 2, as a share of full fine-tuning: {share:.0f} % of the gain" in compared
    axes = posttrain.name_axes(rows)
    assert [row["name"] for row in axes] == ["rank 2", "full"]
    assert len(draw_tradeoff(axes, *list(axes[0])[1:]).data) == 2
    dial = posttrain.open_dial([rows[0]["identifier"]], "shipped/sft")
    plain = posttrain.write_reply("shipped/sft", "Hello")
    name = dial.adapters[0]
    assert dial.answer_write("Hello", 0.0, name)["text"] == plain  # exactly the base
    assert (
        dial.answer_write("Hello", 9.0, name)["text"]
        == dial.answer_write("Hello", 2.0, name)["text"]
    )


@pytest.mark.slow
def test_sets_have_common_ground() -> None:
    plan = posttrain.SeriesConfig(names="faq, topic:food", seeds=1, steps=2, batch_tokens=1024)
    rows = posttrain.compare_sets(plan)
    before, after = (
        series.score_together(name, plan) for name in ("shipped/base", rows[0]["identifier"])
    )
    assert rows[0]["common gain"] == pytest.approx(before - after) and before - after > 0
    assert (
        rows[0]["common gain"] != rows[0]["gain"]
        and rows[1]["common gain"] != rows[0]["common gain"]
    )
    assert list(posttrain.name_axes(rows)[0])[1] == "gain on the common talks, bits per byte"


@pytest.mark.slow
def test_students(tmp_path: Path) -> None:
    plan = posttrain.SeriesConfig(names="eighth taught", seeds=1, steps=2, batch_tokens=1024)
    rows = posttrain.compare_sizes(plan)
    assert rows[0]["retention"] > 0 and 0 <= rows[0]["agreement"] <= 1
    result: Any = registry.load_run(
        registry.run_dir("base", rows[0]["identifier"].partition("/")[2])
    )
    assert [name for name, points in posttrain.list_retention(result).items() if points] == [
        "retention",
        "agreement",
    ]
    assert list(posttrain.list_by_size(rows)) == ["taught"]
    three = [{**rows[0], "retention": 0.5 + 0.1 * i} for i in range(3)]
    ((_, mean, low, high),) = posttrain.list_by_size(three)["taught"]
    assert mean == pytest.approx(0.6) and high - mean == mean - low == pytest.approx(
        0.2484, abs=1e-3
    )
    drawn = draw_lines(posttrain.list_by_size(three), "size", "retention").data[0]
    assert drawn.error_y.array[0] == pytest.approx(high - mean)
    more = posttrain.add_teacher(rows, "shipped/base")
    assert [row["name"] for row in more[1:]] == ["the teacher", "the text itself"]
    assert all(0 < row["distinct-2"] <= 1 and 0 <= row["repetition"] < 1 for row in more)
    said = {
        key: text
        for row in posttrain.open_table(more, ("distinct-2",), diversity=False).output["parts"]
        for key, text in [(r[0], r[-1]) for r in row["rows"]]
    }
    assert said["the teacher"] == f"{more[1]['distinct-2']:.3f}"
    heat = posttrain.open_heat(rows[0]["identifier"], "shipped/base").answer_measure("Hello")
    assert heat["tokens"] and all(t["kl"] >= 0 for t in heat["tokens"])
    same = posttrain.open_heat("shipped/base", "shipped/base").answer_measure("Hello")
    assert max(t["kl"] for t in same["tokens"]) < 1e-3
    found = posttrain.break_down(rows[0]["identifier"], "shipped/base", tokens=1024)
    assert set(found.groups) == {"frequency", "position", "kind"}
    own = posttrain.borrow_model("shipped/base")[0].config
    half = replace(own, n_layer=own.n_layer // 2, n_embd=own.n_embd // 2, n_head=2, n_kv_head=2)
    assert posttrain.guess_halved("shipped/base") == round(100 * half.n_params / own.n_params, 1)
    assert isinstance(own, GPTConfig)


def test_what_is_compared_can_be_written() -> None:
    assert posttrain.SeriesConfig(names=" faq,chitchat , faq,").list_names() == ["faq", "chitchat"]
    for wrong in (dict(names=" , "), dict(seeds=0), dict(steps=0)):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            posttrain.SeriesConfig(**wrong)  # type: ignore[arg-type]
    for function, names in (
        (posttrain.compare_ranks, "0"),
        (posttrain.compare_sizes, "eighth, taught"),
    ):
        with pytest.raises(ConfigError, match="correct it"):
            function(posttrain.SeriesConfig(names=names))


def test_nothing_has_run_yet() -> None:
    figure = draw_lines(posttrain.list_curves(None), "step", "bits per byte")
    assert "Nothing to draw yet" in figure.layout.annotations[-1].text
    assert "Nothing to draw yet" in draw_tradeoff([], "a", "b").layout.annotations[-1].text
    assert (
        posttrain.open_table(None, ("gain",))
        .output["parts"][0]["rows"][0][0]
        .startswith("nothing yet")
    )
    assert (
        posttrain.find_spectra(None, posttrain.SeriesConfig()) == {}
        and posttrain.list_by_size(None) == {}
    )
    assert "No student yet" in str(
        posttrain.open_heat(posttrain.pick_student(None), "shipped/base").output
    )
    assert (
        "when the run above is done"
        in posttrain.open_breakdown(None, "shipped/base").output["parts"][0]["text"]
    )


def test_shares_of_singular_values_and_their_control() -> None:
    change = torch.diag(torch.tensor([4.0, 2.0, 2.0, 1.0, 0.0]))
    assert spectra.add_up(change) == [(1, 64), (2, 80), (3, 96), (4, 100), (5, 100)]
    assert [point[1] for point in spectra.add_up(7 * change, 2)] == [64, 80], "size does not count"
    noise = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    shares = [share for _, share in spectra.add_up(noise)]
    edge = 100 * (64**0.5 + 256**0.5) ** 2 / (64 * 256)  # Marchenko and Pastur 1967
    assert shares[0] == pytest.approx(edge, rel=0.1) and shares[-1] == pytest.approx(100)


def test_muon_spreads_a_change_and_adamw_does_not() -> None:
    """On equal batches: Muon's change has nearly equal singular values, AdamW's a few large ones."""
    shape: dict[str, Any] = dict(vocab_size=96, sequence_len=32, head_dim=32)
    config = replace(GPTConfig.modern(1, **shape), n_embd=64, n_head=2, n_kv_head=2)
    model = GPT(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # as after some training: an untrained head passes no gradient on
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(std=0.1, generator=generator)
    ids = torch.randint(0, 96, (1, 33), generator=generator).expand(8, 33)  # one text to learn
    batches = [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())] * 6
    before = model.get_parameter(f"{spectra.PATH}.weight").detach().clone()

    by_adamw = spectra.tune_by_adamw(model, batches)
    assert torch.equal(model.get_parameter(f"{spectra.PATH}.weight"), before), "left as it was"

    optimizer = Optimizer(model, OptimConfig(), config.n_embd)
    for x, y in batches:
        model.loss(x, y).backward()
        optimizer.step(1.0, 0.95)
    by_muon = model.get_parameter(f"{spectra.PATH}.weight").detach() - before
    held = {name: spectra.add_up(d)[7][1] for name, d in (("AdamW", by_adamw), ("Muon", by_muon))}
    random = spectra.add_up(torch.randn(before.shape, generator=generator))[7][1]
    assert held["AdamW"] > 1.5 * random > 1.5 * held["Muon"]


def test_shares_of_full_fine_tuning_are_told_seed_by_seed() -> None:
    def row(name: str, seed: int, gain: float, forgotten: float) -> dict[str, Any]:
        return {"name": name, "seed": seed, "gain": gain, "forgotten": forgotten}

    rows = [row("8", 0, 0.9, 0.11), row("full", 0, 1.0, 0.1), row("1", 0, 0.5, 0.02)]
    rows += [row("8", 1, 0.8, 0.05), row("full", 1, 1.0, 0.1)]

    def read(found: list[dict[str, Any]]) -> str:
        return str(posttrain.compare_with_full(found).output["parts"][0]["text"])

    said = (
        "Rank 8, as a share of full fine-tuning: 90 % and 80 % of the gain, 110 % and 50 % of what"
    )
    assert read(rows).startswith(said)
    rows += [row("8", 2, 1.0, 0.08), row("full", 2, 1.0, 0.1)]
    assert "90 % ± 25 of the gain, 80 % ± 75 of what it forgot" in read(rows)  # 4.303 s / 3^0.5
    rows += [row("8", 3, 1.0, 0.08), row("full", 3, 1.0, -0.01)]
    assert "forgot" not in read(rows), "a share of a loss that is none says nothing"
    assert posttrain.compare_with_full(None).output["parts"] == []


def test_an_ablation_runs_anew_with_other_settings(base_dir: Path) -> None:
    """A bench that has run is remembered; with more steps it is another one, and not refused for good."""
    model = GPTConfig.modern(1, vocab_size=512, sequence_len=32, head_dim=32)
    evaluation = EvalConfig(tokens=64, last_tokens=64, sample_every=-1)
    base = PretrainConfig(model=model, batch_tokens=64, eval=evaluation, runtime=FIXED)
    plan = pretraining.AblationConfig(base=base, switches="smear", steps=2)
    heard: list[Event] = []
    first = pretraining.ablate(plan, on_event=heard.append)
    n_heard = len(heard)
    assert {name: len(values) for name, values in first.bpb.items()} == {
        "everything on": 3,
        "without smear": 3,
    }
    assert pretraining.ablate(plan, on_event=heard.append) == first
    assert {event.kind for event in heard[n_heard:]} == {"note"}, "nothing is trained twice"
    frozen = [read_frozen(folder, PretrainConfig) for folder in list_runs(base_dir)]
    assert len(frozen) == 2 * plan.seeds and {
        (c.optim.x0_lr, c.optim.smear_lr) for c in frozen
    } == {(0.5, 0.2)}
    assert {(c.optim.residual_lr, c.optim.x0_beta1) for c in frozen} == {(0.005, 0.96)}
    longer = pretraining.ablate(replace(plan, steps=3))
    assert not longer.stopped and longer.bpb != first.bpb


def list_runs(base_dir: Path) -> list[Path]:
    return sorted((base_dir / "base_checkpoints").glob("ablation*"))


@pytest.mark.slow
def test_the_ablation_as_a_command(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rates of the scalars compared at equal tokens; a second call runs nothing again."""
    model = GPTConfig.modern(1, vocab_size=512, sequence_len=32, head_dim=32)
    evaluation = EvalConfig(tokens=64, last_tokens=64, sample_every=-1)
    base = PretrainConfig(model=model, batch_tokens=64, eval=evaluation, runtime=FIXED)
    monkeypatch.setattr(ablation, "build_base", lambda flags: base)
    words = ["rates", "--tokens", "128", "--batch_tokens", "64", "--seeds", "3"]
    words += ["--output", str(base_dir / "rates.json")]
    assert ablation.main(words) == 0
    found = json.loads((base_dir / "rates.json").read_text())
    assert found["complete"] and set(found["bpb"]) == {
        "everything on",
        "nanochat2026",
        "nanochat2026+init",
    }
    assert all(len(values) == 3 for values in found["bpb"].values())
    runs = [read_frozen(folder, PretrainConfig) for folder in list_runs(base_dir)]
    assert {c.steps for c in runs} == {2} and len(runs) == 9
    assert sorted({c.optim.x0_lr for c in runs}) == [0.005, 0.5]
    assert {c.init.residual_first for c in runs if c.optim.x0_lr == 0.5} == {1.0, 1.15}
    said = capsys.readouterr().out
    assert "nanochat2026+init: everything on, seed 2" in said and "Complete: " in said
    assert ablation.main(words) == 0 and "after" not in capsys.readouterr().out
    monkeypatch.setattr("threading.Timer.start", lambda timer: timer.function())
    assert ablation.main([*words, "--seeds", "4"]) == 1, "the time was up at once"
    assert "The time is up; the same command goes on" in capsys.readouterr().out


def test_the_dial_holds_one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Opened:
        """Stands in for a model, which weak references can watch."""

    seen: list[weakref.ref[Opened]] = []

    def open_model(identifier: str) -> tuple[Any, Any, Any]:
        model = Opened()
        seen.append(weakref.ref(model))
        return model, None, {}

    monkeypatch.setattr(registry, "open_model", open_model)
    monkeypatch.setattr("primechat.infer.engine.Engine", lambda model, tokenizer: None)
    monkeypatch.setattr("primechat.model.lora.set_adapter_scale", lambda *_: None)
    monkeypatch.setattr(posttrain, "answer", lambda engine, prompt: prompt)
    desk = posttrain.open_dial(["lora:a+sft/d20", "lora:b+sft/d20", "lora:c+sft/d20"], "sft/d20")
    for name in ("a", "a", "b", "c"):
        assert desk.answer_write("Hi", 1.0, name) == {"text": "Hi"}
    gc.collect()
    assert [one() is not None for one in seen] == [False, False, True]
