"""Adapters: nothing at first, exactly; the same by every way; PEFT's files both ways."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from primechat.checkpoint import registry
from primechat.cli.convert import export_model
from primechat.config import (
    DistillConfig,
    EvalConfig,
    EvaluateConfig,
    FinetuneConfig,
    GPTConfig,
    LoRAConfig,
    PretrainConfig,
    RuntimeConfig,
    TokenizerConfig,
)
from primechat.errors import CheckpointError, ConfigError
from primechat.model import lora
from primechat.model.gpt import GPT
from primechat.model.lora import LoraSpec
from primechat.stages.distill import distill
from primechat.stages.evaluate import evaluate
from primechat.stages.finetune import finetune
from primechat.stages.lora import train_lora
from primechat.stages.pretrain import pretrain
from primechat.stages.tokenizer import train_tokenizer

SHAPE = replace(
    GPTConfig.modern(3, vocab_size=300, sequence_len=32, head_dim=16),
    n_embd=32,
    n_head=2,
    n_kv_head=2,
)
IDS = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(5))


def make_model(train: bool = False) -> GPT:
    model = GPT(SHAPE)
    model.init_weights(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
    if train:
        return model
    return GPT.from_state(SHAPE, {k: v.detach().clone() for k, v in model.state_dict().items()})


def fill(model: GPT, name: str, seed: int) -> None:
    """Give an adapter's B values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for linear in lora.list_targets(model).values():
        if linear.adapter is not None and name in linear.adapter.b:
            linear.adapter.b[name].data.normal_(std=0.1, generator=generator)


def generator(seed: int = 2) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decode(model: GPT) -> Tensor:
    """The logits after each token, one at a time through the cache."""
    cache = model.new_cache(2, 32)
    return torch.stack([model.advance(IDS[:, i : i + 1], cache) for i in range(IDS.size(1))], dim=1)


def test_fresh_adapter_changes_nothing() -> None:
    model = make_model()
    before, stepped = model(IDS), decode(model)
    params = lora.attach(model, "new", LoraSpec(rank=4), generator=generator())
    assert len(params) == 2 * 6 * 3 and torch.equal(model(IDS), before)
    assert torch.allclose(decode(model), stepped, atol=1e-5)
    lora.attach(model, "none", LoraSpec(rank=0))
    assert torch.equal(model(IDS), before) and list(lora.list_adapters(model)) == ["new"]
    lora.detach(model, "new")
    assert lora.list_adapters(model) == {} and torch.equal(decode(model), stepped)
    assert set(model.state_dict()) == set(GPT(SHAPE).state_dict())


@pytest.mark.parametrize("rslora", [False, True])
def test_dials_and_merging(rslora: bool) -> None:
    model = make_model()
    base, stepped = model(IDS), decode(model)
    spec = LoraSpec(rank=4, alpha=8, rslora=rslora)
    assert spec.scale == (4.0 if rslora else 2.0)
    for name, seed in (("a", 3), ("b", 4)):
        lora.attach(model, name, spec, generator=generator(seed))
        fill(model, name, seed)
    both = model(IDS)
    lora.set_adapter_scale(model, "b", 0.0)
    only_a = model(IDS)
    assert (both - only_a).abs().max() > 1e-2 and (only_a - base).abs().max() > 1e-2
    lora.set_adapter_scale(model, "a", 0.0)
    assert torch.equal(model(IDS), base) and torch.equal(decode(model), stepped)
    lora.set_adapter_scale(model, "a", 1.5)
    scaled = model(IDS)
    assert torch.allclose(
        decode(model), scaled, atol=1e-4
    )  # the short way through single tokens sees it too
    before = lora.merge(model)
    assert torch.allclose(model(IDS), scaled, atol=1e-4) and lora.list_adapters(model) == {
        "a": 0,
        "b": 0,
    }
    model.load_state_dict(
        {f"{path}.weight": weight for path, weight in before.items()}, strict=False
    )
    assert torch.equal(model(IDS), base)
    lora.set_adapter_scale(model, "a", 1.5)
    assert torch.equal(model(IDS), scaled)
    with pytest.raises(ConfigError, match=r"adapter='c' must be one of this model's \(a, b\)"):
        lora.set_adapter_scale(model, "c", 1.0)


def test_change_has_the_rank() -> None:
    model = make_model()
    lora.attach(
        model, "a", LoraSpec(rank=3, targets=("c_fc", "attn.c_proj")), generator=generator()
    )
    fill(model, "a", 1)
    changes = lora.weight_changes(model)
    assert len(changes) == 6 and all(
        torch.linalg.matrix_rank(w, atol=1e-5) == 3 for w in changes.values()
    )
    with pytest.raises(ConfigError, match="targets=.*must be some of c_q"):
        lora.list_targets(model, ("lm_head",))


