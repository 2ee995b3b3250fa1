"""Scaling laws as sums of power terms: L(x) = sum_k exp(F_k(x) . theta).

A term is linear in the parameters on a logarithmic scale, so log L is a log-sum-exp and its gradient
costs no more than itself. A law of your own:

    def features(data):                       # data: column -> array [M]
        one, n = np.ones_like(data["n"]), np.log(data["n"])
        zero = np.zeros_like(one)
        return np.stack([np.stack([one, -n, zero], 1), np.stack([zero, zero, one], 1)])   # a - alpha log N, e
    LAW = Law("offset", ("a", "alpha", "e"), ("n",), features, starts={"a": ..., "alpha": ..., "e": ...})

Sources: Hoffmann et al. arXiv 2203.15556, approach 3; Besiroglu et al. arXiv 2404.10102.

Shape legend: S = parameter vectors at once, P = parameters, K = terms, M = points.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Data = Mapping[str, Array]
_ROWS = 64  # at a time: what lies between stays in the cache


@dataclass(frozen=True)
class Law:
    """A law of the loss.

    Args:
        parameters: their names; exponents enter as they are, coefficients by their logarithm.
        columns: of the data, positive; features: [K, M, P] of the data.
        starts: for each parameter the values that a multi-start fit begins from.
        coefficients: parameters that are logarithms, and what their exponentials are called.
    """

    name: str
    parameters: tuple[str, ...]
    columns: tuple[str, ...]
    features: Callable[[Data], Array]
    starts: Mapping[str, tuple[float, ...]]
    coefficients: Mapping[str, str]

    def start_grid(self) -> Array:
        """Return every combination of `starts`, [S, P]."""
        return np.array(
            list(product(*(self.starts[name] for name in self.parameters))), dtype=float
        )

    def loss(self, theta: Array, data: Data) -> Array:
        """Return the loss at `data` for parameters [P] or [S, P]: [M] or [S, M]."""
        found: Array = np.exp(_terms(np.atleast_2d(theta), self.features(data))[0])
        return found[0] if theta.ndim == 1 else found

    def named(self, theta: Array) -> dict[str, Array]:
        """Return parameters [..., P] by name, coefficients as themselves."""
        values = {name: theta[..., i] for i, name in enumerate(self.parameters)}
        return {self.coefficients.get(n, n): np.exp(v) if n in self.coefficients else v for n, v in values.items()}  # fmt: skip


def _terms(theta: Array, features: Array) -> tuple[Array, Array]:
    """Return log of the sum of terms [S, M] and each term's share of it [K, S, M]."""
    shares = np.matmul(theta, features.transpose(0, 2, 1))
    most = shares.max(axis=0)
    shares -= most
    np.exp(shares, out=shares)
    total = shares.sum(axis=0)
    shares /= total
    most += np.log(total)
    return most, shares


def huber_objective(
    theta: Array, features: Array, log_loss: Array, weights: Array | None, delta: float
) -> tuple[Array, Array]:
    """Return sum_i w_i Huber_delta(log L(theta)_i - log_loss_i) of each row, [S], and its gradient [S, P].

    Args:
        weights: [S, M] how often each point counts (a bootstrap's draw), None: once.
    """
    values, gradients = np.empty(len(theta)), np.empty(theta.shape)
    for first in range(0, len(theta), _ROWS):
        part = slice(first, first + _ROWS)
        fitted, shares = _terms(theta[part], features)
        residual = np.subtract(fitted, log_loss, out=fitted)
        slope = np.clip(residual, -delta, delta)
        residual -= 0.5 * slope
        residual *= slope
        if weights is not None:
            residual *= weights[part]
            slope *= weights[part]
        values[part] = residual.sum(axis=1)
        shares *= slope
        gradients[part] = np.matmul(shares, features).sum(axis=0)
    return values, gradients


def _columns(data: Data, *names: str) -> tuple[Array, Array, list[Array]]:
    logs = [np.log(np.asarray(data[name], dtype=float)) for name in names]
    return np.ones_like(logs[0]), np.zeros_like(logs[0]), logs


def _chinchilla(data: Data) -> Array:
    one, zero, (n, d) = _columns(data, "n", "d")
    rows = [(one, zero, zero, -n, zero), (zero, one, zero, zero, -d), (zero, zero, one, zero, zero)]
    return np.stack([np.stack(row, axis=1) for row in rows])


def _offset(data: Data) -> Array:
    one, zero, (x,) = _columns(data, "x")
    return np.stack([np.stack(row, axis=1) for row in [(one, zero, -x), (zero, one, zero)]])


CHINCHILLA = Law(
    "chinchilla",
    ("a", "b", "e", "alpha", "beta"),
    ("n", "d"),
    _chinchilla,
    starts={
        "a": (0.0, 5.0, 10.0, 15.0, 20.0, 25.0), "b": (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
        "e": (-1.0, -0.5, 0.0, 0.5, 1.0), "alpha": (0.0, 0.5, 1.0, 1.5, 2.0), "beta": (0.0, 0.5, 1.0, 1.5, 2.0),
    },
    coefficients={"a": "A", "b": "B", "e": "E"},
)  # fmt: skip
POWER_WITH_OFFSET = Law(
    "power",
    ("a", "e", "alpha"),
    ("x",),
    _offset,
    starts={"a": (0.0, 5.0, 10.0, 20.0), "e": (-1.0, 0.0, 1.0), "alpha": (0.0, 0.5, 1.0)},
    coefficients={"a": "A", "e": "E"},
)
LAWS = {law.name: law for law in (CHINCHILLA, POWER_WITH_OFFSET)}
