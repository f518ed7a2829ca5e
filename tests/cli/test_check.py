"""Whether a model is whole and has its own tokenizer, and what it takes to load it."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from primechat.checkpoint import registry
from primechat.checkpoint.nanochat_format import SHAPE_KEYS
from primechat.cli.check import check_model
from primechat.cli.main import main
from primechat.config import EvalConfig, GPTConfig, PretrainConfig, RuntimeConfig, TokenizerConfig
from primechat.config.model import list_shapes
from primechat.errors import CheckpointError, ConfigError
from primechat.events import NoteEvent
from primechat.infer import admission
from primechat.infer.admission import KNOWN_TEXT, describe_memory, find_memory, read_text
from primechat.infer.engine import Engine
from primechat.model.lora import LoraSpec, attach, list_targets, save_adapter
from primechat.stages.pretrain import pretrain
from primechat.stages.tokenizer import train_tokenizer
from primechat.text.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

NANOCHAT = Path(__file__).parents[1] / "fixtures" / "nanochat"
FIXED = RuntimeConfig(device="cpu", dtype="float32", threads=1, compile="off", micro_batch_rows=8)
EVAL = EvalConfig(every=0, save_every=0, tokens=256, last_tokens=256)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a base directory with an imported model in it, in which a small model was trained."""
    path = tmp_path_factory.mktemp("home") / "nanochat"
    shutil.copytree(NANOCHAT / "oct2025" / "tokenizer", path / "tokenizer")
    shutil.copytree(
        NANOCHAT / "oct2025" / "base_checkpoints" / "d2", path / "base_checkpoints" / "d20"
    )
    before = read_files(path)
    text = path.parent / "known.jsonl"
    text.write_text((json.dumps({"text": KNOWN_TEXT}) + "\n") * 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(path))
        train_tokenizer(TokenizerConfig(tag="mine", corpus=str(text), vocab_size=320))
        shape = replace(
            GPTConfig.modern(1, vocab_size=320, sequence_len=64, head_dim=32), n_embd=64
        )
        shape = replace(shape, n_head=2, n_kv_head=2)
        pretrain(
            PretrainConfig(
                tag="mine",
                model=shape,
                corpus=str(text),
                batch_tokens=1024,
                steps=60,
                runtime=FIXED,
                eval=EVAL,
            )
        )
    after = read_files(path)
    assert before.items() <= after.items() and len(after) > len(before), (
        "the imported files are untouched"
    )
    yield path


@pytest.fixture
def own(home: Path, base_dir: Path) -> Path:
    """Return a test's own copy of that base directory."""
    shutil.copytree(home, base_dir)
    admission._warned.clear()
    return base_dir


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def forget_identity(run: Path) -> None:
    """Make a run look imported: nothing says which tokenizer it has."""
    for path in run.glob("meta_*.json"):
        meta = json.loads(path.read_text())
        del meta["tokenizer_identity"]
        path.write_text(json.dumps(meta))


