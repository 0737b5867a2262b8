"""A model trained by timebox, in plain PyTorch: needs torch and safetensors, and nothing else of where it comes from.

    from modeling import GPT
    model = GPT.load(".")                       # the folder with config.json and model.safetensors
    logits = model(torch.tensor([[bos, ...]]))  # [B, T] token ids -> [B, T, vocabulary]

Ids are those of tokenizer.json (`tokenizers.Tokenizer.from_file`). The model expects the id `bos` of config.json before
the text, and at most seq_len tokens.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

# L layers, V vocabulary, D model width, KVH key-value heads; weights of one kind are one tensor for all layers.


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
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    @classmethod
    def load(cls, folder: str | Path) -> "GPT":
        """The model of an exported folder, in fp32 on the CPU."""
        folder = Path(folder)
        model = cls(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] token ids, T ≤ seq_len -> logits [B, T, V] in fp32."""
        config = self.config
        x = F.embedding(tokens, self.wte)
        if config["smear"]:
            x = x + self.lambda_s * F.pad(x, (0, 0, 1, -1))
        x0 = x = self.norm(x)
        for i, window in enumerate(config["windows"]):
            x = self.lambda_r[i] * x + self.lambda_0[i] * x0
            x = x + F.linear(self.attention(self.norm(x), tokens, i, window), self.w_out[i])
            x = x + F.linear(F.relu(F.linear(self.norm(x), self.w_fc[i])).square(), self.w_proj[i])
        logits = F.linear(self.norm(x), self.lm_head).float()
        return config["softcap"] * torch.tanh(logits / config["softcap"])

    def attention(self, x: Tensor, tokens: Tensor, i: int, window: int) -> Tensor:
        """Of layer `i`, before its output projection. A query sees itself and `window` keys back."""
        config = self.config
        B, T, _ = x.shape
        heads, kv_heads, head_dim = config["num_heads"], config["num_kv_heads"], config["head_dim"]
        qkv = F.linear(x, self.w_qkv[i]).view(B, T, heads + 2 * kv_heads, head_dim)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
        gated = sorted(config["ve_layers"] + config["bigram_layers"])
        if i in gated:
            gate = 2 * torch.sigmoid(F.linear(x[..., : config["gate_channels"]], self.w_gate[gated.index(i)]))
            if i in config["ve_layers"]:
                value = F.embedding(tokens, self.value_embeddings[config["ve_layers"].index(i)])
            else:
                value = F.embedding(self.pairs(tokens), self.bigram_embeddings[config["bigram_layers"].index(i)])
            v = v + gate[..., None] * value.view_as(v)
        if i in config["offset_layers"]:
            k = self.offset(k)
        q, k = self.norm(self.rotate(q)), self.norm(self.rotate(k))
        distance = torch.arange(T, device=x.device)[:, None] - torch.arange(T, device=x.device)
        mask = (distance >= 0) & (distance <= window)
        k, v = (y.repeat_interleave(heads // kv_heads, dim=2) for y in (k, v))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # [B, H, T, head_dim]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    def pairs(self, tokens: Tensor) -> Tensor:
        """Of each token and the one before, token 0 before the first, its row in the hashed tables."""
        before = F.pad(tokens, (1, -1))
        return (before * 36313 ^ tokens * 27191) % (self.config["bigram_rows"] * self.config["vocab_size"])

    def offset(self, k: Tensor) -> Tensor:
        """Of keys [B, T, KVH, head_dim] every other quarter is that of the token before; the first has its own."""
        before = torch.cat([k[:, :1], k[:, :-1]], dim=1)
        own, late = k.chunk(4, dim=-1), before.chunk(4, dim=-1)
        return torch.cat([own[0], late[1], own[2], late[3]], dim=-1)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary positions on [B, T, H, head_dim]: its halves are the two coordinates."""
        half = x.shape[-1] // 2
        base = torch.tensor(self.config["rotary_base"], dtype=torch.float64, device=x.device)
        speed = base ** -(torch.arange(half, dtype=torch.float64, device=x.device) / half)
        angle = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)[:, None, None] * speed
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x.split(half, dim=-1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)

    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config["norm_eps"])
