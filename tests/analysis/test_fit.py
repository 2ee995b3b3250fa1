"""The fit of a table: what it uses, what it says it left out, what it writes, what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.fit import fit
from analysis.forecast import forecast
from analysis.laws import CHINCHILLA, POWER_WITH_OFFSET
from analysis.minimise import minimise
from analysis.objective import Objective
from analysis.report import plain
from analysis.runs import Runs
from tests.conftest import ROOT

THETA = np.array([np.log(406.4), np.log(410.7), np.log(1.69), 0.34, 0.28])
COLUMNS = {"n": "size", "d": "tokens"}


@pytest.fixture
def runs() -> pd.DataFrame:
    """A known law with 0.2% of noise, a run that died, one entered twice."""
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e7, 1e10, 8), np.geomspace(1e9, 1e12, 8)))
    noise = np.random.default_rng(0).normal(0.0, 2e-3, n.size)
    loss = CHINCHILLA.predict(THETA, {"n": n, "d": d}) * np.exp(noise)
    table = pd.DataFrame({"size": n, "tokens": d, "flops": 6 * n * d, "val_loss": loss})
    table.loc[5, "val_loss"] = np.nan
    return pd.concat([table, table.iloc[[9]]], ignore_index=True)


def test_a_fit_covers_the_truth_predicts_what_it_has_not_seen_and_counts_all_rows(
    runs: pd.DataFrame,
) -> None:
    found = fit(
        runs, CHINCHILLA, columns=COLUMNS, loss="val_loss", holdout="flops > 1e22", bootstraps=300
    )
    assert found.left_out == {"a value is missing": 1, "the same point again": 1}
    assert len(found.used) + len(found.held_out) + 2 == len(runs)
    assert found.held_out["n"].size == (runs["flops"] > 1e22).sum()
    truth = CHINCHILLA.named(THETA)
    for row in found.parameters.itertuples():
        spread = 4 * row.se  # wider than the interval: one draw of noise
        assert abs(row.estimate - float(truth[row.parameter])) < spread, row.parameter
        assert row.low < row.high
    report = found.report()
    assert abs(report["held_out_error"]["mean_relative"]) < 2e-3
    assert report["starts"]["in_best_basin"] > 0.2
    band = found.predict({"n": np.array([1e9]), "d": np.array([2e10])})
    assert band["low"][0] < band["loss"][0] < band["high"][0]


def test_points_of_a_run_are_drawn_together_where_they_share_its_error(runs: pd.DataFrame) -> None:
    """Six points of a run share its error: drawn by rows, they look like six times the runs."""
    once = runs.drop_duplicates().dropna()
    parts = [
        once.assign(val_loss=once["val_loss"] * (1 + 1e-6 * i), run=once.index) for i in range(6)
    ]
    spread = {}
    for cluster in (None, "run"):
        found = fit(
            pd.concat(parts, ignore_index=True),
            POWER_WITH_OFFSET,
            columns={"x": "flops"},
            loss="val_loss",
            cluster=cluster,
            delta=1.0,
            bootstraps=200,
        )
        spread[cluster] = found.parameters.set_index("parameter")["se"]["E"]
    assert spread["run"] / spread[None] == pytest.approx(6**0.5, rel=0.25)


def test_many_points_start_from_some_of_them_and_end_where_all_starts_would() -> None:
    rng = np.random.default_rng(0)
    n, d = np.exp(rng.uniform(np.log(1e7), np.log(1e10), 1500)), np.exp(rng.uniform(21, 27, 1500))
    loss = CHINCHILLA.predict(THETA, {"n": n, "d": d}) * np.exp(rng.normal(0, 2e-3, 1500))
    table = pd.DataFrame({"size": n, "tokens": d, "val_loss": loss})
    starts, told = CHINCHILLA.start_grid()[::90], set[str]()
    found = fit(
        table,
        CHINCHILLA,
        columns=COLUMNS,
        loss="val_loss",
        bootstraps=20,
        starts=starts,
        progress=lambda stage, done, total: told.add(stage),
    )
    every = Objective(CHINCHILLA, found.used, 1e-3)
    _, values, _ = minimise(lambda theta, _: every(theta), starts)
    assert found.objective <= np.nanmin(values) * (1 + 1e-9)
    assert len(found.values) == len(starts)
    assert told == {"starts, on some points", "best starts, on all points", "bootstraps"}


def test_the_compute_optimal_size_is_the_minimum_along_a_budget(runs: pd.DataFrame) -> None:
    found = fit(runs, CHINCHILLA, columns=COLUMNS, loss="val_loss", bootstraps=50)
    best = found.compute_optimal(1e21).set_index("quantity")["estimate"]
    n = np.geomspace(best["n"] / 3, best["n"] * 3, 2001)
    losses = CHINCHILLA.predict(found.theta, {"n": n, "d": 1e21 / (6 * n)})
    assert n[np.argmin(losses)] == pytest.approx(best["n"], rel=2e-3)
    assert best["tokens_per_parameter"] == pytest.approx(best["d"] / best["n"])


def test_a_notebook_shows_runs_and_fits_with_what_they_rest_on(runs: pd.DataFrame) -> None:
    found = fit(runs, POWER_WITH_OFFSET, columns={"x": "flops"}, loss="val_loss", bootstraps=20)
    shown = found._repr_html_()
    assert "63 points fitted" in shown
    assert "<td>alpha</td>" in shown
    table = pd.DataFrame({"fingerprint": ["a", "b"], "state": ["finished", "failed"]})
    assert "2 cells: 1 finished, 1 failed" in Runs(table, pd.DataFrame())._repr_html_()


def test_what_cannot_be_fitted_is_refused_with_the_reason(runs: pd.DataFrame) -> None:
    with pytest.raises(KeyError, match="no column N; there are: size, tokens"):
        fit(runs, CHINCHILLA, columns={"n": "N", "d": "tokens"}, loss="val_loss")
    with pytest.raises(ValueError, match="5 points are too few for the 5 parameters of chinchilla"):
        fit(runs[:6], CHINCHILLA, columns=COLUMNS, loss="val_loss")
    logs = runs.assign(val_loss=np.log(runs["val_loss"]) - 1)
    with pytest.raises(
        ValueError, match=r"row \d+ and 24 more: -0.03.* positive: is it a logarithm"
    ):
        fit(logs, CHINCHILLA, columns=COLUMNS, loss="val_loss")
    for column in ("size", "val_loss"):
        spoilt = runs.copy()
        spoilt.loc[7, column] = np.inf
        with pytest.raises(
            ValueError, match=rf"column {column}, row 7: inf must be a finite number"
        ):
            fit(spoilt, CHINCHILLA, columns=COLUMNS, loss="val_loss")
    for argument, value in (("delta", 0.0), ("bootstraps", -1)):
        with pytest.raises(ValueError, match=f"{argument}={value:g} must be"):
            fit(runs, CHINCHILLA, columns=COLUMNS, loss="val_loss", **{argument: value})  # type: ignore[arg-type]
    power = fit(runs, POWER_WITH_OFFSET, columns={"x": "flops"}, loss="val_loss", bootstraps=0)
    assert power.parameters[["se", "low", "high"]].isna().all().all()
    json.dumps(plain(power.report()), allow_nan=False)
    with pytest.raises(ValueError, match="0 bootstraps give no interval; fit with at least 20"):
        forecast(power, pd.DataFrame({"x": [1e22]}))
    with pytest.raises(ValueError, match="power has no compute-optimal size"):
        power.compute_optimal(1e21)


@pytest.mark.slow
def test_the_command_writes_report_and_figure(runs: pd.DataFrame, tmp_path: Path) -> None:
    runs.to_csv(tmp_path / "runs.csv", index=False)
    command = [sys.executable, "-m", "analysis", "fit", str(tmp_path / "runs.csv"), "--n", "size"]
    more = ["--bootstrap", "50", "--flops", "1e21", "--out", str(tmp_path / "law.json")]
    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 left out: a value is missing" in done.stdout
    report = json.loads((tmp_path / "law.json").read_text())
    assert set(report["parameters"]) == {"A", "B", "E", "alpha", "beta"}
    assert len(report["input_sha256"]) == 64
    assert report["command"].startswith("python -m analysis fit")
    assert (tmp_path / "law.pdf").exists()
    assert len(pd.read_csv(tmp_path / "law.csv")) == len(runs) - 2
    bad = subprocess.run(
        [*command, "--loss", "nll"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert bad.returncode == 1
    assert bad.stderr.startswith("no column nll; there are:")


def test_the_command_compares_paired_runs(tmp_path: Path) -> None:
    rows = [
        (p, s, 2.0 + 0.1 * s + 0.01 * (p == "nvfp4") * (1 + s))
        for p in ("bf16", "nvfp4")
        for s in (1, 2, 3)
    ]
    pd.DataFrame(rows, columns=["precision", "seed", "val_loss"]).to_csv(
        tmp_path / "r.csv", index=False
    )
    command = [
        sys.executable,
        "-m",
        "analysis",
        "ablate",
        str(tmp_path / "r.csv"),
        "--baseline",
        "precision=bf16",
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "a.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert pd.read_csv(tmp_path / "a.csv")["difference"][0] == pytest.approx(0.03)
