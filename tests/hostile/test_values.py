"""Values from outside that no field takes: endless numbers, nested JSON, misspelled options, odd dtypes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import HistoryModel, byte_tokenizer

import primechat
from primechat.chat.tree import read_jsonl
from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from primechat.cli import main as cli
from primechat.cli.download import DownloadConfig, build_parcels
from primechat.cloud.plan import read_bench
from primechat.config import GPTConfig, decode_config, encode_config
from primechat.config.autochat import AutochatConfig
from primechat.config.model import list_shapes
from primechat.config.runtime import check_number
from primechat.errors import CheckpointError, ConfigError, DataError
from primechat.files.paths import parse_json
from primechat.files.weights import read_json
from primechat.infer.engine import Engine
from primechat.text.corpora import read_rows

DEEP = "[" * 100_000
DIGITS = "1" * 5000
TINY = GPTConfig(sequence_len=16, vocab_size=265, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)


# Numbers


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("n_layer", 1_000_000_000, "=1000000000 must be a whole number from 1 to 256"),
        ("n_embd", 10**400, r"=1000000000\.\.\. \(a number of about 400 digits\) must be"),
        ("qk_gain", math.nan, "=nan must be a number from 0.001 to 1000"),
        ("qk_gain", 10**400, "about 400 digits"),
        ("rope_base", math.inf, "=inf must be a number from 1 to 1e"),
        ("logit_softcap", -math.inf, "=-inf must be a number from 0 to 70"),
        ("logit_softcap", "much", "='much' must be a number from 0 to 70"),
    ],
)
def test_a_model_that_cannot_be(
    name: str, value: Any, rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=rule):
        GPTConfig(**{name: value})

    # The same in a file, which Python's JSON writes as NaN and Infinity.
    data = encode_config(primechat.PretrainConfig(tag="x", model=TINY))
    data["model"][name] = value
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    assert cli.main(["pretrain", "--config", str(path)]) == 2
    told = capsys.readouterr().err
    assert name in told and "Traceback" not in told and len(told) < 400

    # And in a checkpoint's own settings.
    folder = tmp_path / "base_checkpoints" / "d1"
    state = {key: torch.ones(shape) for key, shape in list_shapes(TINY).items()}
    save_checkpoint(folder, 1, model_state=state, config=TINY, optim_state=None, meta={})
    meta = folder / "meta_000001.json"
    said = json.loads(meta.read_text())
    said["gpt_config"][name] = value
    meta.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(folder, 1)


def test_the_reason_is_the_true_one() -> None:
    for name in ("seed", "top_k"):
        with pytest.raises(ConfigError, match=f"{name}=1{'0' * 20} must be .* from 0 to 1,000,"):
            AutochatConfig(**{name: 10**20})
    with pytest.raises(ConfigError, match="seed=-1 must be a whole number of at least 0"):
        AutochatConfig(seed=-1)
    with pytest.raises(ConfigError, match="must be a number from 0 to 1e"):
        check_number("alpha", 1e19, low=0)
    for value in (0, 10**18):
        assert AutochatConfig(seed=value).seed == value


def test_a_number_too_large_for_its_field() -> None:
    data = encode_config(primechat.PretrainConfig(tag="x", model=TINY))
    with pytest.raises(ConfigError, match="tokens_per_param=1000000000.* too large"):
        decode_config({**data, "tokens_per_param": 10**400}, primechat.PretrainConfig)


@pytest.mark.parametrize(
    "found",
    [
        {"flops_per_s": 0, "memory_bytes": 1e9},
        {"flops_per_s": 1e12, "memory_bytes": -1},
        {"flops_per_s": math.nan, "memory_bytes": 1e9},
        {"flops_per_s": 1e12, "memory_bytes": 10**400},
        {"flops_per_s": 1e12},
        [],
    ],
)
def test_a_bench_that_measured_nothing(found: Any, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(found))
    with pytest.raises(ConfigError, match="primechat bench train"):
        read_bench(tmp_path)


# JSON


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000, DIGITS, "{", "\udcff", ""])
def test_json_that_cannot_be_read(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever reads JSON from outside answers in a sentence, of whatever depth it is."""
    with pytest.raises(ValueError):
        parse_json(text)
    path = tmp_path / "config.json"
    path.write_text(text, errors="surrogateescape")
    assert cli.main(["pretrain", "--config", str(path)]) == 2
    assert "must be a readable JSON file (no JSON" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_json(path)
    (tmp_path / "bench.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError, match="primechat bench train"):
        read_bench(tmp_path)
    if text:
        with pytest.raises(DataError, match="line 1|byte"):
            list(read_rows(path))
        with pytest.raises(DataError, match="Line 1 .*it is no JSON"):
            read_jsonl(text)


def test_nobody_parses_by_himself() -> None:
    """Files from outside go through `parse_json`; what the rest reads, primechat or a tool has written."""
    own = {
        "files/paths.py": "is parse_json",
        "labkit/instruments/forecasts.py": "a record that ships",
        "labkit/instruments/talks.py": "records that ship",
        "views/widgets/figure.py": "of Plotly, in this process",
        "labkit/twins.py": "of marimo's export",
        "cloud/ranks.py": "of a process of ours",
        "model/huggingface.py": "of a tokenizer that is open",
        "text/corpora.py": "of the package chitchat-dataset",
    }
    house = Path(primechat.__file__).parent
    found = {
        str(path.relative_to(house))
        for path in house.rglob("*.py")
        if "json.loads(" in path.read_text(encoding="utf-8")
    }
    assert found <= set(own), found - set(own)


# Options


@pytest.mark.parametrize(
    ("method", "option", "meant"),
    [
        ("generate", "max_tokens", "max_new_tokens"),
        ("generate", "temprature", "temperature"),
        ("generate_batch", "num_sample", "num_samples"),
        ("generate_batch", "max_tokens", "max_new_tokens"),
        ("stream", "n_alternative", "n_alternatives"),
        ("chat", "max_tokens", "max_new_tokens"),
        ("complete", "topk", "top_k"),
        ("measure_batch", "stop_id", "stop_ids"),
    ],
)
def test_a_misspelled_option_of_the_engine(method: str, option: str, meant: str) -> None:
    engine = Engine(HistoryModel(), byte_tokenizer())
    given: Any = {
        "chat": [{"role": "user", "content": "x"}],
        "complete": "x",
        "generate_batch": [[1]],
        "measure_batch": [[1]],
    }.get(method, [1])
    with pytest.raises(ConfigError, match=rf"'{option}'; did you mean {meant}\? Its options") as e:
        getattr(engine, method)(given, **{option: 3})
    assert isinstance(e.value, TypeError), "as Python's own error for it"
    with pytest.raises(ConfigError, match="has no option 'zzz'; its options are"):
        getattr(engine, method)(given, zzz=3)


def test_a_misspelled_option_of_opening() -> None:
    engine = Engine(HistoryModel(), byte_tokenizer())
    with pytest.raises(ConfigError, match="Engine.generate needs max_new_tokens; try"):
        engine.generate([1])
    with pytest.raises(ConfigError, match="open_model has no option 'dtyp'; did you mean dtype"):
        primechat.open_model("shipped/sft", dtyp="float32")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="load_model has no option 'tag'; did you mean model_tag"):
        primechat.load_model("sft", tag="d4")  # type: ignore[call-arg]


