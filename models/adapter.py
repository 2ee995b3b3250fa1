"""Low-rank adapters: y = W x + s B A x, W frozen and held in full or in few bits.

B is 0 at first, so that step 0 has the bits of the model without adapters. DoRA divides each row of
W + s B A by its length and multiplies it by a learnt one (no gradient through the division).
Layers that compute several products at once (q, k and v) have an A and a B for each, as peft has.

Shape legend: rows = outputs, cols = inputs of a linear layer; rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from kernels.frozen import Kind, pack_matrix, packed_product, unpack_matrix
from models.adapter_config import AdapterConfig
from models.contract import blocks
from models.initialise import generator_of

_WHOLE = "whole"  # the only part of a layer that computes one product
Fill = Callable[[str, Tensor], None]
Put = Callable[[Tensor, Tensor], Tensor]


class FrozenLinear(nn.Module):
    """A linear layer whose weight is packed and never trained, nor in the state_dict."""

    def __init__(self, weight: Float[Tensor, "rows cols"], bias: Tensor | None, kind: Kind) -> None:
        super().__init__()
        self.kind, self.shape = kind, tuple(weight.shape)
        self.num_frozen = weight.numel()  # counted as parameters
        self.bias = bias
        for name, part in pack_matrix(weight.detach(), kind).items():
            self.register_buffer(name, part, persistent=False)

    @property
    def packed(self) -> dict[str, Tensor]:
        """The parts of the weight."""
        return {name: part for name, part in self._buffers.items() if part is not None}

    def take(self, weight: Float[Tensor, "rows cols"]) -> None:
        """Hold `weight` from now on."""
        for name, part in pack_matrix(weight, self.kind).items():
            self._buffers[name].copy_(part)  # type: ignore[union-attr]

    def full_weight(self) -> Float[Tensor, "rows cols"]:
        """Return what the packed weight stands for, fp32."""
        return unpack_matrix(self.packed, self.kind, *self.shape)

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = packed_product(x, self.packed, self.kind, self.shape[0])
        return y if self.bias is None else y + self.bias.to(y.dtype)


class AdaptedLinear(nn.Module):
    """A linear layer with an adapter.

    Args:
        base: the frozen layer.
        rows: number of outputs of each part, in order.
        adapted: the parts that have an adapter.
        fill: fills an A, given the name of its part.
    """

    def __init__(
        self,
        base: nn.Linear | FrozenLinear,
        rows: dict[str, int],
        adapted: list[str],
        cfg: AdapterConfig,
        fill: Fill,
    ) -> None:
        super().__init__()
        cols = base.in_features if isinstance(base, nn.Linear) else base.shape[1]
        self.base, self.rows, self.scale = base, rows, cfg.scale
        self.switched_on = True
        self.a = nn.ParameterDict({p: nn.Parameter(torch.empty(cfg.rank, cols)) for p in adapted})
        self.b = nn.ParameterDict(
            {p: nn.Parameter(torch.zeros(rows[p], cfg.rank)) for p in adapted}
        )
        for part, parameter in self.a.items():
            fill(part, parameter)
        dora = adapted if cfg.kind == "dora" else []
        self.magnitude = nn.ParameterDict({p: nn.Parameter(torch.empty(rows[p])) for p in dora})
        self.start_magnitude()

    @torch.no_grad()
    def start_magnitude(self, put: Put | None = None) -> None:
        """Set DoRA's lengths to those of the base, when that has its weights; see `base_loaded`."""
        if not self.magnitude:
            return
        packed = isinstance(self.base, FrozenLinear)  # whole where parameters are sharded
        lengths = torch.linalg.vector_norm(self._base_weight(), dim=1)
        for part, own in self._by_part(lengths).items():
            if part in self.magnitude:
                parameter = self.magnitude[part]
                parameter.copy_(put(own, parameter) if put and packed else own)

    def full_weight(self) -> Float[Tensor, "rows cols"]:
        """Return the weight of base and adapter together, fp32, without gradient."""
        with torch.no_grad():
            weight = self._updated()
            return weight * self._ratio().float()[:, None] if self.magnitude else weight

    def _by_part(self, values: Tensor) -> dict[str, Tensor]:
        parts = torch.split(values, list(self.rows.values()))
        return dict(zip(self.rows, parts, strict=True))

    def _ratio(self) -> Float[Tensor, " rows"]:
        """Return what DoRA multiplies each row with, 1 in parts without an adapter."""
        lengths = self._by_part(self._lengths())
        ratios = [
            self.magnitude[part] / length.to(self.magnitude[part].dtype)
            if part in self.magnitude
            else torch.ones_like(length)
            for part, length in lengths.items()
        ]
        return torch.cat(ratios)

    def _base_weight(self) -> Tensor:
        base = self.base
        return base.full_weight() if isinstance(base, FrozenLinear) else base.weight.float()

    def _updated(self) -> Tensor:
        """Return W + s B A."""
        weight = self._base_weight()
        cols = weight.shape[1]
        updates = [
            self.b[part].float() @ self.a[part].float()
            if part in self.a
            else weight.new_zeros(number, cols)
            for part, number in self.rows.items()
        ]
        updated: Tensor = weight + self.scale * torch.cat(updates)
        return updated

    @torch.no_grad()
    def _lengths(self) -> Float[Tensor, " rows"]:
        lengths: Tensor = torch.linalg.vector_norm(self._updated(), dim=1)
        return lengths

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        y = self.base(x)
        if not self.switched_on:
            return y  # type: ignore[no-any-return]
        update = torch.cat(
            [
                F.linear(F.linear(x, self.a[part]), self.b[part])
                if part in self.a
                else y.new_zeros(*y.shape[:-1], number)
                for part, number in self.rows.items()
            ],
            dim=-1,
        )
        update = (self.scale * update).to(y.dtype)
        if not self.magnitude:
            return y + update  # type: ignore[no-any-return]
        ratio = self._ratio().to(y.dtype)
        product = y if self.base.bias is None else y - self.base.bias.to(y.dtype)
        # In this form the bits are the base's while the ratio is 1 and B is 0.
        return y + (ratio - 1) * product + ratio * update  # type: ignore[no-any-return]


