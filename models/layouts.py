"""Checkpoint layouts of transformers that a decoder is read from and written as.

A layout maps a config.json to a `DecoderConfig` and back, and says for each of our tensors which
tensors of the transformers checkpoint it is made of.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.attention_config import AttentionConfig
from models.decoder_config import DecoderConfig
from models.experts_config import ExpertsConfig
from models.rope_layout import read_rope, write_rope

QKV_BIAS: Mapping[str, Any] = {"a": AttentionConfig(qkv_bias=True)}  # the attention of Qwen2
# Fields of ExpertsConfig that Mixtral fixes; those of training may differ.
_MIXTRAL = {"shared": 0, "softmax": "before", "normalise": True}


@dataclass(frozen=True)
class TensorSource:
    """The tensors of a transformers checkpoint that make one of ours, joined or transposed.

    Args:
        names: of their tensors, to be joined along the rows.
        rows: number of rows of each (left out for a single tensor).
        transposed: the single tensor is stored transposed.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...] = ()
    transposed: bool = False

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Return our tensor, made of `tensors` in the order of `names`."""
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return joined.T.contiguous() if self.transposed else joined

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return the tensors of the transformers checkpoint that our `tensor` becomes, by name."""
        stored = tensor.T if self.transposed else tensor
        parts = torch.split(stored, list(self.rows)) if self.rows else (stored,)
        copies = [part.clone(memory_format=torch.contiguous_format) for part in parts]
        return dict(zip(self.names, copies, strict=True))


class Layout(ABC):
    """An architecture of transformers: `model_type` and `architectures` of its config.json."""

    model_type: str
    architecture: str
    shift = False  # of masked diffusion: the output at a token predicts the next one
    defaults: ClassVar[
        Mapping[str, Any]
    ] = {}  # of transformers, where they differ from those in `read`

    def rows(self, config: Mapping[str, Any]) -> int:
        """Return the rows of the embedding."""
        return int(config["vocab_size"])

    @abstractmethod
    def read(self, config: Mapping[str, Any]) -> DecoderConfig:
        """Return the config of a decoder from the keys of a config.json.

        Raises:
            ValueError: a key asks for something that the decoder cannot do.
        """

    @abstractmethod
    def write(self, cfg: DecoderConfig, vocab_size: int) -> dict[str, Any] | str:
        """Return the keys of config.json for `cfg`, or the reason why the layout cannot hold it."""

    @abstractmethod
    def sources(self, cfg: DecoderConfig) -> dict[str, TensorSource]:
        """Return the source of each of our tensors, by name."""


