"""The layouts of transformers that a decoder can be read from and written as: Llama, Qwen3, Mixtral, GPT-2.

A layout is a config.json in its own words and, for each tensor of ours, the tensors of theirs that it is made of.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from models.attention_config import AttentionConfig
from models.decoder_config import DecoderConfig
from models.experts_config import ExpertsConfig
from models.rope_config import RopeScaling

_ROPE_KEYS = {  # theirs -> ours
    "factor": "factor",
    "original_max_position_embeddings": "original_context",
    "low_freq_factor": "low_freq",
    "high_freq_factor": "high_freq",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "gain",
}
_ROPE_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "original_context", "low_freq", "high_freq"),
    "yarn": ("factor", "original_context", "beta_fast", "beta_slow", "truncate", "gain"),
}

# What its experts are, however they were trained.
_MIXTRAL = {"shared": 0, "softmax": "before", "normalise": True}


@dataclass(frozen=True)
class Source:
    """What one tensor of ours is in a layout: tensors joined along their rows, or one transposed.

    Args:
        names: theirs; rows: of each (only where there are several).
    """

    names: tuple[str, ...]
    rows: tuple[int, ...] = ()
    transposed: bool = False

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Return our tensor."""
        whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return whole.T.contiguous() if self.transposed else whole

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return theirs, by name."""
        whole = tensor.T if self.transposed else tensor
        parts = torch.split(whole, list(self.rows)) if self.rows else (whole,)
        return {
            n: part.clone(memory_format=torch.contiguous_format)
            for n, part in zip(self.names, parts, strict=True)
        }


class Layout(ABC):
    """One architecture of transformers."""

    model_type: str
    architecture: str

    @abstractmethod
    def read(self, given: Mapping[str, Any]) -> DecoderConfig:
        """Return the config of a config.json.

        Raises:
            ValueError: it asks for something that the decoder does not do.
        """

    @abstractmethod
    def write(self, cfg: DecoderConfig, vocab_size: int) -> dict[str, Any] | str:
        """Return the config.json of a decoder, or why this layout cannot hold it."""

    @abstractmethod
    def sources(self, cfg: DecoderConfig) -> dict[str, Source]:
        """Return where each tensor of a decoder comes from."""


class Llama(Layout):
    """LlamaForCausalLM."""

    model_type, architecture, qk_norm = "llama", "LlamaForCausalLM", False
    dense = True  # a feed-forward network in every layer

    def read(self, given: Mapping[str, Any]) -> DecoderConfig:
        bias = given.get("attention_bias", False)
        _refuse_other(
            given,
            hidden_act="silu",
            use_sliding_window=False,
            mlp_bias=bias,
            partial_rotary_factor=1.0,
        )
        base, scaling = _read_rope(given)
        return DecoderConfig(
            depth=given["num_hidden_layers"],
            width=given["hidden_size"],
            num_heads=given["num_attention_heads"],
            num_kv_heads=given.get("num_key_value_heads"),
            head_dim=given.get("head_dim"),
            hidden=given["intermediate_size"],
            context_length=given.get("max_position_embeddings", 2048),
            rope_base=base,
            rope_scaling=scaling,
            qk_norm=self.qk_norm,
            bias=bias,
            tied=given.get("tie_word_embeddings", False),
            norm_eps=given.get("rms_norm_eps", 1e-6),
        )

    def write(self, cfg: DecoderConfig, vocab_size: int) -> dict[str, Any] | str:
        wanted = {
            "norm": "rmsnorm",
            "positions": "rope",
            "activation": "swiglu",
            "qk_norm": self.qk_norm,
        }
        odd = _differences(cfg, wanted)
        if odd:
            return odd
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
            **_write_rope(cfg),
        }

    def sources(self, cfg: DecoderConfig) -> dict[str, Source]:
        q, kv = cfg.num_heads * cfg.attention_dim, cfg.kv_heads * cfg.attention_dim
        found = {
            "embedding.weight": Source(("model.embed_tokens.weight",)),
            "norm.weight": Source(("model.norm.weight",)),
        }
        if not cfg.tied:
            found["head.weight"] = Source(("lm_head.weight",))
        for index in range(cfg.depth):
            ours, theirs = f"layers.{index}", f"model.layers.{index}"
            norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
            if cfg.qk_norm:
                norms |= {f"attn.{n}_norm": f"self_attn.{n}_norm" for n in "qk"}
            found |= {
                f"{ours}.{a}.weight": Source((f"{theirs}.{b}.weight",)) for a, b in norms.items()
            }
            for kind in ("weight", "bias") if cfg.bias else ("weight",):
                qkv = tuple(f"{theirs}.self_attn.{name}_proj.{kind}" for name in "qkv")
                up = tuple(f"{theirs}.mlp.{name}_proj.{kind}" for name in ("gate", "up"))
                found[f"{ours}.attn.qkv.{kind}"] = Source(qkv, (q, kv, kv))
                found[f"{ours}.attn.out.{kind}"] = Source((f"{theirs}.self_attn.o_proj.{kind}",))
                if not self.dense:
                    continue
                found[f"{ours}.mlp.up.{kind}"] = Source(up, (cfg.hidden_dim, cfg.hidden_dim))
                found[f"{ours}.mlp.down.{kind}"] = Source((f"{theirs}.mlp.down_proj.{kind}",))
        return found


class Qwen3(Llama):
    """Qwen3ForCausalLM: Llama's, with norms of queries and keys."""

    model_type, architecture, qk_norm = "qwen3", "Qwen3ForCausalLM", True

    def write(self, cfg: DecoderConfig, vocab_size: int) -> dict[str, Any] | str:
        if cfg.bias:
            return "bias=True"
        found = super().write(cfg, vocab_size)
        return found if isinstance(found, str) else found | {"use_sliding_window": False}


