"""The next sweep: the runs within a budget that best determine the loss at a larger compute.

The bootstraps of a fit give the covariance of its parameters. A run at (n, d) measures one linear
combination of them (the gradient of log L) with the noise of the fitted runs, and lowers the
variance of the prediction by a known amount (a Kalman update). Runs are chosen greedily, once by
reduction per FLOP and once by reduction alone; the better choice is proposed. Tokens per parameter
stay within those measured. Assumed are a law that is right, linear over the range of the
bootstraps, and equal noise everywhere.

Source: Chaloner and Verdinelli, Bayesian Experimental Design, Statistical Science 10 (1995).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import yaml

from analysis.fit import Fit, compute_optimal
from analysis.law import Array

_REPEATS = 2  # of one point, as seeds
_LEAST = 0.01  # of the variance: a run that reduces it by less is not proposed


@dataclass(frozen=True)
class Design:
    """A proposed sweep.

    Args:
        runs: a row for each: n, d, flops, seed, the keys of its shape, se_after (of log L at the
            target).
        before, after: standard error of log L at the target, without and with the runs.
        target: n, d, flops and loss of the compute-optimal run whose loss is to be known.
    """

    runs: pd.DataFrame
    before: float
    after: float
    target: dict[str, float]

    def report(self) -> dict[str, Any]:
        """Return every number, as JSON types."""
        return {
            "target": self.target,
            "relative_se_before": self.before,
            "relative_se_after": self.after,
            "flops": float(self.runs["flops"].sum()),
            "runs": self.runs.to_dict(orient="records"),
        }


def design(
    fitted: Fit,
    shapes: pd.DataFrame,
    *,
    budget: float,
    target: float,
    steps: int = 12,
) -> Design:
    """Return the runs for `budget` FLOPs that best determine the loss at `target` FLOPs.

    Args:
        shapes: models to choose from: a column n, all others are keys of the sweep (`model.width`).
        steps: tokens tried for each shape, log-spaced over the tokens per parameter of the fitted
            runs.

    Raises:
        ValueError: no run fits the budget or helps, or the fit has fewer than 100 bootstraps.
    """
    if len(fitted.draws) < 100:
        raise ValueError(
            f"{len(fitted.draws)} bootstraps give no covariance of the parameters; fit with at "
            "least 100"
        )
    best = {k: float(v) for k, v in compute_optimal(fitted.law.named(fitted.theta), target).items()}
    points = _candidates(fitted, shapes, budget, steps)
    slopes = _slopes(fitted, points["n"].to_numpy(), points["d"].to_numpy())
    target_slope = _slopes(fitted, np.array([best["n"]]), np.array([best["d"]]))[0]
    covariance = np.cov(fitted.draws, rowvar=False)
    choices = [
        _greedy(points, slopes, target_slope, covariance, fitted.noise**2, budget, power)
        for power in (1.0, 0.0)
    ]
    chosen = min(choices, key=lambda rows: rows[-1]["se_after"] if rows else np.inf)
    if not chosen:
        raise ValueError(
            f"no run of the {len(shapes)} shapes within {budget:.3g} FLOPs lowers the variance at "
            f"{target:.3g} FLOPs by {_LEAST:.0%}: raise the budget or add larger shapes"
        )
    loss = float(
        fitted.law.predict(fitted.theta, {"n": np.array([best["n"]]), "d": np.array([best["d"]])})[
            0
        ]
    )
    before = float(np.sqrt(target_slope @ covariance @ target_slope))
    return Design(
        pd.DataFrame(chosen), before, chosen[-1]["se_after"], best | {"flops": target, "loss": loss}
    )


def _greedy(
    points: pd.DataFrame,
    slopes: Array,
    target_slope: Array,
    covariance: Array,
    noise: float,
    budget: float,
    power: float,
) -> list[dict[str, Any]]:
    """Return runs chosen one after another by reduction of the variance over cost ** `power`."""
    left, chosen = budget, []
    variance = float(target_slope @ covariance @ target_slope)
    uses = np.zeros(len(points), dtype=int)
    cost = points["flops"].to_numpy()
    while True:
        spread = slopes @ covariance  # [M, P]
        gains = (spread @ target_slope) ** 2 / (noise + np.einsum("mp,mp->m", spread, slopes))
        open_ = (cost <= left) & (uses < _REPEATS)
        if not open_.any() or (gains[open_] < _LEAST * variance).all():
            break
        worth = np.where(open_ & (gains >= _LEAST * variance), gains / cost**power, -1.0)
        index = int(np.argmax(worth))
        uses[index] += 1
        left -= cost[index]
        along = spread[index]
        covariance = covariance - np.outer(along, along) / (noise + along @ slopes[index])
        variance = float(target_slope @ covariance @ target_slope)
        chosen.append(
            {str(k): v for k, v in points.iloc[index].items()}
            | {"seed": int(uses[index]), "se_after": float(np.sqrt(variance))}
        )
    return chosen


def as_sweep(proposed: Design, *, name: str) -> str:
    """Return the text of a sweep.yaml: a block for each shape, its tokens and seeds as choices.

    A key that is empty for a shape is at its default and not written.
    """
    keys = [c for c in proposed.runs.columns if c not in ("n", "d", "flops", "seed", "se_after")]
    blocks = []
    for shape, part in proposed.runs.groupby(["n", *keys], dropna=False):
        same: dict[str, Any] = dict(zip(["n", *keys], shape, strict=True))
        uses = part.groupby("d")["seed"].max()
        for count in sorted(set(uses)):
            values = {key: _plain(same[key]) for key in keys if not pd.isna(same[key])}
            values["train.tokens"] = ",".join(str(round(d)) for d in uses.index[uses == count])
            values["seed"] = ",".join(str(s + 1) for s in range(int(count)))
            blocks.append({"params": values})
    body = {
        "defaults": ["/config", "_self_"],
        "name": name,
        "hydra": {"mode": "MULTIRUN", "sweeper": {"blocks": blocks}},
    }
    head = (
        "# @package _global_\n"
        f"# What is the loss at {proposed.target['flops']:.3g} FLOPs? "
        f"These {len(proposed.runs)} runs ({proposed.runs['flops'].sum():.3g} FLOPs)\n"
        f"# bring its relative standard error from {proposed.before:.2%} to {proposed.after:.2%}, "
        "if the fitted law holds.\n"
    )
    return head + yaml.safe_dump(body, sort_keys=False, width=110)


def _candidates(fitted: Fit, shapes: pd.DataFrame, budget: float, steps: int) -> pd.DataFrame:
    ratios = fitted.used["d"] / fitted.used["n"]
    rows = []
    for shape in shapes.to_dict(orient="records"):
        for ratio in np.geomspace(ratios.min(), ratios.max(), steps):
            d = float(ratio * shape["n"])
            rows.append(shape | {"d": d, "flops": 6 * shape["n"] * d})
    points = pd.DataFrame(rows)
    points = points[points["flops"] <= budget].reset_index(drop=True)
    if points.empty:
        raise ValueError(
            f"{budget:.3g} FLOPs pay for no run of these shapes at {ratios.min():.3g} or more "
            "tokens per parameter: raise the budget or add smaller shapes"
        )
    return points


def _slopes(fitted: Fit, n: Array, d: Array) -> Array:
    """Return the gradient of log L at each point, [M, P]."""
    at = fitted.law.bind({"n": n, "d": d})
    _, pull = at(np.tile(fitted.theta, (len(n), 1)))
    return pull(np.eye(len(n)))


def _plain(value: Any) -> Any:
    """Return a value as YAML writes it; a whole number read from a CSV is one again."""
    value = value.item() if isinstance(value, np.generic) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value
