"""Round-trip error (SQNR) of each format: on drawn distributions, and on the operands of trained runs."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import Tensor
from torch.distributions import Laplace, LogNormal, StudentT

from analysis import plots
from analysis.runs import Runs, from_folders
from kernels.diagnostics import sqnr_db
from kernels.emulate import Quantiser

HERE = Path(__file__).parent
NAME = "nvfp4_round_trip"
FORMATS = {
    "MXFP4, scale floor": Quantiser(format="mxfp4", block=(1, 32), scale="floor"),
    "MXFP4, scale rounded up": Quantiser(format="mxfp4", block=(1, 32), scale="rceil"),
    "NVFP4 16x16": Quantiser(format="nvfp4", block=(16, 16)),
    "NVFP4 1x16": Quantiser(format="nvfp4", block=(1, 16)),
    "NVFP4 1x16, four over six": Quantiser(format="nvfp4", block=(1, 16), four_over_six=True),
    "FP8 E5M2, one scale": Quantiser(format="fp8_e5m2", block=(0, 0)),
    "FP8 E4M3, one scale": Quantiser(format="fp8_e4m3", block=(0, 0)),
    "MXFP8 E4M3": Quantiser(format="mxfp8_e4m3", block=(1, 32), scale="rceil"),
}
RECIPES = {
    "mxfp4": "mxfp4", "nvfp4_all_layers": "nvfp4", "fp8_current": "fp8, one scale", "mxfp8": "mxfp8",
}  # fmt: skip
OPERANDS = {"fprop.x": "activations", "fprop.w": "weights", "dgrad.g": "gradients"}


def drawn() -> dict[str, Tensor]:
    """Return 1024 x 1024 numbers of each distribution, fp32."""
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


def main(runs: Runs, folder: Path = HERE / "figures") -> list[Path]:
    """Write the figure and results.csv; return the figures."""
    rows = [
        ("drawn", name, shape, sqnr_db(x, how))
        for shape, x in drawn().items()
        for name, how in FORMATS.items()
    ]
    history = runs.history[runs.history["key"].str.endswith("/sqnr_db")]
    last = history.sort_values("step").groupby(["fingerprint", "key"])["value"].last().reset_index()
    parts = last["key"].str.split("/", expand=True)
    last["operand"] = parts[2]
    labels = runs.finished.set_index("fingerprint")["label"].str.partition(" ")[0]
    last["recipe"] = last["fingerprint"].map(labels)
    means = last.groupby(["recipe", "operand"])["value"].mean()
    rows += [
        ("trained", name, what, float(means[recipe, operand]))
        for recipe, name in RECIPES.items()
        for operand, what in OPERANDS.items()
    ]
    table = pd.DataFrame(rows, columns=["source", "format", "distribution", "sqnr_db"])
    table.to_csv(folder.parent / "results.csv", index=False)
    wide = table.pivot(index=["source", "format"], columns="distribution", values="sqnr_db")
    print(wide.round(1).to_string(na_rep=""))
    figure, axes = plt.subplots(1, 2, figsize=(7.0, 3.2))
    for axis, (source, part) in zip(axes, table.groupby("source", sort=False), strict=True):
        for marker, (name, some) in zip(
            "osD^vP", part.groupby("distribution", sort=False), strict=False
        ):
            axis.plot(some["sqnr_db"], some["format"], marker, label=name, alpha=0.8)
        axis.set(xlabel="SQNR in dB (higher is better)", title=f"{source} numbers")
        axis.legend(fontsize=6)
    return [plots.save(folder, NAME, figure, table, runs.count())]


if __name__ == "__main__":
    for path in main(from_folders(Path(sys.argv[1] if len(sys.argv) > 1 else "."), NAME)):
        print(path)
