"""Numbers do not change by accident: losses of short runs against committed ones.

If one changes on purpose, raise `numerics` of the class whose numbers changed (old cells are then
`drifted`, never silently reused) and write the file again:

    ESPALIER_UPDATE_GOLDEN=1 python -m pytest tests/runner/learn/test_golden.py
"""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.launch.worker import run_cell
from runner.machine import storage
from runner.records.cells import freeze_cell, make_cells

FILE = Path(__file__).parent / "golden_losses.json"
CASES = {
    "gpt adamw": [],
    "gpt muon dropout": ["optim=muon", "model.dropout=0.1"],
    "gpt2 layernorm bf16": [
        "model.norm=layernorm",
        "model.positions=learned",
        "model.activation=gelu",
        "model.bias=true",
        "precision=bf16",
    ],
    "untied qk-norm gqa relu2 softcap": [
        "model.tied=false",
        "model.qk_norm=true",
        "model.num_kv_heads=1",
        "model.activation=relu2",
        "model.softcap=20",
        "model.z_loss=1e-4",
    ],
    "bpe masked wsd ema": [
        "tokenizer=bpe",
        "tokenizer.vocab_size=300",
        "data.mask_documents=true",
        "schedule=wsd",
        "train.average.kind=ema",
    ],
    "hybrid": [
        "model=hybrid",
        "model.depth=3",
        "model.width=48",
        "model.parts.n.table_size=64",
        "data.mask_documents=true",
    ],
    **{
        f"{name} bf16": [f"precision={name}", "model.depth=2", "train.steps=4", "eval.every=4"]
        for name in ("nemotron3_super", "quartet2", "tetrajet_v2", "ufp4", "averis")
    },
    "bdh": ["model=bdh", "model.width=32", "model.multiplier=4", "model.depth=2"],
}


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Give pytest its Ctrl-C back: a worker takes the signals for itself."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize("case", CASES)
def test_losses_change_only_with_a_revision(
    case: str, compose: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPUs differ in the order of their sums: fp32 losses agree to 1e-4, bf16 ones to 1e-2."""
    monkeypatch.setenv("ESPALIER_EAGER_KERNELS", "1")  # the same bits, without compiling
    (cell,) = make_cells([("", compose("eval.sample_tokens=0", *CASES[case]))])
    freeze_cell(cell)
    assert run_cell(cell.folder) == 0
    revisions = {k: v for k, v in cell.science.items() if k.endswith(".numerics")}
    losses = [
        row[k]
        for row in storage.read_lines(cell.folder / "metrics.jsonl")
        for k in ("loss", "val_loss", "val_loss_average")
        if k in row
    ]
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    if os.environ.get("ESPALIER_UPDATE_GOLDEN"):
        known[case] = {"revisions": revisions, "losses": losses}
        FILE.write_text(json.dumps(known, indent=1) + "\n")
    assert known[case]["revisions"] == revisions, "a revision was raised: write the file anew"
    tolerance = 1e-2 if "bf16" in case else 1e-4
    assert losses == pytest.approx(known[case]["losses"], rel=tolerance), "raise `numerics`"