def shuffle_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer of the same tokens under other ids."""
    tokens, n = list(tokenizer.ranks), 256
    single, merged = tokens[:n], tokens[n:]
    random.Random(0).shuffle(single)
    ranks = {token: i for i, token in enumerate([*single, *merged[::-1]])}
    return Tokenizer(tokenizer.pattern, ranks, tokenizer.specials)


def test_ok(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "base/mine"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("base/mine@60 needs 0.") and "are free." in err
    assert "modern (nanochat of 2026)" in out and "1 layers" not in out and "width 64" in out
    assert "2 heads of 32" in out and "320 tokens" in out and "RoPE base 100,000, softcap 15" in out
    assert "60 steps" in out and "as stored" in out and "comparable only with" in out
    assert out.rstrip().endswith("talk to it by `primechat chat base/mine@60`.")
    assert "ok: it is whole" in out and "In the summer we had a garden full of → " in out
    forget_identity(own / "base_checkpoints" / "mine")
    result = check_model("base/mine")
    assert result.verdict == "ok" and result.sample.partition(" → ")[2]
    assert (
        result.bpb is not None and result.shuffled_bpb is not None and result.fresh_bpb is not None
    )
    assert result.bpb < 0.8 * result.fresh_bpb < result.shuffled_bpb
    assert result.fresh_bpb == pytest.approx(result.noise_bpb, rel=0.01)


def test_suspicious(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another tokenizer of the same size is told from the model's own, and the way out is named."""
    run = own / "base_checkpoints" / "mine"
    right = Tokenizer.load(run / "tokenizer")
    shuffle_tokenizer(right).save(tmp_path / "wrong")
    refused = check_model("base/mine", tokenizer=tmp_path / "wrong")
    assert refused.verdict == "broken" and "was trained with the tokenizer" in refused.reasons[0]
    forget_identity(run)
    assert main(["check", "base/mine", "--tokenizer", str(tmp_path / "wrong")]) == 1
    report = capsys.readouterr().out
    assert "suspicious: it makes little more of English than noise" in report
    assert (
        "d20 and that of its d32 have the same size and differ" in report
        and "--tokenizer PATH" in report
    )
    shutil.move(run / "tokenizer", tmp_path / "right")
    shutil.move(tmp_path / "wrong", run / "tokenizer")
    assert check_model("base/mine").verdict == "suspicious"
    assert check_model("base/mine", tokenizer=str(tmp_path / "right")).verdict == "ok"
    assert read_text(*registry.open_model("base/mine", tokenizer=right)[:2]).is_good


def test_untrained_with_its_tokenizer(own: Path) -> None:
    """A run that records its tokenizer and is hardly trained gets other advice."""
    path = own / "base_checkpoints" / "mine" / "snapshots"
    first = check_model(f"base/mine@snap:{min(registry.list_snapshots(path.parent))}")
    assert first.verdict == "suspicious" and "train it longer" in first.advice
    assert first.bpb == pytest.approx(first.noise_bpb, rel=0.02)


