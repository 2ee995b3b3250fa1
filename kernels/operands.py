"""The operands of a linear layer's three GEMMs, made by the parts of its recipe.

Some operands are made together: those of a gradient, or of an input, along rows and along columns
from one read; those with one scale of the tensor once for both dimensions.

Shape legend: tokens, k = width of x, n = width of y.
"""

from dataclasses import dataclass, replace
from math import inf

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kernels.codes import Codes, pack_operand, unpack_operand
from kernels.diagnostics import statistics
from kernels.emulate import Operand, emulate
from kernels.float8_mm import FORMATS
from kernels.gemm_recipes import GemmRecipe, LinearRecipe, OperandRecipe
from kernels.hadamard import hadamard, hadamard_matrix, with_signs
from kernels.operand_pairs import emulate_both, emulate_kept, float8_operands, fusible
from kernels.philox import Dice, Draw, rounding_bits
from kernels.quantise import TENSOR

OPERANDS = ("fprop.x", "fprop.w", "dgrad.g", "dgrad.w", "wgrad.g", "wgrad.x")
Probe = dict[str, dict[str, Tensor]]  # statistics by operand
_STREAM = 1 << 16  # dropout draws from the layers below this
_SIGNS = 1 << 28  # and the signs of Hadamard transforms from those above this


@dataclass(frozen=True)
class Delayed:
    """Magnitudes of the six OPERANDS for delayed scaling.

    Args:
        amax: the largest of earlier steps, from which scales are made.
        seen: the largest of this step, updated by `quantised_linear`.
    """

    amax: Float[Tensor, " 6"]
    seen: Float[Tensor, " 6"]


