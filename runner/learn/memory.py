"""Predicts the peak memory of a rank: one training step on fake tensors, every storage counted.

Nothing is computed and nothing is known of the model: whatever a model, task, optimiser or recipe
allocates is seen as it is allocated and freed. What lies outside torch's tensors is a constant and
a factor, measured on CPUs (see `_PROCESS`); of a GPU only the tensors are predicted.
"""

import json
import weakref
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.philox import NoiseKey
from runner.learn.optim.build import build_optimizers
from runner.learn.setup import recompute_blocks
from runner.records import contracts
from runner.records.config import RunConfig, freeze

# Resident size of a CPU process = _PROCESS (interpreter, torch, thread pools) + slack x tensors (holes
# of glibc's allocator, packed operands; recomputing makes more holes): fitted to 11 cells of 0.5M to 10M
# parameters; tests/runner/views/test_plan.py holds it against others.
_PROCESS, _SLACK, _SLACK_RECOMPUTING = 355e6, 1.13, 1.7
_KNOWN: dict[str, int] = {}
_DECIDING = ("model", "precision", "task", "optim", "train", "eval", "data", "resources")


def predicted_bytes(run: RunConfig, vocab_size: int, *, steps: int = 1, gpu: bool = False) -> int:
    """Return the expected peak memory in bytes of one rank that takes `steps` (0: it only reads its model).

    Simplifications: with train.parallel=fsdp and train.compile it is what ddp and eager would take,
    an upper bound; with data.num_workers their own processes are not counted.
    """
    plain = freeze(run)
    science = {key: plain[key] for key in _DECIDING}
    trains = steps > 0
    for changes_nothing in ("steps", "tokens", "flops", "tokens_per_parameter", "checkpoint"):
        science["train"].pop(changes_nothing)
    science["data"] = getattr(run.data, "mask_documents", False)
    # Rates and seeds allocate nothing: cells that differ in numbers of the optimiser share an answer.
    science["optim"] = {k: v for k, v in science["optim"].items() if not isinstance(v, float)}
    key = json.dumps([science, vocab_size, trains], sort_keys=True)
    if key not in _KNOWN:
        _KNOWN[key] = _tensor_bytes(run, vocab_size, steps=2 if trains else 0)
    if gpu:
        return _KNOWN[key]
    slack = _SLACK_RECOMPUTING if run.train.activation_checkpointing else _SLACK
    return int(_PROCESS + slack * _KNOWN[key])


def _tensor_bytes(run: RunConfig, vocab: int, *, steps: int) -> int:
    train = run.train
    share = max(1, train.batch_size // run.resources.num_processes)
    micro = min(share, train.micro_batch or share)
    with FakeTensorMode(allow_non_fake_inputs=True), _Storages() as storages:
        model = run.model.build(vocab, 0)
        precision = run.precision.build(torch.device("cpu"), planning=True)
        precision.prepare(model)
        if train.activation_checkpointing:
            recompute_blocks(model)
        optimizers, average = build_optimizers(run.optim, model), train.average.build(model)
        task = run.task.build(model, _AnyTokenizer(vocab), {})

        def forward(samples: int) -> Any:
            tokens = torch.zeros(samples, train.sequence_length, dtype=torch.long)
            batch = {"tokens": tokens, "targets": tokens.clone(), "documents": tokens.clone()}
            batch["index"] = torch.zeros(samples, dtype=torch.long)
            if not getattr(run.data, "mask_documents", False):
                del batch["documents"]
            noise = NoiseKey(seed=0, step=0, samples=batch["index"])
            with torch.no_grad(), precision.autocast():
                (drawn,) = contracts.draw(task, model, [batch], noise)
            with precision.autocast(noise):
                return task.loss(model, drawn, noise)

        for step in range(steps):  # the second has the optimiser's state from the beginning
            for _ in range(min(2, share // micro)):
                forward(micro).total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if average is not None:
                average.update(step + 1)
        with torch.no_grad():
            forward(run.eval.batch_size)
    return int(storages.peak)


class _AnyTokenizer:
    """What a task may ask of a tokenizer that is not made yet."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.eos = vocab_size, vocab_size - 1

    def bytes_per_id(self) -> np.ndarray:
        return np.ones(self.vocab_size, dtype=np.int32)


class _Storages(TorchDispatchMode):
    """Counts the bytes of all storages that live at the same time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, count: int) -> None:
        self.now -= count
