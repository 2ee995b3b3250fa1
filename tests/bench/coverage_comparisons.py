"""Designs, and the intervals of differences between runs and of evaluations.

A draw is TABLES tables: each has a value of its own of the column that is compared, and shares no
run, seed or question with the others.
"""

from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from analysis.evaluation import paired_score, score_with_error
from analysis.paired import paired_difference, speed_up, unpaired_difference
from tests.bench.coverage_laws import TABLES, Inside, Study

GAP = 0.01  # nats, the true difference
PASSAGE = 10  # questions of a passage


def _differences(spreads: tuple[float, float, float], seeds: int, draw: int) -> Inside:
    """Paired by seed and unpaired, in nats, and a speed-up.

    Args:
        spreads: standard deviations of what a seed does to both, and of the rest of each.
    """
    shared, first, second = spreads
    rng = np.random.default_rng([draw, seeds])
    of_seed = rng.normal(0.0, shared, (TABLES, seeds))
    base = 3.0 + of_seed + rng.normal(0.0, first, of_seed.shape)
    new = 3.0 - GAP + of_seed + rng.normal(0.0, second, of_seed.shape)
    other = 3.0 - GAP + rng.normal(0.0, np.hypot(shared, second), of_seed.shape)
    names = np.repeat([f"new {i}" for i in range(TABLES)], seeds)
    runs = pd.DataFrame(
        {
            "way": np.concatenate([np.repeat("base", names.size), names]),
            "seed": np.tile(np.arange(names.size), 2),
            "loss": np.concatenate([base.ravel(), new.ravel()]),
        }
    )
    runs["fingerprint"] = runs.index.astype(str)
    which: dict[str, Any] = {"key": "way", "baseline": "base", "pair": ["seed"]}
    paired = paired_difference(runs, **which, metric="loss")
    steps = np.geomspace(50.0, 1000.0, 40)
    curves = pd.DataFrame(
        {
            "fingerprint": np.repeat(runs["fingerprint"].to_numpy(), len(steps)),
            "x": np.tile(steps, len(runs)),
            "value": np.add.outer(runs["loss"].to_numpy() - 3.0, 5.0 * steps**-0.3).ravel(),
        }
    )
    sooner = speed_up(runs, curves, **which, target=1.0)
    true = _speed_up(float(np.hypot(shared, first)), float(np.hypot(shared, second)))
    return {
        "a difference, paired by seed": _share(paired, -GAP),
        "a speed-up, paired by seed": _share(sooner, true),
        "a difference, Welch's": _welch(base, other),
        "a difference, Welch's, of runs that share seeds (said to be too wide)": _welch(base, new),
    }


def _welch(base: np.ndarray, new: np.ndarray) -> float:
    """Return the share of tables whose unpaired interval holds the difference."""
    rows = []
    for first, second in zip(base, new, strict=True):
        way = np.repeat(["base", "new"], len(first))
        table = pd.DataFrame({"way": way, "loss": np.concatenate([first, second])})
        rows.append(unpaired_difference(table, key="way", baseline="base", metric="loss"))
    return _share(pd.concat(rows), -GAP)


@cache
def _speed_up(first: float, second: float) -> float:
    """Return the geometric mean of the speed-up, for these standard deviations of both losses."""
    at, weights = np.polynomial.hermite_e.hermegauss(40)
    logs = (
        (np.log((1.0 + gap - spread * at) / 5.0) / -0.3) @ weights / weights.sum()
        for spread, gap in ((first, 0.0), (second, GAP))
    )
    return float(np.exp(np.subtract(*logs)))


def _evaluations(right: float, questions: int, draw: int) -> Inside:
    """Accuracies, clustered accuracies and paired differences.

    Questions of a passage are right with a chance of its own, of correlation 0.1.
    """
    rng = np.random.default_rng([draw, questions])
    count = TABLES * questions
    passage = np.arange(count) // PASSAGE
    chance = rng.beta(right * 9, (1 - right) * 9, count // PASSAGE)[passage]
    scores = pd.DataFrame(
        {
            "run": np.repeat([f"run {i}" for i in range(TABLES)], questions),
            "question": np.arange(count),
            "passage": passage,
            "score": (rng.random(count) < chance).astype(float),
        }
    )
    alone = scores.assign(score=(rng.random(count) < right).astype(float))
    base = scores.assign(run="base", score=(rng.random(count) < chance).astype(float))
    both = pd.concat([base, scores], ignore_index=True)
    inside: Inside = {}
    shown: dict[str, Any] = {"score": "score", "by": "run"}
    inside["an accuracy"] = _share(score_with_error(alone, **shown), right)
    clustered = score_with_error(scores, **shown, cluster="passage")
    inside["an accuracy, clustered by passages of 10"] = _share(clustered, right)
    gaps = paired_score(both, **shown, baseline="base", question="question")
    inside["a difference of accuracies, paired"] = _share(gaps, 0.0)
    gaps = paired_score(both, **shown, baseline="base", question="question", cluster="passage")
    inside["a difference of accuracies, paired, clustered"] = _share(gaps, 0.0)
    return inside


def _share(intervals: pd.DataFrame, true: float) -> float:
    return float(((intervals["low"] < true) & (true < intervals["high"])).mean())


STUDIES: dict[str, Study] = {
    "differences": Study(
        _differences,
        {
            "sd 0.005 of seeds, 0.003 of either": (0.005, 0.003, 0.003),
            "sd 0.02 of seeds, 0.003 and 0.01": (0.02, 0.003, 0.01),
        },
        {"2 seeds": 2, "3 seeds": 3, "5 seeds": 5},
        tables=TABLES,
    ),
    "evaluations": Study(
        _evaluations,
        {"half right": 0.5, "9 of 10 right": 0.9, "1 of 50 right": 0.02},
        {"200 questions": 200, "1,000 questions": 1000, "2,000 questions": 2000},
        tables=TABLES,
    ),
}