def test_broken(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = own / "base_checkpoints" / "d20"
    state = torch.load(run / "model_000010.pt", weights_only=True)
    state["transformer.h.1.mlp.c_fc.weight"][3, 5] = torch.nan
    torch.save(state, run / "model_000010.pt")
    result = check_model("base/d20")
    assert (result.verdict, result.bpb) == ("broken", None)
    assert result.reasons == ("transformer.h.1.mlp.c_fc.weight has numbers that are not finite",)
    assert result.advice == "fetch or train it again" and dict(result.card)["era"].startswith(
        "classic"
    )
    state["transformer.h.1.mlp.c_fc.weight"][3, 5] = -torch.inf
    torch.save(state, run / "model_000010.pt")
    assert "not finite" in str(check_model("base/d20"))
    small = Tokenizer(SPLIT_PATTERN, {bytes([i]): i for i in range(256)}, {SPECIAL_TOKENS[0]: 256})
    result = check_model("base/mine", tokenizer=small)
    assert result.verdict == "broken" and "vocab_size=320, its tokenizer 257" in result.reasons[0]
    assert "--tokenizer" in result.advice
    (run / "model_000010.pt").write_bytes(b"x" * 5000)
    assert main(["check", "base/d20@10"]) == 1
    assert "broken: " in capsys.readouterr().out
    assert main(["check", "base/d21"]) == 2 and "the tags of base are" in capsys.readouterr().err
    assert main(["check", "d20"]) == 2


def test_an_adapter_is_checked_too(own: Path) -> None:
    result = check_model("lora:none+base/mine")
    assert result.verdict == "broken" and "lora_checkpoints/none is missing" in result.reasons[0]
    spec, folder = LoraSpec(rank=2, targets=("c_fc",)), own / "lora_checkpoints" / "loud"
    model, tokenizer, _ = registry.open_model("base/mine")
    attach(model, "loud", spec)
    for linear in list_targets(model, ("c_fc",)).values():
        linear.adapter.b["loud"].normal_(std=20.0)
    save_adapter(model, "loud", spec, folder, tokenizer_identity=tokenizer.identity)
    plain, loud = check_model("base/mine"), check_model("lora:loud+base/mine")
    assert plain.verdict == "ok" and plain.bpb is not None and loud.bpb is not None
    assert loud.bpb > 1.5 * plain.bpb and loud.verdict == "suspicious", (
        "measured with the adapter on"
    )


def test_newer_step_is_damaged(own: Path) -> None:
    run = own / "base_checkpoints" / "mine"
    for kind, end in (("model", "pt"), ("meta", "json")):
        (run / f"{kind}_000070.{end}").write_bytes(b"x")
    result = check_model("base/mine")
    assert (result.identifier, result.verdict) == ("base/mine@60", "suspicious")
    assert "step 70" in result.reasons[0] and "older step" in result.advice


@pytest.mark.parametrize(
    "name", ["oct2025/d2", "oct2025/d2-compiled", "head/d2-compiled", "head_d3/d3"]
)
def test_cards_of_nanochat(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both eras, compiled keys and shared key heads; random weights are told for what they are."""
    era, tag = name.split("/")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(NANOCHAT / era))
    before = set(read_files(NANOCHAT / era))
    result = check_model(f"base/{tag}")
    card = dict(result.card)
    assert result.verdict == "suspicious" and set(read_files(NANOCHAT / era)) == before
    assert card["era"].startswith("classic" if era == "oct2025" else "modern")
    assert "10,000" in card["numerics"] if era == "oct2025" else "100,000" in card["numerics"]
    expected = json.loads(
        (NANOCHAT / era / "base_checkpoints" / tag / "meta_000010.json").read_text()
    )
    assert f"{expected['val_bpb']:.4f}" in card["val_bpb"] and "10 steps" in card["parameters"]
    assert ("of keys and values" in card["shape"]) == (
        expected["model_config"]["n_kv_head"] != expected["model_config"]["n_head"]
    )


def test_unrecorded_tokenizer_is_warned_about_once(
    own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = read_files(own)
    for _ in range(2):
        registry.open_model("base/d20")
        registry.open_model("base/mine")
    (said,) = [
        record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
    ]
    assert said.startswith(
        "base/d20@10 does not record its tokenizer; with this one plain English takes "
    )
    assert "bits per byte, noise needs" in said and "--tokenizer PATH" in said
    assert read_files(own) == before
    forget_identity(own / "base_checkpoints" / "mine")
    caplog.clear()
    model, tokenizer, _ = registry.open_model("base/mine")
    assert "they go together" in caplog.text and not model.training
    found = read_text(model, tokenizer, limit=admission.QUICK_TOKENS)
    assert f"{found.bpb:.2f} bits per byte" in caplog.text


def test_reading_is_that_of_evaluate(own: Path, tmp_path: Path) -> None:
    """The figure is evaluate's: the same text, the same windows."""
    lines = [{"text": KNOWN_TEXT}] * 20
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model, tokenizer, _ = registry.open_model("base/mine")
    ids = [tokenizer.bos_id, *tokenizer.encode(KNOWN_TEXT)]
    nats = 0.0
    for start in range(0, len(ids) - 1, 64):
        row = torch.tensor(ids[start : start + 65])
        logp = model(row[None, :-1])[0].double().log_softmax(-1)
        nats -= float(logp.gather(1, row[1:, None]).sum())
    bits = nats / torch.tensor(2.0).log().item() / len(KNOWN_TEXT.encode())
    assert read_text(model, tokenizer).bpb == pytest.approx(bits, rel=1e-5)


def test_two_tokenizers_side_by_side(own: Path) -> None:
    """Two models of one base directory each talk through their own tokenizer."""
    entries = {entry.identifier: entry for entry in registry.list_models()}
    own_ones = {name for name, entry in entries.items() if not entry.shipped}
    assert own_ones == {"base/d20", "base/mine"} and entries["base/mine"].snapshots
    replies = {}
    for identifier in ("base/d20", "base/mine", "base/d20"):
        model, tokenizer, _ = registry.open_model(identifier)
        said = [{"role": "user", "content": "Hello there"}]
        text = Engine(model, tokenizer).chat(said, max_new_tokens=8, temperature=0.0).read()
        assert replies.setdefault(identifier, (text, tokenizer.identity)) == (
            text,
            tokenizer.identity,
        )
    assert replies["base/d20"][1] != replies["base/mine"][1]
    assert replies["base/d20"][1] == Tokenizer.load(NANOCHAT / "oct2025" / "tokenizer").identity


def test_memory_is_told_before_loading(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("cuda", "mps:0", "abacus"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        with pytest.raises(ConfigError, match=f"device='{device}' is not on this machine; try cpu"):
            registry.open_model("shipped/base", device=device)
    free, total = find_memory()
    assert 0 < free <= total
    events: list[object] = []
    registry.open_model("base/mine", on_event=events.append)  # type: ignore[arg-type]
    registry.open_model("base/mine", dtype="bfloat16", on_event=events.append)  # type: ignore[arg-type]
    sizes = [
        float(e.text.split(" needs ")[1].split(" MB")[0])
        for e in events
        if isinstance(e, NoteEvent)
    ]
    n_params = registry.list_models()[1].n_params
    assert sizes == [
        pytest.approx(4e-6 * n_params, abs=0.06),
        pytest.approx(2e-6 * n_params, abs=0.06),
    ]
    monkeypatch.setattr(admission, "find_memory", lambda device: (10**6, 10**9))
    assert describe_memory("m", 10**6 // 2).endswith(
        "0.5 MB of memory for its weights, 1.0 MB are free."
    )
    assert "it will be slow" in describe_memory("m", 10**7)
    with pytest.raises(
        CheckpointError, match=r"2.00 GB of memory.*cpu has 1.00 GB in all; take a smaller"
    ):
        describe_memory("m", 2 * 10**9)
    monkeypatch.setattr(admission, "find_memory", lambda device: (10**5, 10**5))
    with pytest.raises(CheckpointError, match="needs .* MB of memory"):
        registry.open_model("base/mine")


MEASURE = """
import re, sys, torch
from primechat.checkpoint import registry
def read(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
def use(name):
    model = registry.open_model(name, dtype=sys.argv[1])[0]
    with torch.inference_mode():
        model(torch.arange(32)[None])  # every weight is touched
    return model
use("base/small")  # what the first model of a process takes is not the second one's: libraries, a tokenizer
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = read("VmRSS")
n_bytes = sum(p.nbytes for p in use("base/big").parameters())
print((read("VmHWM") - before) / n_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc"
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_little_memory(dtype: str, base_dir: Path) -> None:
    """At the peak, mapped pages of the file and the reading of the known text included, a model takes 1.3
    times its bytes at most.
    """
    vocab = 65_536
    for tag, depth in (("small", 1), ("big", 8)):  # 370 MB
        config = GPTConfig.classic(depth, vocab_size=vocab, sequence_len=256)
        run = base_dir / "base_checkpoints" / tag
        run.mkdir(parents=True)
        state = {key: torch.zeros(shape) for key, shape in list_shapes(config).items()}
        state["transformer.wte.weight"] = state["transformer.wte.weight"].bfloat16()
        torch.save(state, run / "model_000001.pt")
        meta = {"step": 1, "model_config": {name: getattr(config, name) for name in SHAPE_KEYS}}
        (run / "meta_000001.json").write_text(json.dumps(meta))
    del state
    words = (
        bytes([i // 8100 + 97, i // 90 % 90 + 33, i % 90 + 33]) for i in range(vocab - 256 - 9)
    )
    ranks = {token: i for i, token in enumerate([*(bytes([b]) for b in range(256)), *words])}
    specials = {name: vocab - 9 + i for i, name in enumerate(SPECIAL_TOKENS)}
    Tokenizer(SPLIT_PATTERN, ranks, specials).save(base_dir / "tokenizer")
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, dtype], env=env, capture_output=True, text=True
    )
    (run / "model_000001.pt").unlink()
    assert done.returncode == 0 and 0.9 < float(done.stdout) < 1.3, (done.stdout, done.stderr)
    assert "base/big@1 does not record its tokenizer" in done.stderr, "the known text was read"


def test_opening_needs_no_symbols(own: Path) -> None:
    """A model is built on the meta device without what torch imports for drawing weights there."""
    code = (
        "import sys, primechat; primechat.open_model('base/mine');"
        "assert 'sympy' not in sys.modules and 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
