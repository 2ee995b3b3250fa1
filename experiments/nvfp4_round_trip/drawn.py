"""SQNR of each format on drawn distributions, to drawn.csv.

PYTHONPATH=. python experiments/nvfp4_round_trip/drawn.py
"""

from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.distributions import Laplace, LogNormal, StudentT

from kernels.diagnostics import sqnr_db
from kernels.quantiser import Quantiser

HERE = Path(__file__).parent
FORMATS = {
    "MXFP4, scale floor": Quantiser(format="mxfp4", block=(1, 32), scale="floor"),
    "MXFP4, scale rounded up": Quantiser(format="mxfp4", block=(1, 32), scale="rceil"),
    "NVFP4 16x16": Quantiser(format="nvfp4", block=(16, 16)),
    "NVFP4 1x16": Quantiser(format="nvfp4", block=(1, 16)),
    "NVFP4 1x16, four over six": Quantiser(format="nvfp4", block=(1, 16), four_over_six="mae"),
    "FP8 E5M2, one scale": Quantiser(format="fp8_e5m2", block=(0, 0)),
    "FP8 E4M3, one scale": Quantiser(format="fp8_e4m3", block=(0, 0)),
    "MXFP8 E4M3": Quantiser(format="mxfp8_e4m3", block=(1, 32), scale="rceil"),
}


def samples() -> dict[str, Tensor]:
    """Return 1024 x 1024 numbers of each distribution, fp32, by its name."""
    torch.manual_seed(0)
    shape = torch.Size((1024, 1024))
    normal = torch.randn(shape)
    spiked = torch.where(torch.rand(shape) < 1e-3, 50 * normal, normal)
    return {
        "uniform": torch.rand(shape) * 2 - 1,
        "normal": normal,
        "Laplace": Laplace(0.0, 1.0).sample(shape),
        "Student t, 3": StudentT(3.0).sample(shape),
        "log-normal": LogNormal(0.0, 2.0).sample(shape) * normal.sign(),
        "normal, 0.1% x 50": spiked,
    }


if __name__ == "__main__":
    rows = [
        ("drawn", name, distribution, sqnr_db(x, quantiser))
        for distribution, x in samples().items()
        for name, quantiser in FORMATS.items()
    ]
    table = pd.DataFrame(rows, columns=["source", "format", "distribution", "sqnr_db"])
    table.to_csv(HERE / "drawn.csv", index=False)
