"""`primechat convert`: a classic model as a Hugging Face folder, and back.

Hides: the names that transformers uses. Tensors are renamed, never changed; the tokenizer's ranks become
merges. Whatever transformers has no field for is stored in config.json under `primechat`, so that nothing is
lost on the way back. A folder is written completely or not at all.
Reference: transformers, models/nanochat; tokenizers, the format of tokenizer.json.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tyro.conf import Positional

from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import find_steps, load_checkpoint, save_checkpoint
from primechat.checkpoint.nanochat_format import read_shape
from primechat.checkpoint.run_dir import RunDirLock
from primechat.config import GPTConfig, decode_config
from primechat.config.model import NORM_EPS, classic_switches, list_shapes
from primechat.config.names import FOREIGN, IDENTIFIER, parse_plain
from primechat.errors import CheckpointError, ConfigError, DataError
from primechat.files.hub import fetch_model
from primechat.files.paths import resolve_path
from primechat.files.weights import read_json
from primechat.model.huggingface import list_characters
from primechat.text.tokenizer import Tokenizer

NAMES = (  # parts of tensor names: here, in transformers
    ("transformer.wte.", "model.embed_tokens."),
    ("transformer.h.", "model.layers."),
    (".attn.c_q.", ".self_attn.q_proj."),
    (".attn.c_k.", ".self_attn.k_proj."),
    (".attn.c_v.", ".self_attn.v_proj."),
    (".attn.c_proj.", ".self_attn.o_proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
SIZES = {
    "vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "sequence_len": "max_position_embeddings",
}
KIND = {  # required of a model that is imported
    "model_type": "nanochat",
    "hidden_act": "relu2",
    "rope_type": "default",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "intermediate_size / hidden_size": 4.0,
}
# Switches that may differ from the defaults, because transformers has them too.
FREE = {"rope_base", "rope_dtype", "logit_softcap"}
END = "<|assistant_end|>"
# The chat template inserts this into the `<|` of a text, so that it is not read as a special token.
GUARD = "\u2060\ue0f0\u2060"


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Turn a classic model into a Hugging Face folder, or such a folder into a nanochat checkpoint."""

    model: Positional[str] = ""
    """What to convert: a model such as sft/d20, or with --to nanochat a folder or hf:owner/name."""
    out: Positional[str] = ""
    """A folder that does not exist yet; with --to nanochat a model's name, such as sft/mine, or a folder."""
    to: Literal["hf", "nanochat"] = "hf"
    """The form to convert to."""


def run_convert(config: ConvertConfig) -> int:
    """Convert a model, print where it is, and return the exit code."""
    if not config.model or not config.out:
        raise ConfigError(
            "A model and a place are needed; try `primechat convert sft/d20 --to hf FOLDER`."
        )
    convert = export_model if config.to == "hf" else import_model
    place = convert(config.model, config.out)
    print(f"{config.model} is in {place} now.")
    if config.to == "hf":
        print(
            "transformers opens it: AutoModelForCausalLM.from_pretrained(that folder); see its README.md."
        )
    elif place.is_relative_to(registry.base_dir()):
        print(f"Talk to it: primechat chat {config.out}")
    return 0


