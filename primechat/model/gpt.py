"""The GPT: integers to logits and losses, both generations of nanochat behind named switches.

Hides: the forward pass, with and without a cache. Reference: nanochat (October 2025 and 2026), whose
state_dict keys it keeps; Vaswani et al. 2017; Su et al. 2021 (rotary positions); Henry et al. 2020 (norm on
queries and keys).

Numerics        parameters   compute    rotary table   loss      cache
CPU fp32        float32      float32    rope_dtype     float32   float32
CPU bf16 units  float32      bfloat16   rope_dtype     float32   float32
MPS             float32      float32    rope_dtype     float32   float32
CUDA            float32      bfloat16   rope_dtype     float32   bfloat16
A model loaded for inference holds its parameters in the compute dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from primechat.config import GPTConfig
from primechat.model.attention import KVCache, Segments, TokenStep, attend, rotate, weigh
from primechat.model.losses import cap_logits, sum_cross_entropy, token_cross_entropy
from primechat.protocols import Tap

if TYPE_CHECKING:
    from primechat.model.lora import Adapter

EPS = 1.1920929e-07  # 2 ** -23: what nanochat's eps=None comes to in float32 (measured with torch 2.13)
EPS_HERE = torch.tensor(EPS, device="cpu")
SMEAR_CHANNELS = 24  # nanochat: the smear's gate reads the first 24 channels
MANY_ROWS = 16  # measured at widths 256 and 1280: with fewer, the weights are best on the right
GATE_CHANNELS = 12  # nanochat: a value embedding's gate reads the first 12
Rotary = tuple[Tensor, Tensor]  # cos and sin
Reach = KVCache | Segments | None  # what else attention reads, or may not read
TABLE_FACTOR = 10  # nanochat: the rotary table reaches 10 x sequence_len


def norm(x: Tensor) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) over the last dimension; nothing is learned."""
    if x.dtype != torch.float32 or not x.is_cpu:
        return F.rms_norm(x, (x.size(-1),), eps=EPS)
    # the same in fewer passes over the data and in half as many calls
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.addcmul(EPS_HERE, length, length, value=1 / x.size(-1)).rsqrt()


class Linear(nn.Linear):
    """A map without bias that computes in the dtype of its input."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)
        self.adapter: Adapter | None = None  # what model.lora hangs beside it

    def reset_parameters(self) -> None:
        """Draw nothing on the meta device: there it makes torch import SymPy, 75 MB and seconds."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = F.linear(x, self.weight.to(x.dtype))
        return y if self.adapter is None else self.adapter.add_to(y, x)

    def whole_weight(self) -> Tensor:
        """Return the weight with what its adapters add."""
        return self.weight if self.adapter is None else self.adapter.make_whole(self.weight)


def map_rows(x: Tensor, weight: Tensor) -> Tensor:
    """Return x (B, C) @ weight (N, C).T; on a CPU, in float32, many rows are a sixth faster transposed."""
    many = x.size(0) >= MANY_ROWS and x.is_cpu and x.dtype == torch.float32
    return (weight @ x.T).T if many else F.linear(x, weight)


class Embedding(nn.Embedding):
    """A table of vectors; on the meta device nothing is drawn either."""

    def reset_parameters(self) -> None:  # noqa: D102
        if not self.weight.is_meta:
            super().reset_parameters()


