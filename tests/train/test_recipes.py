"""The recipes: their numbers, one step of each against plain float64, their schedules and first weights.

The reference below is written from the formulas alone, in numpy, one matrix at a time; it shares no line with
the library. Its numbers are those of nanochat's files (c7ae920 of October 2025, 92d63d4 of July 2026).
"""

from __future__ import annotations

import json
import math
import re
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import load_checkpoint
from primechat.checkpoint.run_dir import read_metrics
from primechat.config import (
    EvalConfig,
    GPTConfig,
    InitConfig,
    OptimConfig,
    PretrainConfig,
    RuntimeConfig,
    decode_config,
    encode_config,
)
from primechat.config.history import SCHEMA_1
from primechat.config.recipes import RECIPES, make_recipe, nanochat2026, october2025, quickstart
from primechat.errors import ConfigError
from primechat.model import lora
from primechat.model.gpt import GPT
from primechat.stages.pretrain import pretrain
from primechat.train.loop import decay_ratio, lr_ratio, muon_momentum
from primechat.train.optim import Optimizer, parameter_kind

# every shape that Muon meets: square c_q, wide c_k (kv < width), tall c_fc, wide gates
SHAPE = GPTConfig(
    n_layer=3,
    n_head=4,
    n_kv_head=2,
    n_embd=48,
    vocab_size=90,
    sequence_len=16,
    value_embeddings=True,
    residual_scalars=True,
    smear=True,
    backout=True,
)

# --- the plain reference --------------------------------------------------------------------------

NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
DAMPED = [  # ours: Amsel et al. for 1e-3 to 1, all but the last step for a matrix 2 % larger
    (8.28721201814563 / 1.02, -23.595886519098837 / 1.02**3, 17.300387312530933 / 1.02**5),
    (4.107059111542203 / 1.02, -2.9478499167379106 / 1.02**3, 0.5448431082926601 / 1.02**5),
    (3.9486908534822946 / 1.02, -2.908902115962949 / 1.02**3, 0.5518191394370137 / 1.02**5),
    (3.3184196573706015 / 1.02, -2.488488024314874 / 1.02**3, 0.51004894012372 / 1.02**5),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
]


@dataclass
class Muon:
    """Muon's settings in a recipe."""

    lr: float
    steps: list[tuple[float, float, float]]
    margin: float = 1.01
    muon_eq: bool = False  # rows of one length before, an exact norm after
    row_beta2: float = 0.0
    decay: float = 0.0
    cautious: bool = False


@dataclass
class Recipe:
    """AdamW's by part of a name: rate, beta1, beta2, decay; rates are those at width 48 and this batch."""

    adam: dict[str, tuple[float, float, float, float]]
    muon: Muon
    clip: float = 0.0


WIDE = (48 / 768) ** -0.5  # 4
BATCH = 2**0.5  # sqrt(1,048,576 / 524,288): a d20 of 2026
DECAY = (
    0.28 * BATCH * 135_266_736 / 477_103_280
)  # times the parameters of a d12 over those of a d20
PLAIN = (0.8, 0.95, 0.0)