def export_model(identifier: str, folder: str) -> Path:
    """Write a classic model as a folder that transformers can load, and return the folder.

    Raises:
        CheckpointError: the model cannot be read, or its architecture differs from transformers' NanoChat.
        ConfigError: the folder exists.
    """
    # Load the model, and refuse other architectures than the classic one.
    out = resolve_path(folder, "out")
    if out.exists():
        raise ConfigError(f"{out} exists, and nothing is overwritten; name a new folder.")
    run, place = registry.locate_model(parse_plain(identifier))
    loaded, tokenizer = load_checkpoint(run, place.step), registry.find_tokenizer(run)
    registry.check_pair(loaded.config, loaded.meta, tokenizer, identifier)
    own, named = (
        asdict(loaded.config),
        {"identifier": identifier, "n_params": loaded.config.n_params},
    )
    other = [
        f"{k}={own[k]!r}" for k, v in classic_switches().items() if k not in FREE and own[k] != v
    ]
    if other:
        raise CheckpointError(
            f"{identifier} is {loaded.config.architecture} ({', '.join(other)}), and transformers' NanoChat "
            "is the classic architecture alone; train one by `primechat pretrain --arch classic`."
        )

    # The text files of the folder.
    noted = {
        "step": loaded.step,
        "val_bpb": loaded.meta.get("val_bpb"),
        "tokenizer": tokenizer.identity,
    }
    template, card = (
        Path(__file__).with_suffix(kind).read_text("utf-8") for kind in (".jinja", ".md")
    )
    files: dict[str, Any] = {
        "README.md": card.format(**named, **noted, **own),
        "chat_template.jinja": template.replace("GUARD", GUARD),
        **describe_network(loaded.config, tokenizer, {"config": own, **noted}),
        **describe_tokenizer(tokenizer),
    }

    # Write them and the weights beside the target, then rename the folder.
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as parent:
            (building := Path(parent) / out.name).mkdir()
            for name, data in files.items():
                text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
                (building / name).write_text(text, encoding="utf-8")
            state = {rename_tensor(key): tensor for key, tensor in loaded.model_state.items()}
            save_file(state, building / "model.safetensors", metadata={"format": "pt"})
            # safetensors makes its file readable by the owner only.
            rights = (building / "config.json").stat().st_mode
            (building / "model.safetensors").chmod(rights)
            os.rename(building, out)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own way
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"{out} cannot be written ({reason}); choose another place."
        ) from None
    return out


