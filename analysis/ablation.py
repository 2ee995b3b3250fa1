"""A grid in which one thing is varied against a baseline: table, paired differences, forest plot."""

from pathlib import Path

from analysis import plots
from analysis.compare import over_seeds, paired_difference
from analysis.runs import Runs


def ablate(
    runs: Runs, *, by: str, baseline: str, pair: list[str], metric: str = "val_loss", folder: Path,
    name: str, title: str,
) -> list[Path]:  # fmt: skip
    """Write results.csv beside `folder` and the forest plot `name` into it; return the figures.

    Args:
        by: column that is varied; `choice`: the first word of a cell's label.
        pair: columns in which two runs agree to be compared.
    """
    done = runs.finished.copy()
    done["choice"] = done["label"].str.partition(" ")[0]
    table = over_seeds(done, [by], metric)
    gap = paired_difference(done, key=by, baseline=baseline, metric=metric, pair=pair)
    gap["percent"] = 100 * gap["difference"] / table.set_index(by)["mean"][baseline]
    print(table.to_string(index=False), gap.to_string(index=False), sep="\n\n")
    both = table.merge(gap.rename(columns={"value": by, "n": "pairs"}), on=by, how="left")
    both.to_csv(folder.parent / "results.csv", index=False)
    figure, data = plots.forest(gap, baseline=baseline, metric=metric)
    figure.axes[0].set_title(title)
    return [plots.save(folder, name, figure, data, runs.count())]
