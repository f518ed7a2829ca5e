"""The GPT: token ids to logits and losses, with both generations of nanochat behind named switches.

Start reading at `GPT.hidden`: embed the tokens, run the blocks (attention, then MLP, each adding to the
residual stream), normalise; `logits` and `loss` follow. These are the plain formulas. model/fast_cpu.py
holds faster forms of some of them, and the few places that use those say so.
Reference: nanochat (October 2025 and 2026), whose state_dict keys are kept; Vaswani et al. 2017; Su et al.
2021 (rotary positions); Henry et al. 2020 (norm on queries and keys).
"""

# Numerics        parameters   compute    rotary table   loss      cache
# CPU fp32        float32      float32    rope_dtype     float32   float32
# CPU bf16 units  float32      bfloat16   rope_dtype     float32   float32
# MPS             float32      float32    rope_dtype     float32   float32
# CUDA            float32      bfloat16   rope_dtype     float32   bfloat16
# A model loaded for inference keeps its parameters in the compute dtype.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from primechat.config.model import GATE_CHANNELS, NORM_EPS, SMEAR_CHANNELS, GPTConfig, InitConfig
from primechat.model import fast_cpu
from primechat.model.attention import Documents, Rows, attend, attention_weights
from primechat.model.init import draw_weights
from primechat.model.kv_cache import KVCache
from primechat.model.losses import cap_logits, sum_cross_entropy, token_cross_entropy
from primechat.protocols import Hook

if TYPE_CHECKING:
    from primechat.model.lora import Adapter

TABLE_FACTOR = 10  # nanochat: the rotary table reaches 10 x sequence_len
Rotary = tuple[Tensor, Tensor]  # cos and sin, (T, 1, D) or (B, T, 1, D)


class NoHook:
    """A hook that returns every tensor unchanged; used where nobody listens."""

    def wants(self, point: str) -> bool:
        """Return whether the hook wants a point that costs extra work to compute."""
        return False

    def __call__(self, point: str, x: Tensor) -> Tensor:
        """Return the tensor with which the forward pass continues."""
        return x


NO_HOOK = NoHook()


@dataclass(frozen=True)
class Context:
    """The positions of the tokens in one forward pass, and what each of them may read besides itself.

    Attributes:
        rotary: the rotary tables at the tokens' positions.
        n_before: number of tokens in the cache before this pass.
        cache: keys and values of the preceding tokens; None if the text begins with this pass.
        documents: the document of each token in packed rows; None if each row is one text.
    """

    rotary: Rotary
    n_before: Rows = 0
    cache: KVCache | None = None
    documents: Documents | None = None


def norm(x: Tensor) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) over the last dimension (Zhang & Sennrich 2019; no learned gain)."""
    if x.is_cpu:
        return fast_cpu.norm(x)
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Return x (B, T, H, D) with each pair of channels (j, j + D/2) rotated by minus its position's angle.

    Along D, the tables hold cos twice, and sin followed by -sin.
    """
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((b, a), dim=-1), sin)


