"""How often a training step makes the host wait for the device.

Each time it reads a value, and each time a tensor is made of numbers, which are copied to it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runner.learn.trainer import Trainer
from runner.machine.ranks import Ranks
from runner.records import journal
from runner.records.cells import freeze_cell, make_cells

Compose = Callable[..., dict[str, Any]]


class _Reads(TorchDispatchMode):
    """Counts what is read by `.item()`, `float`, `bool` and `.tolist()`, or made by `torch.tensor`.

    What a kernel of ours reads inside is not seen: that is the CPU's own.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def add(self) -> None:
        """Count one."""
        self.count += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default)
        if func in waits:
            self.add()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "chosen",
    [
        ["precision=nvfp4", "optim=muon", "train.micro_batch=2"],
        ["precision=fp8_delayed", "optim=adamw"],
        ["precision=quartet2", "optim=adamw"],
        ["precision=bf16", "model.pattern=ae", "+model/part@model.parts.e=experts"],
    ],
)
def test_a_step_waits_for_the_device_once(
    chosen: list[str], compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it returns the loss: launches run ahead of the device until then.

    The first step makes constants that later ones find.
    """
    (cell,) = make_cells([("", compose(*chosen, "train.steps=2"))])
    freeze_cell(cell)
    attempt = journal.claim(cell.folder)
    assert attempt is not None
    # Experts by one product, as on a GPU; on a CPU the loss counts its targets, to leave rows out.
    monkeypatch.setattr("models.experts.can_group", lambda x, hidden: True)
    monkeypatch.setattr("kernels.cross_entropy._mostly_ignored", lambda targets: False)
    writer = journal.Journal(cell.folder, attempt)
    trainer = Trainer(cell, cell.inputs, writer, Ranks("cpu"))
    step, tolist, counts = trainer._step, torch.Tensor.tolist, list[int]()

    def counted(batches: Any) -> Any:
        micro = trainer._micro_batches(batches)  # whose tensors are made on the host
        with monkeypatch.context() as patch, _Reads() as reads:
            patch.setattr(torch.Tensor, "tolist", lambda t: reads.add() or tolist(t))
            patch.setattr(trainer, "_micro_batches", lambda batches: micro)
            result = step(batches)
        counts.append(reads.count)
        return result

    monkeypatch.setattr(trainer, "_step", counted)
    assert trainer.fit(lambda: False) == "finished"
    writer.close()
    assert counts[1:] == [1]
