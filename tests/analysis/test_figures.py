"""Every figure against its golden image; `ESPALIER_GOLDEN=write` makes the images anew."""

import os
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.testing.compare import compare_images

from analysis import law_plots, plots, run_plots
from analysis.defaults import default_figures
from analysis.envelope import envelope
from analysis.fit import Fit, fit
from analysis.history import assemble
from analysis.isoflop import isoflop
from analysis.laws import CHINCHILLA
from analysis.paired import paired_difference
from analysis.robustness import profiles
from analysis.runs import Runs
from tests.analysis.known import budgets, curves, grid

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 8.0  # root mean square of 0..255: other fonts' rasters pass, another figure does not


def _runs() -> Runs:
    """Two precisions x three sizes x two seeds, a curve each; one run failed."""
    rng, table, history = np.random.default_rng(0), [], []
    for precision in ("bf16", "nvfp4"):
        for size in (1e5, 1e6, 1e7):
            for seed in (1, 2):
                name = f"{precision}-{size:g}-{seed}"
                failed = name == "nvfp4-1e+07-2"
                level = 2.0 + 3.0 / np.log10(size) + 0.02 * (precision == "nvfp4")
                steps = np.arange(100, 1001, 100)
                loss = level + 8.0 / np.sqrt(steps) + rng.normal(0.0, 0.005, len(steps))
                flops = 6 * size * 2048.0 * steps
                facts = {
                    "num_parameters": size,
                    "precision.compute": precision,
                    "seed": seed,
                    "optim.lr": 1e-3 * seed,
                }
                state = {"state": "failed" if failed else "finished"}
                table.append(
                    {"fingerprint": name, "label": name, "val_loss": loss[-1], "flops": flops[-1]}
                    | facts
                    | state
                )
                for key, values in (
                    ("val_loss", loss),
                    ("flops", flops),
                    ("tokens", 2048.0 * steps),
                ):
                    history.append(
                        pd.DataFrame(
                            {"fingerprint": name, "step": steps, "key": key, "value": values}
                        )
                    )
    return Runs(pd.DataFrame(table), pd.concat(history, ignore_index=True))


def _diagnostics() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    keys = [
        f"precision/layers.{i}.{part}/{gemm}/sqnr_db"
        for i in range(4)
        for part in ("attention.qkv", "feed_forward.down")
        for gemm in ("fprop.x", "fprop.w", "wgrad.g")
    ]
    return pd.DataFrame(
        {"fingerprint": "a", "step": 100, "key": keys, "value": rng.normal(20, 3, len(keys))}
    )


@cache
def _fit() -> Fit:
    table = grid(5e-3)
    return fit(
        table,
        CHINCHILLA,
        columns={"n": "n", "d": "d"},
        loss="loss",
        holdout="flops > 1e22",
        bootstraps=200,
        starts=CHINCHILLA.start_grid()[::50],
    )


def _envelope() -> Figure:
    found = envelope(curves(12, 60), run="run", n="n", flops="flops", loss="loss", bootstraps=20)
    return law_plots.best_size(found, title="Envelope")[0]


def _forest() -> Figure:
    done = _runs().finished
    pair = ["num_parameters", "seed"]
    gap = paired_difference(
        done, key="precision.compute", baseline="bf16", metric="val_loss", pair=pair
    )
    return plots.forest(gap, baseline="bf16")[0]


def _iso(kind: Callable[..., tuple[Figure, pd.DataFrame]]) -> Figure:
    found = isoflop(budgets(2e-3), flops="flops", n="n", loss="loss", bootstraps=50)
    return kind(found, title="IsoFLOP")[0]


FIGURES: dict[str, Callable[[], Figure]] = {
    "learning_curves": lambda: plots.learning_curves(_runs(), x="flops", by="num_parameters")[0],
    "against_size": lambda: plots.against_size(_runs(), by="precision.compute")[0],
    "forest": _forest,
    "law": lambda: law_plots.law_with_residuals(_fit().residuals(), title="Law")[0],
    "pairs": lambda: law_plots.pair_plot(_fit(), title="Pairs")[0],
    "profiles": lambda: law_plots.profile_curves(profiles(_fit()), title="Profiles")[0],
    "isoflop": lambda: _iso(law_plots.isoflop_curves),
    "best_size": lambda: _iso(law_plots.best_size),
    "envelope": _envelope,
    "heat_map": lambda: run_plots.heat_map(
        _runs().finished.query("num_parameters < 1e7 or seed < 2"),
        x="optim.lr",
        y="num_parameters",
        title="Heat map",
    )[0],
    "pareto": lambda: run_plots.pareto(
        _runs().finished, cost="flops", by="precision.compute", title="Pareto"
    )[0],
    "gap": lambda: run_plots.gap_against_tokens(
        _runs(),
        by="precision.compute",
        baseline="bf16",
        pair=["num_parameters", "seed"],
        title="Gap",
    )[0],
    "waterfall": lambda: run_plots.waterfall(
        pd.DataFrame(
            {
                "step": ["nothing", "+ rotation", "+ rounding", "+ head"],
                "mean": [2.1, 2.05, 2.06, 2.0],
            }
        ),
        title="Waterfall",
    )[0],
    "by_layer": lambda: run_plots.by_layer(_diagnostics(), statistic="sqnr_db", title="SQNR")[0],
}


