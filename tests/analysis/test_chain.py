"""From sizes through the loss to the accuracy: both published chains, their intervals, errors."""

import numpy as np
import pytest

from analysis.chain import CHAINS, chain
from tests.analysis.known import grid

SECOND = {
    "olmo_ladder": {"floor": 0.25, "height": 0.7, "k": 6.0, "middle": 2.6},
    "gadre": {"epsilon": 0.85, "k": 2.1, "gamma": 0.7},
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_predicts_the_accuracy_of_larger_runs_within_its_interval(name: str) -> None:
    first, second = CHAINS[name]
    known = {k: np.array(v) for k, v in SECOND[name].items()}
    table = grid(1e-3)
    if name == "gadre":  # its law of the loss, not Chinchilla's
        theta = first.theta(
            {k: np.array(v) for k, v in {"a": 60.0, "b": 80.0, "E": 1.5, "eta": 0.12}.items()}
        )
        exact = first.predict(theta, {c: table[c].to_numpy() for c in ("n", "d")})
        noise = np.random.default_rng(2).normal(0.0, 1e-3, len(table))
        table = table.assign(loss=exact * np.exp(noise))
    else:
        exact = grid()["loss"].to_numpy()
    true = second.predict(second.theta(known), {"x": exact})
    measured = second.predict(second.theta(known), {"x": table["loss"].to_numpy()})
    table["accuracy"] = measured + np.random.default_rng(1).normal(0.0, 5e-3, len(table))
    table.loc[3, "accuracy"] = np.nan
    small = table["flops"] < 1e21
    found = chain(
        table[small],
        (first, second),
        columns={"n": "n", "d": "d"},
        loss="loss",
        accuracy="accuracy",
        bootstraps=60,
    )
    later = found.predict(table.loc[~small, ["n", "d"]])
    inside = (later["low"] < true[~small]) & (true[~small] < later["high"])
    assert inside.all()
    assert (later["high"] - later["low"]).max() < 0.2
    spread = found.noise(np.array([0.5, 0.99]))
    assert spread[0] == pytest.approx(5e-3, rel=0.5)
    assert spread[1] == pytest.approx(spread[0] * np.sqrt(0.99 * 0.01 / 0.25))
    assert len(found.first.used) == len(found.second.used) == small.sum() - 1


def test_runs_that_serve_one_law_only_are_refused() -> None:
    table = grid(1e-3).assign(accuracy=0.5).drop(columns="seed")
    with pytest.raises(KeyError, match="no column score"):
        chain(table, CHAINS["gadre"], columns={"n": "n", "d": "d"}, loss="loss", accuracy="score")
    with pytest.raises(ValueError, match=r"63 runs can be used for the loss, 64 for the accuracy"):
        chain(
            table.assign(d=table["d"].where(table.index != 5, -1.0)),
            CHAINS["gadre"],
            columns={"n": "n", "d": "d"},
            loss="loss",
            accuracy="accuracy",
            bootstraps=0,
        )