class Mixtral(Llama):
    """MixtralForCausalLM: Llama's, with experts in the place of the feed-forward network."""

    model_type, architecture, dense = "mixtral", "MixtralForCausalLM", False

    def read(self, given: Mapping[str, Any]) -> DecoderConfig:
        _refuse_other(given, sliding_window=None, router_jitter_noise=0.0)
        experts = ExpertsConfig(
            num_experts=given["num_local_experts"],
            top_k=given["num_experts_per_tok"],
            balance_weight=given.get("router_aux_loss_coef", 0.01),
            z_loss=0.0,
        )
        return replace(super().read(given), pattern="ae", parts={"e": experts})

    def write(self, cfg: DecoderConfig, vocab_size: int) -> dict[str, Any] | str:
        layer = cfg.branches()[0]
        experts = layer[-1]
        if (
            not isinstance(experts, ExpertsConfig)
            or layer != [AttentionConfig(), experts]
            or " " in cfg.pattern
        ):
            return f"pattern={cfg.pattern}"
        odd = {
            name: getattr(experts, name)
            for name, value in _MIXTRAL.items()
            if getattr(experts, name) != value
        }
        if odd or cfg.bias:
            return ", ".join(f"{name}={value}" for name, value in {**odd, "bias": cfg.bias}.items())
        found = super().write(replace(cfg, pattern="af", parts={}), vocab_size)
        return (
            found
            if isinstance(found, str)
            else found
            | {
                "intermediate_size": experts.width(cfg),
                "num_local_experts": experts.num_experts,
                "num_experts_per_tok": experts.top_k,
                "router_aux_loss_coef": experts.balance_weight,
                "sliding_window": None,
            }
        )

    def sources(self, cfg: DecoderConfig) -> dict[str, Source]:
        found = super().sources(cfg)
        for index, (_, experts) in enumerate(cfg.branches()):
            assert isinstance(experts, ExpertsConfig)
            ours, theirs = f"layers.{index}.moe", f"model.layers.{index}.block_sparse_moe"
            norm = found.pop(f"layers.{index}.mlp_norm.weight")
            found |= {
                f"{ours}_norm.weight": norm,
                f"{ours}.router": Source((f"{theirs}.gate.weight",)),
            }
            rows = (experts.width(cfg),) * 2
            for number in range(experts.num_experts):
                names = [f"{theirs}.experts.{number}.w{n}.weight" for n in (1, 3, 2)]
                found[f"{ours}.experts.{number}.up.weight"] = Source((names[0], names[1]), rows)
                found[f"{ours}.experts.{number}.down.weight"] = Source((names[2],))
        return found


