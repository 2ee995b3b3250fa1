"""The next sweep: its gain is the one of Bayes' rule, and its YAML runs."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from analysis.design import Design, as_sweep, design
from analysis.fit import Fit, compute_optimal, fit
from analysis.laws import CHINCHILLA
from tests.analysis.known import grid
from tests.command_server import run


@pytest.fixture(scope="module")
def found() -> Fit:
    table = grid(5e-3)
    return fit(
        table[table["flops"] < 1e19],
        CHINCHILLA,
        columns={"n": "n", "d": "d"},
        loss="loss",
        bootstraps=200,
        starts=CHINCHILLA.start_grid()[::50],
    )


SHAPES = pd.DataFrame(
    {"n": [1e7, 1e8, 1e9], "model.width": [64, 96, 128], "model.depth": [2, 3, 4]}
)


def test_the_uncertainty_after_the_sweep_is_that_of_bayes_rule(found: Fit) -> None:
    chosen = design(found, SHAPES, budget=3e20, target=1e23)
    assert chosen.runs["flops"].sum() <= 3e20
    assert chosen.after < 0.7 * chosen.before
    best = compute_optimal(found.law.named(found.theta), 1e23)

    def slope(n: float, d: float) -> np.ndarray:
        at = found.law.bind({"n": np.array([n]), "d": np.array([d])})
        return np.array(
            [
                (at(found.theta[None] + e)[0][0, 0] - at(found.theta[None] - e)[0][0, 0]) / 2e-6
                for e in 1e-6 * np.eye(5)
            ]
        )

    rows = np.stack([slope(r.n, r.d) for r in chosen.runs.itertuples()])
    information = np.linalg.inv(np.cov(found.draws, rowvar=False)) + rows.T @ rows / found.noise**2
    wanted = slope(float(best["n"]), float(best["d"]))
    assert chosen.after == pytest.approx(
        np.sqrt(wanted @ np.linalg.inv(information) @ wanted), rel=1e-2
    )


def test_a_shape_with_an_empty_key_keeps_the_default() -> None:
    runs = pd.DataFrame({"n": [1e7, 1e8], "d": 1e9, "flops": 1e17, "seed": 1, "se_after": 0.1})
    runs["model.kind"] = ["wide", None]
    text = as_sweep(Design(runs, 0.2, 0.1, {"flops": 1e20}), name="next")
    blocks = yaml.safe_load(text)["hydra"]["sweeper"]["blocks"]
    assert [block["params"].get("model.kind") for block in blocks] == ["wide", None]


def test_what_cannot_help_is_refused(found: Fit) -> None:
    with pytest.raises(ValueError, match="pay for no run"):
        design(found, SHAPES, budget=1e10, target=1e23)


def test_the_proposed_sweep_runs(found: Fit, tmp_path: Path) -> None:
    runs = pd.DataFrame(
        {
            "n": [1e5, 1e5, 2e5],
            "model.width": [32, 32, 48],
            "model.num_heads": [2, 2, 3],
            "d": [1e4, 2e4, 1e4],
            "flops": 1.0,
            "seed": [1, 1, 2],
            "se_after": 0.1,
        }
    )
    text = as_sweep(Design(runs, 0.1, 0.05, {"flops": 1e12}), name="next")
    assert len(yaml.safe_load(text)["hydra"]["sweeper"]["blocks"]) == 2
    folder = tmp_path / "next"
    folder.mkdir()
    (folder / "sweep.yaml").write_text(text)
    done = run(
        "runner",
        "-m",
        "-cd",
        str(folder),
        "-cn",
        "sweep",
        f"root={tmp_path}",
        "hydra.sweeper.dry_run=true",
    )
    assert done.returncode == 0, done.stderr
    assert "4 cells (4 new)" in done.stdout  # 1 shape x 2 budgets, 1 shape x 1 budget x 2 seeds