REFERENCE = {
    "october2025": Recipe(
        adam={"wte": (0.2 * WIDE, *PLAIN), "lm_head": (0.004 * WIDE, *PLAIN)},
        muon=Muon(lr=0.02, steps=NEWTON_SCHULZ, margin=1.0),
        clip=1.0,
    ),
    "nanochat2026": Recipe(
        adam={
            "wte": (0.3 * WIDE * BATCH, 0.8, 0.995, 0.001),
            "value_embeds": (0.15 * WIDE * BATCH, 0.8, 0.995, 0.01),
            "lm_head": (0.008 * WIDE * BATCH, 0.8, 0.96, 0.01),
            "resid_lambdas": (0.005 * BATCH, 0.8, 0.95, 0.05),
            "x0_lambdas": (0.5 * BATCH, 0.96, 0.95, 0.0),
            "smear_lambda": (0.2, *PLAIN),
            "smear_gate": (0.2, *PLAIN),
            "backout_lambda": (0.2, *PLAIN),
        },
        muon=Muon(
            lr=0.02 * BATCH,
            steps=POLAR_EXPRESS,
            muon_eq=True,
            row_beta2=0.9,
            decay=DECAY,
            cautious=True,
        ),
    ),
    "quickstart": Recipe(
        adam={
            "wte": (0.6 * WIDE, *PLAIN),
            "value_embeds": (0.6 * WIDE, *PLAIN),
            "lm_head": (0.008 * WIDE, *PLAIN),
            **{
                name: (0.005, *PLAIN)
                for name in (
                    "resid_lambdas",
                    "x0_lambdas",
                    "smear_lambda",
                    "smear_gate",
                    "backout_lambda",
                )
            },
        },
        muon=Muon(lr=0.012, steps=DAMPED, row_beta2=0.95),
    ),
    "decayed": Recipe(  # plain decay, which no recipe has by itself: quickstart with optim.weight_decay 0.3
        adam={"wte": (0.6 * WIDE, *PLAIN), "lm_head": (0.008 * WIDE, *PLAIN)},
        muon=Muon(lr=0.012, steps=DAMPED, row_beta2=0.95, decay=0.3),
    ),
}


def step_adam(p: Any, g: Any, state: dict[str, Any], rule: Any, ratio: float) -> Any:
    """Kingma & Ba 2015, algorithm 1, with Loshchilov & Hutter's decoupled decay."""
    lr, beta1, beta2, decay = rule
    state["t"] = state.get("t", 0) + 1
    state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * g
    state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * g * g
    m, v = (
        state["m"] / (1 - beta1 ** state["t"]),
        state["v"] / (1 - beta2 ** state["t"]),
    )
    return p - lr * ratio * decay * p - lr * ratio * m / (np.sqrt(v) + 1e-10)


def step_muon(p: Any, g: Any, state: dict[str, Any], rule: Muon, now: Any) -> Any:
    """Jordan et al. 2024: momentum, Nesterov's mixing, orthogonalisation, shape factor; then 2026's."""
    ratio, momentum, decay_now = now
    state["m"] = momentum * state.get("m", 0.0) + (1 - momentum) * g
    x = (1 - momentum) * g + momentum * state["m"]

    if rule.muon_eq:
        x = x * (np.linalg.norm(x) / math.sqrt(len(x)) / np.linalg.norm(x, axis=1, keepdims=True))
    x = x / (rule.margin * np.linalg.norm(x))
    for a, b, c in rule.steps:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    if rule.muon_eq:
        x = x * math.sqrt(min(x.shape)) / np.linalg.norm(x)

    rows, cols = p.shape
    if rule.row_beta2:
        size, axis = np.linalg.norm(x), 1 if rows >= cols else 0
        mean = (x * x).mean(axis=axis, keepdims=True)
        state["s"] = rule.row_beta2 * state.get("s", 0.0) + (1 - rule.row_beta2) * mean
        x = x / np.sqrt(np.maximum(state["s"], 1e-10))
        x = x * size / np.linalg.norm(x)

    factor = math.sqrt(max(1.0, rows / cols))
    lr, decay = rule.lr * ratio, rule.decay * decay_now
    if rule.cautious:
        return p - lr * factor * (x + decay * np.where(x * p >= 0, p, 0.0))
    return p - lr * decay * p - lr * factor * x


def find_rule(recipe: Recipe, name: str) -> Any:
    """AdamW's rule of a parameter, None for Muon's."""
    return next((rule for part, rule in recipe.adam.items() if part in name), None)


def get_optim(name: str) -> OptimConfig:
    if name == "decayed":
        return replace(quickstart().optim, weight_decay=0.3)
    return make_recipe(name).optim