class Attention(nn.Module):
    """Causal self-attention with rotary positions and normed queries and keys."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.left = layer, config.window(layer)
        self.n_head, self.n_kv_head, self.head_dim = (
            config.n_head,
            config.n_kv_head,
            config.head_dim,
        )
        self.scale = (
            config.qk_gain**2 / config.head_dim**0.5
        )  # the gain of queries times that of keys
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, config.kv_dim)
        self.c_v = Linear(config.n_embd, config.kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.qkv: Tensor | None = None  # the three weights in one, where none of them changes
        if config.has_value_embedding(layer):
            self.ve_gate = Linear(GATE_CHANNELS, config.n_kv_head)

    @torch.no_grad()
    def merge_weights(self) -> None:
        """Lay the weights of queries, keys and values side by side in one tensor, as views of it."""
        maps = (self.c_q, self.c_k, self.c_v)
        self.qkv = torch.cat([f.weight for f in maps])
        for f, part in zip(maps, self.qkv.split([len(f.weight) for f in maps]), strict=True):
            f.weight = nn.Parameter(part, requires_grad=False)

    def forward(
        self, u: Tensor, ve: Tensor | None, rotary: Rotary, cache: Reach, tap: Tap | None
    ) -> Tensor:
        """Map the normed stream u (B, T, C) to what attention adds to it (B, T, C)."""
        B, T, _ = u.shape
        weight = self.qkv
        if weight is None or self.c_q.weight.requires_grad:
            weight = torch.cat([self.c_q.weight, self.c_k.weight, self.c_v.weight])
        heads = F.linear(u, weight.to(u.dtype))
        maps = (self.c_q, self.c_k, self.c_v)
        if any(f.adapter is not None for f in maps):
            pairs = zip(maps, heads.split([len(f.weight) for f in maps], dim=-1), strict=True)
            heads = torch.cat(
                [y if f.adapter is None else f.adapter.add_to(y, u) for f, y in pairs], dim=-1
            )
        heads = heads.view(B, T, -1, self.head_dim)
        qk, v = heads.split(
            [self.n_head + self.n_kv_head, self.n_kv_head], dim=2
        )  # (B, T, H + K, D)
        if ve is not None:
            gate = torch.sigmoid(self.ve_gate(u[..., :GATE_CHANNELS]))  # (B, T, K)
            v = torch.addcmul(v, gate.unsqueeze(-1), ve.view_as(v), value=3)
        q, k = norm(rotate(qk, *rotary)).split([self.n_head, self.n_kv_head], dim=2)
        if tap is not None:
            here = f"layer.{self.layer}.attn."
            tap(here + "qk_raw", qk)
            q, k, v = tap(here + "q", q), tap(here + "k", k), tap(here + "v", v)
            if here + "weights" in tap.extra:
                tap(here + "weights", weigh(q, k, self.left, self.scale))
        if cache is None:
            out = attend(q, k, v, self.left, self.scale)
        else:
            out = cache.attend(self.layer, q, k, v, self.left, self.scale)
        if tap is None:
            return self.c_proj(out.reshape(B, T, -1))
        return tap(here + "out", self.c_proj(tap(here + "heads", out).reshape(B, T, -1)))


class MLP(nn.Module):
    """Two maps with relu(x)^2 between (So et al. 2021)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, u: Tensor, here: str = "", tap: Tap | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        if tap is None:
            return self.c_proj(F.relu(self.c_fc(u)).square())
        pre = tap(here + "pre", self.c_fc(u))  # (B, T, 4C)
        return tap(here + "out", self.c_proj(F.relu(pre).square()))


