"""Scaling laws: the published ones, and what a law of your own needs.

A law of your own is a formula in numpy's analytic functions; its gradient comes from the formula
itself (complex step, exact to rounding). Parameters in `positive` are fitted by their logarithm.

    def formula(p, x):
        return p["E"] + p["A"] / x["n"] ** p["alpha"]
    OFFSET = Formula(name="offset", parameters=("A", "alpha", "E"), columns=("n",),
                     positive=("A", "E"), formula=formula, bounds={"alpha": (0, 3)},
                     starts={"A": (1, 100, 1e4), "alpha": (0.2, 0.5), "E": (0.5, 2)})

A sum of power terms is a `PowerSum`: log L is a log-sum-exp, whose gradient costs no more than
itself.

Shape legend: S = parameter vectors at once, P = parameters, K = terms, M = points.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Data = Mapping[str, Array]
Pull = Callable[[Array], Array]
At = Callable[[Array], tuple[Array, Pull]]
_STEP = 1e-30
_ROWS = 64  # at a time: what lies between stays in the cache


@dataclass(frozen=True, kw_only=True)
class Law(ABC):
    """A law of a positive response, for example a loss.

    Args:
        parameters: their names; columns: names of the data, which is positive.
        starts: for each parameter the values that a multi-start fit begins from.
        positive: parameters that are fitted by their logarithm.
        bounds: the plausible range of a parameter; a fit that ends outside reports it.
        log: compare logarithms of the response (losses), or the response itself (accuracies).
    """

    name: str
    parameters: tuple[str, ...]
    columns: tuple[str, ...]
    starts: Mapping[str, tuple[float, ...]]
    positive: tuple[str, ...]
    bounds: Mapping[str, tuple[float, float]]
    log: bool = True
    source: str = ""

    @abstractmethod
    def bind(self, data: Data) -> At:
        """Return the law at `data`, a function of parameters [S, P].

        The function returns the response [S, M] (its logarithm where `log`) and a function from
        slopes [S, M] to the gradient [S, P].
        """

    def start_grid(self) -> Array:
        """Return every combination of `starts`, [S, P]."""
        grid = np.array(
            list(product(*(self.starts[name] for name in self.parameters))), dtype=float
        )
        return self.theta({name: grid[:, i] for i, name in enumerate(self.parameters)})

    def predict(self, theta: Array, data: Data) -> Array:
        """Return the response at `data` for parameters [P] or [S, P]: [M] or [S, M]."""
        values = self.bind(data)(np.atleast_2d(theta))[0]
        values = np.exp(values) if self.log else values
        return values[0] if theta.ndim == 1 else values

    def response(self, values: Array) -> Array:
        """Return measured values as the fit compares them: their logarithm where `log`."""
        return np.log(values) if self.log else values

    def named(self, theta: Array) -> dict[str, Array]:
        """Return parameters [..., P] by name, those in `positive` no longer as logarithms."""
        values = {name: theta[..., i] for i, name in enumerate(self.parameters)}
        return {n: np.exp(v) if n in self.positive else v for n, v in values.items()}

    def theta(self, named: Mapping[str, Array]) -> Array:
        """Return the inverse of `named`."""
        columns = [np.log(named[n]) if n in self.positive else named[n] for n in self.parameters]
        return np.stack(columns, axis=-1)

    def at_bound(self, theta: Array) -> list[str]:
        """Return the parameters outside `bounds`."""
        named = self.named(theta)
        return [n for n, (low, high) in self.bounds.items() if not low < float(named[n]) < high]


@dataclass(frozen=True, kw_only=True)
class PowerSum(Law):
    """L = sum_k exp(F_k . theta), all coefficients positive; `features` returns F [K, M, P]."""

    features: Callable[[Data], Array]

    def bind(self, data: Data) -> At:
        """See `Law.bind`."""
        features = self.features(data)

        def at(theta: Array) -> tuple[Array, Pull]:
            fitted, shares = _terms(theta, features)

            def pull(slope: Array) -> Array:
                np.multiply(shares, slope, out=shares)
                gradient: Array = np.matmul(shares, features).sum(axis=0)
                return gradient

            return fitted, pull

        return at


@dataclass(frozen=True, kw_only=True)
class Formula(Law):
    """Any formula, analytic in the parameters, of parameters [S, 1] and data [M] by their names."""

    formula: Callable[[Mapping[str, Array], Data], Array]

    def bind(self, data: Data) -> At:
        """See `Law.bind`."""

        def value(theta: Array) -> Array:
            response = self.formula({n: v[..., None] for n, v in self.named(theta).items()}, data)
            return np.log(response) if self.log else response

        def at(theta: Array) -> tuple[Array, Pull]:
            def pull(slope: Array) -> Array:
                gradient = np.empty(theta.shape)
                for index in range(theta.shape[1]):
                    moved = theta.astype(complex)
                    moved[:, index] += 1j * _STEP
                    gradient[:, index] = (slope * value(moved).imag).sum(axis=1) / _STEP
                return gradient

            with np.errstate(all="ignore"):  # what is not finite is not taken
                return value(theta), pull

        return at


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
    at: At, theta: Array, target: Array, weights: Array | None, delta: float
) -> tuple[Array, Array]:
    """Return sum_i w_i Huber_delta(fitted_i - target_i) of each row, [S], and its gradient [S, P].

    Args:
        at: from `Law.bind`; theta: [S, P].
        weights: [S, M], how often each point counts (a bootstrap's draw); None: once.
    """
    values, gradients = np.empty(len(theta)), np.empty(theta.shape)
    for first in range(0, len(theta), _ROWS):
        part = slice(first, first + _ROWS)
        fitted, pull = at(theta[part])
        residual = fitted - target
        slope = np.clip(residual, -delta, delta)
        residual -= 0.5 * slope
        residual *= slope
        if weights is not None:
            residual *= weights[part]
            slope *= weights[part]
        values[part] = residual.sum(axis=1)
        with np.errstate(all="ignore"):
            gradients[part] = pull(slope)
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


def _overtraining(data: Data) -> Array:
    one, zero, (n, d) = _columns(data, "n", "d")
    compute, ratio = np.log(6.0) + n + d, d - n
    rows = [
        (one, zero, zero, ratio - compute),
        (zero, one, zero, -ratio - compute),
        (zero, zero, one, zero),
    ]
    return np.stack([np.stack(row, axis=1) for row in rows])


def _kaplan(p: Mapping[str, Array], x: Data) -> Array:
    size = (p["N_c"] / x["n"]) ** (p["alpha_N"] / p["alpha_D"])
    return np.asarray((size + p["D_c"] / x["d"]) ** p["alpha_D"])


def _data_constrained(p: Mapping[str, Array], x: Data) -> Array:
    a, b, alpha, beta = p["A"], p["B"], p["alpha"], p["beta"]
    unique = np.minimum(x["unique"], x["d"])
    ratio = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    optimal = ratio * (unique * ratio) ** (beta / alpha)  # parameters for the unique tokens
    used = np.where(np.real(optimal) < x["n"], optimal, x["n"])
    n = used * (1 + p["R_N"] * (1 - np.exp((1 - x["n"] / used) / p["R_N"])))
    d = unique * (1 + p["R_D"] * (1 - np.exp((1 - x["d"] / unique) / p["R_D"])))
    return np.asarray(p["E"] + a / n**alpha + b / d**beta)


def _precision(p: Mapping[str, Array], x: Data) -> Array:
    share = (1 - np.exp(-x["bits_w"] / p["gamma_w"])) * (1 - np.exp(-x["bits_a"] / p["gamma_a"]))
    return np.asarray(
        p["E"] + p["A"] / (x["n"] * share) ** p["alpha"] + p["B"] / x["d"] ** p["beta"]
    )


def _sigmoid(p: Mapping[str, Array], x: Data) -> Array:
    return np.asarray(p["floor"] + p["height"] / (1 + np.exp(p["k"] * (x["x"] - p["middle"]))))


def _exp(*logs: float) -> tuple[float, ...]:
    return tuple(float(np.exp(value)) for value in logs)


_ABE = {"A": (1e-300, 1e30), "B": (1e-300, 1e30), "E": (1e-4, 1e3)}
_EXPONENTS = {"alpha": (0.0, 3.0), "beta": (0.0, 3.0)}
_FEW = {
    "A": _exp(4, 8),
    "B": _exp(4, 8),
    "E": _exp(0.0, 0.7),
    "alpha": (0.3, 0.6),
    "beta": (0.3, 0.6),
}
CHINCHILLA = PowerSum(
    name="chinchilla",
    parameters=("A", "B", "E", "alpha", "beta"),
    columns=("n", "d"),
    features=_chinchilla,
    starts={
        "A": _exp(0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
        "B": _exp(0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
        "E": _exp(-1.0, -0.5, 0.0, 0.5, 1.0),
        "alpha": (0.0, 0.5, 1.0, 1.5, 2.0),
        "beta": (0.0, 0.5, 1.0, 1.5, 2.0),
    },
    positive=("A", "B", "E"),
    bounds=_ABE | _EXPONENTS,
    source="Hoffmann et al. arXiv 2203.15556, approach 3; Besiroglu et al. arXiv 2404.10102",
)
POWER_WITH_OFFSET = PowerSum(
    name="power",
    parameters=("A", "E", "alpha"),
    columns=("x",),
    features=_offset,
    starts={"A": _exp(0.0, 5.0, 10.0, 20.0), "E": _exp(-1.0, 0.0, 1.0), "alpha": (0.0, 0.5, 1.0)},
    positive=("A", "E"),
    bounds={"E": (1e-4, 1e3), "alpha": (0.0, 3.0)},
)
OVERTRAINING = PowerSum(
    name="overtraining",
    parameters=("a", "b", "E", "eta"),
    columns=("n", "d"),
    features=_overtraining,
    starts={
        "a": _exp(0.0, 4.0, 8.0, 12.0),
        "b": _exp(0.0, 4.0, 8.0, 12.0),
        "E": _exp(-1.0, 0.0, 1.0),
        "eta": (0.05, 0.15, 0.3, 0.5),
    },
    positive=("a", "b", "E"),
    bounds={"E": (1e-4, 1e3), "eta": (0.0, 3.0)},
    source="Gadre et al. arXiv 2403.08540: a (C/M)^-eta + b (C M)^-eta, M = D/N, C = 6 N D",
)
KAPLAN = Formula(
    name="kaplan",
    parameters=("N_c", "D_c", "alpha_N", "alpha_D"),
    columns=("n", "d"),
    formula=_kaplan,
    starts={
        "N_c": _exp(12, 24, 32),
        "D_c": _exp(12, 24, 32),
        "alpha_N": (0.05, 0.1, 0.3),
        "alpha_D": (0.05, 0.1, 0.3),
    },
    positive=("N_c", "D_c"),
    bounds={"alpha_N": (0.0, 3.0), "alpha_D": (0.0, 3.0)},
    source="Kaplan et al. arXiv 2001.08361, equation 1.5",
)
DATA_CONSTRAINED = Formula(
    name="data_constrained",
    parameters=("A", "B", "E", "alpha", "beta", "R_D", "R_N"),
    columns=("n", "d", "unique"),
    formula=_data_constrained,
    starts=_FEW | {"R_D": (5.0, 15.0), "R_N": (5.0, 15.0)},
    positive=("A", "B", "E", "R_D", "R_N"),
    bounds=_ABE | _EXPONENTS | {"R_D": (0.1, 1e3), "R_N": (0.1, 1e3)},
    source="Muennighoff et al. arXiv 2305.16264: unique tokens beside n and d; "
    "published R_D* 15.4, R_N* 5.3",
)
PRECISION = Formula(
    name="precision",
    parameters=("A", "B", "E", "alpha", "beta", "gamma_w", "gamma_a"),
    columns=("n", "d", "bits_w", "bits_a"),
    formula=_precision,
    starts=_FEW | {"gamma_w": (1.0, 3.0), "gamma_a": (1.0, 3.0)},
    positive=("A", "B", "E", "gamma_w", "gamma_a"),
    bounds=_ABE | _EXPONENTS | {"gamma_w": (1e-2, 1e2), "gamma_a": (1e-2, 1e2)},
    source="Kumar et al. arXiv 2411.04330, weights and activations (no key-value cache)",
)
SIGMOID = Formula(
    name="sigmoid",
    parameters=("floor", "height", "k", "middle"),
    columns=("x",),
    formula=_sigmoid,
    starts={
        "floor": (0.0, 0.25, 0.5),
        "height": (0.3, 0.6, 1.0),
        "k": (1.0, 4.0, 10.0),
        "middle": (0.5, 1.0, 2.0, 3.0),
    },
    positive=("height", "k"),
    bounds={"floor": (-0.05, 1.0), "height": (0.0, 1.05)},
    log=False,
    source="the second step from loss to accuracy, Bhagia et al. arXiv 2412.04403",
)
_ALL = (CHINCHILLA, POWER_WITH_OFFSET, OVERTRAINING, KAPLAN, DATA_CONSTRAINED, PRECISION, SIGMOID)
LAWS: dict[str, Law] = {law.name: law for law in _ALL}
