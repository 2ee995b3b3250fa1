"""Linear layers whose weights, and inputs, are rounded in each forward pass of training.

Shape legend: rows = outputs, cols = inputs of a linear layer; groups of a row.
"""

import importlib.util
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kernels.integers import pack_bits, unpack_bits
from kernels.straight_through import (
    int8_tokens,
    lsq,
    lsq_codes,
    lsq_range,
    lsq_start,
    ternary,
    ternary_codes,
)
from models.contract import blocks
from models.rounding_config import RoundingConfig

_LEAST_STEP = 1e-6
_STEP = "step"  # the parameter of LSQ
# Adam's updates are as large as the rate whatever the gradient; a step of rounding is some
# hundredths, a weight's own spread.
_STEP_RATE = 0.01


class RoundedLinear(nn.Module):
    """A linear layer that computes with rounded weights and trains those in full; no nn.Linear.

    What replaces or packs an nn.Linear would compute with the weights in full.
    """

    def __init__(self, linear: nn.Linear, cfg: RoundingConfig) -> None:
        super().__init__()
        self.cfg, self.weight, self.bias = cfg, linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.fixed: Tensor | None = None  # the rounded weight of a model that only decodes
        self.fake = _torchao_fake(cfg) if cfg.weights == "torchao" else None
        if cfg.weights == "lsq":
            self.step = nn.Parameter(torch.ones(1, device=self.weight.device))
            self.learning_rate_scale = {_STEP: _STEP_RATE}
            self.start_step()

    @torch.no_grad()
    def start_step(self) -> None:
        """Set LSQ's step by the weights, when those are there."""
        if not self.weight.is_meta:
            self.step.copy_(lsq_start(self.weight, self.cfg.bits))

    def rounded(self) -> Float[Tensor, "rows cols"]:
        """Return the weight that the layer computes with; gradients reach the one in full."""
        if self.cfg.weights == "ternary":
            return ternary(self.weight)
        if self.cfg.weights == "lsq":
            return lsq(self.weight, self.step.clamp(min=_LEAST_STEP), self.cfg.bits)
        assert self.fake is not None
        full: Tensor = self.fake(self.weight)
        return full

    def form(self) -> "RoundedForm":
        """Return how `packed` is read."""
        return RoundedForm(self.cfg)

    @torch.no_grad()
    def packed(self) -> dict[str, Tensor]:
        """Return what the layer computes with in few bits, by the names of its parts."""
        weight, bits, form = self.weight.detach(), self.cfg.bits, self.form()
        if self.cfg.weights == "ternary":
            codes, steps = ternary_codes(weight)
        elif self.cfg.weights == "lsq":
            steps = self.step.detach().float().clamp(min=_LEAST_STEP).view(1, 1)
            codes = lsq_codes(weight, steps.view(1), bits)
        else:
            codes, steps = _torchao_codes(weight, self.cfg)
        unsigned = (codes - form.low).to(torch.uint8)
        bits_of_steps = steps.float().contiguous().view(torch.int32)
        return {"codes": pack_bits(unsigned, form.bits), "steps": bits_of_steps}

    def for_inference(self) -> "RoundedLinear":
        """Return self with its weight rounded once; do not train it afterwards."""
        self.fixed = self.rounded().detach()
        return self

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        weight = self.rounded() if self.fixed is None else self.fixed
        return F.linear(rounded_input(x, self.cfg), weight.to(self.weight.dtype), self.bias)