class Linear(nn.Linear):
    """A linear map without bias that computes in the dtype of its input."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)
        self.adapter: Adapter | None = None  # set by model.lora

    def reset_parameters(self) -> None:
        """Draw the weights, except on the meta device, where torch would import SymPy (75 MB, seconds)."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return self.adapt(F.linear(x, self.weight.to(x.dtype)), x)

    def adapt(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y = W x plus what the adapters compute from x."""
        return y if self.adapter is None else self.adapter.add_to(y, x)

    def whole_weight(self) -> Tensor:
        """Return the weight, including what its adapters add."""
        return self.weight if self.adapter is None else self.adapter.make_whole(self.weight)


class Embedding(nn.Embedding):
    """A table of vectors; like `Linear`, it draws nothing on the meta device."""

    def reset_parameters(self) -> None:  # noqa: D102
        if not self.weight.is_meta:
            super().reset_parameters()


class Attention(nn.Module):
    """Causal self-attention with rotary positions and normalised queries and keys."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.name = f"layer.{layer}.attn"
        self.window = config.window(layer)
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.head_dim
        # The gain applies to queries and to keys, so it enters the scores squared.
        self.scale = config.qk_gain**2 / config.head_dim**0.5
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, config.kv_dim)
        self.c_v = Linear(config.n_embd, config.kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        if config.has_value_embedding(layer):
            self.ve_gate = Linear(GATE_CHANNELS, config.n_kv_head)

    def forward(self, u: Tensor, ve: Tensor | None, context: Context, hook: Hook) -> Tensor:
        """Return what attention adds to the residual stream, (B, T, C).

        Args:
            u: the normalised residual stream, (B, T, C).
            ve: the tokens' value embeddings in this layer, (B, T, K * D), or None.
            context: positions, and what each token may read.
            hook: called with each named tensor; what it returns is used in its place.
        """
        B, T, _ = u.shape

        # Each head's queries, keys and values.
        q, k, v = self.project(u)
        q = q.view(B, T, self.n_head, self.head_dim)  # (B, T, H, D)
        k = k.view(B, T, self.n_kv_head, self.head_dim)  # (B, T, K, D)
        v = v.view(B, T, self.n_kv_head, self.head_dim)  # (B, T, K, D)
        q, k = hook(f"{self.name}.q_raw", q), hook(f"{self.name}.k_raw", k)

        # Each token adds a gated embedding to its values. The gate reads a few channels of the
        # stream; it lies between 0 and 3.
        if ve is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(u[..., :GATE_CHANNELS]))  # (B, T, K)
            v = torch.addcmul(v, gate.unsqueeze(-1), ve.view_as(v))

        # Positions enter as a rotation. After the norm, a score depends only on the angle between
        # query and key.
        q = hook(f"{self.name}.q", norm(rotate(q, context.rotary)))
        k = hook(f"{self.name}.k", norm(rotate(k, context.rotary)))
        v = hook(f"{self.name}.v", v)

        # Every token reads itself and the tokens before it.
        out = self.read(q, k, v, context, hook)  # (B, T, H, D)

        # Concatenate the heads and mix them.
        out = hook(f"{self.name}.heads", out)
        return hook(f"{self.name}.out", self.c_proj(out.reshape(B, T, -1)))

    def project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, T, H * D), keys and values (B, T, K * D)."""
        if not u.is_cpu:
            return self.c_q(u), self.c_k(u), self.c_v(u)
        q, k, v = fast_cpu.project(u, (self.c_q.weight, self.c_k.weight, self.c_v.weight))
        return self.c_q.adapt(q, u), self.c_k.adapt(k, u), self.c_v.adapt(v, u)

    def read(self, q: Tensor, k: Tensor, v: Tensor, context: Context, hook: Hook) -> Tensor:
        """Return, for each query, the weighted sum of the values it may read, (B, T, H, D)."""
        # With a cache, keys and values include those of all earlier tokens.
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)  # (B, S, K, D)
        documents = None if context.documents is None else context.documents.ids

        # `attend` does not return the weights, so they are computed separately for a hook.
        if hook.wants(f"{self.name}.weights"):
            weights = attention_weights(
                q,
                k,
                scale=self.scale,
                window=self.window,
                n_before=context.n_before,
                document_ids=documents,
            )
            hook(f"{self.name}.weights", weights)  # (B, H, T, S)

        return attend(
            q,
            k,
            v,
            scale=self.scale,
            window=self.window,
            n_before=context.n_before,
            document_ids=documents,
        )


class MLP(nn.Module):
    """Two linear maps with relu(x)^2 between them (So et al. 2021)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.name = f"layer.{layer}.mlp"
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, u: Tensor, hook: Hook) -> Tensor:
        """Return what the MLP adds to the residual stream, (B, T, C), given the normalised stream u."""
        hidden = hook(f"{self.name}.pre", self.c_fc(u))  # (B, T, 4C)
        return hook(f"{self.name}.out", self.c_proj(F.relu(hidden).square()))