def describe_network(
    config: GPTConfig, tokenizer: Tokenizer, noted: dict[str, Any]
) -> dict[str, Any]:
    """Return config.json and generation_config.json; `noted` is stored for primechat alone."""
    bos, end = tokenizer.stop_ids
    return {
        "config.json": {
            "architectures": ["NanoChatForCausalLM"],
            "model_type": "nanochat",
            "dtype": "float32",
            **{there: getattr(config, here) for here, there in SIZES.items()},
            "intermediate_size": 4 * config.n_embd,
            "hidden_act": "relu2",
            "rms_norm_eps": NORM_EPS,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
            "final_logit_softcapping": config.logit_softcap or None,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": bos,
            "eos_token_id": end,
            "pad_token_id": None,
            "primechat": noted,
        },
        "generation_config.json": {
            "bos_token_id": bos,
            "eos_token_id": [bos, end],
            "pad_token_id": end,
        },
    }


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return tokenizer.json and tokenizer_config.json.

    Every split of a token into two tokens becomes a merge, in the order of the token's rank: tiktoken joins
    any two neighbours whose bytes form a token, not only the pair from which the token was learned.
    """
    # The merges.
    char, ranks = list_characters(), tokenizer.ranks
    shown = {token: "".join(char[byte] for byte in token) for token in ranks}
    merges = [
        [shown[token[:i]], shown[token[i:]]]
        for token in ranks
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]

    # The parts of the two files.
    plain = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    bytewise = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    cut = {
        "type": "Split",
        "pattern": {"Regex": tokenizer.pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": name, **plain} for name, i in tokenizer.specials.items()
            ],
            "normalizer": {"type": "Replace", "pattern": {"String": f"<{GUARD}|"}, "content": "<|"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, bytewise]},
            "post_processor": None,
            "decoder": bytewise,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,
                "vocab": {shown[token]: rank for token, rank in ranks.items()},
                "merges": merges,
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": END,
            "pad_token": END,
            "clean_up_tokenization_spaces": False,
        },
    }


def import_model(source: str, out: str) -> Path:
    """Write transformers' nanochat model as a checkpoint with its tokenizer; return the run directory.

    Args:
        source: a folder, or hf:owner/name.
        out: name of the model, such as sft/mine, or a folder.

    Raises:
        CheckpointError: the source is another kind of model, or the target already has checkpoints.
        DataError: its tokenizer is of another kind.
    """
    # Read the config, the tokenizer and the weights.
    is_foreign = FOREIGN.fullmatch(source)
    folder = fetch_model(source[3:]) if is_foreign else resolve_path(source, "model")
    data, state = read_json(folder / "config.json"), dict[str, Any]()
    try:
        config = read_network(data, folder)
        read_shape({"model_config": asdict(config)})
    except (TypeError, AttributeError, ArithmeticError, ConfigError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} is damaged ({error}); fetch it again."
        ) from None
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    for path in sorted(folder.glob("*.safetensors")):
        try:
            state |= {
                rename_tensor(key, back=True): tensor for key, tensor in load_file(path).items()
            }
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); fetch it again.") from None
    if {key: tuple(tensor.shape) for key, tensor in state.items()} != list_shapes(config):
        raise CheckpointError(
            f"{folder} has other tensors than its config.json says; fetch it again."
        )

    # The target, and the metadata that primechat stored when it exported the model.
    name = IDENTIFIER.fullmatch(out)
    is_run = name and name[3] and not (name[1] or name[5])
    target = registry.run_dir(name[2], name[3]) if name and is_run else resolve_path(out, "out")
    noted = read_noted(data)
    meta = {
        "val_bpb": noted.get("val_bpb"),
        "tokenizer_identity": tokenizer.identity,
        "origin": source,
    }
    told = noted.get("step")
    step = told if type(told) is int and 0 <= told < 10**9 else 0

    # Write the checkpoint.
    with RunDirLock(target):
        if find_steps(target):
            raise CheckpointError(
                f"{target} has checkpoints, which nothing overwrites; name another place."
            )
        tokenizer.save(target / "tokenizer")
        state = {key: state[key] for key in list_shapes(config)}  # the order of nanochat's files
        save_checkpoint(target, step, model_state=state, config=config, optim_state=None, meta=meta)
    return target


def read_noted(data: dict[str, Any]) -> dict[str, Any]:
    """Return what primechat stored in a config.json when it exported the model; {} if others wrote it."""
    noted = data.get("primechat")
    return noted if isinstance(noted, dict) else {}


def read_network(data: dict[str, Any], folder: Path) -> GPTConfig:
    """Return the config of the model that a config.json describes.

    Raises:
        CheckpointError: it is not a classic nanochat model; the message names the differences.
    """
    rope, width = data.get("rope_parameters") or {}, data.get("hidden_size")
    found = {
        "model_type": data.get("model_type"),
        "hidden_act": data.get("hidden_act", "relu2"),
        "rope_type": rope.get("rope_type", "default"),
        "attention_bias": data.get("attention_bias", False),
        "tie_word_embeddings": data.get("tie_word_embeddings", False),
        "intermediate_size / hidden_size": data.get("intermediate_size", 0) / (width or 1),
    }
    if other := [f"{key}={value!r}" for key, value in found.items() if value != KIND[key]]:
        raise CheckpointError(
            f"{folder} holds no classic nanochat ({', '.join(other)}), which alone has a place among "
            "primechat's checkpoints; open others by hf:owner/name."
        )
    if own := read_noted(data).get("config"):
        return decode_config(own, GPTConfig, f"{folder / 'config.json'}: primechat.config")
    sizes: dict[str, Any] = {here: data.get(there) for here, there in SIZES.items()}
    sizes["n_kv_head"] = sizes["n_kv_head"] or sizes["n_head"]
    sizes["logit_softcap"] = data.get("final_logit_softcapping", 15.0) or 0.0
    return GPTConfig(**sizes, rope_base=float(rope.get("rope_theta", 10_000.0)))


def read_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a byte-level tokenizer.json with a single split pattern."""
    data, byte_of = read_json(path), {char: byte for byte, char in list_characters().items()}
    try:
        cuts = data["pre_tokenizer"].get("pretokenizers") or [data["pre_tokenizer"]]
        (pattern,) = [cut["pattern"]["Regex"] for cut in cuts if cut["type"] == "Split"]
        specials = {token["content"]: token["id"] for token in data["added_tokens"]}
        vocab = {piece: i for piece, i in data["model"]["vocab"].items() if piece not in specials}
        ranks = {bytes(byte_of[c] for c in piece): i for piece, i in vocab.items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is not byte-level with one pattern ({error!r}); open it by hf:."
        ) from None
    return Tokenizer(pattern, ranks, specials, source=str(path))


def rename_tensor(key: str, back: bool = False) -> str:
    """Return the name of a tensor in transformers, or, with `back`, its name here.

    >>> rename_tensor("transformer.h.0.attn.c_q.weight")
    'model.layers.0.self_attn.q_proj.weight'
    """
    for names in NAMES:
        old, new = reversed(names) if back else names
        key = key.replace(old, new)
    return key