class GPT2(Layout):
    """GPT2LMHeadModel; its matrices are stored transposed."""

    model_type, architecture = "gpt2", "GPT2LMHeadModel"

    def read(self, given: Mapping[str, Any]) -> DecoderConfig:
        _refuse_other(
            given,
            activation_function="gelu_new",
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            add_cross_attention=False,
        )
        return DecoderConfig(
            depth=given["n_layer"],
            width=given["n_embd"],
            num_heads=given["n_head"],
            hidden=given.get("n_inner"),
            context_length=given["n_positions"],
            norm="layernorm",
            positions="learned",
            activation="gelu",
            bias=True,
            tied=given.get("tie_word_embeddings", True),
            norm_eps=given.get("layer_norm_epsilon", 1e-5),
        )

    def write(self, cfg: DecoderConfig, vocab_size: int) -> dict[str, Any] | str:
        wanted = {
            "norm": "layernorm",
            "positions": "learned",
            "activation": "gelu",
            "bias": True,
            "qk_norm": False,
            "kv_heads": cfg.num_heads,
            "attention_dim": cfg.width // cfg.num_heads,
        }
        odd = _differences(cfg, wanted)
        if odd:
            return odd
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

    def sources(self, cfg: DecoderConfig) -> dict[str, Source]:
        found = {
            "embedding.weight": Source(("transformer.wte.weight",)),
            "positions.weight": Source(("transformer.wpe.weight",)),
        }
        if not cfg.tied:
            found["head.weight"] = Source(("lm_head.weight",))
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
            found[f"{ours}.weight"] = Source((f"{theirs}.weight",), transposed=matrix)
            found[f"{ours}.bias"] = Source((f"{theirs}.bias",))
        return found


LAYOUTS: tuple[Layout, ...] = (Llama(), Qwen3(), Mixtral(), GPT2())


def _common(layout: Layout, vocab_size: int, cfg: DecoderConfig) -> dict[str, Any]:
    return {
        "model_type": layout.model_type,
        "architectures": [layout.architecture],
        "vocab_size": vocab_size,
        "tie_word_embeddings": cfg.tied,
    }


def _differences(cfg: DecoderConfig, wanted: Mapping[str, Any]) -> str:
    """Return what a layout cannot hold, "" if it can hold everything."""
    wanted = {
        **wanted,
        "softcap": None,
        "width_multiplier": 1.0,
        "pattern": "af",
        "parts": {},
        "streams": None,
        "causal": True,
    }
    odd = {
        name: getattr(cfg, name) for name, value in wanted.items() if getattr(cfg, name) != value
    }
    return ", ".join(f"{name}={value}" for name, value in odd.items())


def _refuse_other(given: Mapping[str, Any], **wanted: Any) -> None:
    for key, value in wanted.items():
        if given.get(key, value) not in (value, None):
            raise ValueError(f"config.json has {key}={given[key]!r}; only {value!r} is read")


def _read_rope(given: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Return (base, scaling) as transformers 5 writes them (`rope_parameters`) or as 4 did."""
    found = {**(given.get("rope_scaling") or {}), **(given.get("rope_parameters") or {})}
    base = float(found.get("rope_theta", given.get("rope_theta", 10000.0)))
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return base, None
    if kind not in _ROPE_FIELDS:
        raise ValueError(f"config.json has rope_type={kind!r}; read are: {', '.join(_ROPE_FIELDS)}")
    values = {
        ours: found[theirs] for theirs, ours in _ROPE_KEYS.items() if found.get(theirs) is not None
    }
    values = {name: value for name, value in values.items() if name in _ROPE_FIELDS[kind]}
    if kind == "yarn" and found.get("mscale") and found.get("mscale_all_dim"):
        log = 0.1 * math.log(values["factor"])
        values.setdefault("gain", (log * found["mscale"] + 1) / (log * found["mscale_all_dim"] + 1))
    values.setdefault("original_context", given.get("max_position_embeddings"))
    return base, RopeScaling(kind=kind, **values)


def _write_rope(cfg: DecoderConfig) -> dict[str, Any]:
    """Return the keys of transformers 4, which 5 and other readers know too."""
    scaling = cfg.rope_scaling
    if scaling is None:
        return {"rope_theta": cfg.rope_base, "rope_scaling": None}
    own = {ours: theirs for theirs, ours in _ROPE_KEYS.items()}
    values = {own[name]: getattr(scaling, name) for name in _ROPE_FIELDS[scaling.kind]}
    kept = {key: value for key, value in values.items() if value is not None}
    return {
        "rope_theta": cfg.rope_base,
        "rope_scaling": {"rope_type": scaling.kind, "type": scaling.kind} | kept,
    }
