"""Fits of scaling laws: gradients, a surface that is known, and Epoch's refit of Chinchilla."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.laws import CHINCHILLA, LAWS, Array, Data, Law, huber_objective
from analysis.minimise import minimise

EPOCH = Path(os.environ.get("ESPALIER_SHARED", Path(__file__).parents[3] / "shared")) / "scaling/chinchilla_epoch/svg_extracted_data.csv"  # fmt: skip
needs_epoch = pytest.mark.skipif(
    not EPOCH.exists(), reason=f"needs {EPOCH}: Epoch's extracted data"
)


def _surface(theta: Array) -> tuple[Data, Array]:
    n, d = (values.ravel() for values in np.meshgrid(np.geomspace(1e7, 1e10, 9), np.geomspace(1e9, 1e12, 9)))  # fmt: skip
    data = {"n": n, "d": d}
    return data, np.log(CHINCHILLA.predict(theta, data))


def _fit(law: Law, starts: Array, data: Data, log_loss: Array, weights: Array | None = None) -> tuple[Array, Array]:  # fmt: skip
    at = law.bind(data)

    def objective(theta: Array, rows: np.ndarray) -> tuple[Array, Array]:
        return huber_objective(at, theta, log_loss, None if weights is None else weights[rows], 1e-3)  # fmt: skip

    x, value, done = minimise(objective, starts)
    assert done.all()
    return x, value


@pytest.mark.parametrize("name", LAWS)
def test_the_gradient_is_that_of_the_objective(name: str) -> None:
    law = LAWS[name]
    rng = np.random.default_rng(0)
    data = {column: rng.uniform(2.0, 9.0, 20) for column in law.columns}
    named = {p: rng.uniform(1.1, 2.0, 3) for p in law.parameters}
    theta = law.theta(named)
    assert law.named(theta).keys() == named.keys()
    at, target, weights = law.bind(data), rng.uniform(0.0, 1.0, 20), rng.integers(0, 3, (3, 20)).astype(float)  # fmt: skip
    _, gradient = huber_objective(at, theta, target, weights, 0.05)
    for p in range(theta.shape[1]):
        shift = np.zeros_like(theta)
        shift[:, p] = 1e-6
        up, down = (huber_objective(at, theta + s, target, weights, 0.05)[0] for s in (shift, -shift))  # fmt: skip
        assert gradient[:, p] == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=1e-8)


def test_a_known_surface_is_recovered_to_1e_6() -> None:
    theta = np.array([np.log(406.4), np.log(410.7), np.log(1.69), 0.34, 0.28])
    data, log_loss = _surface(theta)
    x, value = _fit(CHINCHILLA, CHINCHILLA.start_grid()[::37], data, log_loss)
    assert x[np.argmin(value)] == pytest.approx(theta, rel=1e-6)


@pytest.fixture(scope="module")
def epoch() -> tuple[Data, Array]:
    table = pd.read_csv(EPOCH)
    n, loss = table["Model Size"].to_numpy(), table["loss"].to_numpy()
    d = table["Training FLOP"].to_numpy() / (6 * n)
    kept = loss < np.sort(loss)[-5]  # the published procedure drops the five highest
    return {"n": n[kept], "d": d[kept]}, np.log(loss[kept])


@needs_epoch
def test_epochs_grid_fit_is_reproduced(epoch: tuple[Data, Array]) -> None:
    x, value = _fit(CHINCHILLA, CHINCHILLA.start_grid(), *epoch)
    assert value.min() == pytest.approx(0.0010182740, abs=1e-8)
    found = CHINCHILLA.named(x[np.argmin(value)])
    published = {"A": 477.842, "B": 2143.864, "E": 1.81724, "alpha": 0.347313, "beta": 0.367183}
    for name, number in published.items():
        assert float(found[name]) == pytest.approx(number, rel=2e-3), name


@needs_epoch
def test_epochs_bootstrap_is_reproduced_with_its_own_draws(epoch: tuple[Data, Array]) -> None:
    data, log_loss = epoch
    draws, count = np.random.RandomState(42), len(log_loss)
    weights = np.stack([np.bincount(draws.choice(count, count), minlength=count) for _ in range(4000)])  # fmt: skip
    start = np.array([6.0073404, 6.0179186, 0.5267228, 0.33917084, 0.2849083])
    x, _ = _fit(CHINCHILLA, np.tile(start, (4000, 1)), data, log_loss, weights.astype(float))
    spread = {name: values.std(ddof=1) for name, values in CHINCHILLA.named(x).items()}
    published = {"A": 124.522, "B": 1293.284, "E": 0.02566, "alpha": 0.01540, "beta": 0.02060}
    for name, number in published.items():
        assert spread[name] == pytest.approx(number, rel=0.02), name