# Weights


def test_weights_of_float64_are_loaded_as_float32(base_dir: Path) -> None:
    folder = base_dir / "base_checkpoints" / "d1"
    state = {
        key: torch.rand(shape, dtype=torch.float64) / 3 for key, shape in list_shapes(TINY).items()
    }
    byte_tokenizer().save(folder / "tokenizer")
    save_checkpoint(folder, 1, model_state=state, config=TINY, optim_state=None, meta={})
    loaded = load_checkpoint(folder, 1).model_state
    for key, tensor in state.items():
        assert torch.equal(loaded[key], tensor.float()), key
    model, _, _ = registry.open_model("base/d1")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    half = registry.open_model("base/d1", dtype="bfloat16")[0]
    assert torch.equal(
        half.transformer.wte.weight, state["transformer.wte.weight"].to(torch.bfloat16)
    )


# The network


def test_what_was_asked_for_is_asked_first(base_dir: Path) -> None:
    """Offline, the error is about the first repository: it must be the one that was named."""
    extra = DownloadConfig(extra=(("owner/mine::base_checkpoints/d2::model_*",),))
    assert [parcel.repo for parcel in build_parcels(extra)][0] == "owner/mine"
    assert [parcel.repo for parcel in build_parcels(DownloadConfig())][0].endswith("d20-base")