def test_only_the_adapter_learns() -> None:
    model = make_model(train=True)
    params = lora.attach(
        model, "a", LoraSpec(rank=2, dropout=0.5), generator=generator(), train=True
    )
    fill(model, "a", 1)
    assert [p for p in model.parameters() if p.requires_grad] == params
    targets = torch.randint(0, 300, (2, 20), generator=generator(9))
    model.loss(IDS, targets).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in params)
    assert model.lm_head.weight.grad is None
    first, second = model.loss(IDS, targets), model.loss(IDS, targets)
    assert first != second  # dropout draws anew, in training only
    grads = []
    for model.checkpoint_blocks in (
        False,
        True,
    ):  # a block that is computed again drops the same inputs
        torch.manual_seed(3)
        model.zero_grad()
        model.loss(IDS, targets).backward()
        grads.append([p.grad for p in params])
    assert all(map(torch.equal, *grads))
    model.eval()
    assert model.loss(IDS, targets) == model.loss(IDS, targets)
    # the gradient is that of the plain formula
    model.zero_grad()
    model.loss(IDS, targets).backward()
    path, linear = next(iter(lora.list_targets(model).items()))
    got = linear.adapter.b["a"].grad.clone()
    plain = make_model(train=True).eval()
    weights = {p: m.whole_weight().detach() for p, m in lora.list_targets(model).items()}
    with torch.no_grad():
        for p, m in lora.list_targets(plain).items():
            m.weight.copy_(weights[p])
    plain.loss(IDS, targets).backward()
    by_hand = dict(plain.named_modules())[path].weight.grad @ linear.adapter.a["a"].T * 8.0
    assert torch.allclose(got, by_hand, atol=1e-5)


class Wrapped(nn.Module):
    """A model as PEFT wants one: plain linear maps under the same paths."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        for path, linear in lora.list_targets(model).items():
            parent: nn.Module = self
            *inner, last = path.split(".")
            for part in inner:
                if not hasattr(parent, part):
                    setattr(parent, part, nn.Module())
                parent = getattr(parent, part)
            plain = nn.Linear(linear.in_features, linear.out_features, bias=False)
            plain.weight.data.copy_(linear.weight)
            setattr(parent, last, plain)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_peft_reads_ours_and_we_read_peft(tmp_path: Path, rslora: bool) -> None:
    peft = pytest.importorskip("peft", reason="peft is a test extra")
    model = make_model()
    spec = LoraSpec(rank=4, alpha=6, rslora=rslora, targets=("c_q", "mlp.c_proj", "attn.c_proj"))
    lora.attach(model, "mine", spec, generator=generator())
    fill(model, "mine", 1)
    lora.save_adapter(model, "mine", spec, tmp_path / "ours", base="sft/d4")
    loaded = peft.PeftModel.from_pretrained(Wrapped(model), str(tmp_path / "ours"))
    for path, change in lora.weight_changes(model).items():
        theirs = dict(loaded.base_model.model.named_modules())[path]
        assert torch.allclose(theirs.get_delta_weight("default"), change, atol=1e-6)
    # and back: what peft made and saved
    config = peft.LoraConfig(
        r=3,
        lora_alpha=9,
        use_rslora=rslora,
        target_modules=["c_fc", "c_v"],
        init_lora_weights=False,
    )
    made = peft.get_peft_model(Wrapped(model), config)
    made.save_pretrained(str(tmp_path / "theirs"))
    lora.detach(model, "mine")
    spec = lora.load_adapter(model, "theirs", tmp_path / "theirs")
    assert (spec.rank, spec.rslora, spec.targets) == (3, rslora, ("c_v", "c_fc"))
    changes = lora.weight_changes(model)
    assert len(changes) == 6
    for path, change in changes.items():
        theirs = dict(made.base_model.model.named_modules())[path]
        assert torch.allclose(theirs.get_delta_weight("default"), change, atol=1e-6)


def test_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, spec = make_model(), LoraSpec(rank=2)
    with pytest.raises(CheckpointError, match="holds no adapter_config.json"):
        lora.load_adapter(model, "a", tmp_path)
    lora.attach(model, "a", spec, generator=generator())
    lora.save_adapter(model, "a", spec, tmp_path)
    lora.detach(model, "a")
    path = tmp_path / "adapter_config.json"
    good = json.loads(path.read_text())
    changes: list[tuple[dict[str, Any], str]] = [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"use_dora": True}, "use_dora=T"),
        ({"bias": "all"}, "bias="),
        ({"r": 3}, "rank 3 need"),
        ({"r": "x"}, "write numbers"),
        ({"rank_pattern": {"c_q": 4}}, "several"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_dropout": [1]}, "write numbers"),
        ({"lora_dropout": "a"}, "write numbers"),
        ({"lora_alpha": 10**400}, "write numbers"),
    ]
    for change, said in changes:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=said):
            lora.load_adapter(model, "a", tmp_path)
        assert lora.list_adapters(model) == {}
    with (
        monkeypatch.context() as patch
    ):  # a rank that the file's matrices do not have takes no memory
        patch.setattr(lora, "attach", None)
        path.write_text(json.dumps({**good, "r": 65_536}))
        with pytest.raises(CheckpointError, match="rank 65536 need"):
            lora.load_adapter(model, "a", tmp_path)
        path.write_text(json.dumps(good))
        matrices = (tmp_path / "adapter_model.safetensors").read_bytes()
        (tmp_path / "adapter_model.safetensors").write_bytes(save({}))
        with pytest.raises(CheckpointError, match="adapts 'nothing'"):
            lora.load_adapter(model, "a", tmp_path)
        (tmp_path / "adapter_model.safetensors").write_bytes(matrices)
    other = GPT.from_state(
        replace(SHAPE, n_layer=2),
        {k: v.detach() for k, v in GPT(replace(SHAPE, n_layer=2)).state_dict().items()},
    )
    with pytest.raises(CheckpointError, match="has not or does not adapt"):
        lora.load_adapter(other, "a", tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be read"):
        lora.load_adapter(model, "a", tmp_path)


# The stage

WORDS = (
    "the cat sat on a mat and ate my hat while you ran to see what we did with all that jam".split()
)
FIXED = RuntimeConfig(device="cpu", dtype="float32", threads=1, compile="off", micro_batch_rows=2)


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A chat model of three small blocks, and the path of its dialogues."""
    rng = np.random.default_rng(0)
    text, talk = tmp_path / "words.jsonl", tmp_path / "talk.jsonl"
    lines = [" ".join(rng.choice(WORDS, size=60)) for _ in range(80)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    pairs = [[" ".join(rng.choice(WORDS, size=8)) for _ in range(2)] for _ in range(60)]
    rows = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a.upper()}]
        for q, a in pairs
    ]
    talk.write_text("\n".join(map(json.dumps, rows)))
    train_tokenizer(TokenizerConfig(corpus=str(text), vocab_size=300))
    evaluation = EvalConfig(tokens=256, snapshots=False, sample_every=-1)
    pretrain(
        PretrainConfig(
            tag="d3",
            model=SHAPE,
            corpus=str(text),
            batch_tokens=128,
            steps=6,
            runtime=FIXED,
            eval=evaluation,
        )
    )
    finetune(
        FinetuneConfig(
            tag="d3", dialogues=str(talk), batch_tokens=128, steps=3, runtime=FIXED, eval=evaluation
        )
    )
    return str(talk)


