"""The published scaling laws by their names; `analysis.law` says what a law of your own needs."""

from collections.abc import Mapping

import numpy as np

from analysis.law import Array, Data, Formula, Law, PowerSum


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


def _pure_power(data: Data) -> Array:
    one, _, (x,) = _columns(data, "x")
    return np.stack([one, -x], axis=1)[None]


def _kaplan(p: Mapping[str, Array], x: Data) -> Array:
    size = (p["N_c"] / x["n"]) ** (p["alpha_N"] / p["alpha_D"])
    return np.asarray((size + p["D_c"] / x["d"]) ** p["alpha_D"])


def _data_constrained(p: Mapping[str, Array], x: Data) -> Array:
    a, b, alpha, beta = p["A"], p["B"], p["alpha"], p["beta"]
    unique = np.minimum(x["unique"], x["d"])
    ratio = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    optimal = ratio * (unique * ratio) ** (beta / alpha)  # parameters for the unique tokens
    used = np.where(np.real(optimal) < x["n"], optimal, x["n"])
    n = used * (1 + p["R_N"] * -np.expm1((1 - x["n"] / used) / p["R_N"]))
    d = unique * (1 + p["R_D"] * -np.expm1((1 - x["d"] / unique) / p["R_D"]))
    return np.asarray(p["E"] + a / n**alpha + b / d**beta)


def _precision(p: Mapping[str, Array], x: Data) -> Array:
    share = np.expm1(-x["bits_w"] / p["gamma_w"]) * np.expm1(-x["bits_a"] / p["gamma_a"])
    return np.asarray(
        p["E"] + p["A"] / (x["n"] * share) ** p["alpha"] + p["B"] / x["d"] ** p["beta"]
    )


def _sigmoid(p: Mapping[str, Array], x: Data) -> Array:
    return np.asarray(p["floor"] + p["height"] / (1 + np.exp(p["k"] * (x["x"] - p["middle"]))))


def _exponential_error(p: Mapping[str, Array], x: Data) -> Array:
    return np.asarray(p["epsilon"] - p["k"] * np.exp(-p["gamma"] * x["x"]))


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
PURE_POWER = PowerSum(
    name="pure_power",
    parameters=("A", "alpha"),
    columns=("x",),
    features=_pure_power,
    starts={"A": _exp(0.0, 5.0, 10.0), "alpha": (0.0, 0.5)},
    positive=("A",),
    bounds={"alpha": (-3.0, 3.0)},
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
EXPONENTIAL_ERROR = Formula(
    name="exponential_error",
    parameters=("epsilon", "k", "gamma"),
    columns=("x",),
    formula=_exponential_error,
    starts={"epsilon": (0.6, 0.8, 1.0), "k": (0.5, 2.0, 8.0), "gamma": (0.3, 1.0, 2.0)},
    positive=("epsilon", "k", "gamma"),
    bounds={"epsilon": (0.0, 1.05), "k": (0.0, 1e3), "gamma": (0.0, 10.0)},
    log=False,
    source="the second step from loss to top-1 error, Gadre et al. arXiv 2403.08540, equation 5",
)
_ALL = (
    CHINCHILLA,
    POWER_WITH_OFFSET,
    PURE_POWER,
    OVERTRAINING,
    KAPLAN,
    DATA_CONSTRAINED,
    PRECISION,
    SIGMOID,
    EXPONENTIAL_ERROR,
)
LAWS: dict[str, Law] = {law.name: law for law in _ALL}