class Block(nn.Module):
    """Attention, then MLP, each reading the normed stream and adding to it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(config, layer), MLP(config)

    def forward(
        self, x: Tensor, ve: Tensor | None, rotary: Rotary, cache: Reach, tap: Tap | None
    ) -> Tensor:
        """Map the residual stream (B, T, C) to the next one."""
        x = x + self.attn(norm(x), ve, rotary, cache, tap)
        if tap is None:
            return x + self.mlp(norm(x))
        here = f"layer.{self.attn.layer}."
        return tap(here + "resid", x + self.mlp(norm(x), here + "mlp.", tap))


class LayerPlan:
    """One block's weights and numbers laid out for `GPT.decode_token`; only adapted weights are copied."""

    def __init__(self, block: Block, model: GPT, layer: int) -> None:
        attn, mlp, config = block.attn, block.mlp, model.config
        self.layer, self.left, self.scale = layer, attn.left, attn.scale
        self.n_head, self.n_kv_head, self.head_dim = (
            config.n_head,
            config.n_kv_head,
            config.head_dim,
        )
        maps = (attn.c_q, attn.c_k, attn.c_v)
        plain = attn.qkv is not None and all(f.adapter is None for f in maps)
        self.qkv = cast(Tensor, attn.qkv) if plain else torch.cat([f.whole_weight() for f in maps])
        self.proj, self.fc = attn.c_proj.whole_weight().T, mlp.c_fc.whole_weight()
        self.out = mlp.c_proj.whole_weight().T
        self.keep = float(model.resid_lambdas[layer]) if config.residual_scalars else None
        self.again = float(model.x0_lambdas[layer]) if config.residual_scalars else 0.0
        has_table = config.has_value_embedding(layer)
        self.table = (
            cast(nn.Embedding, model.value_embeds[str(layer)]).weight if has_table else None
        )
        self.gate = attn.ve_gate.weight if has_table else None

    def run(
        self, x: Tensor, ids: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, step: TokenStep
    ) -> Tensor:
        """Map the stream x (B, C) of one token a row to the next one, and store its keys and values."""
        u, B = norm(x), x.size(0)
        heads = F.linear(u, self.qkv).view(B, -1, self.head_dim)  # (B, H + 2K, D)
        n_turned = self.n_head + self.n_kv_head
        qk, v = heads[:, :n_turned], heads[:, n_turned:]
        if self.table is not None and self.gate is not None:
            gate = torch.sigmoid(F.linear(u[:, :GATE_CHANNELS], self.gate))  # (B, K)
            v = torch.addcmul(
                v, gate.unsqueeze(-1), F.embedding(ids, self.table).view_as(v), value=3
            )
        qk = norm(torch.addcmul(qk * cos, torch.roll(qk, self.head_dim // 2, -1), sin))
        q, k = qk[:, : self.n_head], qk[:, self.n_head :]
        out = cache.attend_token(self.layer, q, k, v, self.left, self.scale, step)
        x = torch.addmm(x, out.reshape(B, -1), self.proj)
        return torch.addmm(x, map_rows(norm(x), self.fc).relu_().square_(), self.out)


class GPT(nn.Module):
    """A language model; its parameters carry the keys of nanochat's checkpoints."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        self.checkpoint_blocks = (
            False  # in training, compute each block again instead of keeping its inside
        )
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
        self.rotary: Rotary | None = None
        self.plan: list[LayerPlan] | None = None  # of `decode_token`, once the weights are final

    @classmethod
    def from_state(
        cls,
        config: GPTConfig,
        state: dict[str, Tensor],
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> GPT:
        """Build a model around tensors by nanochat's keys, one cast at a time, without a second copy of the
        weights: the dictionary is emptied on the way. `dtype` is of parameters and compute.
        """
        with torch.device("meta"):
            model = cls(config)
        for key in list(state):
            state[key] = state[key].to(device=device, dtype=dtype)
        model.load_state_dict(state, strict=True, assign=True)
        state.clear()
        model.compute_dtype = dtype
        for block in model.blocks:
            cast(Block, block).attn.merge_weights()
        return model.requires_grad_(False).eval()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw fresh weights.

        Source: nanochat HEAD: uniform blocks of std 1/sqrt(n_embd), zero outputs, so that each block starts
            as nothing.
        """
        bound = (3 / self.config.n_embd) ** 0.5
        for name, p in self.named_parameters():
            if name in ("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda"):
                p.fill_(
                    {"resid_lambdas": 1.0, "x0_lambdas": 0.1, "backout_lambda": 0.2}.get(name, 0.0)
                )
            elif name == "transformer.wte.weight":
                p.normal_(std=0.8, generator=generator)
            elif name == "lm_head.weight":
                p.normal_(std=0.001, generator=generator)
            elif "c_proj" in name or name.endswith("gate.weight"):
                p.zero_()
            else:
                p.uniform_(-bound, bound, generator=generator)

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers."""
        return cast(nn.ModuleList, self.transformer["h"])

    # what every language model offers (protocols.LanguageModel)

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
        """Most tokens that can be read: the length of the rotary table."""
        return TABLE_FACTOR * self.config.sequence_len

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.lm_head.weight.device

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Return an empty cache for `batch_size` rows of up to `capacity` tokens."""
        c, dtype = self.config, torch.float32 if self.device.type == "cpu" else self.compute_dtype
        shape = (c.n_layer, batch_size, c.n_kv_head, capacity, c.head_dim)
        return KVCache(*shape, dtype=dtype, device=self.device)

    @torch.inference_mode()
    def advance(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Read ids (B, T) into the cache; return the float32 logits (B, V) that follow the last one."""
        frozen = not (self.lm_head.weight.requires_grad or self.training)
        room = min(self.max_context, cache.capacity)
        if frozen and ids.size(1) == 1 and min(cache.lengths) > 0 and max(cache.lengths) < room:
            if self.plan is None:
                self.plan = [
                    LayerPlan(cast(Block, block), self, i) for i, block in enumerate(self.blocks)
                ]
            return self.logits(self.decode_token(ids, cache, self.plan))
        return self.logits(self.hidden(ids, cache)[:, -1])

    @torch.inference_mode()
    def read_padded(self, ids: Tensor, counts: list[int], cache: KVCache) -> Tensor:
        """Read of each row of ids (B, T) its first `counts` into an empty cache; return logits (B, V)."""
        # what pads a row stands behind its tokens, which do not see it, and is overwritten by what comes
        h, rows = self.hidden(ids, cache), torch.arange(len(counts), device=ids.device)
        last, cache.lengths = torch.tensor(counts, device=ids.device) - 1, list(counts)
        if cache.last_embed is not None:
            cache.last_embed = norm(self.transformer["wte"](ids[rows, last]).to(self.compute_dtype))
        return self.logits(h[rows, last])

    def decode_token(self, ids: Tensor, cache: KVCache, plan: list[LayerPlan]) -> Tensor:
        """Do what `hidden` does for one token a row, ids (B, 1); return (B, C).

        The same formulas in two dimensions, in few calls: a small model spends half its time in Python.
        """
        step = TokenStep(cache.lengths, self.device)
        cos, sin = (
            table[step.at] for table in self.build_rotary()
        )  # (B, 1, D), or (1, D) for one length
        x = x0 = middle = self.embed(ids, cache)[:, 0]  # (B, C)
        flat = ids[:, 0]
        for i, layer in enumerate(plan):
            if layer.keep is not None:
                x = torch.add(x * layer.keep, x0, alpha=layer.again)
            x = layer.run(x, flat, cos, sin, cache, step)
            if i == self.config.n_layer // 2:
                middle = x
        if self.config.backout:
            x = x - self.backout_lambda * middle
        cache.lengths = [n + 1 for n in cache.lengths]
        return norm(x)

    @torch.inference_mode(False)  # a table first needed in decoding must serve training too
    def build_rotary(self) -> Rotary:
        """Return the tables cos and sin, (10 * sequence_len, 1, D), in the compute dtype, made once a
        device.

        Source: nanochat, gpt.py: angle t * base^(-2j/D) in float32, rounded to rope_dtype.
        """
        device, dtype = self.device, self.compute_dtype
        if self.rotary is None or self.rotary[0].device != device or self.rotary[0].dtype != dtype:
            half = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=device)
            speed = self.config.rope_base ** -(half / self.config.head_dim)
            angle = (
                torch.arange(self.max_context, dtype=torch.float32, device=device)[:, None] * speed
            )
            kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "compute": dtype}
            kind = kinds[self.config.rope_dtype]
            cos, sin = (f(angle).to(kind).to(dtype)[:, None] for f in (torch.cos, torch.sin))
            self.rotary = torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)
        return self.rotary

    def embed(self, ids: Tensor, cache: Reach = None, tap: Tap | None = None) -> Tensor:
        """Return the first residual stream (B, T, C): normed embeddings, smeared where the switch is on."""
        e = norm(self.transformer["wte"](ids).to(self.compute_dtype))
        if tap is not None:
            e = tap("token", e)
        if not self.config.smear:
            return e
        first = torch.zeros_like(e[:, :1])
        if isinstance(cache, KVCache) and cache.last_embed is not None:
            first = cache.last_embed[:, None]
        gate = torch.sigmoid(self.smear_gate(e[..., :SMEAR_CHANNELS])) * self.smear_lambda.to(
            e.dtype
        )
        if isinstance(cache, KVCache):
            cache.last_embed = e[:, -1]
        elif cache is not None:
            gate = (
                gate * (cache.at > 0)[..., None]
            )  # the first token of a segment has none before it
        return e + gate * torch.cat((first, e[:, :-1]), dim=1)

    def hidden(self, ids: Tensor, cache: Reach = None, tap: Tap | None = None) -> Tensor:
        """Return the normed final states (B, T, C) of ids (B, T); with a cache, ids go behind what it holds,
        with segments, what shares a row is kept apart. A tap sees, and may change, what passes the points
        that `metrics.probes` names.

        Raises:
            ValueError: more tokens than the rotary table or the cache has room for.
        """
        B, T = ids.shape
        held = cache if isinstance(cache, KVCache) else None
        lengths = [0] if held is None else held.lengths
        room = self.max_context if held is None else min(self.max_context, held.capacity)
        if max(lengths) + T > room:
            raise ValueError(
                f"{max(lengths) + T} tokens do not fit in {room} places; shorten the text."
            )
        cos, sin = self.build_rotary()
        if isinstance(cache, Segments):
            rotary = cos[cache.at], sin[cache.at]  # (B, T, 1, D)
        elif min(lengths) == max(lengths):
            rotary = cos[lengths[0] : lengths[0] + T], sin[lengths[0] : lengths[0] + T]
        else:
            at = torch.tensor(lengths, device=ids.device)[:, None] + torch.arange(
                T, device=ids.device
            )
            rotary = cos[at], sin[at]  # (B, T, 1, D)
        x = self.embed(ids, cache, tap)
        x0 = middle = x = x if tap is None else tap("embed", x)
        if self.config.residual_scalars:
            keep, again = (
                self.resid_lambdas.to(x.dtype).unbind(),
                self.x0_lambdas.to(x.dtype).unbind(),
            )
        for i, block in enumerate(self.blocks):
            if self.config.residual_scalars:
                x = torch.addcmul(x * keep[i], x0, again[i])
            ve = (
                self.value_embeds[str(i)](ids).to(x.dtype)
                if self.config.has_value_embedding(i)
                else None
            )
            inside, spare = (
                (x, ve, rotary, cache, tap),
                self.checkpoint_blocks and torch.is_grad_enabled(),
            )
            x = checkpoint(block, *inside, use_reentrant=False) if spare else block(*inside)
            if i == self.config.n_layer // 2:
                middle = x
        if self.config.backout:
            x = x - self.backout_lambda.to(x.dtype) * middle
        if held is not None:
            held.lengths = [n + T for n in held.lengths]
        return norm(x) if tap is None else tap("final", norm(tap("last", x)))

    def logits(self, h: Tensor) -> Tensor:
        """Return float32 logits (..., V), capped, of normed final states (..., C)."""
        return cap_logits(self.lm_head(h)[..., : self.config.vocab_size], self.config.logit_softcap)

    def forward(self, ids: Tensor) -> Tensor:
        """Return float32 logits (B, T, V) of ids (B, T) int64."""
        return self.logits(self.hidden(ids))

    def loss(
        self, ids: Tensor, targets: Tensor, reduction: str = "mean", bos_id: int = -1
    ) -> Tensor:
        """Return the cross-entropy in nats.

        Args:
            ids: (B, T) int64.
            targets: (B, T) int64; -1 is ignored.
            reduction: mean over the targets that count, sum, or none for (B, T) with 0 where ignored.
            bos_id: what each of these begins is kept apart from its neighbours in the row; -1: nothing is.
        """
        h, c = self.hidden(ids, None if bos_id < 0 else Segments.split(ids, bos_id)), self.config
        head = (self.lm_head.weight, targets, c.logit_softcap, c.vocab_size)
        if reduction == "none":
            return token_cross_entropy(h, *head)
        total = sum_cross_entropy(h, *head)
        return total if reduction == "sum" else total / (targets >= 0).sum().clamp(min=1)
