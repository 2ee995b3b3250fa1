"""From the precision config of a linear layer to the `LinearRecipe` of `kernels`."""

from kernels.format_names import DOUBLE, EDEN
from kernels.gemm_recipes import GemmRecipe, LinearRecipe, OperandRecipe
from kernels.quantiser import Quantiser
from models.operand_config import DOUBLE_GROUP, OperandConfig
from models.precision_config import BackwardConfig, GemmConfig, LinearConfig


def operand_recipe(cfg: OperandConfig, hadamard: int) -> OperandRecipe | None:
    """Return the `OperandRecipe` of an operand, None if it stays in `compute`.

    Args:
        hadamard: size of its GEMM's transform.
    """
    if cfg.format == "compute":
        return None
    groups = dict.fromkeys(EDEN, hadamard) | {DOUBLE: DOUBLE_GROUP}
    quantiser = Quantiser(
        format=cfg.format,
        block=cfg.block_shape,
        scale=cfg.scale_rule,
        sr_headroom=cfg.sr_headroom,
        element_headroom=cfg.element_headroom,
        four_over_six=cfg.four_over_six_error if cfg.four_over_six else "",
        e4m3_max=cfg.e4m3_max,
        row_scaled=cfg.row_scaled,
        group=groups.get(cfg.scale_rule, 0),
    )
    return OperandRecipe(
        quantiser=quantiser,
        stochastic=cfg.rounding == "stochastic",
        quantile=cfg.quantile,
        delayed=cfg.scale_rule == "delayed",
        centred=cfg.centred,
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
        left=operand_recipe(left, gemm.hadamard),
        right=operand_recipe(right, gemm.hadamard),
        hadamard=gemm.hadamard,
        signs=gemm.signs,
        dequantised=isinstance(gemm, BackwardConfig) and gemm.saved == "quantised",
    )
