"""Linear layers after training: weights in few bits, activations too where the scheme says so.

Shape legend: rows = outputs, cols = inputs of a linear layer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kernels.awq import awq
from kernels.frozen import Packed
from kernels.gptq import gptq
from kernels.hqq import hqq
from kernels.int4_mm import MOST_ROWS, ZERO, fits_int4, has_int4, int4_linear, pack_int4
from kernels.int8_mm import int8_dynamic_linear, int8_weight_linear
from kernels.integers import in_bf16
from kernels.quantiser import Quantiser
from kernels.stored import restore, restored_codes, store, store_codes
from models.adapter import merge
from models.contract import blocks
from models.rounded_linear import RoundedLinear, rounded_input, rounded_layers
from models.scheme import AS_TRAINED, Scheme

_ACTIVATIONS = {
    "fp8": Quantiser(format="fp8_e4m3", block=(1, 1), scale="fp32"),
    "nvfp4": Quantiser(format="nvfp4", block=(1, 16), row_scaled=True),
    "mxfp4": Quantiser(format="mxfp4", block=(1, 32), scale="rceil"),
    "mxfp8": Quantiser(format="mxfp8_e4m3", block=(1, 32), scale="rceil"),
}


class Moments:
    """What calibration sums up of the inputs of a layer.

    Attributes:
        squares: sum of x x^T, [cols, cols]; magnitudes: sum of |x|, [cols]; count: of inputs.
    """

    def __init__(self, cols: int) -> None:
        self.squares, self.magnitudes, self.count = torch.zeros(cols, cols), torch.zeros(cols), 0

    def add(self, x: Float[Tensor, "*batch cols"]) -> None:
        """Add inputs."""
        flat = x.detach().float().cpu().flatten(0, -2)
        self.squares += flat.T @ flat
        self.magnitudes += flat.abs().sum(dim=0)
        self.count += len(flat)


class StoredLinear(nn.Module):
    """A linear layer whose weight is stored by a scheme, in the state_dict in packed form."""

    def __init__(
        self, linear: nn.Linear | RoundedLinear, scheme: Scheme, moments: Moments | None = None
    ) -> None:
        super().__init__()
        self.scheme, self.shape, self.bias = scheme, tuple(linear.weight.shape), linear.bias
        self.num_frozen = linear.weight.numel()  # counted as parameters
        self.dense: Tensor | None = None
        self.rounded = linear.form() if isinstance(linear, RoundedLinear) else None
        weight = linear.weight.detach()
        if isinstance(linear, RoundedLinear):
            packed = linear.packed()
        else:
            packed = _packed(weight.cpu(), scheme, moments)
        for name, part in packed.items():
            self.register_buffer(name, part.to(weight.device))

    @property
    def packed(self) -> Packed:
        """The parts of the weight."""
        return {name: part for name, part in self._buffers.items() if part is not None}

    def num_bytes(self) -> int:
        """Return the size of the packed weight."""
        return sum(part.nbytes for part in self.packed.values())

    def full_weight(self) -> Float[Tensor, "rows cols"]:
        """Return what the packed weight stands for, fp32; input scales are multiplied in."""
        packed = self.packed
        if self.rounded is not None:
            return self.rounded.restored(packed, self.shape[1])
        inputs = packed.pop("inputs", None)
        full = restore(packed, self.scheme.storage, *self.shape)
        return full if inputs is None else full * inputs.view(torch.bfloat16).float()

    def for_inference(self, dtype: torch.dtype, *, compiled: bool) -> nn.Module:
        """Return what decodes: a plain layer where the product is one in fp anyhow.

        Args:
            dtype: what the model computes in.
            compiled: the step will be compiled, which then reads int8 weights as they are.
        """
        of_inputs = self.rounded is not None and self.rounded.rounds_inputs
        if self.scheme.dynamic or of_inputs or (compiled and not self.scheme.is_emulated):
            self.dense = None if self.scheme.storage.elements == "int8" else self.full_weight()
            return self
        plain = as_linear(self, dtype)
        if compiled or dtype != torch.bfloat16 or not self._has_int4():
            return plain
        codes = restored_codes(self.packed, self.scheme.storage, self.shape[1]) + ZERO
        scales = self.packed["scales"].view(torch.bfloat16).float()
        return Int4Linear(pack_int4(codes.to(torch.uint8), scales), plain)

    def _has_int4(self) -> bool:
        """Return whether torch has a product of its own with the weight, in bf16."""
        storage = self.scheme.storage
        simple = storage.elements == "int" and storage.bits == 4 and storage.symmetric
        if not simple or storage.group is None or self.scheme.method == "awq":
            return False
        rows, cols = self.shape
        return has_int4(self.packed["codes"].device) and fits_int4(rows, cols, storage.group)

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.rounded is not None:
            x = rounded_input(x, self.rounded.cfg)
        if self.scheme.storage.elements == "int8":
            scales = self.packed["scales"].view(torch.float32)[:, 0]
            product = int8_dynamic_linear if self.scheme.dynamic else int8_weight_linear
            y = product(x, self.packed["codes"], scales)
        else:
            weight = self.full_weight() if self.dense is None else self.dense
            if self.scheme.dynamic:
                x = _rounded(x, self.scheme)
            y = F.linear(x, weight.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class Int4Linear(nn.Module):
    """A linear layer whose product with one or two rows reads 4 bits a weight; see `int4_linear`.

    Args:
        int4: what `pack_int4` returns.
        many: the plain layer, for more rows.
    """

    def __init__(self, int4: tuple[Tensor, Tensor], many: nn.Linear) -> None:
        super().__init__()
        self.packed, self.scales = int4
        self.group = many.in_features // self.scales.shape[0]
        self.many, self.bias = many, many.bias

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        if x.numel() > MOST_ROWS * x.shape[-1] or x.dtype != torch.bfloat16:
            return self.many(x)  # type: ignore[no-any-return]
        y = int4_linear(x, self.packed, self.scales, self.group)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def _rounded(x: Tensor, scheme: Scheme) -> Tensor:
    """Return activations rounded token by token in the format of the weights."""
    quantiser, flat = _ACTIVATIONS[scheme.storage.elements], x.flatten(0, -2)
    cols = flat.shape[1]
    if quantiser.format == "fp8_e4m3":
        quantiser = Quantiser(format="fp8_e4m3", block=(1, cols), scale="fp32")
    padded = F.pad(flat, (0, -cols % quantiser.block[1]))
    return quantiser(padded).dequantise()[:, :cols].to(x.dtype).view(x.shape)


def _packed(weight: Tensor, scheme: Scheme, moments: Moments | None) -> Packed:
    storage, method = scheme.storage, scheme.method
    bits, group, symmetric = storage.bits, storage.group, storage.symmetric
    if method == "hqq":
        return store_codes(*hqq(weight, bits, group), storage)
    if scheme.needs_data and moments is None:  # the form alone: what is loaded fills it
        method = "nearest"
    if method == "gptq":
        assert moments is not None
        found = gptq(weight, moments.squares, bits, group, symmetric=symmetric)
        return store_codes(*found, storage)
    inputs = {}
    if scheme.method == "awq":
        ones = torch.ones(weight.shape[1], device=weight.device)
        inputs = {"inputs": ones.bfloat16().view(torch.int16)}
    if method == "awq":
        assert moments is not None
        mean = moments.magnitudes / max(1, moments.count)
        grid, codes, factors = awq(weight, moments.squares, mean, bits, group, symmetric=symmetric)
        inputs = {"inputs": in_bf16(factors).bfloat16().view(torch.int16)}
        return store_codes(grid, codes, storage) | inputs
    return store(weight, storage) | inputs


def compress(model: nn.Module, scheme: Scheme, calibrate: Callable[[], None] | None = None) -> None:
    """Store the weights of all linear layers in the blocks of `model` by `scheme`, in place.

    Adapters are merged first. Blocks follow one another: each is calibrated on what those before
    it, stored already, give it.

    Args:
        calibrate: runs the model on training text (None: the scheme needs none, or the form alone
            is wanted, which a checkpoint fills).

    Raises:
        ValueError: the blocks have no linear layer, or such as are trained rounded and a scheme
            that would round them anew, or the other way about.
    """
    merge(model)
    kind = _kind(model, scheme)
    for block in blocks(model):
        names = [n for n, m in block.named_modules() if isinstance(m, kind)]
        moments: dict[str, Moments] = {}
        if scheme.needs_data and calibrate is not None:
            with _summing(block, names) as moments:
                calibrate()
        for name in names:
            linear: Any = block.get_submodule(name)
            parent, _, attribute = name.rpartition(".")
            stored = StoredLinear(linear, scheme, moments.get(name))
            setattr(block.get_submodule(parent), attribute, stored)
    if not stored_layers(model):
        raise ValueError(
            f"{type(model).__name__} has no linear layer in its blocks: no scheme changes it"
        )


def _kind(model: nn.Module, scheme: Scheme) -> type[nn.Module]:
    """Return the class of the layers that a scheme stores."""
    trained = bool(rounded_layers(model))
    if trained and scheme.name != AS_TRAINED:
        raise ValueError(
            "the layers of this model are trained rounded, and would be rounded anew; "
            f"take scheme={AS_TRAINED}, which stores what they compute with"
        )
    if not trained and scheme.name == AS_TRAINED:
        raise ValueError(
            "the layers of this model are not trained rounded; take another scheme, or train with "
            "+model/rounding=bitnet, lsq or torchao"
        )
    return RoundedLinear if trained else nn.Linear


@contextmanager
def _summing(block: nn.Module, names: list[str]) -> Iterator[dict[str, Moments]]:
    """Sum up the inputs of layers inside the context."""
    moments, handles = {}, []
    for name in names:
        linear: Any = block.get_submodule(name)
        own = moments[name] = Moments(linear.in_features)
        handles.append(
            linear.register_forward_pre_hook(lambda _, given, own=own: own.add(given[0]))
        )
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def stored_layers(model: nn.Module) -> dict[str, StoredLinear]:
    """Return the layers that `compress` has made, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, StoredLinear)}


def as_linear(stored: StoredLinear, dtype: torch.dtype) -> nn.Linear:
    """Return a plain layer with the full weight, in `dtype`.

    Raises:
        ValueError: the layer rounds its inputs, which a plain one does not.
    """
    if stored.rounded is not None and stored.rounded.rounds_inputs:
        raise ValueError(
            "its layers round their inputs too, which no plain layer does; export the run whose "
            "weights it stores"
        )
    rows, cols = stored.shape
    linear: Any = nn.Linear(cols, rows, device="meta")
    linear.weight = nn.Parameter(stored.full_weight().to(dtype), requires_grad=False)
    linear.bias = stored.bias
    return linear  # type: ignore[no-any-return]


def decompress(model: Any) -> Any:
    """Return `model` with plain layers that hold what is stored: the same function, in full."""
    dtype = next(model.parameters()).dtype
    for name, stored in stored_layers(model).items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, as_linear(stored, dtype))
    if getattr(model.cfg, "rounding", None) is not None:
        model.cfg = replace(model.cfg, rounding=None)
    return model
