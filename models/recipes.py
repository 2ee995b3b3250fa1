"""From the precision config of a linear layer to the `LinearRecipe` of `kernels`."""

from kernels.emulate import Quantiser
from kernels.quantised_linear import GemmRecipe, LinearRecipe, OperandRecipe
from models.precision_config import GemmConfig, LinearConfig, OperandConfig


def operand_recipe(cfg: OperandConfig) -> OperandRecipe | None:
    """Return the `OperandRecipe` of an operand, None if it stays in `compute`."""
    if cfg.format == "compute":
        return None
    quantiser = Quantiser(
        format=cfg.format,
        block=cfg.block_shape,
        scale=cfg.scale_rule,
        sr_headroom=cfg.sr_headroom,
        element_headroom=cfg.element_headroom,
        four_over_six=cfg.four_over_six_error if cfg.four_over_six else "",
        e4m3_max=cfg.e4m3_max,
        row_scaled=cfg.row_scaled,
    )
    return OperandRecipe(
        quantiser=quantiser,
        stochastic=cfg.rounding == "stochastic",
        quantile=cfg.quantile,
        delayed=cfg.scale_rule == "delayed",
    )


def linear_recipe(
    cfg: LinearConfig, *, forward: bool = True, backward: bool = True
) -> LinearRecipe:
    """Return the `LinearRecipe` of a layer; a direction that is switched off uses `compute`."""
    fprop, dgrad, wgrad = cfg.fprop, cfg.dgrad, cfg.wgrad
    return LinearRecipe(
        fprop=_gemm_recipe(fprop, fprop.x, fprop.w) if forward else GemmRecipe(),
        dgrad=_gemm_recipe(dgrad, dgrad.g, dgrad.w) if backward else GemmRecipe(),
        wgrad=_gemm_recipe(wgrad, wgrad.g, wgrad.x) if backward else GemmRecipe(),
    )


def _gemm_recipe(gemm: GemmConfig, left: OperandConfig, right: OperandConfig) -> GemmRecipe:
    """Return the `GemmRecipe` of one GEMM."""
    return GemmRecipe(
        left=operand_recipe(left),
        right=operand_recipe(right),
        hadamard=gemm.hadamard,
        signs=gemm.signs,
    )