@dataclass(frozen=True)
class RoundedForm:
    """How the packed weight of a layer is read that was trained rounded."""

    cfg: RoundingConfig

    @property
    def bits(self) -> int:
        """Of a code."""
        return 2 if self.cfg.weights == "ternary" else self.cfg.bits

    @property
    def low(self) -> int:
        """The smallest code."""
        return -1 if self.cfg.weights == "ternary" else lsq_range(self.bits)[0]

    @property
    def rounds_inputs(self) -> bool:
        """Whether the layer changes its inputs, so that no plain one computes the same."""
        return self.cfg.normed or self.cfg.activations != "full"

    def restored(self, packed: dict[str, Tensor], cols: int) -> Float[Tensor, "rows cols"]:
        """Return the fp32 weight that `RoundedLinear.packed` stands for."""
        codes = unpack_bits(packed["codes"], self.bits, cols).float() + self.low
        steps = packed["steps"].view(torch.float32)
        if steps.numel() > 1:
            steps = steps.repeat_interleave(cols // steps.shape[1], dim=1)
        return codes * steps


def rounded_input(x: Float[Tensor, "*batch cols"], cfg: RoundingConfig) -> Tensor:
    """Return the input of a layer as its product takes it."""
    if cfg.normed:
        x = F.rms_norm(x, x.shape[-1:], eps=1e-6)
    return int8_tokens(x) if cfg.activations == "int8" else x


def round_linears(model: nn.Module, cfg: RoundingConfig) -> None:
    """Replace the linear layers in the blocks of `model` by rounded ones, in place."""
    for block in blocks(model):
        for name in [n for n, m in block.named_modules() if isinstance(m, nn.Linear)]:
            parent, _, attribute = name.rpartition(".")
            linear: Any = block.get_submodule(name)
            setattr(block.get_submodule(parent), attribute, RoundedLinear(linear, cfg))


def rounded_layers(model: nn.Module) -> dict[str, RoundedLinear]:
    """Return the layers that `round_linears` has made, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, RoundedLinear)}


def step_names(model: nn.Module) -> set[str]:
    """Return the names of LSQ's steps, which a model that was trained in full has not."""
    layers = rounded_layers(model).items()
    return {f"{name}.{_STEP}" for name, layer in layers if layer.cfg.weights == "lsq"}


def start_steps(model: nn.Module) -> None:
    """Set LSQ's steps by the weights that have been loaded."""
    for layer in rounded_layers(model).values():
        if layer.cfg.weights == "lsq":
            layer.start_step()


def plain_layers(model: Any) -> Any:
    """Return `model` with plain layers of rounded weights, where nothing else is rounded."""
    cfg = getattr(model.cfg, "rounding", None)
    if cfg is None or RoundedForm(cfg).rounds_inputs:
        return model
    for name, layer in rounded_layers(model).items():
        linear: Any = nn.Linear(layer.in_features, layer.out_features, device="meta")
        linear.weight = nn.Parameter(layer.rounded().detach())
        linear.bias = layer.bias
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, linear)
    model.cfg = replace(model.cfg, rounding=None)
    return model


@lru_cache(maxsize=64)
def num_steps(cfg: Any, vocab_size: int) -> int:
    """Return the number of LSQ's steps of a model, one a matrix."""
    with torch.device("meta"):
        return len(step_names(cfg.build(vocab_size, 0)))


def _torchao(cfg: RoundingConfig) -> Any:
    """Return torchao's config of the weights.

    Raises:
        ValueError: torchao is not installed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(
            "rounding.weights=torchao needs torchao: pip install torchao; or take weights=lsq"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it deprecates parts of itself as it is imported
        from torchao.quantization import IntxWeightOnlyConfig  # noqa: PLC0415
        from torchao.quantization.granularity import PerGroup  # noqa: PLC0415

        dtype = getattr(torch, f"int{cfg.bits}")
        return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=PerGroup(cfg.group))


def _torchao_fake(cfg: RoundingConfig) -> nn.Module:
    """Return the module that rounds a weight as torchao's QAT does."""
    base = _torchao(cfg)
    from torchao.quantization import quantize_  # noqa: PLC0415
    from torchao.quantization.qat import QATConfig  # noqa: PLC0415

    layer = nn.Sequential(nn.Linear(cfg.group, 1, bias=False))
    quantize_(layer, QATConfig(base, step="prepare"))
    fake: nn.Module = layer[0].weight_fake_quantizer  # type: ignore[assignment]
    return fake


def _torchao_codes(weight: Tensor, cfg: RoundingConfig) -> tuple[Tensor, Tensor]:
    """Return torchao's (codes, scales [rows, groups])."""
    from torchao.quantization import quantize_  # noqa: PLC0415

    rows, cols = weight.shape
    layer = nn.Sequential(nn.Linear(cols, rows, bias=False))
    layer[0].weight = nn.Parameter(weight.detach().clone())  # type: ignore[assignment]
    quantize_(layer, _torchao(cfg))
    stored: Any = layer[0].weight
    return stored.qdata.float(), stored.scale.float()
