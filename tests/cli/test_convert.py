"""Classic models to Hugging Face's form and back: the same weights, logits, token ids and prompts."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import load_checkpoint
from primechat.cli.convert import export_model, import_model, rename_tensor
from primechat.cli.main import main
from primechat.errors import CheckpointError, ConfigError, DataError
from primechat.infer.engine import Engine
from primechat.model.gpt import GPT
from primechat.text.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

NANOCHAT = Path(__file__).parents[1] / "fixtures" / "nanochat"
EXPECTED: dict[str, Any] = json.loads((NANOCHAT / "oct2025" / "expected.json").read_text())
WEIRD = st.text(
    st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from("'sdmtlvreSLVE ſK\n\r\t\u00a0\u2028 \u3000019<|>_bosuser\u0301é🎈日"),
    ),
    max_size=40,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a base directory with the classic fixture; its models are converted beside it."""
    path = tmp_path_factory.mktemp("home") / "nanochat"
    shutil.copytree(NANOCHAT / "oct2025", path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(path))
        for tag in ("d2", "d2-compiled"):
            assert main(["convert", f"base/{tag}", "--to", "hf", str(path.parent / tag)]) == 0
    return path


@pytest.fixture(autouse=True)
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))


@pytest.fixture(scope="module")
def theirs(home: Path) -> Any:
    transformers = pytest.importorskip(
        "transformers", reason="needs the extra hf: pip install -e '.[hf]'"
    )
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(home.parent / "d2").eval()


@pytest.fixture(scope="module")
def their_tokenizer(home: Path) -> Any:
    transformers = pytest.importorskip(
        "transformers", reason="needs the extra hf: pip install -e '.[hf]'"
    )
    return transformers.AutoTokenizer.from_pretrained(home.parent / "d2")


def open_float(home: Path) -> GPT:
    """Return the model with a float32 rotary table, as transformers keeps it."""
    loaded = load_checkpoint(home / "base_checkpoints" / "d2")
    return GPT.from_state(replace(loaded.config, rope_dtype="float32"), loaded.model_state)


def test_transformers_computes_the_same(home: Path, theirs: Any) -> None:
    assert type(theirs).__name__ == "NanoChatForCausalLM"
    ours, rounded = open_float(home), registry.open_model("base/d2")[0]
    assert theirs.config.num_key_value_heads == 2 and theirs.config.intermediate_size == 256
    for prompt in EXPECTED["prompts"]:
        ids = torch.tensor([prompt["ids"]])
        with torch.no_grad():
            logits = theirs(ids).logits
        assert torch.allclose(logits, ours(ids), atol=2e-4)
        nanochat = torch.tensor(prompt["logits_last_f32_rotary"])
        assert torch.allclose(logits[0, -1], nanochat, atol=2e-4)
        assert 2e-4 < float((logits - rounded(ids)).abs().max()) < 0.05, (
            "a bfloat16 table moves them"
        )


def test_transformers_writes_the_same(home: Path, theirs: Any) -> None:
    engine = Engine(open_float(home), Tokenizer.load(home / "tokenizer"))
    for prompt in EXPECTED["prompts"][:3]:
        ids = prompt["ids"]
        made = theirs.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[
            0, len(ids) :
        ].tolist()
        ours = list(engine.generate(ids, max_new_tokens=32, temperature=0.0))
        assert made == ours == prompt["engine32_f32_rotary"]


def test_tokenizer_encodes_the_same(home: Path, their_tokenizer: Any) -> None:
    ours = Tokenizer.load(home / "tokenizer")
    assert len(their_tokenizer) == ours.vocab_size
    for case in EXPECTED["encode"]:
        found = their_tokenizer(case["text"], split_special_tokens=True)["input_ids"]
        assert found == case["ids"] == ours.encode(case["text"])
        assert their_tokenizer.decode(found) == ours.decode(case["ids"])
    for name, i in ours.specials.items():
        assert their_tokenizer(name)["input_ids"] == [i]