@contextmanager
def without_weights() -> Iterator[None]:
    """Give every nn.Linear built inside an empty weight, for `adapt` to fill: one at a time."""

    def empty(_: nn.Module, __: str, module: nn.Module | None) -> None:
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(torch.empty(0))

    handle = register_module_module_registration_hook(empty)
    try:
        yield
    finally:
        handle.remove()


def adapt(model: nn.Module, cfg: AdapterConfig, seed: int, fill: Fill) -> None:
    """Freeze `model` and put adapters on the linear layers of its blocks, in place.

    Args:
        fill: fills a weight that `without_weights` left empty, given its name.

    Raises:
        ValueError: a pattern of `targets` matches no layer.
    """
    inside = {id(m) for block in blocks(model) for m in block.modules()}
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    parts = {n: _parts(model, n) for n in linears if id(model.get_submodule(n)) in inside}
    names = [_joined(name, part) for name, rows in parts.items() for part in rows]
    for pattern in cfg.targets:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"adapter.targets: {pattern!r} matches no layer; there are: {', '.join(names[:6])}"
            )
    for name in linears:  # by name: a list of the layers would keep what is packed
        linear: Any = model.get_submodule(name)
        if not linear.weight.numel():
            weight = torch.empty(linear.out_features, linear.in_features)
            fill(f"{name}.weight", weight)
            linear.weight = nn.Parameter(weight)
        linear.requires_grad_(requires_grad=False)
        if name in parts:
            _put(model, name, _adapted(name, linear, parts[name], cfg, seed))
    own = adapter_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in own)


def _parts(model: nn.Module, name: str) -> dict[str, int]:
    """Return the number of outputs of each product that a layer computes, by its parent's word."""
    parent, _, attribute = name.rpartition(".")
    fused: dict[str, dict[str, int]] = getattr(model.get_submodule(parent), "fused", {})
    linear: Any = model.get_submodule(name)
    return fused.get(attribute, {_WHOLE: linear.out_features})


def _joined(name: str, part: str) -> str:
    return name if part == _WHOLE else f"{name}.{part}"


def _adapted(
    name: str, linear: nn.Linear, rows: dict[str, int], cfg: AdapterConfig, seed: int
) -> nn.Module:
    base: nn.Linear | FrozenLinear = linear
    if cfg.base != "full":
        base = FrozenLinear(linear.weight, linear.bias, cfg.base)
    adapted = [p for p in rows if any(fnmatchcase(_joined(name, p), t) for t in cfg.targets)]
    if not adapted:
        return base

    def fill(part: str, a: Tensor) -> None:
        bound = a.shape[1] ** -0.5  # kaiming_uniform_ with a = sqrt(5)
        if not a.is_meta:
            generator = generator_of(seed, f"{_joined(name, part)}.a")
            nn.init.uniform_(a, -bound, bound, generator=generator)

    return AdaptedLinear(base, rows, adapted, cfg, fill)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Return the layers with an adapter, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Make `model` compute without its adapters inside the context."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.switched_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.switched_on = True