@pytest.mark.filterwarnings("ignore::analysis.pooling.PooledWarning")  # some pool, and look so
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_looks_as_it_did(name: str, tmp_path: Path) -> None:
    drawn = tmp_path / f"{name}.png"
    figure = FIGURES[name]()
    figure.savefig(drawn, dpi=100)
    plt.close(figure)
    golden = GOLDEN / f"{name}.png"
    if os.environ.get("ESPALIER_GOLDEN") == "write":
        golden.parent.mkdir(exist_ok=True)
        golden.write_bytes(drawn.read_bytes())
    assert golden.exists(), f"no {golden}; ESPALIER_GOLDEN=write makes it"
    difference = compare_images(str(golden), str(drawn), tol=TOLERANCE)
    assert difference is None, difference


@pytest.mark.filterwarnings("ignore::analysis.pooling.PooledWarning")  # the sizes of a recipe
def test_a_legend_hides_no_point_and_an_empty_key_is_a_series() -> None:
    runs = _runs()
    long = "model=gpt_micro precision=nvfp4 optim.lr=0.001 and some more words"
    runs.table["recipe"] = runs.table["precision.compute"].map({"nvfp4": long})
    drawn = (
        plots.learning_curves(runs, x="tokens", by="recipe"),
        plots.against_size(runs, by="recipe"),
        run_plots.pareto(runs.finished, cost="flops", by="recipe", title="Pareto"),
    )
    for figure, shown in drawn:
        figure.canvas.draw()
        (axis,) = figure.axes
        legend = axis.get_legend()
        assert legend is not None
        box, page = legend.get_window_extent(), figure.bbox
        assert not box.overlaps(axis.get_window_extent())
        assert box.x0 >= page.x0
        assert box.y0 >= page.y0
        named = [text.get_text().replace("\n", " ") for text in legend.get_texts()]
        assert any(name.startswith("(empty) (n=") for name in named), named
        assert shown["recipe"].isna().any()
        plt.close(figure)


@pytest.mark.parametrize(
    ("ends", "labels"),
    [((2e5, 2e6), ["200k", "500k", "1M", "2M"]), ((9e16, 6e17), ["1e17", "2e17", "5e17"])],
)
def test_a_short_logarithmic_axis_has_numbers(ends: tuple[float, float], labels: list[str]) -> None:
    figure, axis = plt.subplots()
    axis.plot(ends, [1.0, 2.0])
    plots.log_x(axis)
    figure.canvas.draw()
    shown = [text.get_text() for text in axis.get_xticklabels()]
    assert [label for label in labels if label in shown] == labels
    plt.close(figure)


def test_sources_are_named_in_words() -> None:
    sources = '[{"content": "0123456789abcdef0123", "weight": 1.0}, {"content": "b"}]'
    assert plots.tick(sources) == "content=012345 weight=1.0; content=b"
    assert plots.tick("[0.9, 0.95]") == "[0.9, 0.95]"


def test_the_default_figures_of_a_grid_follow_what_it_varies(tmp_path: Path) -> None:
    runs = _runs()
    runs.table["model.width"] = runs.table["num_parameters"].map({1e5: 32, 1e6: 96, 1e7: 300})
    made = {file.stem for file in default_figures(runs, tmp_path)}
    by_size = pd.read_csv(tmp_path / "val_loss_by_parameters.csv")
    assert list(by_size.columns[:2]) == ["precision.compute, optim.lr", "num_parameters"]
    assert set(by_size["n"]) <= {1, 2}, "a point is a mean over seeds alone"
    assert made == {
        "val_loss_by_step",
        "val_loss_by_tokens",
        "val_loss_by_flops",
        "val_loss_by_parameters",
        "pareto",
        "map_num_parameters_compute",
        "map_num_parameters_lr",
        "map_compute_lr",
    }
    bounded = runs.table["seed"] == runs.table["seed"].min()
    mine = runs.history["fingerprint"].isin(runs.table.loc[bounded, "fingerprint"])
    runs.history.loc[mine & (runs.history["key"] == "val_loss"), "key"] = "val_bound"
    runs.table["val_bound"] = runs.table["val_loss"].where(bounded)
    runs.table.loc[bounded, "val_loss"] = float("nan")
    both = {file.stem for file in default_figures(runs, tmp_path / "both")}
    assert {"val_bound_by_step", "val_loss_by_step", "pareto", "pareto_val_bound"} <= both
    assert set(pd.read_csv(tmp_path / "both" / "val_loss_by_step.csv")["n"]) == {1}
    dated = [f.name for f in tmp_path.glob("*.pdf") if b"CreationDate" in f.read_bytes()]
    assert not dated, "drawn again it differs"