@pytest.mark.parametrize("name", list(REFERENCE))
def test_steps_match_plain_float64(name: str) -> None:
    """Four steps of every kind of parameter, each with its own rate, momentum and decay."""
    recipe, optim = REFERENCE[name], get_optim(name)
    plain = name in ("october2025", "decayed")
    model = GPT(GPTConfig(**{**asdict(SHAPE), **(CLASSIC if plain else {})}))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.5)
    optimizer = Optimizer(model, optim, SHAPE.n_embd)
    want = {key: p.detach().double().numpy().copy() for key, p in model.named_parameters()}
    start = {key: value.copy() for key, value in want.items()}
    state: dict[str, dict[str, Any]] = {key: {} for key in want}

    for now in ((1.0, 0.85, 1.0), (0.9, 0.9, 0.8), (0.5, 0.95, 0.5), (0.25, 0.93, 0.2)):
        grads = {
            key: torch.randn(p.shape, generator=draw) * 0.3 for key, p in model.named_parameters()
        }
        for key, p in model.named_parameters():
            p.grad = grads[key].clone()
        optimizer.step(*now)

        plain_grads = {key: grad.double().numpy() for key, grad in grads.items()}
        norm = math.sqrt(sum(float((g * g).sum()) for g in plain_grads.values()))
        cut = min(1.0, recipe.clip / norm) if recipe.clip else 1.0
        assert not recipe.clip or cut < 0.5, "clipping is at work"
        for key, g in plain_grads.items():
            rule = find_rule(recipe, key)
            if rule is None:
                want[key] = step_muon(want[key], cut * g, state[key], recipe.muon, now)
            else:
                want[key] = step_adam(want[key], cut * g, state[key], rule, now[0])

    for key, p in model.named_parameters():
        move = np.linalg.norm(want[key] - start[key])
        miss = np.linalg.norm(p.detach().double().numpy() - want[key])
        assert move > 0 and miss < 3e-5 * move, (key, miss / move)


CLASSIC = dict(value_embeddings=False, residual_scalars=False, smear=False, backout=False)


# --- schedules ------------------------------------------------------------------------------------


def plain_schedule(name: str, step: int, steps: int) -> tuple[float, float, float]:
    """Rate, momentum and decay, as shares of their peaks, by nanochat's formulas; ours for quickstart."""
    if name == "october2025":
        down = round(0.2 * steps)
        rate = 1.0 if step <= steps - down else (steps - step) / down
        up = min(step / 300, 1)
        return rate, (1 - up) * 0.85 + up * 0.95, rate
    if name == "nanochat2026":
        down = round(0.65 * steps)
        left = (steps - step) / down
        rate = (step + 1) / 40 if step < 40 else 1.0 if left >= 1 else left + (1 - left) * 0.05
        momentum = 0.97
        if step < 400:
            momentum = 0.85 + 0.12 * step / 400
        elif step >= steps - down:
            momentum = 0.97 * left + 0.90 * (1 - left)
        return rate, momentum, 0.5 * (1 + math.cos(math.pi * step / steps))
    down = 0.7 * steps
    rate = min(1.0, (steps - step) / down)
    return rate, 0.85 + 0.1 * min(1.0, step / min(300, steps / 4)), rate


@pytest.mark.parametrize(
    ("name", "steps", "points"),
    [
        ("october2025", 21_400, (0, 1, 150, 299, 300, 9000, 17_120, 17_121, 20_000, 21_399)),
        ("nanochat2026", 5_460, (0, 20, 39, 40, 200, 399, 400, 1911, 1912, 5459)),
        ("nanochat2026", 1_001, (0, 39, 40, 300, 350, 351, 399, 400, 700, 1000)),
        ("quickstart", 333, (0, 1, 50, 83, 84, 99, 100, 101, 250, 332)),
    ],
)
def test_schedules(name: str, steps: int, points: tuple[int, ...]) -> None:
    optim = make_recipe(name).optim
    for step in points:
        found = (
            lr_ratio(step, steps, optim),
            muon_momentum(step, steps, optim),
            decay_ratio(step, steps, optim),
        )
        assert found == pytest.approx(plain_schedule(name, step, steps), abs=1e-9), step


