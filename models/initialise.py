"""Initial weights, a function of (seed, parameter name): the order of construction does not matter.

Schemes:
    gpt2          N(0, std)
    depth_scaled  N(0, 1/sqrt(fan_in)); embeddings and heads N(0, std)
    mup           N(0, std/sqrt(m)) at width multiplier m (Yang et al., arXiv 2203.03466);
                  embeddings and heads N(0, std)
In all of them the std of matrices that write to the residual stream is divided by sqrt(2 * depth).
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.branch_config import Scheme

_RESIDUAL_WRITERS = (".out.weight", ".down.weight")


def initialise(
    model: nn.Module, *, scheme: Scheme, std: float, depth: int, width_multiplier: float, seed: int
) -> None:
    """Fill all matrices of `model` in place; biases become 0, gains stay 1. See `filler`."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    fill = filler(
        model, scheme=scheme, std=std, depth=depth, width_multiplier=width_multiplier, seed=seed
    )
    for name, parameter in model.named_parameters():
        fill(name, parameter)


def filler(
    model: nn.Module, *, scheme: Scheme, std: float, depth: int, width_multiplier: float, seed: int
) -> Callable[[str, Tensor], None]:
    """Return the function that fills a parameter of `model`, given its name, in place.

    A module overrides the std of its own parameters by a dict `initial_std` (name -> std); 0 leaves
    a parameter as it is.
    """
    own = {
        f"{prefix}.{name}": spread
        for prefix, module in model.named_modules()
        for name, spread in getattr(module, "initial_std", {}).items()
    }

    def fill(name: str, parameter: Tensor) -> None:
        if parameter.is_meta or (parameter.ndim < 2 and name not in own) or own.get(name) == 0.0:
            return
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
            parameter.normal_(0.0, spread, generator=generator_of(seed, name))

    return fill


def generator_of(seed: int, name: str) -> torch.Generator:
    """Return the generator of the initial values of parameter `name`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
