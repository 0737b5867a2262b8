"""A model trained by timebox, in plain PyTorch: needs torch, and safetensors to load it; nothing else of ours.

    from modeling import GPT, Cache
    model = GPT.load(".")                       # the folder with config.json and model.safetensors
    logits = model(torch.tensor([[bos, ...]]))  # [B, T] token ids -> [B, T, vocabulary]

    cache = Cache()                             # token by token: what was read is not computed again
    logits = model(prompt, cache)               # [B, T]
    logits = model(next_tokens, cache)          # [B, 1], and so on

Ids are those of tokenizer.json (`tokenizers.Tokenizer.from_file`). The model expects the id `bos` of config.json before
the text, and learned from rows of seq_len tokens. Of a longer text no layer sees more than the last seq_len + 1.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch, T time, S keys that are seen, D model width, KVH key-value heads, L layers, V vocabulary; weights of one kind
# are one tensor for all layers.

SPARE = 64  # tokens for which a layer's cache has room before it is moved


class Kept:
    """Of one layer the keys and values [B, KVH, S, head_dim] that its window still reaches."""

    def __init__(self):
        self.keys = self.values = None
        self.begin = self.end = 0  # of what is kept, inside the buffers

    def append(self, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """Keys and values of T more tokens. Returns all that these may see: at most `window` before them, and them."""
        seen = slice(max(self.begin, self.end - window), self.end + k.shape[2])
        if self.keys is not None and seen.stop <= self.keys.shape[2]:
            self.keys[:, :, self.end : seen.stop], self.values[:, :, self.end : seen.stop] = k, v
            self.begin, self.end = seen.start, seen.stop
            return self.keys[:, :, seen], self.values[:, :, seen]
        if self.keys is not None:
            before = slice(seen.start, self.end)
            k, v = torch.cat([self.keys[:, :, before], k], dim=2), torch.cat([self.values[:, :, before], v], dim=2)
        self.begin, self.end = 0, min(window, k.shape[2])
        self.keys, self.values = (F.pad(y[:, :, y.shape[2] - self.end :], (0, 0, 0, SPARE)) for y in (k, v))
        return k, v


class Cache:
    """What the tokens read so far leave for those to come."""

    def __init__(self):
        self.length = 0  # tokens read, padding too
        self.token: Tensor | None = None  # the last one, [B, 1]
        self.layers: dict[int, Kept] = {}
        self.last_keys: dict[int, Tensor] = {}  # of layers with a key offset, not rotated: [B, 1, KVH, head_dim]

    def reorder(self, rows: Tensor) -> None:
        """Row b goes on from what was row `rows[b]`."""
        if self.token is not None:
            self.token = self.token[rows]
        self.last_keys = {i: k[rows] for i, k in self.last_keys.items()}
        for kept in self.layers.values():
            kept.keys, kept.values = kept.keys[rows], kept.values[rows]


class Span:
    """Tokens [B, T] that are read together, and what every layer asks of them: where they are, and what they see."""

    def __init__(self, config: dict, tokens: Tensor, cache: Cache | None, starts: Tensor | None, dtype: torch.dtype):
        self.tokens, self.cache, self.starts = tokens, cache, starts
        begin = cache.length if cache else 0
        self.positions = torch.arange(begin, begin + tokens.shape[1], device=tokens.device)
        # The first of a text has none before it: [B or 1, T].
        self.first = self.positions == (torch.zeros_like(tokens[:1, 0]) if starts is None else starts)[:, None]
        token = tokens[:, :1] if cache is None or cache.token is None else cache.token
        self.before = torch.cat([token, tokens[:, :-1]], dim=1).masked_fill(self.first, 0)
        # Rotary positions, in fp64 on the CPU, since not every device has it: [T, 1, head_dim / 2].
        half = config["head_dim"] // 2
        speed = config["rotary_base"] ** -(torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(begin, begin + tokens.shape[1], dtype=torch.float64)[:, None, None] * speed
        self.cos, self.sin = (y.to(dtype).to(tokens.device) for y in (angles.cos(), angles.sin()))
        self.masks: dict[int, Tensor | None] = {}

    def mask(self, window: int) -> Tensor | None:
        """Which keys each query sees, itself and `window` back: [B or 1, 1, T, S], or None where it sees all S."""
        if window not in self.masks:
            self.masks[window] = self._mask(window)
        return self.masks[window]

    def _mask(self, window: int) -> Tensor | None:
        if len(self.positions) == 1 and self.starts is None:
            return None
        reached = min(window, self.cache.length) if self.cache else 0
        first = (self.cache.length if self.cache else 0) - reached
        keys = torch.arange(first, first + reached + len(self.positions), device=self.positions.device)
        distance = self.positions[:, None] - keys
        mask = ((distance >= 0) & (distance <= window))[None]
        if self.starts is not None:  # what stands in padding sees itself, for want of anything
            mask = mask & ((keys >= self.starts[:, None])[:, None] | (distance == 0))
        return mask[:, None]


class GPT(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        L, V, D = config["depth"], config["vocab_size"], config["d_model"]
        kv_heads, head_dim = config["num_kv_heads"], config["head_dim"]
        with_ve, with_bigrams = len(config["ve_layers"]), len(config["bigram_layers"])
        shapes = {
            "wte": (V, D),
            "value_embeddings": (with_ve, V, kv_heads * head_dim),
            "lm_head": (V, D),
            "w_qkv": (L, D + 2 * kv_heads * head_dim, D),
            "w_out": (L, D, D),
            "w_fc": (L, 4 * D, D),
            "w_proj": (L, D, 4 * D),
            "w_gate": (with_ve + with_bigrams, kv_heads, config["gate_channels"]),
            "lambda_r": (L,),
            "lambda_0": (L,),
            **({"lambda_s": (1,)} if config["smear"] else {}),
            **({"bigram_embeddings": (with_bigrams, config["bigram_rows"] * V, kv_heads * head_dim)}
               if with_bigrams else {}),
        }  # fmt: skip
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    @classmethod
    def load(cls, folder: str | Path) -> "GPT":
        """The model of an exported folder, in fp32 on the CPU."""
        from safetensors.torch import load_file

        folder = Path(folder)
        model = cls(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()

    def forward(self, tokens: Tensor, cache: Cache | None = None, starts: Tensor | None = None) -> Tensor:
        """[B, T] token ids -> logits [B, T, V] in fp32.

        Args:
            tokens: those of a whole text; with a cache, those that come after what it has read.
            cache: reads these tokens too.
            starts: [B], how many tokens of padding each row begins with, counted from the first that was ever read.
        """
        return self.logits(self.features(tokens, cache, starts))

    def logits(self, x: Tensor) -> Tensor:
        """Of features [..., D]."""
        softcap = self.config["softcap"]
        return softcap * torch.tanh(F.linear(x, self.lm_head).float() / softcap)

    def features(self, tokens: Tensor, cache: Cache | None = None, starts: Tensor | None = None) -> Tensor:
        """What the head reads, [B, T, D]; arguments as of `forward`."""
        config, span = self.config, Span(self.config, tokens, cache, starts, self.wte.dtype)
        x = F.embedding(tokens, self.wte)
        if config["smear"]:
            before = F.embedding(span.before, self.wte).masked_fill(span.first[..., None], 0)
            x = x + self.lambda_s[0] * before
        x0 = x = self.norm(x)
        for i in range(config["depth"]):
            x = self.lambda_r[i] * x + self.lambda_0[i] * x0
            x = x + F.linear(self.attention(self.norm(x), span, i), self.w_out[i])
            x = x + F.linear(F.relu(F.linear(self.norm(x), self.w_fc[i])).square(), self.w_proj[i])
        if cache is not None:
            cache.length, cache.token = cache.length + tokens.shape[1], tokens[:, -1:]
        return self.norm(x)

    def attention(self, x: Tensor, span: Span, i: int) -> Tensor:
        """Of layer `i`, before its output projection. A query sees itself and its window's number of keys back."""
        config, window = self.config, self.config["windows"][i]
        B, T, _ = x.shape
        heads, kv_heads, head_dim = config["num_heads"], config["num_kv_heads"], config["head_dim"]
        qkv = F.linear(x, self.w_qkv[i]).view(B, T, heads + 2 * kv_heads, head_dim)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
        gated = sorted(config["ve_layers"] + config["bigram_layers"])
        if i in gated:
            gate = 2 * torch.sigmoid(F.linear(x[..., : config["gate_channels"]], self.w_gate[gated.index(i)]))
            if i in config["ve_layers"]:
                value = F.embedding(span.tokens, self.value_embeddings[config["ve_layers"].index(i)])
            else:
                value = F.embedding(self.pairs(span), self.bigram_embeddings[config["bigram_layers"].index(i)])
            v = v + gate[..., None] * value.view_as(v)
        if i in config["offset_layers"]:
            k = self.offset(k, span, i)
        q, k = self.norm(self.rotate(q, span)), self.norm(self.rotate(k, span))
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # [B, KVH, T, head_dim]
        if span.cache is not None:
            k, v = span.cache.layers.setdefault(i, Kept()).append(k, v, window)
        # The heads that share a key's head are as many more queries: [B, KVH, shared * T, head_dim].
        shared, mask = heads // kv_heads, span.mask(window)
        q = q.view(B, T, kv_heads, shared, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
        mask = mask if mask is None else mask.repeat(1, 1, shared, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.view(B, kv_heads, shared, T, head_dim).permute(0, 3, 1, 2, 4).flatten(2)

    def pairs(self, span: Span) -> Tensor:
        """Of each token and the one before, token 0 before the first, its row in the hashed tables."""
        rows = self.config["bigram_rows"] * self.config["vocab_size"]
        return (span.before * 36313 ^ span.tokens * 27191) % rows

    def offset(self, k: Tensor, span: Span, i: int) -> Tensor:
        """Of keys [B, T, KVH, head_dim] every other quarter is that of the token before; the first has its own."""
        last = k[:, :1]
        if span.cache is not None:
            last, span.cache.last_keys[i] = span.cache.last_keys.get(i, last), k[:, -1:]
        before = torch.where(span.first[..., None, None], k, torch.cat([last, k[:, :-1]], dim=1))
        own, late = k.chunk(4, dim=-1), before.chunk(4, dim=-1)
        return torch.cat([own[0], late[1], own[2], late[3]], dim=-1)

    def rotate(self, x: Tensor, span: Span) -> Tensor:
        """Rotary positions on [B, T, H, head_dim]: its halves are the two coordinates."""
        a, b = x.split(x.shape[-1] // 2, dim=-1)
        return torch.cat([a * span.cos + b * span.sin, b * span.cos - a * span.sin], dim=-1)

    def norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.config["norm_eps"])
