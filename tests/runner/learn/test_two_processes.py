"""Two processes, data-parallel or sharded, train as one does."""

import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.records import checkpoint_folder, journal, metrics
from runner.records.cells import Cell, freeze_cell, make_cells
from tests.command_server import start
from tests.workers import logged, start_worker

Compose = Callable[..., dict[str, Any]]
# Experts are balanced per micro-batch, so one process takes micro-batches as large as each of two.
HYBRID = ["model=hybrid", "model.depth=2", "model.width=48", "train.micro_batch=2"]
BDH = ["model=bdh", "model.depth=2", "model.width=32", "model.num_heads=2", "model.multiplier=8"]
PARTS = {"m": "mamba2", "r": "min_gru", "b": "based", "c": "short_conv", "w": "window_sinks"}
MIXERS = [
    *(f"+model/part@model.parts.{letter}={name}" for letter, name in PARTS.items()),
    "model.depth=5",
    'model.pattern="mf rf bf cf wf"',
    "+model/streams=hc",
]
SPREAD = [["train.parallel=ddp"], ["train.parallel=fsdp"], ["train.parallel=fsdp", "optim=muon"]]
SPREAD += [
    [*model, f"train.parallel={how}"] for model in (HYBRID, BDH, MIXERS) for how in ("ddp", "fsdp")
]

# OsciReset of all weights that move, twice in twelve steps; OutControl from step 4 on.
SOON = [
    *("precision.osci_reset.start_at=1", "precision.osci_reset.every=4"),
    *("precision.osci_reset.window=3", "precision.osci_reset.threshold=1e-9"),
    *("precision.out_control.start_at=1", "precision.out_control.window=3"),
]


def _on_two(cell: Cell) -> tuple[int, str]:
    """Run a cell in two processes with the variables of torchrun; return exit code and stderr.

    torchrun itself starts cells of two processes in tests/runner/launch/test_sweep.py.
    """
    freeze_cell(cell)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    given = os.environ | where | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        start(
            "runner.launch.worker",
            str(cell.folder),
            env=given | {"RANK": n, "LOCAL_RANK": n},
            keep=True,
        )
        for n in "01"
    ]
    deadline = time.monotonic() + 300
    while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    failed = next((rank for rank in ranks if rank.poll()), ranks[0])
    for rank in ranks:
        rank.kill()  # one that waits for the other for ever
    return failed.wait(), failed.communicate()[1]


def _run_on_one_and_on_two(one: Cell, two: Cell) -> None:
    assert start_worker(one).wait() == 0
    code, errors = _on_two(two)
    assert code == 0, errors


@pytest.mark.slow
@pytest.mark.parametrize("overrides", SPREAD, ids=" ".join)
def test_two_processes_lose_nothing_against_one(
    overrides: list[str], compose: Compose, tmp_path: Path
) -> None:
    """Gradients are summed in another order, so losses agree to 1e-4, gradient norms (which see the
    differences that Muon's bf16 iteration amplifies) to 1e-3, not to the bit."""
    common = ["model.dropout=0.1", "train.average.kind=ema", *overrides]
    cells = [make_cells([("", compose(*common, f"root={tmp_path / n}"))])[0] for n in "ab"]
    _run_on_one_and_on_two(*cells)
    one, two = logged(cells[0]), logged(cells[1])
    assert one.keys() == two.keys()
    assert (12, "val_loss_average") in one
    for key, value in one.items():
        tolerance = 1e-3 if key[1] == "grad_norm" else 1e-4
        assert two[key] == pytest.approx(value, rel=tolerance), key


