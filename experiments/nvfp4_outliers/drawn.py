"""NVFP4 on drawn outliers by size of the Hadamard transform, to drawn.csv.

PYTHONPATH=. python experiments/nvfp4_outliers/drawn.py
"""

from pathlib import Path

import pandas as pd
import torch

from kernels.diagnostics import kurtosis, sqnr_db
from kernels.format_names import HADAMARD_SIZES
from kernels.hadamard import hadamard, hadamard_matrix
from kernels.quantiser import Quantiser

HERE = Path(__file__).parent
FACTORS = (1, 3, 10, 30, 100)
NVFP4 = Quantiser(format="nvfp4", block=(1, 16))


def drawn() -> pd.DataFrame:
    """Return SQNR (dB) and kurtosis of bf16 normal numbers of which 1% are larger by a factor.

    Columns: factor, hadamard (size of the transform, 0: none), sqnr_db, kurtosis.
    """
    torch.manual_seed(0)
    normal, chosen = torch.randn(1024, 1024), torch.rand(1024, 1024) < 0.01
    rows = []
    for factor in FACTORS:
        x = torch.where(chosen, factor * normal, normal).bfloat16()
        rows.append((factor, 0, sqnr_db(x, NVFP4), float(kurtosis(x.float()))))
        for size in HADAMARD_SIZES:
            turned = hadamard(x, hadamard_matrix(size), 1)
            rows.append((factor, size, sqnr_db(turned, NVFP4), float(kurtosis(turned.float()))))
    return pd.DataFrame(rows, columns=["factor", "hadamard", "sqnr_db", "kurtosis"])


if __name__ == "__main__":
    drawn().to_csv(HERE / "drawn.csv", index=False)