class Block(nn.Module):
    """Attention, then MLP; both read the normalised stream and add to it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attn, self.mlp = Attention(config, layer), MLP(config, layer)

    def forward(self, x: Tensor, ve: Tensor | None, context: Context, hook: Hook) -> Tensor:
        """Return the residual stream after this block, (B, T, C)."""
        x = x + self.attn(norm(x), ve, context, hook)
        x = x + self.mlp(norm(x), hook)
        return hook(f"layer.{self.layer}.resid", x)


class GPT(nn.Module):
    """A language model whose parameters have the same keys as nanochat's checkpoints."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        # In training: recompute each block in the backward pass instead of keeping its activations.
        self.checkpoint_blocks = False

        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        if config.smear:
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.zeros(1))

        rows = config.padded_vocab
        blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.transformer = nn.ModuleDict({"wte": Embedding(rows, config.n_embd), "h": blocks})
        self.lm_head = Linear(config.n_embd, rows)
        if config.smear:
            self.smear_gate = Linear(SMEAR_CHANNELS, 1)
        layers = [i for i in range(config.n_layer) if config.has_value_embedding(i)]
        self.value_embeds = nn.ModuleDict({str(i): Embedding(rows, config.kv_dim) for i in layers})

        # Both are built on first use; the second serves `decode_token`.
        self.rotary: Rotary | None = None
        self.token_weights: list[fast_cpu.LayerWeights] | None = None

    # ---- the forward pass

    def hidden(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        hook: Hook = NO_HOOK,
        documents: Documents | None = None,
    ) -> Tensor:
        """Return the normalised final states (B, T, C) of ids (B, T).

        Args:
            ids: (B, T) int64.
            cache: the tokens read before; ids are read after them and added to the cache.
            hook: called at the points that `interp.hooks` names; it may replace the tensors.
            documents: in packed rows, the document of each token; documents do not read each other.

        Raises:
            ValueError: there are more tokens than the rotary table or the cache can hold.
        """
        c = self.config
        context = self.open_context(ids, cache, documents)

        # The first residual stream, which blocks may mix in again.
        x = first = middle = hook("embed", self.embed(ids, context, hook))  # (B, T, C)
        if c.residual_scalars:
            keep, again = self.resid_lambdas.to(x.dtype), self.x0_lambdas.to(x.dtype)  # (L,)

        # The blocks, each with its residual scalars and value embedding where the config has them.
        for i, block in enumerate(self.blocks):
            if c.residual_scalars:
                x = torch.addcmul(x * keep[i], first, again[i])
            ve = None
            if c.has_value_embedding(i):
                ve = self.value_embeds[str(i)](ids).to(x.dtype)  # (B, T, K * D)
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, ve, context, hook, use_reentrant=False)
            else:
                x = block(x, ve, context, hook)
            if i == c.n_layer // 2:
                middle = x

        # Backout subtracts a share of the stream as it was in the middle of the network.
        if c.backout:
            x = x - self.backout_lambda.to(x.dtype) * middle
        if cache is not None:
            cache.lengths = [n + ids.size(1) for n in cache.lengths]
        return hook("final", norm(hook("last", x)))

    def open_context(
        self, ids: Tensor, cache: KVCache | None, documents: Documents | None
    ) -> Context:
        """Return the positions of ids (B, T) and what they may read."""
        # Check that the new tokens fit.
        n_new, room = ids.size(1), self.max_context
        n_held = 0
        if cache is not None:
            n_held, room = max(cache.lengths), min(room, cache.capacity)
        if n_held + n_new > room:
            raise ValueError(
                f"{n_held + n_new} tokens do not fit in {room} places; shorten the text."
            )

        # Find the position of each token: one slice if all rows are equally long, else an index per row.
        n_before: Rows = n_held
        at: slice | Tensor = slice(n_held, n_held + n_new)
        if documents is not None:
            at = documents.places  # (B, T)
        elif cache is not None and not cache.is_even:
            n_before = torch.tensor(cache.lengths, device=ids.device)  # (B,)
            at = n_before[:, None] + torch.arange(n_new, device=ids.device)  # (B, T)
        cos, sin = self.rotary_table()
        return Context((cos[at], sin[at]), n_before, cache, documents)

    def embed(self, ids: Tensor, context: Context, hook: Hook = NO_HOOK) -> Tensor:
        """Return the first residual stream (B, T, C): normalised embeddings, smeared if `config.smear` is on.

        Smearing adds to each embedding a gated share of the preceding one in the same text.
        """
        e = hook("token", norm(self.transformer["wte"](ids).to(self.compute_dtype)))
        if not self.config.smear:
            return e

        # The embedding before the first token: zero, or the last one that the cache has read.
        cache, documents = context.cache, context.documents
        before = torch.zeros_like(e[:, :1])
        if cache is not None:
            if cache.last_embed is not None:
                before = cache.last_embed[:, None]
            cache.last_embed = e[:, -1]

        # The first token of a packed document takes nothing from the document before it.
        share = torch.sigmoid(self.smear_gate(e[..., :SMEAR_CHANNELS]))  # (B, T, 1)
        share = share * self.smear_lambda.to(e.dtype)
        if documents is not None:
            share = share * (documents.places > 0)[..., None]
        return e + share * torch.cat((before, e[:, :-1]), dim=1)

    def logits(self, h: Tensor) -> Tensor:
        """Return the capped float32 logits (..., V) of normalised final states (..., C)."""
        return cap_logits(self.lm_head(h)[..., : self.config.vocab_size], self.config.logit_softcap)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the float32 logits (B, T, V) of ids (B, T) int64."""
        return self.logits(self.hidden(ids))

    def loss(
        self, ids: Tensor, targets: Tensor, reduction: str = "mean", bos_id: int = -1
    ) -> Tensor:
        """Return the cross-entropy in nats.

        Args:
            ids: (B, T) int64.
            targets: (B, T) int64; -1 is ignored.
            reduction: "mean" over the targets that are not ignored, "sum", or "none" for (B, T) with 0 where
                a target is ignored.
            bos_id: the id that begins a document; documents packed into a row then do not read each other.
                With -1 each row is one text.
        """
        documents = None if bos_id < 0 else Documents.find(ids, bos_id)
        h = self.hidden(ids, documents=documents)
        head = (
            self.lm_head.weight,
            targets,
            self.config.logit_softcap,
            self.config.vocab_size,
        )
        if reduction == "none":
            return token_cross_entropy(h, *head)
        total = sum_cross_entropy(h, *head)
        return total if reduction == "sum" else total / (targets >= 0).sum().clamp(min=1)

    # Not in inference mode: a table first needed for decoding must serve training too.
    @torch.inference_mode(False)
    def rotary_table(self) -> Rotary:
        """Return the tables cos and sin, (10 * sequence_len, 1, D), in the compute dtype.

        They are built once per device and dtype.

        Source: nanochat, gpt.py: angle t * base^(-2j/D) in float32, rounded to rope_dtype.
        """
        device, dtype = self.device, self.compute_dtype
        if self.rotary is not None:
            if self.rotary[0].device == device and self.rotary[0].dtype == dtype:
                return self.rotary

        # The angle of each position and pair of channels.
        c = self.config
        even = torch.arange(0, c.head_dim, 2, dtype=torch.float32, device=device)
        speed = c.rope_base ** -(even / c.head_dim)  # (D / 2,)
        place = torch.arange(self.max_context, dtype=torch.float32, device=device)
        angle = place[:, None] * speed  # (10 * sequence_len, D / 2)

        # Round cos and sin as the config says, and lay them out as `rotate` reads them.
        kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "compute": dtype}
        cos = angle.cos().to(kinds[c.rope_dtype]).to(dtype)[:, None]
        sin = angle.sin().to(kinds[c.rope_dtype]).to(dtype)[:, None]
        self.rotary = torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)
        return self.rotary

    # ---- decoding with a cache

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Return an empty cache for `batch_size` rows of up to `capacity` tokens."""
        c = self.config
        # On a CPU, SDPA takes 3 to 4 times as long for a bfloat16 query as for a float32 one.
        dtype = torch.float32 if self.device.type == "cpu" else self.compute_dtype
        shape = (c.n_layer, batch_size, c.n_kv_head, capacity, c.head_dim)
        return KVCache(*shape, dtype=dtype, device=self.device)

    @torch.inference_mode()
    def advance(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Read ids (B, T) into the cache and return the float32 logits (B, V) after the last token."""
        room = min(self.max_context, cache.capacity)
        is_frozen = not (self.lm_head.weight.requires_grad or self.training)
        one_more = ids.size(1) == 1 and min(cache.lengths) > 0 and max(cache.lengths) < room
        if is_frozen and one_more:
            return self.logits(self.decode_token(ids, cache))
        return self.logits(self.hidden(ids, cache)[:, -1])

    @torch.inference_mode()
    def read_padded(self, ids: Tensor, counts: list[int], cache: KVCache) -> Tensor:
        """Read rows of different lengths into an empty cache and return the logits (B, V) after each row.

        Args:
            ids: (B, T) int64; row b holds counts[b] tokens, then padding.
            counts: number of real tokens in each row.
            cache: an empty cache of B rows.

        The padding follows the tokens of its row, so they never read it; later tokens overwrite it.
        """
        h = self.hidden(ids, cache)
        rows = torch.arange(len(counts), device=ids.device)
        last = torch.tensor(counts, device=ids.device) - 1

        # Set the cache to what each row holds without its padding.
        cache.lengths = list(counts)
        if cache.last_embed is not None:
            cache.last_embed = norm(self.transformer["wte"](ids[rows, last]).to(self.compute_dtype))
        return self.logits(h[rows, last])

    def decode_token(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Return the normalised final states (B, C) of one new token per row, ids (B, 1), as `hidden` does.

        A small model spends half its time in Python; these are the same formulas in fewer calls.
        """
        if self.token_weights is None:
            self.token_weights = [
                lay_out_weights(self, cast(Block, block)) for block in self.blocks
            ]
        context = self.open_context(ids, cache, None)
        cos, sin = context.rotary  # (1, 1, D) or (B, 1, 1, D)
        rotary = cos.squeeze(-3), sin.squeeze(-3)  # (1, D) or (B, 1, D)
        x = self.embed(ids, context)[:, 0]  # (B, C)
        x, middle = fast_cpu.run_layers(x, ids[:, 0], self.token_weights, rotary, cache)
        if self.config.backout:
            x = x - self.backout_lambda * middle
        cache.lengths = [n + 1 for n in cache.lengths]
        return norm(x)

    def forget_token_weights(self) -> None:
        """Drop the weights that `decode_token` prepared; call this after changing weights or adapters."""
        self.token_weights = None

    # ---- making one

    @classmethod
    def from_state(
        cls,
        config: GPTConfig,
        state: dict[str, Tensor],
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> GPT:
        """Return a frozen model, in eval mode, from a state dictionary with nanochat's keys.

        The tensors are cast one at a time and `state` is emptied, so that no second copy of the weights is
        held. `dtype` is used for parameters and compute.
        """
        with torch.device("meta"):
            model = cls(config)
        for key in list(state):
            state[key] = state[key].to(device=device, dtype=dtype)
        model.load_state_dict(state, strict=True, assign=True)
        state.clear()
        model.compute_dtype = dtype
        return model.requires_grad_(False).eval()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, init: InitConfig | None = None) -> None:
        """Draw new weights according to `init`, or to primechat's own InitConfig if it is None."""
        named = self.named_parameters()
        draw_weights(named, self.config.n_embd, init or InitConfig(), generator)

    # ---- the properties of every language model (protocols.LanguageModel)

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers."""
        return cast(nn.ModuleList, self.transformer["h"])

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.config.vocab_size

    @property
    def sequence_len(self) -> int:
        """Tokens of context in training."""
        return self.config.sequence_len

    @property
    def max_context(self) -> int:
        """Maximum number of tokens that can be read: the length of the rotary table."""
        return TABLE_FACTOR * self.config.sequence_len

    @property
    def device(self) -> torch.device:
        """The device that holds the parameters."""
        return self.lm_head.weight.device


# Not in inference mode: the weights become views of the tensors made here, and may change later.
@torch.inference_mode(False)
@torch.no_grad()
def lay_out_weights(model: GPT, block: Block) -> fast_cpu.LayerWeights:
    """Return a frozen block's weights as `fast_cpu.run_layers` takes them; only adapted ones are copied."""
    attn, mlp, c = block.attn, block.mlp, model.config
    layer = block.layer
    has_table = c.has_value_embedding(layer)
    return fast_cpu.LayerWeights(
        layer=layer,
        n_head=attn.n_head,
        n_kv_head=attn.n_kv_head,
        scale=attn.scale,
        window=attn.window,
        qkv=join_weights(attn.c_q, attn.c_k, attn.c_v),
        proj=attn.c_proj.whole_weight().T,
        fc=mlp.c_fc.whole_weight(),
        out=mlp.c_proj.whole_weight().T,
        keep=float(model.resid_lambdas[layer]) if c.residual_scalars else None,
        again=float(model.x0_lambdas[layer]) if c.residual_scalars else 0.0,
        table=cast(Embedding, model.value_embeds[str(layer)]).weight if has_table else None,
        gate=attn.ve_gate.weight if has_table else None,
    )


def join_weights(*maps: Linear) -> Tensor:
    """Return the weights of frozen linear maps stacked along their output, including what adapters add.

    Without adapters, the maps' own weights become views of the result, so that no weight is held twice.
    """
    joined = torch.cat([f.whole_weight() for f in maps])
    if all(f.adapter is None for f in maps):
        for f, part in zip(maps, joined.split([len(f.weight) for f in maps]), strict=True):
            f.weight = nn.Parameter(part, requires_grad=False)
    return joined