@pytest.mark.slow
def test_a_mixture_of_experts_is_one_run_by_the_samples_of_a_forward_pass(
    compose: Compose, tmp_path: Path
) -> None:
    """Two processes, or two micro-batches in one: the same name, losses and router statistics."""
    experts = ["model.pattern=ae", "+model/part@model.parts.e=experts", "train.steps=3"]
    spread = {"a": "train.micro_batch=2", "b": "resources.processes=2"}
    cells = [
        make_cells([("", compose(*experts, how, f"root={tmp_path / name}"))])[0]
        for name, how in spread.items()
    ]
    assert cells[0].fingerprint == cells[1].fingerprint
    _run_on_one_and_on_two(*cells)
    one, two = (
        {
            (row["step"], k): v
            for row in metrics.read(cell.folder)
            for k, v in row.items()
            if k == "loss" or ".moe." in k
        }
        for cell in cells
    )
    assert one.keys() == two.keys()
    assert any(".moe." in key for _, key in one)
    for key, value in one.items():
        assert two[key] == pytest.approx(value, rel=1e-3), key


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["train.parallel=ddp", "precision=nvfp4"],
        ["train.parallel=fsdp", "precision=nvfp4"],
        ["train.parallel=fsdp", "precision=fp8_delayed"],
        ["train.parallel=fsdp", "precision=tetrajet_v2", *SOON],
        ["train.parallel=fsdp", "+model/rounding=bitnet"],
        ["train.parallel=fsdp", "+model/rounding=lsq"],
    ],
    ids=" ".join,
)
def test_quantised_layers_are_the_same_on_two_processes(
    overrides: list[str], compose: Compose, tmp_path: Path
) -> None:
    """Scales are per micro-batch, so one process takes micro-batches as large as each of two.

    Gradients summed in another order change some roundings: losses agree to 1e-3.
    """
    common = ["model.width=32", "model.hidden=64", "train.micro_batch=2", *overrides]
    cells = [make_cells([("", compose(*common, f"root={tmp_path / n}"))])[0] for n in "ab"]
    _run_on_one_and_on_two(*cells)
    one, two = logged(cells[0]), logged(cells[1])
    assert one.keys() == two.keys()
    for key, value in one.items():
        if key[1] in ("loss", "val_loss"):
            assert two[key] == pytest.approx(value, rel=1e-3), key
    first = (1, "loss")
    assert two[first] == pytest.approx(one[first], rel=1e-6)


@pytest.mark.slow
def test_a_sharded_run_resumes_in_one_process_and_back(compose: Compose, tmp_path: Path) -> None:
    """Two processes under FSDP2 save at step 5, one process continues; then the other way round."""
    overrides = [
        "train.parallel=fsdp",
        "train.average.kind=last",
        "train.average.every=2",
        "optim=muon",
    ]
    (reference,) = make_cells([("", compose(*overrides, f"root={tmp_path / 'whole'}"))])
    assert start_worker(reference).wait() == 0
    alone = lambda cell: start_worker(cell).wait()  # noqa: E731
    on_two = lambda cell: _on_two(cell)[0]  # noqa: E731
    for name, starts in (("2to1", [on_two, alone]), ("1to2", [alone, on_two])):
        keep = ["train.checkpoint.every_steps=5", "train.checkpoint.keep_last=9"]
        (cell,) = make_cells([("", compose(*overrides, *keep, f"root={tmp_path / name}"))])
        assert cell.fingerprint == reference.fingerprint
        for index, train in enumerate(starts):
            assert train(cell) == 0
            if index == 0:  # as if it had been killed after step 5
                for path in checkpoint_folder.listing(cell.folder / "checkpoints")[1:]:
                    shutil.rmtree(path)
                (journal.attempts(cell.folder)[-1] / "events.jsonl").unlink()
        one, two = logged(reference), logged(cell)
        assert one.keys() == two.keys()
        for key, value in one.items():
            tolerance = 1e-3 if key[1] == "grad_norm" else 1e-4
            assert two[key] == pytest.approx(value, rel=tolerance), key


def test_a_batch_that_ranks_cannot_share_is_refused(compose: Compose) -> None:
    (cell,) = make_cells([("", compose("train.batch_size=5"))])
    code, errors = _on_two(cell)
    assert code != 0
    assert "train.batch_size=5 over 2 processes" in errors
