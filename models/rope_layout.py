"""Rotary positions in a config.json of transformers, of version 4 and of version 5."""

import math
from collections.abc import Mapping
from typing import Any

from models.decoder_config import DecoderConfig
from models.rope_config import RopeScaling

_ROPE_KEYS = {  # key of config.json -> field of RopeScaling
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


def read_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Return (base, scaling) from the keys of transformers 4, or `rope_parameters` of 5."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(
            f"config.json has partial_rotary_factor={rope['partial_rotary_factor']}; only 1 is read"
        )
    base = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    if kind not in _ROPE_FIELDS:
        raise ValueError(f"config.json has rope_type={kind!r}; read are: {', '.join(_ROPE_FIELDS)}")
    values = {
        field: rope[key]
        for key, field in _ROPE_KEYS.items()
        if field in _ROPE_FIELDS[kind] and rope.get(key) is not None
    }
    if kind == "yarn" and rope.get("mscale") and rope.get("mscale_all_dim"):
        log = 0.1 * math.log(values["factor"])
        values.setdefault("gain", (log * rope["mscale"] + 1) / (log * rope["mscale_all_dim"] + 1))
    values.setdefault("original_context", config.get("max_position_embeddings"))
    return base, RopeScaling(kind=kind, **values)


def write_rope(cfg: DecoderConfig) -> dict[str, Any]:
    """Return the rope keys of transformers 4, which version 5 and other programs read too."""
    scaling = cfg.rope_scaling
    if scaling is None:
        return {"rope_theta": cfg.rope_base, "rope_scaling": None}
    keys = {field: key for key, field in _ROPE_KEYS.items()}
    values = {keys[field]: getattr(scaling, field) for field in _ROPE_FIELDS[scaling.kind]}
    present = {key: value for key, value in values.items() if value is not None}
    return {
        "rope_theta": cfg.rope_base,
        "rope_scaling": {"rope_type": scaling.kind, "type": scaling.kind} | present,
    }
