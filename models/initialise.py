"""Initial weights as a function of (seed, parameter name): no order of construction matters.

Schemes:
    gpt2          N(0, std); matrices that write to the residual stream divided by sqrt(2 * depth)
    depth_scaled  N(0, 1/sqrt(fan_in)); writers divided by sqrt(2 * depth)
    mup           N(0, std) * sqrt(1/m) for hidden matrices at width multiplier m, embeddings at std
                  (Yang et al., arXiv 2203.03466; writers also divided by sqrt(2 * depth))
"""

import hashlib
import math

import torch
from torch import nn

from models.branch_config import Scheme

_RESIDUAL_WRITERS = (".out.weight", ".down.weight")


def initialise(
    model: nn.Module, *, scheme: Scheme, std: float, depth: int, width_multiplier: float, seed: int
) -> None:
    """Fill all matrices of `model` in place; biases become 0, gains keep their 1.

    A module with an attribute `initial_std` (parameter name -> std) says otherwise of its own; 0 keeps what it has.
    """
    own = {
        f"{prefix}.{name}": spread
        for prefix, module in model.named_modules()
        for name, spread in getattr(module, "initial_std", {}).items()
    }
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if parameter.is_meta or (parameter.ndim < 2 and name not in own) or own.get(name) == 0.0:
            continue
        embedding = name.startswith(("embedding", "positions", "head"))
        spread = std
        if not embedding and scheme == "depth_scaled":
            spread = 1.0 / math.sqrt(parameter.shape[1])
        if not embedding and scheme == "mup":
            spread = std / math.sqrt(width_multiplier)
        if name.endswith(_RESIDUAL_WRITERS):
            spread /= math.sqrt(2 * depth)
        spread = own.get(name, spread)
        with torch.no_grad():
            parameter.normal_(0.0, spread, generator=_generator(seed, name))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