def adapter_names(model: nn.Module) -> set[str]:
    """Return the names of the adapters' parameters; the empty set for a model without adapters."""
    return {
        f"{prefix}.{name}"
        for prefix, layer in adapted_layers(model).items()
        for name, _ in layer.named_parameters()
        if not name.startswith("base.")
    }


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint holds of a model: its state_dict, or its adapters' part of it."""
    state, own = model.state_dict(), adapter_names(model)
    return {name: tensor for name, tensor in state.items() if not own or name in own}


def base_state(model: nn.Module) -> dict[str, Tensor | FrozenLinear]:
    """Return the weights of the model below its adapters, by the names they have without them.

    A packed weight is represented by its layer, which takes the full one.
    """
    own = adapter_names(model)
    if not own:
        return dict(model.state_dict())
    state: dict[str, Tensor | FrozenLinear] = {
        name.replace(".base.", "."): tensor
        for name, tensor in model.state_dict().items()
        if name not in own
    }
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear):
            state[f"{name.removesuffix('.base')}.weight"] = module
    return state


def base_loaded(model: nn.Module, put: Put | None = None) -> None:
    """Set what of the adapters depends on the base's weights, which have been loaded.

    Args:
        put: called with (tensor, parameter), returns the parameter's shard of the tensor.
    """
    for layer in adapted_layers(model).values():
        layer.start_magnitude(put)


def merge(model: Any) -> Any:
    """Return `model` with its adapters added to the weights and its packed weights in full.

    A merged model in few bits would be another one: the sum is rounded anew.
    """
    dtype = next(model.parameters()).dtype
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear) or (
            isinstance(module, FrozenLinear) and not name.endswith(".base")
        ):
            weight = module.full_weight().to(dtype)
            inner = module.base if isinstance(module, AdaptedLinear) else module
            rows, cols = weight.shape
            linear: Any = nn.Linear(cols, rows, device="meta")
            linear.weight = nn.Parameter(weight)
            linear.bias = inner.bias
            _put(model, name, linear)
    if getattr(model.cfg, "adapter", None) is not None:
        model.cfg = replace(model.cfg, adapter=None)
    return model


class AdapterSizes(NamedTuple):
    """What adapters add to a model, and what they spare its training.

    Args:
        parameters: of the adapters.
        for_token: their forward FLOPs for a token.
        for_pass: FLOPs for a forward pass: of DoRA's B A, whose rows are measured. They have no
            gradient.
        frozen: forward FLOPs for a token of the frozen linear layers that a gradient passes: those
            outside the blocks and in the blocks from `lowest` on.
        lowest: the number of the first block that has an adapter.
    """

    parameters: int
    for_token: int
    for_pass: int
    frozen: int
    lowest: int


@lru_cache(maxsize=64)
def adapter_sizes(cfg: Any, vocab_size: int) -> AdapterSizes:
    """Return the sizes of the adapters of a model's config."""
    with torch.device("meta"):
        model = cfg.build(vocab_size, 0)
    layers = adapted_layers(model).values()
    matrices = sum(p.numel() for layer in layers for d in (layer.a, layer.b) for p in d.values())
    lengths = sum(p.numel() for layer in layers for p in layer.magnitude.values())
    products = [
        2 * layer.b[part].numel() * layer.a[part].shape[1]
        for layer in layers
        for part in layer.a
        if part in layer.magnitude
    ]
    numbers = {id(m): n for n, block in enumerate(blocks(model)) for m in block.modules()}
    lowest = min(numbers[id(layer)] for layer in layers)
    frozen = 0
    for module in model.modules():
        if numbers.get(id(module), lowest) < lowest:
            continue
        if isinstance(module, nn.Linear):
            frozen += module.weight.numel()
        elif isinstance(module, FrozenLinear):
            frozen += module.num_frozen
    return AdapterSizes(matrices + lengths, 2 * matrices, sum(products), 2 * frozen, lowest)
