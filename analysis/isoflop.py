"""Approach 2 to compute-optimal training: the size of smallest loss at each budget, a power law.

A minimum found on few noisy losses has a bias and a spread that depend on the curve, the sizes and
the method. Both are measured: the shape of a Chinchilla law fitted to all runs, moved to the
minimum found, gives losses whose minimum is known; the same procedure on them, without noise, has
the bias, which is subtracted, and on noisy copies the deviations, which make the intervals. The
noise is that of the runs about the law, a parabola at each budget taken out; it is one share of the
loss at all budgets, as fits of log losses take it to be.

Source: Hoffmann et al. arXiv 2203.15556, approach 2.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from analysis.budgets import Shape, budget_points, fitted_law, noise_of_runs, outliers
from analysis.law import Array
from analysis.minima import METHODS, MIN_SIZES, Find, Minima

Method = Literal["parabola", "akima"]
_LOST = 0.2  # of the noisy copies may have no minimum


@dataclass(frozen=True)
class IsoFlop:
    """The minimum of each budget and the power laws through them.

    Args:
        budgets: a row for each: flops; n and tokens at the minimum with _low and _high; loss there;
            bias (log of the n found over the true one, for the fitted law; it is subtracted); sizes
            (their number); rejected (the reason, or "").
        exponents: rows n and tokens: exponent of C, low, high, coefficient.
        curves: the fitted curves, for the figure: flops, n, loss.
        points: the runs with their budget.
        outliers: runs more than four standard deviations off: row, flops, n, loss, deviations.
        noise: standard deviation of a run, a share of its loss.
        left_out: numbers of rows not used, by the reason.
        lines: log n and log tokens at log C = 0 and their slopes, bootstrapped [2, 2, B].
    """

    budgets: pd.DataFrame
    exponents: pd.DataFrame
    curves: pd.DataFrame
    points: pd.DataFrame
    outliers: pd.DataFrame
    noise: float
    left_out: dict[str, int]
    method: Method
    lines: Array

    def counts(self) -> str:
        """Return a sentence: points, budgets and bias, and why others were not used."""
        parts = [f"{len(self.points)} points at {len(self.budgets)} budgets"]
        parts += _rejections(self.budgets)
        bias = self.budgets.loc[self.budgets["rejected"] == "", "bias"]
        if bias.isna().all():
            parts.append("bias of the method not known")
        else:
            known = bias.dropna().to_numpy()
            worst = float(np.expm1(known[np.argmax(np.abs(known))]))
            parts.append(f"bias of the {self.method} (up to {worst:+.1%} of n) subtracted")
        if len(self.outliers):
            parts.append(f"outliers: {len(self.outliers)}")
        parts += [f"{count} left out: {why}" for why, count in self.left_out.items()]
        return "; ".join(parts)

    def at(self, flops: float) -> pd.DataFrame:
        """Return the best n, tokens and tokens per parameter at `flops`, a row each.

        Columns: quantity, estimate, low, high (95%).
        """
        rows, log_c = self.exponents.set_index("quantity"), np.log(flops)
        best = np.log(rows["coefficient"].to_numpy()) + rows["exponent"].to_numpy() * log_c
        draws = self.lines[:, 0] + self.lines[:, 1] * log_c
        values = {
            "n": (best[0], draws[0]),
            "tokens": (best[1], draws[1]),
            "tokens_per_parameter": (best[1] - best[0], draws[1] - draws[0]),
        }
        table = [(name, np.exp(v), *np.exp(_interval(b))) for name, (v, b) in values.items()]
        return pd.DataFrame(table, columns=["quantity", "estimate", "low", "high"])

    def report(self) -> dict[str, Any]:
        """Return every number, as JSON types."""
        return {
            "method": self.method,
            "exponents": self.exponents.set_index("quantity").to_dict(orient="index"),
            "budgets": self.budgets.to_dict(orient="records"),
            "noise": self.noise,
            "outliers": self.outliers.to_dict(orient="records"),
            "points": {"used": len(self.points), "left_out": self.left_out},
        }


def _rejections(budgets: pd.DataFrame) -> list[str]:
    pairs = zip(budgets["flops"], budgets["rejected"], strict=True)
    return [f"{flops:.3g} FLOPs rejected: {why}" for flops, why in pairs if why]


def isoflop(
    table: pd.DataFrame,
    *,
    flops: str,
    n: str,
    loss: str,
    tokens: str | None = None,
    method: Method = "parabola",
    bootstraps: int = 1000,
    seed: int = 0,
) -> IsoFlop:
    """Return the size of smallest loss at each budget and its growth with compute.

    Args:
        flops, n, loss, tokens: columns; tokens default to flops / 6n.

    Raises:
        KeyError: a column is missing.
        ValueError: fewer than two budgets have a minimum; names the reason for each.
    """
    points, left_out = budget_points(table, flops, n, loss, tokens)
    law = fitted_law(points)
    noise, degrees = noise_of_runs(points, law)
    rng, rows, curves = np.random.default_rng(seed), [], []
    deviations: list[Array] = []
    spread = noise * np.sqrt(max(1, degrees) / rng.chisquare(max(1, degrees), bootstraps))
    for budget, part in points.groupby("budget"):
        level = part["loss"].mean()
        row, draws, curve = _one(METHODS[method], part, law, noise * level, spread * level, rng)
        rows.append({"flops": budget} | row)
        if not row["rejected"]:
            deviations.append(draws)
        if curve is not None:
            curves.append(curve.assign(flops=budget))
    budgets = pd.DataFrame(rows)
    accepted = budgets[budgets["rejected"] == ""]
    if len(accepted) < 2:
        why = "; ".join(_rejections(budgets))
        raise ValueError(
            f"{len(accepted)} of {len(budgets)} budgets have a minimum, at least 2 are needed. "
            f"{why}"
        )
    exponents, lines = _exponents(accepted, np.stack(deviations, axis=1))
    return IsoFlop(
        budgets,
        exponents,
        pd.concat(curves, ignore_index=True),
        points,
        outliers(points, law, noise),
        noise,
        left_out,
        method,
        lines,
    )


def _one(
    find: Find,
    part: pd.DataFrame,
    law: Array | None,
    noise: float,
    spread: Array,
    rng: np.random.Generator,
) -> tuple[dict[str, Any], Array, pd.DataFrame | None]:
    """Return (row of one budget, deviations of log n and log tokens [2, B], fitted curve).

    Args:
        noise: standard deviation of a run's loss; spread: that of each copy [B].
    """
    sizes, y = part["n"].nunique(), part["loss"].to_numpy()
    logs = [np.log(part[column].to_numpy()) for column in ("n", "d")]
    names = [f"{name}{end}" for name in ("n", "tokens") for end in ("", "_low", "_high")]
    row: dict[str, Any] = dict.fromkeys([*names, "loss", "bias"], np.nan) | {"sizes": sizes}
    if sizes < MIN_SIZES:
        why = f"{sizes} sizes are fewer than {MIN_SIZES}"
        return row | {"rejected": why}, np.empty((2, 0)), None
    by_n, by_d = (find(x, y[None], noise) for x in logs)
    if by_n.reason or by_d.reason:
        why = by_n.reason or f"by tokens, {by_d.reason}"
        return row | {"rejected": why}, np.empty((2, 0)), None
    row["loss"] = float(by_n.loss[0])
    exact, truth, calibrated = _known_shape(by_n, part, law, find, noise)
    copies = exact + spread[:, None] * rng.standard_normal((len(spread), len(y)))
    deviations = []
    for name, x, found, true in zip(("n", "tokens"), logs, (by_n, by_d), truth, strict=True):
        bias = float(find(x, exact[None], noise).best[0]) - true
        moved = find(x, copies, noise).best - true - bias
        best, (low, high) = float(found.best[0]) - bias, _interval(moved)
        row |= {name: np.exp(best)}
        row |= {f"{name}_low": np.exp(best - high), f"{name}_high": np.exp(best - low)}
        if name == "n" and calibrated:
            row["bias"] = bias
        deviations.append(moved)
    both = np.stack(deviations)
    lost = np.asarray(np.isnan(both).any(axis=0))
    share = float(lost.mean()) if lost.size else 0.0
    why = f"{share:.0%} of the noisy copies have no minimum"
    row["rejected"] = why if share > _LOST else ""
    if 0 < share < 1:
        both[:, lost] = both[:, rng.choice(np.flatnonzero(~lost), lost.sum())]
    line = np.linspace(*by_n.reach, 200)
    return row, both, pd.DataFrame({"n": np.exp(line), "loss": by_n.curve(line)})


def _known_shape(
    found: Minima, part: pd.DataFrame, law: Array | None, find: Find, noise: float
) -> tuple[Array, tuple[float, float], bool]:
    """Return noise-free losses [M] near those of a budget, their true minimum, whether of the law.

    The minimum is that in log n and in log tokens. Where the law has none at these sizes, the
    fitted curve itself is taken.
    """
    x = np.log(part["n"].to_numpy())
    if law is not None:
        shape = Shape.of(law, part)
        for _ in range(2):  # the bias hangs a little on where the minimum lies
            first = find(x, shape.losses(x)[None], noise).best[0]
            if not np.isfinite(first):
                break
            shape = shape.moved(float(found.best[0] - first))
        else:
            if np.isfinite(find(x, shape.losses(x)[None], noise).best[0]):
                return shape.losses(x), shape.minimum, True
    x_fitted = np.clip(x, *found.reach)
    order = np.argsort(x)
    tokens = np.interp(found.best[0], x[order], np.log(part["d"].to_numpy())[order])
    return found.curve(x_fitted), (float(found.best[0]), float(tokens)), False


def _exponents(accepted: pd.DataFrame, deviations: Array) -> tuple[pd.DataFrame, Array]:
    """Return the rows of the power laws, and their bootstrapped lines [2, 2, B].

    Args:
        deviations: of log n and log tokens [2, budgets, B].
    """
    c, rows, lines = np.log(accepted["flops"].to_numpy()), [], []
    middle = c.mean()
    for index, name in enumerate(("n", "tokens")):
        slope, at_middle = np.polyfit(c - middle, np.log(accepted[name].to_numpy()), 1)
        moved = np.polyfit(c - middle, deviations[index], 1)
        slopes, heights = slope - moved[0], at_middle - moved[1]
        rows.append((name, slope, *_interval(slopes), float(np.exp(at_middle - slope * middle))))
        lines.append(np.stack([heights - slopes * middle, slopes]))
    columns = ["quantity", "exponent", "low", "high", "coefficient"]
    return pd.DataFrame(rows, columns=columns), np.stack(lines)


def _interval(draws: Array) -> tuple[float, float]:
    """Return the 2.5% and 97.5% quantiles, NaN where there are no draws."""
    known = draws[np.isfinite(draws)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    return float(low), float(high)