def test_stage_and_identifiers(base: str) -> None:
    evaluation = EvalConfig(tokens=256, save_every=4, every=4, snapshots=False)
    config = LoRAConfig(
        tag="loud",
        base="sft/d3",
        dialogues=base,
        rank=4,
        dropout=0.2,
        batch_tokens=128,
        steps=8,
        runtime=FIXED,
        eval=evaluation,
    )
    result = train_lora(config)
    assert result.identifier == "lora:loud+sft/d3@3" and result.path == "lora_checkpoints/loud"
    again = registry.load_run(
        result.path
    )  # a lab that is opened again shows the same, and its dial opens it
    assert (again.identifier, again.n_params) == (result.identifier, result.n_params)
    assert result.train_s < again.total_s <= result.total_s
    losses = [e for e in result.events if e["kind"] == "loss"]
    assert losses[-1]["val_bpb"] < losses[0]["val_bpb"] and losses[-1]["general_bpb"] > 0
    folder = registry.base_dir() / result.path
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer"} < set(
        os.listdir(folder)
    )
    assert (folder / "model_000008.pt").stat().st_size < result.n_params * 4 + 20_000
    plain, tokenizer, _ = registry.open_model("sft/d3")
    model, _, meta = registry.open_model("lora:loud*0.5+sft/d3")
    assert meta["identifier"] == "lora:loud*0.5+sft/d3@3" and lora.list_adapters(model) == {
        "loud": 0.5
    }
    assert result.n_params == sum(p.numel() for p in lora.read_state(model, "loud").values())
    assert not torch.equal(model(IDS), plain(IDS))
    lora.set_adapter_scale(model, "loud", 0.0)
    assert torch.equal(model(IDS), plain(IDS))  # a dial of 0 is the base, exactly
    # resumed at step 4, it ends in the unbroken run's matrices
    whole = registry.open_model("lora:loud+sft/d3")[0](IDS)
    for name in ("model_000008.pt", "optim_000008_rank0.pt", "meta_000008.json"):
        (folder / name).unlink()
    assert train_lora(replace(config, resume=True)).step == 8
    assert torch.equal(registry.open_model("lora:loud+sft/d3")[0](IDS), whole)
    alone, _, meta = registry.open_model("lora:loud*0.5")  # on the base that it records
    assert meta["identifier"] == "lora:loud*0.5+sft/d3@3" and lora.list_adapters(alone) == {
        "loud": 0.5
    }
    with pytest.raises(CheckpointError, match=r"was made for sft/d3@3: use lora:loud\+sft/d3@3\."):
        registry.open_model("lora:loud+shipped/sft")
    train_lora(replace(config, tag="other", seed=1, steps=2))
    both = registry.open_model("lora:loud+lora:other+sft/d3")[0]
    assert list(lora.list_adapters(both)) == ["loud", "other"]
    entries = {e.identifier: e for e in registry.list_models()}
    assert entries["lora:loud+sft/d3@3"].steps == (4, 8)
    assert evaluate(
        EvaluateConfig(model="lora:loud+sft/d3", corpus=str(Path(base).parent / "words.jsonl"))
    ).bpb