class Llama(Layout):
    """LlamaForCausalLM."""

    model_type, architecture, qk_norm = "llama", "LlamaForCausalLM", False
    dense = True  # a feed-forward network in every layer

    def read(self, config: Mapping[str, Any]) -> DecoderConfig:
        bias = config.get("attention_bias", False)
        refuse_other(
            config,
            hidden_act="silu",
            use_sliding_window=False,
            mlp_bias=bias,
            partial_rotary_factor=1.0,
            layer_types=["full_attention"] * config["num_hidden_layers"],
        )
        base, scaling = read_rope(config)
        return DecoderConfig(
            depth=config["num_hidden_layers"],
            width=config["hidden_size"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config.get("num_key_value_heads"),
            head_dim=config.get("head_dim"),
            hidden=config["intermediate_size"],
            context_length=config.get("max_position_embeddings", 2048),
            rope_base=base,
            rope_scaling=scaling,
            qk_norm=self.qk_norm,
            bias=bias,
            tied=config.get("tie_word_embeddings", False),
            norm_eps=config.get("rms_norm_eps", 1e-6),
        )

    def write(self, cfg: DecoderConfig, vocab_size: int) -> dict[str, Any] | str:
        required = {
            "norm": "rmsnorm",
            "positions": "rope",
            "activation": "swiglu",
            "qk_norm": self.qk_norm,
        }
        if differences := _differences(cfg, required):
            return differences
        return _common(self, vocab_size, cfg) | {
            "hidden_size": cfg.width,
            "intermediate_size": cfg.hidden_dim,
            "num_hidden_layers": cfg.depth,
            "num_attention_heads": cfg.num_heads,
            "num_key_value_heads": cfg.kv_heads,
            "head_dim": cfg.attention_dim,
            "max_position_embeddings": cfg.context_length,
            "rms_norm_eps": cfg.norm_eps or 1e-6,
            "hidden_act": "silu",
            "attention_bias": cfg.bias,
            "mlp_bias": cfg.bias,
            "initializer_range": cfg.init_std,
            **write_rope(cfg),
        }

    def sources(self, cfg: DecoderConfig) -> dict[str, TensorSource]:
        q, kv = cfg.num_heads * cfg.attention_dim, cfg.kv_heads * cfg.attention_dim
        sources = {
            "embedding.weight": TensorSource(("model.embed_tokens.weight",)),
            "norm.weight": TensorSource(("model.norm.weight",)),
        }
        if not cfg.tied:
            sources["head.weight"] = TensorSource(("lm_head.weight",))
        for index in range(cfg.depth):
            ours, theirs = f"layers.{index}", f"model.layers.{index}"
            norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
            if cfg.qk_norm:
                norms |= {f"attn.{n}_norm": f"self_attn.{n}_norm" for n in "qk"}
            sources |= {
                f"{ours}.{a}.weight": TensorSource((f"{theirs}.{b}.weight",))
                for a, b in norms.items()
            }
            if cfg.parts == QKV_BIAS:
                biases = tuple(f"{theirs}.self_attn.{name}_proj.bias" for name in "qkv")
                sources[f"{ours}.attn.qkv.bias"] = TensorSource(biases, (q, kv, kv))
            for kind in ("weight", "bias") if cfg.bias else ("weight",):
                qkv = tuple(f"{theirs}.self_attn.{name}_proj.{kind}" for name in "qkv")
                up = tuple(f"{theirs}.mlp.{name}_proj.{kind}" for name in ("gate", "up"))
                sources[f"{ours}.attn.qkv.{kind}"] = TensorSource(qkv, (q, kv, kv))
                sources[f"{ours}.attn.out.{kind}"] = TensorSource(
                    (f"{theirs}.self_attn.o_proj.{kind}",)
                )
                if not self.dense:
                    continue
                sources[f"{ours}.mlp.up.{kind}"] = TensorSource(
                    up, (cfg.hidden_dim, cfg.hidden_dim)
                )
                sources[f"{ours}.mlp.down.{kind}"] = TensorSource(
                    (f"{theirs}.mlp.down_proj.{kind}",)
                )
        return sources


class Qwen2(Llama):
    """Qwen2ForCausalLM: Llama's, with biases on queries, keys and values alone."""

    model_type, architecture = "qwen2", "Qwen2ForCausalLM"
    defaults: ClassVar = {"num_key_value_heads": 32, "max_position_embeddings": 32768}

    def read(self, config: Mapping[str, Any]) -> DecoderConfig:
        cfg = super().read({**config, "attention_bias": False, "mlp_bias": False})
        return replace(cfg, parts=dict(QKV_BIAS))

    def write(self, cfg: DecoderConfig, vocab_size: int) -> dict[str, Any] | str:
        if cfg.parts != QKV_BIAS or cfg.bias:
            return "no biases on queries, keys and values alone"
        keys = super().write(replace(cfg, parts={}), vocab_size)
        if isinstance(keys, str):
            return keys
        return {k: v for k, v in keys.items() if k not in ("attention_bias", "mlp_bias")}


class Qwen3(Llama):
    """Qwen3ForCausalLM: Llama's, with norms of queries and keys."""

    model_type, architecture, qk_norm = "qwen3", "Qwen3ForCausalLM", True
    defaults: ClassVar = {
        "head_dim": 128,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    }

    def write(self, cfg: DecoderConfig, vocab_size: int) -> dict[str, Any] | str:
        if cfg.bias:
            return "bias=True"
        keys = super().write(cfg, vocab_size)
        return keys if isinstance(keys, str) else keys | {"use_sliding_window": False}


class Mixtral(Llama):
    """MixtralForCausalLM: Llama's, with experts in the place of the feed-forward network."""

    model_type, architecture, dense = "mixtral", "MixtralForCausalLM", False
    defaults: ClassVar = {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    }

    def read(self, config: Mapping[str, Any]) -> DecoderConfig:
        refuse_other(config, sliding_window=None, router_jitter_noise=0.0)
        experts = ExpertsConfig(
            num_experts=config["num_local_experts"],
            top_k=config["num_experts_per_tok"],
            balance_weight=config.get("router_aux_loss_coef", 0.01),
            z_loss=0.0,
        )
        return replace(super().read(config), pattern="ae", parts={"e": experts})

    def write(self, cfg: DecoderConfig, vocab_size: int) -> dict[str, Any] | str:
        layer = cfg.branches()[0]
        experts = layer[-1]
        alike = layer == [AttentionConfig(), experts] and " " not in cfg.pattern
        if not isinstance(experts, ExpertsConfig) or not alike:
            return f"pattern={cfg.pattern}"
        values = {name: getattr(experts, name) for name in _MIXTRAL}
        differences = {name: v for name, v in values.items() if v != _MIXTRAL[name]}
        if differences or cfg.bias:
            return ", ".join(f"{k}={v}" for k, v in {**differences, "bias": cfg.bias}.items())
        keys = super().write(replace(cfg, pattern="af", parts={}), vocab_size)
        if isinstance(keys, str):
            return keys
        return keys | {
            "intermediate_size": experts.width(cfg),
            "num_local_experts": experts.num_experts,
            "num_experts_per_tok": experts.top_k,
            "router_aux_loss_coef": experts.balance_weight,
            "sliding_window": None,
        }

    def sources(self, cfg: DecoderConfig) -> dict[str, TensorSource]:
        sources = super().sources(cfg)
        for index, (_, experts) in enumerate(cfg.branches()):
            assert isinstance(experts, ExpertsConfig)
            ours, theirs = f"layers.{index}.moe", f"model.layers.{index}.block_sparse_moe"
            sources[f"{ours}_norm.weight"] = sources.pop(f"layers.{index}.mlp_norm.weight")
            sources[f"{ours}.router"] = TensorSource((f"{theirs}.gate.weight",))
            rows = (experts.width(cfg),) * 2
            for number in range(experts.num_experts):
                gate, up, down = (f"{theirs}.experts.{number}.w{n}.weight" for n in (1, 3, 2))
                expert = f"{ours}.experts.{number}"
                sources[f"{expert}.up.weight"] = TensorSource((gate, up), rows)
                sources[f"{expert}.down.weight"] = TensorSource((down,))
        return sources


class GPT2(Layout):
    """GPT2LMHeadModel; its matrices are stored transposed."""

    model_type, architecture = "gpt2", "GPT2LMHeadModel"

    def read(self, config: Mapping[str, Any]) -> DecoderConfig:
        refuse_other(
            config,
            activation_function="gelu_new",
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            add_cross_attention=False,
        )
        return DecoderConfig(
            depth=config["n_layer"],
            width=config["n_embd"],
            num_heads=config["n_head"],
            hidden=config.get("n_inner"),
            context_length=config["n_positions"],
            norm="layernorm",
            positions="learned",
            activation="gelu",
            bias=True,
            tied=config.get("tie_word_embeddings", True),
            norm_eps=config.get("layer_norm_epsilon", 1e-5),
        )

    def write(self, cfg: DecoderConfig, vocab_size: int) -> dict[str, Any] | str:
        required = {
            "norm": "layernorm",
            "positions": "learned",
            "activation": "gelu",
            "bias": True,
            "qk_norm": False,
            "kv_heads": cfg.num_heads,
            "attention_dim": cfg.width // cfg.num_heads,
        }
        if differences := _differences(cfg, required):
            return differences
        return _common(self, vocab_size, cfg) | {
            "n_embd": cfg.width,
            "n_inner": cfg.hidden_dim,
            "n_layer": cfg.depth,
            "n_head": cfg.num_heads,
            "n_positions": cfg.context_length,
            "layer_norm_epsilon": cfg.norm_eps or 1e-5,
            "activation_function": "gelu_new",
            "initializer_range": cfg.init_std,
            "embd_pdrop": cfg.dropout,
            "resid_pdrop": cfg.dropout,
            "attn_pdrop": 0.0,
        }

    def sources(self, cfg: DecoderConfig) -> dict[str, TensorSource]:
        sources = {
            "embedding.weight": TensorSource(("transformer.wte.weight",)),
            "positions.weight": TensorSource(("transformer.wpe.weight",)),
        }
        if not cfg.tied:
            sources["head.weight"] = TensorSource(("lm_head.weight",))
        names = {
            "attn_norm": "ln_1",
            "attn.qkv": "attn.c_attn",
            "attn.out": "attn.c_proj",
            "mlp_norm": "ln_2",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
        }
        pairs = {"norm": "transformer.ln_f"} | {
            f"layers.{index}.{a}": f"transformer.h.{index}.{b}"
            for index in range(cfg.depth)
            for a, b in names.items()
        }
        for ours, theirs in pairs.items():
            matrix = "norm" not in ours
            sources[f"{ours}.weight"] = TensorSource((f"{theirs}.weight",), transposed=matrix)
            sources[f"{ours}.bias"] = TensorSource((f"{theirs}.bias",))
        return sources


def _common(layout: Layout, vocab_size: int, cfg: DecoderConfig) -> dict[str, Any]:
    return {
        "model_type": layout.model_type,
        "architectures": [layout.architecture],
        "vocab_size": vocab_size,
        "tie_word_embeddings": cfg.tied,
    }


def _differences(cfg: DecoderConfig, required: Mapping[str, Any]) -> str:
    """Return the fields of `cfg` that a layout cannot hold, "" if it can hold all."""
    required = {
        **required,
        "softcap": None,
        "width_multiplier": 1.0,
        "pattern": "af",
        "parts": {},
        "streams": None,
        "rounding": None,
        "causal": True,
    }
    values = {name: getattr(cfg, name) for name in required}
    return ", ".join(f"{name}={v}" for name, v in values.items() if v != required[name])


def refuse_other(config: Mapping[str, Any], **required: Any) -> None:
    for key, value in required.items():
        if config.get(key, value) not in (value, None):
            raise ValueError(f"config.json has {key}={config[key]!r}; only {value!r} is read")
