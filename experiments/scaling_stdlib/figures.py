"""Three approaches to the law of small decoders, and the forecast of a held-out size."""

from pathlib import Path

import pandas as pd

from analysis import law_plots, plots
from analysis.envelope import envelope
from analysis.fit import fit
from analysis.forecast import score
from analysis.isoflop import isoflop
from analysis.laws import CHINCHILLA
from analysis.runs import Runs

HERE = Path(__file__).parent
COLUMNS = {"n": "num_parameters", "d": "tokens"}
HELD_OUT = "num_parameters > 8e5"  # the size that forecast.json predicts


def main(runs: Runs, folder: Path) -> list[Path]:
    """Write figures and results.csv; return the figures."""
    done, note = runs.finished, runs.count()
    ends = done[done["stage"].str.startswith("cool_")].copy()
    ends["budget"] = ends["stage"].str.removeprefix("cool_").astype(float)
    fitted = fit(
        ends, CHINCHILLA, columns=COLUMNS, loss="val_loss", holdout=HELD_OUT, bootstraps=2000
    )
    print(
        fitted.parameters.to_string(index=False),
        fitted.counts(),
        fitted.report()["held_out_error"],
        sep="\n",
    )
    print(fitted.compute_optimal(1e13).to_string(index=False), end="\n\n")
    figure, data = law_plots.law_with_residuals(
        fitted.residuals(), title="The largest size was held out"
    )
    made = [plots.save(folder, "law", figure, data, note)]

    best = isoflop(ends, flops="budget", n="num_parameters", loss="val_loss", tokens="tokens")
    print(
        best.budgets.to_string(index=False),
        best.exponents.to_string(index=False),
        best.counts(),
        sep="\n",
        end="\n\n",
    )
    title = f"The best size grows as C^{best.exponents['exponent'].iloc[0]:.2f}"
    made.append(plots.save(folder, "isoflop", *law_plots.isoflop_curves(best, title=title), note))

    hull = envelope(trunks(runs), run="run", n="n", flops="flops", loss="loss", width=0.2)
    print(
        hull.exponents.to_string(index=False),
        f"{hull.unused:.0%} of the envelope at the ends",
        sep="\n",
        end="\n\n",
    )
    figure, data = law_plots.best_size(hull, title="Constant-rate trunks: lower envelope")
    made.append(plots.save(folder, "envelope", figure, data, note))

    by = ends.groupby(["num_parameters", "budget"])
    results = by.agg(
        tokens=("tokens", "mean"),
        mean=("val_loss", "mean"),
        std=("val_loss", "std"),
        n=("val_loss", "count"),
    )
    results = results.reset_index()
    sizes = {name: results[column].to_numpy() for name, column in COLUMNS.items()}
    results["predicted"] = fitted.law.predict(fitted.theta, sizes)
    results["held_out"] = results.eval(HELD_OUT)
    results.to_csv(folder.parent / "results.csv", index=False)
    if (HERE / "forecast.json").exists():
        scores = score(HERE / "forecast.json", ends, columns=COLUMNS, loss="val_loss")
        print(scores.to_string(index=False))
    return made


def trunks(runs: Runs) -> pd.DataFrame:
    """Return the training loss of each size and seed: columns run, n, flops, loss."""
    facts = runs.table[runs.table["stage"].str.startswith("trunk_")].set_index("fingerprint")
    loss, flops = (runs.history[runs.history["key"] == key] for key in ("loss", "flops"))
    both = loss.merge(flops, on=["fingerprint", "step"], suffixes=("", "_flops"))
    both = both[both["fingerprint"].isin(facts.index)].astype({"fingerprint": str})
    both = both.join(facts[["num_parameters", "seed"]], on="fingerprint")
    run = both["num_parameters"].astype(str) + " " + both["seed"].astype(str)
    return pd.DataFrame(
        {
            "run": run,
            "n": both["num_parameters"],
            "flops": both["value_flops"],
            "loss": both["value"],
        }
    )
