"""Loss against size by precision, curves, and bf16 minus fp32 paired by seed."""

from pathlib import Path

from analysis import plots
from analysis.paired import over_seeds, paired_difference
from analysis.runs import Runs


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write figures and results.csv; return the figures."""
    done, note = runs.finished, runs.count()
    figure, data = plots.against_size(runs, by="precision.compute")
    figure.axes[0].set_title("Bytes of the standard library: loss falls with size")
    made = [plots.save(folder, "loss_by_size", figure, data, note)]
    figure, data = plots.curves_in_panels(runs, x="flops", by="num_parameters", panels="precision")
    figure.suptitle("300 steps each: loss against compute")
    made.append(plots.save(folder, "loss_by_flops", figure, data, note))
    pair = ["num_parameters", "seed"]
    gap = paired_difference(
        done, key="precision.compute", baseline="fp32", metric="val_loss", pair=pair
    )
    gap.to_csv(folder / "bf16_minus_fp32.csv", index=False)
    by = ["num_parameters", "precision.compute"]
    over_seeds(done, by, "val_loss").to_csv(folder.parent / "results.csv", index=False)
    print(over_seeds(done, by, "val_loss").to_string(index=False))
    print("\nbf16 minus fp32, paired by model and seed (95% interval):")
    print(gap.to_string(index=False))
    return made