def test_two_axes_of_many_values_are_panels_and_a_heat_map(tmp_path: Path) -> None:
    """No curve averages recipes; a point is a mean over seeds; names stand as in the grid."""
    points = [(m, p, s) for m in "zyx" for p in "dcba" for s in (1, 2)]
    size = {"z": 1e5, "y": 1e6, "x": 1e7}
    rows = [
        {"fingerprint": f"{m}{p}{s}", "label": "", "state": "finished", "model": m, "precision": p}
        | {"seed": s, "num_parameters": size[m], "val_loss": 3.0 + s / 10, "wall_s": s * size[m]}
        for m, p, s in points
    ]
    table = pd.DataFrame(rows)
    table.attrs["settings"] = ("model", "precision", "seed")
    parts = [(f"{m}{p}{s}", "val_loss", [0, 10], [5.0, 3.0 + s / 10]) for m, p, s in points]
    made = {file.stem for file in default_figures(Runs(table, assemble(parts)), tmp_path)}
    assert made == {
        "val_loss_by_step",
        "val_loss_by_parameters",
        "pareto_time",
        "map_model_precision",
    }
    curves = pd.read_csv(tmp_path / "val_loss_by_step.csv")
    assert list(curves["model"].drop_duplicates()) == ["z", "y", "x"]
    assert set(curves["n"]) == {2}
    ended = curves[curves["x"] == 10].iloc[0]
    assert (ended["low"], ended["mean"], ended["high"]) == pytest.approx((3.1, 3.15, 3.2))
    timed = pd.read_csv(tmp_path / "pareto_time.csv")
    assert list(timed["wall_s"].drop_duplicates()) == [1.5e5, 1.5e6, 1.5e7]
    assert list(timed["front"]) == [True] + [False] * 11
    figure, _ = run_plots.heat_map(table, x="precision", y="model", title="")
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == list("dcba")
    plt.close(figure)


def test_of_many_recipes_the_best_is_shown_and_said_never_a_mean(tmp_path: Path) -> None:
    """Three axes of 2 x 2 x 3 values: twelve curves are too many."""
    points = list(product("zy", "dc", (0.1, 0.3, 1.0), (1, 2)))
    loss = {(m, p, r, s): 3 + (p == "d") + abs(r - 0.3) + s / 10 for m, p, r, s in points}
    rows = [
        {"fingerprint": str(point), "label": "", "state": "finished", "model": point[0]}
        | {"precision": point[1], "optim.lr": point[2], "seed": point[3], "num_parameters": 1e5}
        | {"val_loss": loss[point]}
        for point in points
    ]
    table = pd.DataFrame(rows)
    table.attrs["settings"] = ("model", "precision", "optim.lr", "seed")
    parts = [(str(point), "val_loss", [0, 10], [5.0, loss[point]]) for point in points]
    made = {file.stem for file in default_figures(Runs(table, assemble(parts)), tmp_path)}
    assert made >= {"val_loss_by_step", "map_model_precision", "map_model_lr", "map_precision_lr"}
    curves = pd.read_csv(tmp_path / "val_loss_by_step.csv")
    named = curves["model (its best precision, lr)"]
    assert set(named) == {"z (c, 0.3)", "y (c, 0.3)"}
    assert set(curves["n"]) == {2}
    assert curves[curves["x"] == 10]["mean"].to_list() == pytest.approx([3.15, 3.15])
    rates = pd.read_csv(tmp_path / "map_model_lr.csv")
    assert rates["mean"].to_list() == pytest.approx([3.35, 3.15, 3.85] * 2), "of the best precision"


@pytest.mark.filterwarnings("ignore::analysis.pooling.PooledWarning")  # it pools two formats
def test_a_heat_map_shows_holes_and_the_best_of_each_row() -> None:
    figure, shown = run_plots.heat_map(
        _runs().finished.query("num_parameters < 1e7 or seed < 2"),
        x="optim.lr",
        y="num_parameters",
        title="",
    )
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts.count("x") == 1
    assert len(shown) == 5
    assert len(figure.axes[0].patches) == 3


def test_the_front_is_what_nothing_beats() -> None:
    rows = pd.DataFrame(
        {"kind": "a", "flops": [1.0, 2.0, 3.0, 4.0], "val_loss": [3.0, 3.5, 2.0, 2.0]}
    )
    _, shown = run_plots.pareto(rows, cost="flops", by="kind", title="")
    assert shown["front"].tolist() == [True, False, True, False]


def test_layers_without_diagnostics_say_how_to_get_them() -> None:
    with pytest.raises(ValueError, match=r"set precision\.diagnostics_every"):
        run_plots.by_layer(_runs().history, statistic="sqnr_db", title="")


def test_a_forest_of_single_pairs_speaks_of_no_interval() -> None:
    gap = pd.DataFrame(
        {"value": ["a", "b"], "difference": [0.1, 0.2], "low": np.nan, "high": np.nan, "n": 1}
    )
    label = plots.forest(gap, baseline="bf16")[0].axes[0].get_xlabel()
    assert "too few" in label
    gap.loc[0, ["low", "high"]] = 0.0, 0.2
    assert "95% interval" in plots.forest(gap, baseline="bf16")[0].axes[0].get_xlabel()
