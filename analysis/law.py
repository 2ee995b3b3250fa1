"""What a scaling law is: its parameters, its formula, its gradient, the objective of a fit.

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
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Data = Mapping[str, Array]
Pull = Callable[[Array], Array]
At = Callable[[Array], tuple[Array, Pull]]
_STEP = 1e-30
_VALUES = 16384  # at a time, rows x points: what lies between stays in the cache


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

    def linear(self) -> "Law":
        """Return the same law, fitted by differences of the response, not of its logarithm."""
        return replace(self, log=False)

    def fix(self, values: Mapping[str, float]) -> "Law":
        """Return the law with parameters held at `values`; those left are fitted.

        Raises:
            ValueError: there is no such parameter, none is left, or a value is no possible one.
        """
        if not values:
            return self
        unknown = sorted(set(values) - set(self.parameters))
        if unknown:
            raise ValueError(
                f"law {self.name} has no parameter {', '.join(unknown)}; "
                f"there are: {', '.join(self.parameters)}"
            )
        for name, value in values.items():
            if not np.isfinite(value) or (name in self.positive and value <= 0):
                wanted = "a positive number" if name in self.positive else "a finite number"
                raise ValueError(f"{name}={value:g} must be {wanted}")
        free = tuple(name for name in self.parameters if name not in values)
        if not free:
            raise ValueError(f"every parameter of {self.name} is held: leave one to be fitted")
        return Restricted(
            name=self.name,
            parameters=free,
            columns=self.columns,
            starts={name: self.starts[name] for name in free},
            positive=self.positive,
            bounds={n: limits for n, limits in self.bounds.items() if n in free},
            log=self.log,
            source=self.source,
            law=self,
            held=dict(values),
        )

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
            if not self.log:
                fitted = np.exp(fitted)

            def pull(slope: Array) -> Array:
                np.multiply(shares, slope if self.log else slope * fitted, out=shares)
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


@dataclass(frozen=True, kw_only=True)
class Restricted(Law):
    """A law of which some parameters are held at values: `Law.fix` makes it.

    Args:
        law: with all its parameters; held: the values of those that are not fitted.
    """

    law: Law
    held: Mapping[str, float]

    def bind(self, data: Data) -> At:
        """See `Law.bind`."""
        at_all = self.law.bind(data)
        free = [self.law.parameters.index(name) for name in self.parameters]
        full = self.law.theta(
            {n: np.array(self.held.get(n, 1.0), dtype=float) for n in self.law.parameters}
        )

        def at(theta: Array) -> tuple[Array, Pull]:
            whole = np.tile(full, (len(theta), 1))
            whole[:, free] = theta
            fitted, pull = at_all(whole)
            return fitted, lambda slope: pull(slope)[:, free]

        return at

    def linear(self) -> Law:
        """See `Law.linear`."""
        return self.law.linear().fix(self.held)

    def named(self, theta: Array) -> dict[str, Array]:
        """See `Law.named`; the held parameters are among them."""
        free = super().named(theta)
        held = {name: np.full(theta.shape[:-1], value) for name, value in self.held.items()}
        return {name: (free | held)[name] for name in self.law.parameters}


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
    rows = max(1, _VALUES // max(1, len(target)))
    for first in range(0, len(theta), rows):
        part = slice(first, first + rows)
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