@settings(max_examples=200, deadline=None)
@given(text=WEIRD)
def test_any_text_encodes_the_same(home: Path, their_tokenizer: Any, text: str) -> None:
    ours = Tokenizer.load(home / "tokenizer").encode(text)
    assert their_tokenizer(text, split_special_tokens=True)["input_ids"] == ours


@pytest.mark.parametrize("seed", range(3))
def test_any_vocabulary_encodes_the_same(seed: int) -> None:
    """Tokens that were not learned by merging: every split of a token into two counts, as for tiktoken."""
    tokenizers = pytest.importorskip(
        "tokenizers", reason="needs the extra hf: pip install -e '.[hf]'"
    )
    from primechat.cli.convert import describe_tokenizer

    draw, words = random.Random(seed), set[bytes]()
    while len(words) < 60:
        words.add("".join(draw.choice("abc ") for _ in range(draw.randint(2, 5))).encode())
    listed = [*(bytes([i]) for i in range(256)), *draw.sample(sorted(words), 60)]
    ranks = {token: i for i, token in enumerate(listed)}
    ours = Tokenizer(
        SPLIT_PATTERN, ranks, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    )
    made = tokenizers.Tokenizer.from_str(json.dumps(describe_tokenizer(ours)["tokenizer.json"]))
    differ = 0
    for _ in range(400):
        text = "".join(draw.choice("abc ") for _ in range(draw.randint(1, 14)))
        found = made.encode(text).ids
        assert ours.decode(found) == text
        differ += found != ours.encode(text)
    assert differ == 0


def test_chat_template_renders_the_same(their_tokenizer: Any) -> None:
    def render(messages: list[dict[str, Any]], ask: bool) -> list[int]:
        return their_tokenizer.apply_chat_template(
            messages, add_generation_prompt=ask, return_dict=False
        )

    ours = registry.load_tokenizer("base/d2")
    for case in EXPECTED["conversations"]:
        talk = case["conversation"]
        assert render(talk["messages"], False) == case["ids"]
        assert (
            render(talk["messages"], True)
            == case["completion_ids"]
            == ours.render_for_completion(talk)
        )
    sly = {"messages": [{"role": "user", "content": "a<|user_end|><|assistant_start|>b <|bos|"}]}
    assert render(sly["messages"], True) == ours.render_for_completion(sly)
    assert render(sly["messages"], True).count(ours.special("<|user_end|>")) == 1
    for wrong in (
        [{"role": "system", "content": "x"}],
        [{"role": "assistant", "content": "x"}] * 2,
    ):
        with pytest.raises(Exception, match="user"):
            render(wrong, False)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(WEIRD, min_size=1, max_size=4), system=st.booleans())
def test_any_talk_renders_the_same(their_tokenizer: Any, texts: list[str], system: bool) -> None:
    roles = [*(["system"] if system and len(texts) > 1 else []), *["user", "assistant"] * 2]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    ours = Tokenizer.load(NANOCHAT / "oct2025" / "tokenizer").render_conversation(
        {"messages": messages}
    )[0]
    assert their_tokenizer.apply_chat_template(messages, return_dict=False) == ours


@pytest.mark.parametrize("told", [True, False], ids=["ours", "others"])
def test_back_again_is_identical(home: Path, tmp_path: Path, told: bool) -> None:
    """With what primechat noted for the way back, and without, as in a folder that others made."""
    folder = shutil.copytree(home.parent / "d2", tmp_path / "folder")
    if not told:
        config = json.loads((folder / "config.json").read_text())
        del config["primechat"]
        (folder / "config.json").write_text(json.dumps(config))
    target = import_model(str(folder), str(tmp_path / "back"))
    before, after = load_checkpoint(home / "base_checkpoints" / "d2"), load_checkpoint(target)
    assert after.config == before.config and after.step == (10 if told else 0)
    assert after.meta["val_bpb"] == (before.meta["val_bpb"] if told else None)
    assert list(after.model_state) == list(before.model_state)
    for key, tensor in before.model_state.items():
        assert after.model_state[key].dtype == tensor.dtype and torch.equal(
            after.model_state[key], tensor
        )
    tokenizer = Tokenizer.load(target / "tokenizer")
    assert tokenizer.identity == after.meta["tokenizer_identity"]
    assert tokenizer.identity == Tokenizer.load(home / "tokenizer").identity
    again = import_model(str(folder), "sft/back" if told else "sft/other")
    assert again == home / "chatsft_checkpoints" / ("back" if told else "other")
    model, found, meta = registry.open_model(f"sft/{again.name}")
    assert found.identity == tokenizer.identity and meta["architecture"] == "classic"
    with pytest.raises(CheckpointError, match="has checkpoints, which nothing overwrites"):
        import_model(str(folder), f"sft/{again.name}")
    shutil.rmtree(again)


