"""Folders of published masked-diffusion models, which are read and not written."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from models.decoder_config import DecoderConfig
from models.layouts import QKV_BIAS, Llama, Qwen2, TensorSource, refuse_other

_READ_ONLY = "folders of {} are read, not written"


class Dream(Qwen2):
    """Dream, Dream-Coder and DreamOn (arXiv 2508.15487): Qwen2's, every token seeing all others.

    They go on from an autoregressive model: the output at a token predicts the next one.
    """

    model_type, architecture, shift = "Dream", "DreamModel", True

    def read(self, config: Mapping[str, Any]) -> DecoderConfig:
        refuse_other(config, use_mrope=False)
        return replace(super().read(config), causal=False)

    def write(self, cfg: DecoderConfig, vocab_size: int) -> dict[str, Any] | str:
        return _READ_ONLY.format("Dream")


class LLaDA(Llama):
    """LLaDA (arXiv 2502.09992): Llama's under other names, every token seeing all others."""

    model_type, architecture = "llada", "LLaDAModelLM"
    _required: ClassVar[Mapping[str, Any]] = {
        "block_type": "llama",
        "block_group_size": 1,
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "include_bias": False,
        "input_emb_norm": False,
        "scale_logits": False,
        "alibi": False,
        "rope": True,
    }
    _names: ClassVar[Mapping[str, str]] = {
        "model.embed_tokens": "model.transformer.wte",
        "model.norm": "model.transformer.ln_f",
        "lm_head": "model.transformer.ff_out",
        "model.layers": "model.transformer.blocks",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ff_norm",
        "self_attn.o_proj": "attn_out",
        "self_attn.": "",
        "mlp.gate_proj": "ff_proj",
        "mlp.up_proj": "up_proj",
        "mlp.down_proj": "ff_out",
    }

    def rows(self, config: Mapping[str, Any]) -> int:
        return int(config.get("embedding_size") or config["vocab_size"])

    def read(self, config: Mapping[str, Any]) -> DecoderConfig:
        refuse_other(config, **self._required)
        one = config.get("multi_query_attention")  # older than n_kv_heads
        heads = config["n_heads"]
        cfg = DecoderConfig(
            depth=config["n_layers"],
            width=config["d_model"],
            num_heads=heads,
            num_kv_heads=1 if one else config.get("n_kv_heads") or heads,
            hidden=config.get("mlp_hidden_size") or config["mlp_ratio"] * config["d_model"],
            context_length=config["max_sequence_length"],
            rope_base=config.get("rope_theta", 10000.0),
            tied=config.get("weight_tying", True),
            norm_eps=config.get("rms_norm_eps", 1e-5),
            causal=False,
        )
        return replace(cfg, parts=dict(QKV_BIAS)) if config.get("include_qkv_bias") else cfg

    def write(self, cfg: DecoderConfig, vocab_size: int) -> dict[str, Any] | str:
        return _READ_ONLY.format("LLaDA")

    def sources(self, cfg: DecoderConfig) -> dict[str, TensorSource]:
        return {
            ours: replace(source, names=tuple(self._renamed(name) for name in source.names))
            for ours, source in super().sources(cfg).items()
        }

    def _renamed(self, name: str) -> str:
        for theirs, here in self._names.items():
            name = name.replace(theirs, here)
        return name