def test_a_kill_at_the_last_step(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = EvalConfig(tokens=256, save_every=2, every=4, snapshots=False, sample_every=-1)
    config = LoRAConfig(
        tag="cut",
        base="sft/d3",
        dialogues=base,
        rank=2,
        batch_tokens=128,
        steps=4,
        runtime=FIXED,
        eval=evaluation,
    )
    saved, written = lora.save_adapter, [0]

    def kill_second(*args: Any, **kwargs: Any) -> None:
        written[0] += 1
        if written[0] == 2:
            raise KeyboardInterrupt
        saved(*args, **kwargs)

    monkeypatch.setattr(lora, "save_adapter", kill_second)
    with pytest.raises(KeyboardInterrupt):
        train_lora(config)
    result = train_lora(replace(config, resume=True))
    newest = torch.load(registry.base_dir() / result.path / "model_000004.pt")
    opened = lora.read_state(registry.open_model("lora:cut+sft/d3")[0], "cut")
    assert result.step == 4 and all(torch.equal(newest[key], opened[key]) for key in opened)


def test_harm_to_a_run(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that has changed on the disk is passed over, as in every stage; a full disk is named."""
    evaluation = EvalConfig(tokens=256, save_every=2, every=4, snapshots=False, sample_every=-1)
    config = LoRAConfig(
        tag="hurt",
        base="sft/d3",
        dialogues=base,
        rank=2,
        batch_tokens=128,
        steps=4,
        runtime=FIXED,
        eval=evaluation,
    )
    folder = registry.base_dir() / train_lora(config).path
    path = folder / "model_000004.pt"
    sound, file = path.read_bytes(), bytearray(path.read_bytes())
    file[len(file) // 2] ^= 255
    path.write_bytes(file)
    said: list[str] = []
    train_lora(replace(config, resume=True), on_event=lambda e: said.append(getattr(e, "text", "")))
    assert any("Skipped step 4" in text for text in said) and "Going on from step 2 of 4." in said
    assert path.read_bytes() == sound
    monkeypatch.setattr("primechat.checkpoint.checkpoint.write_part", refuse_to_write)
    with pytest.raises(CheckpointError, match="could not be written to .*No space"):
        train_lora(replace(config, tag="full"))


def refuse_to_write(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_stage_refuses(base: str) -> None:
    with pytest.raises(CheckpointError, match="the adapters are: none"):
        registry.open_model("lora:none")
    for name in ("lora:+sft", "lora:a+", "lora:a*x+sft", "lora:a.b+sft"):
        with pytest.raises(ConfigError, match="must be like"):
            registry.open_model(name)
    for wrong, said in ((dict(rank=0), "rank=0"), (dict(learn="all"), "learn='all'")):
        with pytest.raises(ConfigError, match=said):
            train_lora(LoRAConfig(base="sft/d3", dialogues=base, runtime=FIXED, **wrong))
    # what trains from weights on disk, or renames them, would leave the adapter out without a word
    named, loud = "lora:a+sft/d3", "without adapters here; try sft/d3"
    for run in (
        lambda: train_lora(LoRAConfig(base=named, dialogues=base)),
        lambda: finetune(FinetuneConfig(base=named, dialogues=base)),
        lambda: distill(DistillConfig(teacher="sft/d3", base=named, dialogues=base, runtime=FIXED)),
        lambda: export_model(named, f"{base}.out"),
    ):
        with pytest.raises(ConfigError, match=loud):
            run()
    with pytest.raises(ConfigError, match="no dot"):
        LoRAConfig(tag="a.b")
    with pytest.raises(ConfigError, match="dropout"):
        LoRAConfig(dropout=1.0)
