"""Which models exist, and opening them with the right tokenizer."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stored_models import CONFIG, make_run, make_state

from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import save_snapshot
from primechat.checkpoint.run_dir import MetricsFile
from primechat.cli import main as cli
from primechat.config import GPTConfig
from primechat.errors import CheckpointError, ConfigError, DataError
from primechat.files.hub import count_stored_params, list_cached
from primechat.text.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

NANOCHAT = Path(__file__).parents[1] / "fixtures" / "nanochat"


@pytest.fixture(autouse=True)
def nothing_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the shipped models in a folder of the test's own."""
    monkeypatch.setattr(registry, "SHIPPED", tmp_path / "data" / "nanochat")
    return tmp_path / "data" / "nanochat"


def make_tokenizer(pattern: str = SPLIT_PATTERN, extra: int = 0) -> Tokenizer:
    """Return a byte tokenizer with `extra` merges."""
    ranks = {bytes([i]): i for i in range(256)} | {b"a" * (i + 2): 256 + i for i in range(extra)}
    return Tokenizer(
        pattern, ranks, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    )


def test_base_dir_is_read_at_each_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / name))
        assert registry.base_dir() == tmp_path / name
    assert registry.run_dir("sft", "d4") == tmp_path / "b" / "chatsft_checkpoints" / "d4"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "")
    assert registry.base_dir() == Path.home() / ".cache" / "nanochat"
    with pytest.raises(ConfigError, match="source='hf' must be one of base, mid, sft, rl"):
        registry.run_dir("hf", "d4")


def test_identifiers() -> None:
    for text in (
        "base",
        "sft/d20",
        "base/d4@600",
        "base/d4@snap:64",
        "rl/my-run_2.0",
        "shipped/sft",
        "mid/d4@0",
        "shipped/sft/d4",
        "shipped/base/timelapse@snap:64",
        "lora:pirate*0.5+lora:music+sft/d4@600",
    ):
        assert str(registry.parse_identifier(text)) == text
    wrong = [
        "",
        "d4",
        "base/",
        "base/d4@",
        "base/d4@-1",
        "base/d4@snap:",
        "base@3",
        "lora:pirate",
        "lora:+sft",
    ]
    wrong += [
        "hf:smollm",
        "shipped/",
        "shipped/d4",
        "shipped/sft@5",
        "shipped/sft/../x",
        "base/d4/x",
        "base/..",
        "base/../../etc",
        "BASE/d4",
        " base",
    ]
    for text in (*wrong, "base/d4@5\n"):
        with pytest.raises(ConfigError):
            registry.parse_identifier(text)
    with pytest.raises(ConfigError, match="must be like base/d4, base/d4@600.*primechat models"):
        registry.open_model("hf:smollm")


@pytest.mark.parametrize("name", ["oct2025", "head", "head_d3"])
def test_opens_nanochat(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(NANOCHAT / name))
    expected = json.loads((NANOCHAT / name / "expected.json").read_text())["prompts"][0]
    tags = [entry.tag for entry in registry.list_models()]
    assert tags == (["d3"] if name == "head_d3" else ["d2", "d2-compiled"])
    for tag in (None, *tags):
        model, tokenizer, meta = registry.load_model("base", model_tag=tag)
        assert meta["identifier"] == f"base/{tag or tags[0]}@10" and meta["skipped"] == []
        assert tokenizer.vocab_size == model.vocab_size == 600
        assert not any(p.requires_grad for p in model.parameters()) and not model.training
        kind, error = ("bf16", 1e-3) if name == "oct2025" else ("f32", 1e-4)
        logits = model(torch.tensor([expected["ids"]]))[0, -1]
        assert torch.allclose(
            logits, torch.tensor(expected[f"logits_last_{kind}_rotary"]), atol=error
        )
    assert registry.load_tokenizer("base").identity == registry.load_tokenizer().identity


