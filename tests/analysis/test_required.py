"""Required sizes, crossings and contours, on tables whose answers are known."""

import importlib.util
import json
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

from analysis.contours import bit_guides, contour_lines, contours, whole_grid
from analysis.required import crossover, over_seeds_required, required_sizes
from analysis.runs import from_folders

ROOT = Path(__file__).parents[2]

SIZES = (1e3, 1e4, 1e5)


def _runs(values: dict[tuple[str, int, int], tuple[float, ...]]) -> pd.DataFrame:
    """Return a run for each (condition, facts, seed) and size, with its recall."""
    rows = [
        {"condition": c, "facts": f, "seed": s, "num_parameters": size, "recall": recall}
        for (c, f, s), recalls in values.items()
        for size, recall in zip(SIZES, recalls, strict=True)
    ]
    return pd.DataFrame(rows)


def test_a_required_size_lies_on_a_line_in_the_logarithm() -> None:
    runs = _runs(
        {
            ("w", 8, 1): (0.0, 0.9, 1.0),  # halfway between 10^4 and 10^5
            ("w", 8, 2): (0.95, 1.0, 1.0),
            ("w", 8, 3): (0.0, 0.1, 0.94),
            ("w", 9, 1): (0.5, 1.0, 0.2),  # the smallest that passes counts
        }
    )
    found = required_sizes(runs, by=["condition", "facts"])
    assert found["required"].tolist() == pytest.approx([10**4.5, 1e3, 1e5, 10 ** (3 + 0.45 / 0.5)])
    assert found["bound"].tolist() == ["", "below", "above", ""]
    over = over_seeds_required(found, by=["condition", "facts"])
    assert over["median"].tolist() == pytest.approx([10**4.5, 10**3.9])
    assert over[["low", "high", "n"]].iloc[0].tolist() == [1e3, 1e5, 3]
    assert over["bound"].tolist() == ["", ""]


def test_lines_cross_where_the_rising_one_passes_the_flat_one() -> None:
    """Required: facts against 100 x 10 for all: they cross at 1,000 facts."""
    rows = [
        {"kind": kind, "facts": facts, "seed": seed, "required": required}
        for facts in (100, 400, 1600, 6400)
        for seed in (1, 2, 3)
        for kind, required in (("w", float(facts)), ("t", 1000.0))
    ]
    table = pd.DataFrame(rows)
    how = {"x": "facts", "kind": "kind", "rising": "w", "flat": "t"}
    assert crossover(table, **how) == pytest.approx((1000.0, 1000.0, 1000.0))
    rng = np.random.default_rng(0)
    noisy = table.assign(required=table["required"] * np.exp(rng.normal(0.0, 0.2, len(table))))
    found, low, high = crossover(noisy, **how)
    assert low < found < high
    assert low < 1000 < high
    assert np.isnan(crossover(table, **how | {"rising": "t", "flat": "w"})[0])
    with pytest.raises(ValueError, match="same values of facts"):
        crossover(table[(table["kind"] == "w") | (table["facts"] < 6400)], **how)


def test_a_contour_is_where_the_metric_has_the_level() -> None:
    """recall = log10(parameters / facts): the contour of 1 is parameters = 10 x facts."""
    table = pd.DataFrame(
        {"facts": f, "num_parameters": p, "recall": np.log10(p / f), "seed": 1}
        for f in (10.0, 100.0, 1000.0)
        for p in (100.0, 1000.0, 20000.0)
    )
    of = {"x": "facts", "y": "num_parameters", "metric": "recall"}
    lines = contour_lines(table, **of, levels=[1.0, 1.5])
    assert set(lines["level"]) == {1.0, 1.5}
    np.testing.assert_allclose(lines["y"] / lines["x"], 10 ** lines["level"], rtol=1e-9)
    figure, shown = contours(table, **of, guides={"1 a fact": lambda facts: facts})
    assert len(shown) == 9
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert "1 a fact" in labels
    with pytest.raises(ValueError, match="1 missing"):
        contour_lines(table.iloc[1:], **of, levels=[1.0])
    whole = whole_grid(table.iloc[1:], x="facts", y="num_parameters")
    assert set(whole["facts"]) == {100.0, 1000.0}


def test_guides_of_bits_a_parameter_are_facts_times_their_bits() -> None:
    guides = bit_guides(8.0)
    assert list(guides) == ["1 bit a parameter", "2 bits a parameter"]
    required = [guide(np.array([10.0, 100.0])).tolist() for guide in guides.values()]
    assert required == [[80.0, 800.0], [40.0, 400.0]]


