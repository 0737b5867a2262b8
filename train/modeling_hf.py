"""The model of modeling.py for Hugging Face's transformers: needs torch, transformers, and modeling.py beside it.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # puts `bos` before a text

A batch may be padded on the left, as `generate` wants it, or on the right.
"""

from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .modeling import GPT, Cache


class TimeboxConfig(PretrainedConfig):
    """config.json: what modeling.py reads, under its names, and under those that transformers asks for."""

    model_type = "timebox"
    attribute_map = {  # noqa: RUF012 -- transformers' own
        "hidden_size": "d_model",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "max_position_embeddings": "seq_len",
    }


class TimeboxCache(Cache):
    """With what transformers asks of a cache."""

    is_compileable = is_croppable = False
    is_linear = (False,)

    def get_seq_length(self) -> int:
        return self.length

    reorder_cache = Cache.reorder


class TimeboxForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TimeboxConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: TimeboxConfig):
        super().__init__(config)
        self.model = GPT(config.to_dict())
        self.post_init()

    def _init_weights(self, module) -> None:
        """Weights come from the folder: timebox trains them."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes one that knows of windows, and of what looks a token back

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: TimeboxCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] in fp32, of the last `logits_to_keep` tokens alone where that is given.

        Args:
            input_ids: [B, T], those after what `cache` has read.
            attention_mask: [B, tokens read + T], 0 for padding, which comes before or after a row's text.
            labels: [B, T], -100 where none counts; the loss is of each token by those before it.
            use_cache: returns a cache that has read these tokens too; the default is yes, but not while training.

        Raises ValueError for a mask with padding inside a text, or of another length.
        """
        if use_cache if use_cache is not None else not self.training:
            cache = TimeboxCache() if cache is None else cache
        x = self.model.features(input_ids, cache, starts_of(attention_mask, input_ids, cache))
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.logits(x[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)


def starts_of(mask: Tensor | None, tokens: Tensor, cache: TimeboxCache | None) -> Tensor | None:
    """How many tokens of padding each row begins with: [B]; None where none has any."""
    if mask is None or bool((mask != 0).all()):
        return None
    length = tokens.shape[1] + (cache.length if cache is not None else 0)
    if mask.shape != (tokens.shape[0], length):
        wanted = (tokens.shape[0], length)
        raise ValueError(f"attention_mask has the shape {tuple(mask.shape)} in place of {wanted}: rows, tokens read")
    text = (mask != 0).long()
    if ((text[:, 1:] - text[:, :-1]) == 1).sum(dim=1).add(text[:, 0]).max() > 1:
        raise ValueError("attention_mask has padding inside a text: pad on the left, or on the right")
    return (text.cumsum(dim=1) == 0).sum(dim=1)