def test_default_tag_and_step(base_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_tokenizer().save(base_dir / "tokenizer")
    make_run(base_dir, "base_checkpoints/d9", (1, 3))
    old = make_run(base_dir, "base_checkpoints/zebra")
    for path in old.iterdir():
        os.utime(path, (1e9, 1e9))
    make_run(base_dir, "base_checkpoints/d10-x", (5,))
    assert registry.open_model("base")[2]["identifier"] == "base/d9@3", "d<number> comes first"
    make_run(base_dir, "base_checkpoints/d10", (2,))
    assert registry.open_model("base")[2]["identifier"] == "base/d10@2"
    assert registry.load_model("base", step=2)[2]["identifier"] == "base/d10@2"
    assert registry.load_model("base", model_tag="d9", step=1)[2]["identifier"] == "base/d9@1"
    make_run(base_dir, "chatsft_checkpoints/alpha", (7,))
    newest = make_run(base_dir, "chatsft_checkpoints/beta", (8,))
    for path in newest.iterdir():
        os.utime(path, (3e9, 3e9))
    assert registry.open_model("sft")[2]["identifier"] == "sft/beta@8"
    assert registry.open_model("")[2]["identifier"] == "sft/beta@8", "the chat model is the default"
    (newest / "meta_000008.json").unlink()
    caplog.clear()
    assert registry.open_model("sft")[2]["identifier"] == "sft/alpha@7", (
        "an incomplete run is no model"
    )
    assert "beta/meta_000008.json is missing" in caplog.text
    (base_dir / "chatsft_checkpoints/alpha/model_000007.pt").unlink()
    with pytest.raises(
        CheckpointError, match="No sft model can be used: .*meta_000008.json is missing"
    ):
        registry.open_model("sft")
    make_run(base_dir, "base_checkpoints/d10", (4,))
    os.truncate(base_dir / "base_checkpoints/d10/model_000004.pt", 99)
    meta = registry.open_model("base/d10")[2]
    assert meta["identifier"] == "base/d10@2" and "99 bytes" in meta["skipped"][0]
    for call, match in (
        (lambda: registry.open_model("base/d10@4"), "99 bytes"),
        (lambda: registry.open_model("base/d10@77"), "no step 77, there are 2 to 4"),
        (lambda: registry.open_model("base/d77"), "the tags of base are: d10, d10-x, d9, zebra"),
        (lambda: registry.open_model("rl"), "chatrl_checkpoints holds no checkpoint"),
        (lambda: registry.load_model("rl", step=3), "no step 3"),
        (lambda: registry.open_model("shipped/sft"), "holds no checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=match):
            call()
    for options in ({"dtype": "int8"}, {"phase": "sleep"}):
        with pytest.raises(ConfigError):
            registry.open_model("base", **options)
    with pytest.raises(ConfigError, match="source='all'"):
        registry.load_model("all")


def test_dtype_and_phase(base_dir: Path) -> None:
    make_tokenizer().save(base_dir / "tokenizer")
    make_run(base_dir, "base_checkpoints/d1")
    model = registry.load_model("base", phase="train")[0]
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(
        torch.equal(model.state_dict()[key], tensor) for key, tensor in make_state(1).items()
    )
    assert {p.dtype for p in registry.load_model("base", dtype="bfloat16")[0].parameters()} == {
        torch.bfloat16
    }
    assert {p.dtype for p in registry.load_model("base", dtype="auto")[0].parameters()} == {
        torch.float32
    }
    with torch.no_grad():
        model.lm_head.weight.zero_()  # a mapped weight is the reader's own copy
    assert registry.load_model("base")[0].lm_head.weight.abs().sum() > 0


def test_snapshots_open(base_dir: Path) -> None:
    make_tokenizer().save(base_dir / "base_checkpoints/d1/tokenizer")
    run = make_run(base_dir, "base_checkpoints/d1", (9,))
    save_snapshot(run, 4, make_state(4), CONFIG, {})
    model, _, meta = registry.open_model("base/d1@snap:4")
    assert meta["identifier"] == "base/d1@snap:4"
    assert torch.equal(model.lm_head.weight, make_state(4)["lm_head.weight"].bfloat16().float())
    with pytest.raises(CheckpointError, match="no step 4"):
        registry.open_model("base/d1@4")
    with pytest.raises(CheckpointError, match="no step 9"):
        registry.open_model("base/d1@snap:9")


def test_tokenizer_rules(base_dir: Path, tmp_path: Path) -> None:
    mine, other, larger = make_tokenizer(), make_tokenizer(r"\s+|\S+"), make_tokenizer(extra=1)
    other.save(base_dir / "tokenizer")
    run = make_run(base_dir, "base_checkpoints/d1", tokenizer_identity=mine.identity)
    with pytest.raises(
        CheckpointError, match=f"{mine.identity[:12]}, this is {other.identity[:12]}.*--tokenizer"
    ):
        registry.open_model("base")
    assert registry.open_model("base", tokenizer=mine)[1] is mine
    mine.save(tmp_path / "mine")
    assert (
        registry.open_model("base", tokenizer=str(tmp_path / "mine"))[1].identity == mine.identity
    )
    mine.save(run / "tokenizer")
    assert registry.open_model("base")[1].identity == mine.identity, "the one beside the model wins"
    assert registry.load_tokenizer("base/d1").identity == mine.identity
    assert registry.load_tokenizer().identity == other.identity
    with pytest.raises(CheckpointError, match="vocab_size=265, its tokenizer 266"):
        registry.open_model("base", tokenizer=larger)
    with pytest.raises(CheckpointError, match="was trained with"):
        registry.open_model("base", tokenizer=other)
    make_run(base_dir, "sft_none")
    make_run(base_dir, "chatsft_checkpoints/d1")
    assert registry.open_model("sft")[1].identity == other.identity, (
        "one that records no tokenizer is loaded"
    )
    (base_dir / "tokenizer" / "tokenizer.pkl").unlink()
    with pytest.raises(DataError, match="tokenizer.pkl is missing"):
        registry.open_model("sft")
    assert registry.load_tokenizer("base").identity == mine.identity


def test_shipped_stands_in(base_dir: Path, nothing_shipped: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint; run `primechat pretrain`"):
        registry.open_model()
    make_tokenizer().save(nothing_shipped / "tokenizer")
    for family in ("base", "chatsft"):
        make_run(nothing_shipped, f"{family}_checkpoints/small")
    for text, identifier in (
        ("", "shipped/sft"),
        ("base", "shipped/base"),
        ("shipped/sft", "shipped/sft"),
    ):
        model, _, meta = registry.open_model(text)
        assert meta["identifier"] == identifier and str(nothing_shipped) in meta["path"]
    assert registry.load_model("sft")[2]["identifier"] == "shipped/sft"
    assert registry.load_tokenizer().vocab_size == 265
    for call in (
        lambda: registry.load_model("sft", step=1),
        lambda: registry.load_model("sft", model_tag="small"),
    ):
        with pytest.raises(CheckpointError):
            call()
    entries = registry.list_models()
    assert [(e.identifier, e.shipped, e.steps) for e in entries] == [
        ("shipped/base", True, (1,)),
        ("shipped/sft", True, (1,)),
    ]
    assert registry.open_model("shipped/sft")[2]["sampling"] == registry.ADVICE
    make_tokenizer().save(base_dir / "tokenizer")
    make_run(
        base_dir, "base_checkpoints/d1", sampling=[{"rm": 1}, "a file that somebody gave away"]
    )
    own = registry.open_model("")[2]
    assert own["identifier"] == "base/d1@1", "one's own comes before what ships"
    assert own["sampling"] == ({}, "")
    assert registry.open_model("shipped/base")[2]["identifier"] == "shipped/base"
    assert [e.identifier for e in registry.list_models()] == [
        "base/d1",
        "shipped/base",
        "shipped/sft",
    ]


def test_each_shipped_tag_has_a_name(base_dir: Path, nothing_shipped: Path) -> None:
    """The largest depth is the default; the others, and snapshots alone, are opened by their tags."""
    make_tokenizer().save(nothing_shipped / "tokenizer")
    for tag, step in (("d9", 1), ("d10", 2), ("zebra", 3)):
        make_run(nothing_shipped, f"base_checkpoints/{tag}", (step,))
    movie = nothing_shipped / "base_checkpoints" / "timelapse"
    for step in (0, 64):
        save_snapshot(movie, step, make_state(step), CONFIG, {})
    entries = registry.list_models()
    assert {e.identifier: (e.tag, e.steps, e.snapshots) for e in entries} == {
        "shipped/base": ("d10", (2,), ()),
        "shipped/base/d9": ("d9", (1,), ()),
        "shipped/base/timelapse@snap:64": ("timelapse", (), (0, 64)),
        "shipped/base/zebra": ("zebra", (3,), ()),
    }
    for entry in entries:
        model, _, meta = registry.open_model(entry.identifier)
        path = Path(entry.path) / ("snapshots" if entry.tag == "timelapse" else "")
        assert Path(meta["path"]) == path and meta["step"] == max(entry.steps or entry.snapshots)
        weights = make_state(meta["step"])["lm_head.weight"].to(
            torch.bfloat16 if not entry.steps else None
        )
        assert torch.equal(model.lm_head.weight, weights.float())
        again = registry.open_model(meta["identifier"])[2]
        assert again["identifier"] == meta["identifier"] and again["path"] == meta["path"]
    first = registry.open_model("shipped/base/timelapse@snap:0")[2]
    assert (first["identifier"], first["step"]) == ("shipped/base/timelapse@snap:0", 0)
    assert registry.load_run("shipped/base/d9").identifier == "shipped/base/d9"
    make_run(base_dir, "base_checkpoints/d9", (7,))
    make_tokenizer().save(base_dir / "tokenizer")
    assert (
        registry.open_model("base/d9")[2]["step"] == 7
        and registry.open_model("shipped/base/d9")[2]["step"] == 1
    )
    for name, match in (
        ("shipped/base/d4", "tags of shipped/base are: d10, d9, timelapse, zebra"),
        ("shipped/base/timelapse@snap:5", "no step 5, there are 0 to 64"),
        ("shipped/base/d9@5", "no step 5"),
    ):
        with pytest.raises(CheckpointError, match=match):
            registry.open_model(name)


def test_list_models(base_dir: Path) -> None:
    assert registry.list_models() == []
    run = make_run(base_dir, "base_checkpoints/d1", (1, 5), val_bpb=1.25, tokenizer_identity="cafe")
    save_snapshot(run, 2, make_state(), CONFIG, {})
    save_snapshot(base_dir / "base_checkpoints" / "only", 3, make_state(), CONFIG, {})
    make_run(base_dir, "mid_checkpoints/not a tag")
    broken = make_run(base_dir, "chatrl_checkpoints/d7")
    size = (broken / "model_000001.pt").stat().st_size
    (broken / "model_000001.pt").write_bytes(b"x" * size)
    (base_dir / "base_checkpoints" / "empty").mkdir()
    (base_dir / "base_checkpoints" / "file").touch()
    first, only, last = registry.list_models()
    assert first == registry.ModelEntry(
        identifier="base/d1",
        family="base",
        tag="d1",
        steps=(1, 5),
        snapshots=(2,),
        architecture="modern",
        val_bpb=1.25,
        n_bytes=sum(p.stat().st_size for p in run.rglob("*.pt")),
        n_params=CONFIG.n_params,
        tokenizer_identity="cafe",
        path=str(run),
    )
    assert (only.identifier, only.steps) == ("base/only@snap:3", ())
    assert (last.identifier, last.architecture) == ("rl/d7", "unreadable")


def test_a_damaged_adapter_hides_no_model(base_dir: Path) -> None:
    make_run(base_dir, "base_checkpoints/d1")
    folder = registry.run_dir("lora", "torn")
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    for text in ('{"r": 4', "[]", "{}"):
        (folder / "adapter_config.json").write_text(text)
        assert [entry.identifier for entry in registry.list_models()] == ["base/d1"]


def test_strange_files_hide_no_model(
    base_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Damaged or foreign data, and a folder of another user, neither end the list nor the default model."""
    make_run(base_dir, "base_checkpoints/d1", val_bpb=10**400)
    closed = make_run(base_dir, "base_checkpoints/d2")
    adapter = registry.run_dir("lora", "odd")
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    (adapter / "adapter_config.json").write_text(
        '{"r": "\\u001b[2J", "base_model_name_or_path": "[/x]"}'
    )
    usual = Path.iterdir

    def look(path: Path) -> Any:
        if path == closed:
            raise PermissionError(13, "Permission denied")
        return usual(path)

    monkeypatch.setattr(Path, "iterdir", look)
    assert [(e.identifier, e.val_bpb) for e in registry.list_models()] == [
        ("base/d1", None),
        ("lora:odd+[/x]", None),
    ]
    assert cli.main(["models"]) == 0
    said = capsys.readouterr().out
    assert "lora:odd+[/x]" in said and "\x1b" not in said
    assert registry.locate_model(registry.parse_identifier("base"))[1].tag == "d1"
    with pytest.raises(
        CheckpointError, match="d2 cannot be read .Permission denied.; correct its rights"
    ):
        registry.open_model("base/d2")

    place = tmp_path / "hub" / "models--owner--name"
    folder = place / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "model.safetensors").symlink_to(place / "blobs" / "gone")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert list(list_cached()) == []
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(b"\xff" * 8 + b"[" * 100_000)
    assert list(list_cached()) == [("owner/name", folder)] and count_stored_params(folder) == 0
    (folder / "config.json").write_text("[" * 100_000)
    assert list(list_cached()) == []


def test_listing_leaves_torch_out() -> None:
    code = (
        "import sys, primechat as p; print(len(p.list_models())); assert 'torch' not in sys.modules"
    )
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(NANOCHAT / "head")}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0 and int(done.stdout) >= 2, done.stderr


def test_numbers_that_are_none(base_dir: Path) -> None:
    run = make_run(base_dir, "base_checkpoints/d1", (2,))
    (run / "metrics.jsonl").write_text(
        '{"kind": "step", "step": NaN, "tokens": NaN, "tokens_per_s": 1}\n'
    )
    assert registry.load_run("base/d1").tokens == 0


def test_load_run(base_dir: Path, tmp_path: Path) -> None:
    run = make_run(base_dir, "base_checkpoints/d1", (2,), val_bpb=2.5)
    result = registry.load_run("base/d1")
    assert (result.identifier, result.path, result.step) == ("base/d1", "base_checkpoints/d1", 2)
    assert (result.val_bpb, result.n_params, result.stopped, result.tokens) == (
        2.5,
        CONFIG.n_params,
        True,
        0,
    )
    log = MetricsFile(run)
    for step in (1, 2):
        log.append(
            {"kind": "step", "step": step, "tokens": 100, "tokens_per_s": 50.0, "elapsed_s": 2.0}
        )
    log.append({"kind": "loss", "step": 2, "val_bpb": 1.5})
    log.append({"kind": "done", "step": 2, "elapsed_s": 9.0, "stopped": False})
    result = registry.load_run(run)
    assert (result.tokens, result.train_s, result.tokens_per_s, result.total_s) == (
        200,
        4.0,
        50.0,
        9.0,
    )
    assert (result.val_bpb, result.stopped, len(result.events)) == (1.5, False, 4)
    away = tmp_path / "from-the-cloud"
    away.mkdir()
    (away / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    (away / "config.json").write_text(
        json.dumps({"model": {"n_layer": 2, "n_embd": 64, "n_head": 1, "n_kv_head": 1}})
    )
    result = registry.load_run(away)
    assert (result.identifier, result.path, result.step) == ("run/from-the-cloud", str(away), 2)
    assert result.n_params == GPTConfig(n_layer=2, n_embd=64, n_head=1, n_kv_head=1).n_params
    (away / "metrics.jsonl").write_text('{"kind": "step", "step": 3, "tokens": "many"}\n')
    assert math.isnan(registry.load_run(away).val_bpb)
    (away / "metrics.jsonl").write_text('{"kind": "step", "step": 3, "tokens": 5}\n')
    assert (registry.load_run(away).tokens, registry.load_run(away).train_s) == (5, 0.0), (
        "no speed, no time"
    )
    with pytest.raises(CheckpointError, match="neither checkpoint nor metrics"):
        registry.load_run(tmp_path)
    with pytest.raises(CheckpointError, match="neither checkpoint nor metrics"):
        registry.load_run("nothing/here")


OLD_BY_PRODUCTS = (
    "sft/lab06-style-pirate-0-12ab9f",
    "sft/lab07-full-0-6cc07e",
    "lora/lab07-8-1-6cc07e",
    "base/lab08-eighth-0-0f0f0f",
    "base/ablation-everything-on-0-abcdef",
    "base/mine-without-value_embeddings-1-123456",
    "base/small-3-400000-0",
    "sft/lab09-shipped-sft-600-gen-0-s2-g3",
)
OWN_NAMES = ("d4", "lab05", "lab07", "student", "small", "my-mix", "run-1-202611", "quickstart-2")


def test_by_products_are_known_by_mark_or_name(base_dir: Path) -> None:
    """Runs of a lab's comparison carry a mark; those of before the mark are known by their names."""
    for name in OLD_BY_PRODUCTS:
        assert registry.is_by_product(registry.run_dir(*name.split("/"))), name
    for tag in OWN_NAMES:
        assert not registry.is_by_product(registry.run_dir("base", tag)), tag
    folder = registry.run_dir("base", "study-4")
    registry.mark_by_product(folder, "lab 04's series `study`")
    assert registry.is_by_product(folder)


def test_a_by_product_is_never_chosen(base_dir: Path, nothing_shipped: Path) -> None:
    make_run(nothing_shipped, "chatsft_checkpoints/d4")
    make_run(base_dir, "base_checkpoints/mine")
    old = make_run(base_dir, "chatsft_checkpoints/lab07-full-0-6cc07e")
    marked = make_run(base_dir, "base_checkpoints/study-1", (1, 9))
    registry.mark_by_product(marked, "a series")
    assert str(registry.choose_model()) == "base", (
        "one's own base model, not the by-product that chats"
    )

    def locate(text: str) -> str:
        return str(registry.locate_model(registry.parse_identifier(text))[1])

    assert locate("base") == "base/mine" and locate("sft") == "shipped/sft"
    assert locate(f"sft/{old.name}") == f"sft/{old.name}", "it is opened by its name"
    marks = {entry.identifier: entry.by_product for entry in registry.list_models()}
    assert marks == {
        "base/mine": False,
        "base/study-1": True,
        f"sft/{old.name}": True,
        "shipped/sft": False,
    }