def test_schedule_in_figures() -> None:
    """Some of these points as numbers that one can check by hand."""
    old, new = october2025().optim, nanochat2026().optim
    assert lr_ratio(19_260, 21_400, old) == 0.5 and lr_ratio(21_399, 21_400, old) < 3e-4
    assert muon_momentum(150, 21_400, old) == pytest.approx(0.90)
    assert lr_ratio(0, 5_460, new) == 1 / 40 and lr_ratio(5_460, 5_460, new) == 0.05
    assert muon_momentum(200, 5_460, new) == pytest.approx(0.91)
    assert muon_momentum(5_460, 5_460, new) == pytest.approx(0.90)
    assert decay_ratio(2_730, 5_460, new) == pytest.approx(0.5)


# --- tokens, batch, and the numbers of a recipe ---------------------------------------------------


def test_october_counts() -> None:
    run = october2025(20)
    assert run.model.n_params == 560_988_160 and run.model.architecture == "classic"
    assert (run.batch_tokens, run.default_steps) == (524_288, 21_400)
    assert run.default_steps * run.batch_tokens == 11_219_763_200
    assert (run.rows, run.corpus, run.optim.grad_clip) == ("stream", "fineweb-edu", 1.0)


@pytest.mark.parametrize(
    ("depth", "counted", "batch", "steps"),
    [
        (12, 135_266_736, 2**19, 135_266_736 * 12 // 2**19),
        (20, 477_103_280, 2**20, 5_460),
        (26, None, 2**20, None),
        (40, None, 2**21, None),
        (4, None, 2**18, None),
    ],
)
def test_modern_counts(depth: int, counted: int | None, batch: int, steps: int | None) -> None:
    """12 tokens for each parameter of blocks and head; the batch by the 0.383th power, as a power of two."""
    run = nanochat2026(depth)
    model = GPT_on_meta(run.model)
    n = sum(
        p.numel()
        for name, p in model.named_parameters()
        if name.startswith(("transformer.h.", "lm_head"))
    )
    assert run.n_params_counted == n and counted in (None, n)
    rule = 2 ** round(math.log2(524_288 * (n / 135_266_736) ** 0.383))
    assert run.batch_tokens == rule == batch
    assert run.default_steps == 12 * n // batch and steps in (None, run.default_steps)
    by_batch = math.sqrt(batch / 524_288)
    assert run.optim.matrix_lr == pytest.approx(0.02 * by_batch)
    assert run.optim.x0_lr == pytest.approx(0.5 * by_batch) and run.optim.smear_lr == 0.2
    assert run.optim.weight_decay == pytest.approx(0.28 * by_batch * 135_266_736 / n)
    assert (run.rows, run.optim.grad_clip) == ("best-fit", 0.0)


def GPT_on_meta(config: GPTConfig) -> GPT:  # noqa: N802
    with torch.device("meta"):
        return GPT(config)


def test_quickstart_is_ours() -> None:
    run = quickstart(4, seconds=30)
    assert run.batch_tokens == 2048 and quickstart(4).batch_tokens == 4096 and run.seconds == 30
    scalars = (run.optim.residual_lr, run.optim.x0_lr, run.optim.smear_lr)
    assert scalars == (0.005, 0.005, 0.005) and run.init == InitConfig() and run.rows == "stream"


def test_recipes_travel() -> None:
    for name in RECIPES:
        run = make_recipe(name, 2)
        assert decode_config(json.loads(json.dumps(encode_config(run))), PretrainConfig) == run
        assert run.model.n_layer == 2
    with pytest.raises(ConfigError, match="recipe='nanogpt' must be one of october2025"):
        make_recipe("nanogpt")


# --- first weights --------------------------------------------------------------------------------


def draw_weights(recipe: PretrainConfig, model: GPTConfig) -> dict[str, torch.Tensor]:
    built = GPT(model)
    built.init_weights(torch.Generator().manual_seed(1), recipe.init)
    return {name: p.detach() for name, p in built.named_parameters()}


def test_october_first_weights() -> None:
    """Normal, by min(1, sqrt(out / in)) / sqrt(in); embedding 1; head and maps back to the stream 0."""
    shape = replace(GPTConfig.classic(4, vocab_size=2000), n_head=4, n_kv_head=1)
    weights = draw_weights(october2025(4), shape)
    for name, w in weights.items():
        if name == "lm_head.weight" or "c_proj" in name:
            assert not w.any(), name
            continue
        out, width = w.shape
        std = 1.0 if "wte" in name else min(1.0, (out / width) ** 0.5) / width**0.5
        assert float(w.std()) == pytest.approx(std, rel=0.03), name
        assert abs(float(w.mean())) < 5 * std / w.numel() ** 0.5, name
        kurtosis = float((w / w.std()).pow(4).mean())
        assert kurtosis == pytest.approx(3, abs=0.15), f"{name} is normal"


def test_modern_first_weights() -> None:
    shape = replace(GPTConfig.modern(4, vocab_size=2000), n_head=4, n_kv_head=2)
    weights, width, seen = draw_weights(nanochat2026(4), shape), 256, set()
    assert torch.allclose(
        weights["resid_lambdas"], torch.tensor([1.15, 1.15 - 0.1 / 3, 1.15 - 0.2 / 3, 1.05])
    )
    assert torch.allclose(weights["x0_lambdas"], torch.tensor([0.20, 0.15, 0.10, 0.05]))
    assert weights["smear_lambda"].item() == 0
    assert weights["backout_lambda"].item() == pytest.approx(0.2)
    for name, w in weights.items():
        seen.add(re.sub(r"\d+", "N", name))
        if "c_proj" in name:
            assert not w.any(), name
        elif "gate" in name:  # 24 numbers each
            assert 0 <= w.min() and 0.015 < w.max() <= 0.02, name
        elif name.endswith("weight") and ("wte" in name or "lm_head" in name):
            std = 0.8 if "wte" in name else 0.001
            assert float(w.std()) == pytest.approx(std, rel=0.02), name
        elif name.endswith("weight"):
            bound = (3 / width) ** 0.5 * (0.4 if "c_fc" in name else 1.0)
            assert float(w.abs().max()) == pytest.approx(bound, rel=1e-3), name
            assert float(w.std()) == pytest.approx(bound / 3**0.5, rel=0.02), name
    assert "value_embeds.N.weight" in seen and "transformer.h.N.attn.ve_gate.weight" in seen


def test_quickstart_first_weights() -> None:
    """As all runs before there were recipes: no draw is added or moved, so that a seed keeps its weights."""
    shape = GPTConfig.modern(2, vocab_size=300, sequence_len=32, head_dim=64)
    weights, generator = draw_weights(quickstart(2), shape), torch.Generator().manual_seed(1)
    bound = (3 / 128) ** 0.5
    for name, w in weights.items():
        if name in ("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda"):
            value = dict(resid_lambdas=1.0, x0_lambdas=0.1, backout_lambda=0.2).get(name, 0.0)
            assert torch.equal(w, torch.full_like(w, value)), name
        elif "c_proj" in name or "gate" in name:
            assert not w.any(), name
        elif "wte" in name or "lm_head" in name:
            std = 0.8 if "wte" in name else 0.001
            assert torch.equal(w, torch.empty_like(w).normal_(std=std, generator=generator)), name
        else:
            assert torch.equal(
                w, torch.empty_like(w).uniform_(-bound, bound, generator=generator)
            ), name


# --- parameter kinds ------------------------------------------------------------------------------


def test_every_parameter_has_a_kind() -> None:
    kinds: dict[str, list[str]] = {}
    for name, _ in GPT_on_meta(SHAPE).named_parameters():
        kinds.setdefault(parameter_kind(name), []).append(name)
    assert sorted(kinds) == [
        "embedding",
        "matrix",
        "residual",
        "smear",
        "unembedding",
        "value_embedding",
        "x0",
    ]
    assert kinds["smear"] == ["smear_lambda", "backout_lambda", "smear_gate.weight"]
    assert len(kinds["matrix"]) == 3 * 6 + 2 and len(kinds["value_embedding"]) == 2
    with pytest.raises(LookupError, match="'h.0.bias' is of no kind"):
        parameter_kind("h.0.bias")


def test_adapters_are_added() -> None:
    """Whatever an adapter is called."""
    model = GPT(SHAPE).requires_grad_(False)
    spec = lora.LoraSpec(rank=2, alpha=4.0, targets=("c_q", "mlp.c_proj"))
    lora.attach(model, "weight", spec, generator=torch.Generator().manual_seed(0), train=True)
    learned = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(learned) == 12 and {parameter_kind(name) for name in learned} == {"added"}
    assert parameter_kind("projector.weight") == "added"


# --- runs of before -------------------------------------------------------------------------------


def as_schema_1(config: PretrainConfig) -> dict[str, Any]:
    """A config.json as it was written before there were recipes."""
    data = encode_config(config)
    for name in SCHEMA_1["PretrainConfig"]:
        del data[name]
    for name in (*SCHEMA_1["OptimConfig"], "residual_lr", "x0_lr", "smear_lr"):
        del data["optim"][name]
    data["optim"]["scalar_lr"], data["schema"] = 0.5, 1
    return data


def test_old_settings_mean_what_they_meant() -> None:
    file = next(Path(registry.SHIPPED).glob("base_checkpoints/d4/meta_*.json"))
    old = json.loads(file.read_text())["user_config"]
    assert old["schema"] == 1 and old["optim"]["scalar_lr"] == 0.5
    optim = decode_config(old, PretrainConfig).optim
    assert (optim.residual_lr, optim.x0_lr, optim.smear_lr) == (0.005, 0.005, 0.005)
    assert (optim.matrix_lr, optim.row_beta2, optim.orthogonalize) == (0.02, 0.95, "polar-damped")
    data = as_schema_1(PretrainConfig())
    data["optim"]["scalar_lr"] = 0.05
    assert decode_config(data, PretrainConfig).optim.x0_lr == 0.05 * 0.01
    data["optim"]["scalar_lr"] = "much"
    with pytest.raises(ConfigError, match="scalar_lr"):
        decode_config(data, PretrainConfig)
    with pytest.raises(ConfigError, match="scalar_lr"):  # a file of today has no such field
        decode_config({**data, "schema": 2}, PretrainConfig)


def test_old_run_resumes(base_dir: Path) -> None:
    """A run whose config.json is of schema 1 goes on as the unbroken one, by the command that began it."""
    config = PretrainConfig(
        tag="old",
        model=replace(
            GPTConfig.modern(2, vocab_size=2048, sequence_len=32, head_dim=32),
            n_embd=32,
            n_head=1,
            n_kv_head=1,
        ),
        batch_tokens=256,
        steps=8,
        eval=EvalConfig(
            every=100,
            tokens=512,
            last_tokens=512,
            sample_every=-1,
            snapshots=False,
        ),
        runtime=RuntimeConfig(
            device="cpu", dtype="float32", threads=1, compile="off", micro_batch_rows=8
        ),
    )
    pretrain(replace(config, tag="whole"))
    stop = threading.Event()
    pretrain(config, stop=stop, on_event=lambda e: e.kind == "step" and e.step == 3 and stop.set())
    file = registry.run_dir("base", "old") / "config.json"
    frozen = decode_config(json.loads(file.read_text()), PretrainConfig)
    file.write_text(json.dumps(as_schema_1(frozen)))

    pretrain(replace(config, resume=True))
    log = read_metrics(registry.run_dir("base", "old") / "metrics.jsonl")
    assert [e["step"] for e in log if e["kind"] == "step"] == list(range(1, 9))
    one, two = (load_checkpoint(registry.run_dir("base", tag), 8) for tag in ("whole", "old"))
    for key, tensor in one.model_state.items():
        assert torch.equal(tensor, two.model_state[key]), key