# Without eq: torch.compile of torch 2.11 asks for the hash before the attributes are set.
@dataclass(frozen=True, kw_only=True, eq=False)
class Operands:
    """Makes the operands of one layer; `number` is an operand's index in OPERANDS.

    For the arguments see `kernels.quantised_linear.quantised_linear`.
    """

    layer: int
    dice: Dice | None
    delayed: Delayed | None = None
    probe: Probe | None = None
    tensor_cores: bool = False

    def __call__(
        self, x: Tensor, gemm: GemmRecipe, operand: OperandRecipe | None, dim: int, number: int
    ) -> Operand:
        """Return an operand of `gemm`, which sums over its dimension `dim`."""
        (made,) = self._made(x, gemm, operand, (dim,), number)
        return made

    def of_input(
        self, x: Tensor, recipe: LinearRecipe, *, trains: bool
    ) -> tuple[Operand, Codes | None]:
        """Return x of fprop, and x of wgrad as it is kept where both are made at once, else None.

        Args:
            trains: whether there will be a wgrad.
        """
        first, wgrad, operand = recipe.fprop, recipe.wgrad, recipe.fprop.left
        if trains and self.probe is None and operand is not None:
            if _same_either_way(first, wgrad, of_x=True):
                left, kept = self._made(x, first, operand, (1, 0), 0)
                return left, (kept.values, kept.numerator, None, None)
            if self._from_one_read(x, recipe, first, operand, wgrad.right):
                padded, matrix, draws = self._read(x, recipe, operand, (0, 5))
                left, codes = emulate_kept(padded, operand.quantiser, matrix, draws)
                return self._on_tensor_cores(left, operand), codes
        return self(x, first, operand, 1, 0), None

    def kept_input(self, codes: Codes, operand: OperandRecipe) -> Operand:
        """Return x of wgrad from what `of_input` keeps."""
        if operand.quantiser.block == TENSOR:
            return Operand(codes[0], codes[1])
        made = unpack_operand(codes, operand.quantiser.along(0))
        return self._on_tensor_cores(made, operand)

    def of_weight(self, weight: Tensor, recipe: LinearRecipe) -> tuple[Operand, Operand | None]:
        """Return w of fprop, and that of dgrad where it has the same codes, else None."""
        gemm = recipe.fprop
        if not _same_codes(recipe):
            return self(weight, gemm, gemm.right, 1, 1), None
        right, other = self._made(weight, gemm, gemm.right, (1, 0), 1)
        return right, other

    def of_gradient(
        self, grad: Tensor, recipe: LinearRecipe
    ) -> tuple[Operand | None, Operand | None]:
        """Return g of dgrad and of wgrad where they are made at once, else (None, None)."""
        first, operand = recipe.dgrad, recipe.dgrad.left
        if self.probe is not None or operand is None:
            return None, None
        if _same_either_way(first, recipe.wgrad, of_x=False):
            along, across = self._made(grad, first, operand, (1, 0), 2)
            return along, across
        if not self._from_one_read(grad, recipe, first, operand, recipe.wgrad.left):
            return None, None
        padded, matrix, draws = self._read(grad, recipe, operand, (2, 4))
        along, across = emulate_both(padded, operand.quantiser, matrix, draws)
        return self._on_tensor_cores(along, operand), self._on_tensor_cores(across, operand)

    def _made(
        self,
        x: Tensor,
        gemm: GemmRecipe,
        operand: OperandRecipe | None,
        dims: tuple[int, ...],
        number: int,
    ) -> list[Operand]:
        """Return an operand for sums over each of `dims`; several where its scale is a tensor's."""
        tokens, dim = x.shape[0], dims[0]
        if not OPERANDS[number].endswith("w"):
            x = _padded(x, gemm, dim)
        before = x
        if gemm.hadamard:
            x = hadamard(x, self._matrix(gemm, number // 2, x.device), dim)
        if operand is None:
            return [Operand(x.to(torch.bfloat16))]
        amax, draw = None, self._draw(operand, x, tokens, number)
        if operand.delayed:
            assert self.delayed is not None
            amax = self.delayed.amax[number].clone()
            if self.dice is not None:
                seen = self.delayed.seen[number]
                seen.copy_(torch.maximum(seen, torch.linalg.vector_norm(x, inf)))
        elif operand.quantile is not None:
            amax = _quantile(x, operand.quantile)
        if self.probe is not None:
            bits = None if draw is None else draw.bits(*x.shape)
            quantised = operand.quantiser.along(dim)(x, bits, amax)
            untransformed = before if gemm.hadamard else None
            self.probe[OPERANDS[number]] = statistics(x, quantised, untransformed)
        if self.tensor_cores and operand.quantiser.format in FORMATS:
            return float8_operands(x, operand.quantiser, dims, amax)
        made = emulate(x, operand.quantiser, dim, draw=draw, amax=amax)
        return [self._on_tensor_cores(made, operand)] * len(dims)

    def _from_one_read(
        self,
        x: Tensor,
        recipe: LinearRecipe,
        first: GemmRecipe,
        operand: OperandRecipe,
        other: OperandRecipe | None,
    ) -> bool:
        """Return whether a kernel makes `operand` of `first` and `other`, of wgrad, at once."""
        changed = operand.delayed or operand.centred or operand.quantile is not None
        if operand != other or changed or first.hadamard or recipe.wgrad.dequantised:
            return False
        return fusible(x, operand.quantiser, recipe.wgrad.hadamard)

    def _read(
        self, x: Tensor, recipe: LinearRecipe, operand: OperandRecipe, numbers: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None, tuple[Draw, Draw] | None]:
        """Return padded x, the transform of wgrad and the dice of both operands."""
        padded = _padded(x, recipe.wgrad, 0)
        matrix = self._matrix(recipe.wgrad, 2, x.device) if recipe.wgrad.hadamard else None
        along, across = (self._draw(operand, padded, len(x), number) for number in numbers)
        return padded, matrix, None if along is None or across is None else (along, across)

    def _on_tensor_cores(self, made: Operand, operand: OperandRecipe) -> Operand:
        """Return `made` with the format of its blocks, by which `torch._scaled_mm` multiplies."""
        return replace(made, format=operand.quantiser.format) if self.tensor_cores else made

    def _matrix(self, gemm: GemmRecipe, number: int, device: torch.device) -> Tensor:
        """Return the transform of both operands of a GEMM, whose `number` is 0, 1 or 2."""
        if gemm.signs not in ("step", "backward"):
            return hadamard_matrix(gemm.hadamard, gemm.signs, self.layer, device)
        if self.dice is None:
            return hadamard_matrix(gemm.hadamard, "fixed", self.layer, device)
        matrix = hadamard_matrix(gemm.hadamard, "none", self.layer, device)
        number = 1 if gemm.signs == "backward" else number
        stream = _SIGNS + 3 * self.layer + number
        return with_signs(
            matrix, rounding_bits(_of_no_sample(self.dice), stream, 1, len(matrix))[0]
        )

    def _draw(self, operand: OperandRecipe, x: Tensor, tokens: int, number: int) -> Draw | None:
        """Return the dice of an operand; rows beyond `tokens` are padding."""
        if not operand.stochastic or self.dice is None:
            return None
        stream = _STREAM + len(OPERANDS) * self.layer + number
        if OPERANDS[number].endswith("w"):
            return Draw(_of_no_sample(self.dice), stream, x.shape[0])
        return Draw(self.dice, stream, tokens)


def packed(operand: Operand, recipe: OperandRecipe | None) -> Codes:
    """Return what fprop has made of an operand, to be kept for the backward pass."""
    if recipe is None:
        return operand.values, None, None, None
    return pack_operand(operand, recipe.quantiser)


def dequantised(codes: Codes, recipe: OperandRecipe) -> Float[Tensor, "rows cols"]:
    """Return in bf16 what `packed` stands for."""
    return unpack_operand(codes, recipe.quantiser).dequantised().to(torch.bfloat16)


def fits_float8(recipe: LinearRecipe) -> bool:
    """Return whether `kernels.float8_mm` multiplies every GEMM that `recipe` quantises."""
    gemms = (recipe.fprop, recipe.dgrad, recipe.wgrad)
    return any(not gemm.plain for gemm in gemms) and all(
        gemm.plain or (_tensor_wide(gemm) and _formats(gemm) != {"fp8_e5m2"}) for gemm in gemms
    )


def split_mean(
    x: Float[Tensor, "tokens k"], operand: OperandRecipe | None
) -> tuple[Float[Tensor, "tokens k"], Float[Tensor, " k"] | None]:
    """Return `x` without its mean over tokens, in bf16, and the mean; `x`, None if not centred."""
    if operand is None or not operand.centred:
        return x, None
    mean = x.float().mean(dim=0)
    return (x.float() - mean).to(torch.bfloat16), mean


def _of_no_sample(dice: Dice) -> Dice:
    """Return the dice of what belongs to a step and to none of its samples, as a weight does."""
    return Dice(torch.zeros_like(dice.samples[:1]), dice.key)


def _same_codes(recipe: LinearRecipe) -> bool:
    """Return whether the weight has the same codes in fprop and dgrad."""
    forward, backward = recipe.fprop, recipe.dgrad
    if forward.right is None or forward.right != backward.right or backward.dequantised:
        return False
    rows, cols = forward.right.quantiser.block
    return rows == cols and not (forward.hadamard or backward.hadamard)


def _formats(gemm: GemmRecipe) -> set[str]:
    return {o.quantiser.format for o in (gemm.left, gemm.right) if o is not None}


def _tensor_wide(gemm: GemmRecipe) -> bool:
    """Return whether both operands are FP8 with one scale of the tensor, and are not changed."""
    operands = (gemm.left, gemm.right)
    return not (gemm.hadamard or gemm.dequantised) and all(
        operand is not None
        and operand.quantiser.format in FORMATS
        and operand.quantiser.block == TENSOR
        and not operand.centred
        for operand in operands
    )


def _same_either_way(first: GemmRecipe, wgrad: GemmRecipe, *, of_x: bool) -> bool:
    """Return whether x has the same codes in fprop and wgrad, or the gradient in dgrad and wgrad.

    A scale of the tensor is the same whichever dimension is summed over; delayed scales have a
    history for each operand.
    """
    mine, other = first.left, wgrad.right if of_x else wgrad.left
    if mine is None or mine != other or mine.delayed:
        return False
    return _tensor_wide(first) and _tensor_wide(wgrad)


def _padded(x: Tensor, gemm: GemmRecipe, dim: int) -> Tensor:
    """Return `x` with zero tokens appended up to whole blocks; they add nothing to any sum."""
    operands = [operand for operand in (gemm.left, gemm.right) if operand is not None]
    blocks = [operand.quantiser.along(dim).span[0] for operand in operands]
    size = max([1, *blocks, gemm.hadamard if dim == 0 else 1])
    missing = -x.shape[0] % size
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _quantile(x: Tensor, share: float) -> Tensor:
    """Return the smallest magnitude that `share` of all do not exceed."""
    magnitudes = x.float().abs().flatten()
    rank = max(1, round(share * len(magnitudes)))
    above = len(magnitudes) - rank + 1
    if above <= len(magnitudes) // 8:  # topk takes a third of the time there
        return magnitudes.topk(above).values[-1]
    return magnitudes.kthvalue(rank).values
