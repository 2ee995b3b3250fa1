"""The objective of a fit: the sum of Huber losses of a law at the points that are fitted.

Outside the law's bounds a wall is added. Points that do not determine a parameter would else send
it anywhere: an exponent below zero, at which loss grows with the model. A fit that ends at the wall
is reported; one that ends inside does not feel it.

Source: arXiv 2404.10102 (Huber loss on log L, summed; the mean would make an optimiser stop early);
Huber and Ronchetti, Robust Statistics, section 7, for the scale of its rises; Koenker, Quantile
Regression (2005), section 3.4, for the points that a fit passes through.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import stats

from analysis.law import Array, At, Law, huber_objective

_STEP = 1e-6
_WALL = 100.0  # times points x delta, the steepest that the losses can be: ends stay within 1%


@dataclass(frozen=True)
class Objective:
    """The sum of Huber losses as a function of a law's parameters.

    Args:
        points: columns of the law and loss [M]; delta: where Huber's loss turns linear.
    """

    law: Law
    points: pd.DataFrame
    delta: float

    @cached_property
    def at(self) -> At:
        """The law at the points."""
        return self.law.bind({name: self.points[name].to_numpy() for name in self.law.columns})

    @cached_property
    def target(self) -> Array:
        """The measured responses [M] as the fit compares them."""
        return self.law.response(self.points["loss"].to_numpy())

    def __call__(self, theta: Array, weights: Array | None = None) -> tuple[Array, Array]:
        """Return values [S] and gradients [S, P] at `theta` [S, P]; weights [S, M] of points."""
        values, gradients = huber_objective(self.at, theta, self.target, weights, self.delta)
        low, high = self.walls
        beyond = theta - np.clip(theta, low, high)
        steep = _WALL * len(self.target) * self.delta
        return values + steep * np.square(beyond).sum(axis=1), gradients + 2 * steep * beyond

    @cached_property
    def walls(self) -> tuple[Array, Array]:
        """The least and the largest plausible parameters [P], as they are fitted."""
        law = self.law
        low, high = np.full(len(law.parameters), -np.inf), np.full(len(law.parameters), np.inf)
        for index, name in enumerate(law.parameters):
            if name in law.bounds:
                ends = np.array(law.bounds[name])
                with np.errstate(divide="ignore"):
                    low[index], high[index] = np.log(ends) if name in law.positive else ends
        return low, high

    def residuals(self, theta: Array) -> Array:
        """Return fitted minus measured responses [M] at `theta` [P]."""
        fitted: Array = self.at(theta[None])[0][0]
        return fitted - self.target

    def scale(self, theta: Array) -> float:
        """Return E[psi^2] / E[psi'] at `theta`: twice a rise over it is chi-square.

        E[psi'], the probability of a residual within delta, is that of a normal variable whose
        median magnitude is that of the residuals. Those within delta are too few to be counted
        where delta is small, and a fit passes through as many points as it has parameters: these
        are left out.
        """
        residual = self.residuals(theta)
        slope = np.clip(residual, -self.delta, self.delta)
        others = np.sort(np.abs(residual))[len(theta) :]
        middle = max(float(np.median(others)) if len(others) else 0.0, 1e-300)
        within = 2 * stats.norm.cdf(self.delta * stats.norm.ppf(0.75) / middle) - 1
        return float(np.mean(slope**2) / within)

    def inverse_curvature(self, theta: Array) -> Array:
        """Return the inverse [P, P] of the Gauss-Newton Hessian at `theta`: a first metric.

        Directions that the points do not determine keep a finite length.
        """
        size = len(theta)
        around = self.at(
            np.concatenate([theta + _STEP * np.eye(size), theta - _STEP * np.eye(size)])
        )
        slopes = (around[0][:size] - around[0][size:]) / (2 * _STEP)
        weights = np.minimum(1.0, self.delta / np.maximum(np.abs(self.residuals(theta)), 1e-300))
        hessian = (slopes * weights) @ slopes.T
        if not np.isfinite(hessian).all():
            return np.eye(size)
        lengths, axes = np.linalg.eigh(hessian)
        lengths = np.maximum(lengths, max(1e-10 * lengths[-1], 1e-300))
        inverse: Array = (axes / lengths) @ axes.T
        return inverse
