"""Histories in bulk equal those of MLflow's client, of run folders by the rules, of the cache."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.history import assemble, cached, read_folder
from analysis.runs import _with_last
from analysis.stores import _Server, from_mlflow
from tests.mlflow_server import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An MLflow server on SQLite with runs of 12,000 points, of 30,000, of NaN and infinity."""
    found = Server(tmp_path_factory.mktemp("store"))
    found.start()
    try:
        _fill(found)
        yield found
    finally:
        found.kill()


def _fill(server: Server) -> None:
    """Write runs past the server: what an answer of it holds ends at 25,000 points."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

    client = MlflowClient(server.store)
    experiment = client.create_experiment("foreign", artifact_location=str(server.folder))
    for index, points in enumerate((500, 500, 26_000, 3)):
        run = client.create_run(experiment, run_name=f"run {index}")
        loss = np.random.default_rng(index).normal(size=points).tolist()
        if index == 3:
            loss = [float("nan"), float("inf"), 1.0]
        for first in range(0, points, 1000):
            metrics = [
                Metric("loss", loss[s], s, s) for s in range(first, min(first + 1000, points))
            ]
            client.log_batch(
                run.info.run_id,
                metrics,
                [Param("lr", "0.001")] if not first else [],
                [RunTag("fingerprint", f"f{index}")],
            )
        client.set_terminated(run.info.run_id, "FINISHED" if index else "KILLED")


def _theirs(uri: str) -> pd.DataFrame:
    from mlflow import MlflowClient

    client, rows = MlflowClient(uri), []
    experiment = client.get_experiment_by_name("foreign")
    for run in client.search_runs([experiment.experiment_id]):
        for point in client.get_metric_history(run.info.run_id, "loss"):
            rows.append((run.data.tags["fingerprint"], point.step, "loss", point.value))
    found = pd.DataFrame(rows, columns=["fingerprint", "step", "key", "value"])
    found["value"] = found["value"].mask(found["value"] >= 1.797e308, np.inf)
    return found.sort_values(["fingerprint", "step"], ignore_index=True)


def _plain(history: pd.DataFrame) -> pd.DataFrame:
    plain = history.astype({"fingerprint": str, "key": str})
    return plain.sort_values(["fingerprint", "step"], ignore_index=True)


@pytest.mark.slow
def test_database_and_server_give_what_mlflows_client_gives(server: Server, tmp_path: Path) -> None:
    theirs = _theirs(server.uri)
    assert len(theirs) == 27_003
    for uri in (f"sqlite:///{server.folder}/server.db", server.uri):
        found = from_mlflow(uri, "foreign", cache=tmp_path / "cache")
        pd.testing.assert_frame_equal(_plain(found.history), theirs, check_dtype=False)
        assert found.notes == ()
        table = found.table.set_index("fingerprint")
        assert table["state"].to_dict() == {
            "f0": "interrupted",
            "f1": "finished",
            "f2": "finished",
            "f3": "finished",
        }
        assert table.loc["f0", "lr"] == 0.001
        assert table.loc["f3", "loss"] == 1.0
        again = from_mlflow(uri, "foreign", cache=tmp_path / "cache")
        pd.testing.assert_frame_equal(_plain(again.history), theirs, check_dtype=False)
    with pytest.raises(KeyError, match=r"no experiment 'x'.*Default"):
        from_mlflow(server.uri, "x")
    with pytest.raises(ValueError, match="give sqlite"):
        from_mlflow("file:///tmp/mlruns", "x")


def test_runs_of_one_fingerprint_keep_their_own_ids(tmp_path: Path) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import RunTag

    uri = f"sqlite:///{tmp_path}/twice.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("twice", artifact_location=str(tmp_path))
    ids = []
    for value in (1.0, 2.0):
        run = client.create_run(experiment).info.run_id
        client.log_metric(run, "loss", value)
        client.log_batch(run, tags=[RunTag("fingerprint", "same")])
        ids.append(run)
    found = from_mlflow(uri, "twice")
    assert set(found.table["fingerprint"]) == set(found.history["fingerprint"]) == set(ids)
    assert found.table.set_index("fingerprint")["loss"].to_dict() == dict(
        zip(ids, (1.0, 2.0), strict=True)
    )


def test_a_fact_stands_until_a_metric_of_its_name_is_there() -> None:
    table = pd.DataFrame({"fingerprint": ["a", "b"], "tokens": [100.0, 200.0]})
    history = assemble([("a", "tokens", [1, 2], [10.0, 20.0]), ("a", "loss", [2], [1.5])])
    found = _with_last(table, history, {})
    assert found["tokens"].tolist() == [20.0, 200.0]
    assert found["loss"].tolist() == pytest.approx([1.5, float("nan")], nan_ok=True)
    assert list(_with_last(table, assemble([]), {}).columns) == ["fingerprint", "tokens"]
    for step, value in {1: 20.0, 2: 100.0}.items():  # evaluated again at the last step, or before
        assert _with_last(table, history, {"a": {"tokens": step}})["tokens"][0] == value


def test_a_history_that_a_server_cuts_is_reported(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that gives fewer points than it says is made of the real one by dropping some."""
    whole = _Server._batch

    def cut(self: _Server, key: str, runs: list[str]) -> list[dict[str, object]]:
        return whole(self, key, runs)[:2]

    monkeypatch.setattr(_Server, "_batch", cut)
    found = from_mlflow(server.uri, "foreign")
    assert any("the server cut loss of" in note for note in found.notes)
    assert "the server cut" in found.count()


def test_the_fast_reader_of_folders_follows_the_rules(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    file = tmp_path / "metrics.jsonl"
    lines = [
        {
            "step": s,
            "time": 1.0 * s,
            "attempt": 1,
            "loss": rng.normal(),
            **({"val_loss": 2.0} if s % 5 == 0 else {}),
        }
        for s in range(50)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 50, "lo')
    found = assemble(read_folder(file, "a"))
    assert len(found) == 60
    assert found[found["key"] == "loss"]["value"].tolist() == [line["loss"] for line in lines]
    lines[3]["loss"] = float("nan")
    more = [
        {"restored": 40, "attempt": 2},
        {"step": 41, "time": 0.0, "attempt": 2, "loss": 7.0},
        {"step": 42, "time": 0.0, "attempt": 1, "loss": 8.0},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *more]))
    again = assemble(read_folder(file, "a"))
    loss = again[again["key"] == "loss"].set_index("step")["value"]
    assert np.isnan(loss[3])
    assert loss[41] == 7.0
    assert loss.index.max() == 41


def test_the_cache_reads_again_only_what_changed(tmp_path: Path) -> None:
    asked: list[str] = []

    def read(runs: list[str]) -> pd.DataFrame:
        asked.extend(runs)
        return assemble([(run, "loss", [0, 1], [0.5, len(asked)]) for run in runs])

    file = tmp_path / "cache.parquet"
    cached(file, {"b": "1", "a": "1"}, read)
    assert sorted(asked) == ["a", "b"]
    asked.clear()
    found = cached(file, {"a": "1", "b": "2", "c": "1"}, read)
    assert asked == ["b", "c"]
    assert len(found) == 6
    assert list(found["fingerprint"].cat.categories) == ["a", "b", "c"]
    asked.clear()
    assert len(cached(file, {"a": "1", "c": "1"}, read)) == 4  # one is gone
    assert asked == []
    file.write_bytes(b"torn")
    cached(file, {"a": "1"}, read)
    assert asked == ["a"]