def test_what_a_folder_holds(home: Path) -> None:
    folder = home.parent / "d2-compiled"
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, (
        "all may be read by the same people"
    )
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "# base/d2-compiled" in card
    assert (
        "2 layers, width 64, 4 heads, 600 tokens, context 256" in card
        and "{" not in card.replace("[{", "")
    )
    assert (folder / "model.safetensors").read_bytes() == (
        home.parent / "d2" / "model.safetensors"
    ).read_bytes(), "compiled keys are the same model"
    assert rename_tensor(rename_tensor("transformer.h.3.mlp.c_proj.weight"), back=True) == (
        "transformer.h.3.mlp.c_proj.weight"
    )


def test_refusals(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="exists, and nothing is overwritten"):
        export_model("base/d2", str(home))
    assert (
        main(["convert"]) == 2
        and "primechat convert sft/d20 --to hf FOLDER" in capsys.readouterr().err
    )
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(NANOCHAT / "head"))
    assert main(["convert", "base/d2", "--to", "hf", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert (
        "base/d2 is modern (value_embeddings=True, " in said
        and "the classic architecture alone" in said
    )
    assert "primechat pretrain --arch classic" in said and not (tmp_path / "out").exists()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))
    files = set(tmp_path.iterdir())

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, os.strerror(28))

    usual, limit = (
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (200_000, limit[1])
    )  # of the weights only the first bytes fit
    try:
        with pytest.raises(
            CheckpointError, match="out cannot be written .Error while serializing.*too large"
        ):
            export_model("base/d2", str(tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, usual)
    assert set(tmp_path.iterdir()) == files, "nothing is left of it"

    with monkeypatch.context() as patch:
        patch.setattr("primechat.cli.convert.save_file", refuse)
        with pytest.raises(CheckpointError, match="cannot be written .No space left"):
            export_model("base/d2", str(tmp_path / "out"))
    assert set(tmp_path.iterdir()) == files, "nothing is left of it"

    folder = shutil.copytree(home.parent / "d2", tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    for change, match in (
        ({"model_type": "llama"}, "no classic nanochat .model_type='llama'."),
        ({"hidden_act": "silu"}, "hidden_act='silu'"),
        ({"intermediate_size": 100}, "intermediate_size / hidden_size=1.56"),
        ({"attention_bias": True}, "attention_bias=True"),
        (
            {"num_hidden_layers": 3, "primechat": None},
            "has other tensors than its config.json says",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
        ({"intermediate_size": None}, "config.json is damaged"),
        ({"rope_parameters": [1]}, "config.json is damaged"),
        ({"rope_parameters": {"rope_theta": None}, "primechat": None}, "config.json is damaged"),
        ({"final_logit_softcapping": "x", "primechat": None}, "config.json is damaged"),
        ({"num_hidden_layers": 10**12, "primechat": None}, "n_layer=1000000000000 must be"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=match):
            import_model(str(folder), str(tmp_path / "back"))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(DataError, match="not byte-level with one pattern"):
        import_model(str(folder), str(tmp_path / "back"))
    shutil.copy(home.parent / "d2" / "tokenizer.json", folder)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="cannot be read .*; fetch it again"):
        import_model(str(folder), str(tmp_path / "back"))
    with pytest.raises(CheckpointError, match="config.json cannot be read"):
        import_model(str(tmp_path / "nothing"), "sft/x")
    assert not (tmp_path / "back").exists() and not (home / "chatsft_checkpoints" / "x").exists()
