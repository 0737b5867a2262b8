"""The shape of the model. The defaults are the published GPU configuration: 50.3M parameters."""

from dataclasses import dataclass

GATE_CHANNELS = 32  # the value embedding's gate reads this many channels of the normed stream
SHORT_WINDOWS = (2, 4, 8)


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT, and where it starts. Raises ValueError, in one line, for shapes that do not fit together."""

    vocab_size: int = 8192
    seq_len: int = 2048
    depth: int = 8
    d_model: int = 512
    head_dim: int = 128
    num_kv_heads: int = 0  # 0: as many as heads
    window_pattern: str = "SSSL"  # repeated over the layers; S sees T/short_window back, L all; the last is always L
    short_window: int = 2
    smear: bool = False  # to each token's embedding a learned share of the one before is added
    bigram_rows: int = 0  # of hashed tables of token pairs, in vocabularies, in the other layers' values; 0: none
    key_offset: bool = False  # on L layers the slow half of each key's channels is that of the token before
    rope_base: float = 10_000.0
    init_scale: float = 1.0  # of every weight that starts uniform: value embeddings, w_qkv, w_fc
    lambda_r_init: float = 1.0
    lambda_0_init: float = 0.1

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError(f"depth {self.depth} must be at least 1")
        if self.head_dim % 2 or self.d_model % self.head_dim:
            raise ValueError(f"d_model {self.d_model} must be a multiple of an even head_dim ({self.head_dim})")
        if self.d_model < GATE_CHANNELS:
            raise ValueError(f"d_model {self.d_model} must be at least {GATE_CHANNELS}, which the value gates read")
        if self.num_kv_heads < 0 or self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} must divide the {self.num_heads} heads")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(f"window_pattern {self.window_pattern!r} must be a string of S and L")
        if self.bigram_rows < 0:
            raise ValueError(f"bigram_rows {self.bigram_rows} must be 0 or more")
        if self.key_offset and self.head_dim % 4:
            raise ValueError(f"head_dim {self.head_dim} must be a multiple of 4: key_offset moves half of its pairs")
        if self.short_window not in SHORT_WINDOWS:
            raise ValueError(f"short_window {self.short_window} must be one of {', '.join(map(str, SHORT_WINDOWS))}")

    @property
    def num_heads(self) -> int:
        return self.d_model // self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def windows(self) -> list[int]:
        """Keys back that each layer's queries see, besides their own."""
        short, full = self.seq_len // self.short_window, self.seq_len
        pattern = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.depth - 1)] + ["L"]
        return [short if kind == "S" else full for kind in pattern]

    @property
    def offset_layers(self) -> list[int]:
        """Layers with a key offset: those that see all."""
        return [i for i, window in enumerate(self.windows) if self.key_offset and window == self.seq_len]

    @property
    def bigram_layers(self) -> list[int]:
        """Layers whose values have an embedding of the token and the one before, hashed: those without another."""
        return [i for i in range(self.depth) if self.bigram_rows and i not in self.ve_layers]

    @property
    def gated_layers(self) -> list[int]:
        """Layers with either: a gate of the stream decides how much of it is added to the values."""
        return sorted(self.ve_layers + self.bigram_layers)

    @property
    def ve_layers(self) -> list[int]:
        """Layers with a value embedding: every other one, the last included."""
        return [i for i in range(self.depth) if i % 2 == (self.depth - 1) % 2]
