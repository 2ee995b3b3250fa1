"""Statistics of quantised operands against what they say they are."""

import torch

from kernels.diagnostics import statistics
from kernels.hadamard import hadamard, hadamard_matrix
from kernels.quantise import quantise_fp8, quantise_nvfp4
from kernels.quantiser import Quantiser
from tests.kernels.oracles import inputs

NVFP4 = Quantiser(format="nvfp4", block=(1, 16))


def test_a_gaussian_has_the_published_error_and_kurtosis() -> None:
    x = inputs("normal", 512, 512)
    found = statistics(x, quantise_nvfp4(x))
    assert abs(float(found["sqnr_db"]) - 20.43) < 0.05  # relative RMSE .0952
    assert abs(float(found["kurtosis"]) - 3.0) < 0.05
    assert found["amax"] == x.abs().max()
    assert found["saturation"] == 0
    assert 0.02 < found["underflow"] < 0.1  # |x| below a quarter of the scale
    assert found["zero_scales"] == 0
    shares = {key: float(v) for key, v in found.items() if key.startswith("scale_log2_")}
    assert sum(shares.values()) == 1.0
    # The largest of 2^18 numbers is 4.8 (scale 448); a block's median maximum, 2.0, has scale 190.
    assert max(shares, key=shares.__getitem__) == "scale_log2_7"


def test_underflow_and_saturation_count_what_is_lost() -> None:
    x = torch.ones(1, 64)
    x[0, :16] = 1e-9
    found = statistics(x, quantise_nvfp4(x))
    assert found["underflow"] == 0.25
    assert found["zero_scales"] == 0.25
    assert found["scale_log2_8"] == 0.75
    clipped = quantise_fp8(x * 3, amax=torch.tensor(1.0))
    assert statistics(x * 3, clipped)["saturation"] == 0.75


def test_stochastic_rounding_has_no_bias_where_nearest_has() -> None:
    """Gradients of one sign near the underflow threshold: nearest loses them, the dice do not."""
    x = torch.full((64, 64), 0.02)
    x[:, ::16] = 1.0
    bits = torch.randint(
        0, 256, x.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    nearest = statistics(x, quantise_nvfp4(x))["bias"]
    dice = statistics(x, quantise_nvfp4(x, bits=bits))["bias"]
    assert nearest < -0.1
    assert abs(float(dice)) < 0.1 * abs(float(nearest))


def test_hadamard_gains_kurtosis_on_outliers() -> None:
    x = inputs("normal", 256, 256).float()
    x[:, ::16] *= 30.0  # one outlier in each group
    turned = hadamard(x, hadamard_matrix(16), 1)
    assert statistics(turned, NVFP4(turned), x)["kurtosis_gain"] > 1.5