def _write_run(
    root: Path, sweep: str, science: dict[str, object], curves: dict[str, list[float]]
) -> None:
    """Write the folder of a finished run with the values of its steps."""
    name = f"{len(list(root.glob('runs/*'))):016x}"
    run = root / "runs" / name
    (run / "attempts/0001").mkdir(parents=True)
    (run / "cell.json").write_text(json.dumps({"schema": 1, "science": science}))
    sizes = {"num_parameters": 4000 * int(str(science["model.width"]))}
    (run / "summary.json").write_text(json.dumps(sizes))
    lease = {"host": "a", "pid": 1, "process_start": 0.0}
    (run / "attempts/0001/lease.json").write_text(json.dumps(lease))
    (run / "attempts/0001/events.jsonl").write_text('{"event": "finished"}\n')
    rows = [
        {"step": step, "attempt": 1, "time": step} | dict(zip(curves, values, strict=True))
        for step, values in enumerate(zip(*curves.values(), strict=True), start=1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = root / "sweeps" / sweep
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "cells.jsonl").open("a") as file:
        file.write(json.dumps({"fingerprint": name, "label": name}) + "\n")


def _figures(experiment: str) -> ModuleType:
    """Return the module that draws an experiment."""
    file = ROOT / "experiments" / experiment / "figures.py"
    spec = importlib.util.spec_from_file_location(experiment, file)
    assert spec is not None
    assert spec.loader is not None
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    return figures


def test_figures_of_many_logs_are_drawn_by_a_notebook_and_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By heart 16 people need a width of 16 x 0.95, in-tool all need 32: they cross between."""
    for seed, condition, people, width in product(
        (1, 2), ("in_weight", "in_tool"), (16, 64), (8, 16, 32, 64)
    ):
        needed = people if condition == "in_weight" else 32
        keys = {"seed": seed, "data.condition": condition, "data.num_people": people}
        sweep = f"sweep{seed}"
        recall = [share * min(1.0, width / needed) for share in (0.1, 0.5, 1.0)]
        curves = {"recall": recall, "recall/unseen_train": [value / 2 for value in recall]}
        curves["call_accuracy"] = [1.0] * 3
        _write_run(tmp_path, sweep, keys | {"model.width": width}, curves)
    monkeypatch.setenv("ESPALIER", str(ROOT))
    monkeypatch.setenv("LOGS", f"{tmp_path}=sweep1 {tmp_path}=sweep2")
    notebook = json.loads((ROOT / "examples/many_logs.ipynb").read_text())
    space: dict[str, object] = {}
    for cell in notebook["cells"]:
        assert not cell.get("outputs"), "clear the outputs of examples/many_logs.ipynb"
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
    assert "they cross at 128 facts, 128 to 128" in capsys.readouterr().out
    assert len(space["table"]) == 32  # type: ignore[arg-type]
    (tmp_path / "out").mkdir()
    drawn = _figures("in_tool").main(from_folders(tmp_path, "sweep1"), tmp_path / "out/figures")
    assert [file.stem for file in drawn] == ["required", "unseen", "contours", "in_training"]
    assert (tmp_path / "out/results.csv").read_text().count("\n") == 17
    members = tmp_path / "sweeps/sweep1/cells.jsonl"
    members.write_text("".join(members.read_text().splitlines(keepends=True)[:6]))
    drawn = _figures("in_tool").main(from_folders(tmp_path, "sweep1"), tmp_path / "out/figures")
    assert len(drawn) == 3, "of 32 cells six: no plane of facts and sizes yet, the others stand"


def test_capacity_is_drawn_with_contours_of_recall_where_its_grid_is_whole(tmp_path: Path) -> None:
    """Models that learn a bit a parameter, or all; each fact has 8 bits."""
    for exposures, people, width in product((100, 1000), (1000, 4000), (1, 2, 4)):
        most, size = people * 2 * 8.0, 4000 * width
        bits = min(most, float(size))
        measured = {"names_nats": 0.0, "values_nats": 0.0, "value_recall": bits / most}
        ratios = {"bits_per_parameter": bits / size, "most_bits_per_parameter": most / size}
        measured |= {"bits": bits, **ratios, "bits_per_parameter_without_embeddings": bits / size}
        science: dict[str, object] = {
            "seed": 1,
            "model.width": width,
            "data.num_people": people,
            "data.attributes.town": 256,
            "data.attributes.trade": 256,
            "train.batch_size": people // 10,
            "train.steps": 10 * exposures,
        }
        curves = {key: [value] for key, value in measured.items()}
        _write_run(tmp_path, "whole", science, curves)
        if (exposures, people, width) != (100, 4000, 1):
            _write_run(tmp_path, "holed", science, curves)
    for sweep, panels in (("whole", 2), ("holed", 1)):
        out = tmp_path / sweep / "figures"
        out.mkdir(parents=True)
        drawn = _figures("capacity").main(from_folders(tmp_path, sweep), out)
        assert [file.stem for file in drawn] == ["capacity", "contours"]
        assert pd.read_csv(out / "contours.csv")["exposures"].nunique() == panels
    results = pd.read_csv(tmp_path / "whole/results.csv")
    assert set(results["facts"]) == {2000, 8000}
    assert set(results["exposures"]) == {100, 1000}
    assert set(results["bits_per_fact"]) == {8.0}
