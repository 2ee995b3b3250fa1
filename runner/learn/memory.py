"""Predicts the peak memory of a rank by running a training step on fake tensors.

Every storage that the model, task, optimiser or recipe allocates is counted; nothing is computed.
Memory outside torch's tensors is a constant and a factor measured on CPUs (see `_PROCESS`); for a
GPU the prediction covers the tensors alone.
"""

import json
import weakref
from collections.abc import Sequence
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

# Resident size of a CPU process = _PROCESS (interpreter, torch, thread pools) + slack x tensors
# (fragmentation of glibc's allocator, packed operands; recomputing fragments more, and so do the
# small tensors that adapters keep between large ones, less so DoRA, which keeps more large ones):
# fitted to 13 cells of 0.5M to 10M parameters; tests/runner/views/test_plan.py compares it with
# others.
_PROCESS, _SLACK, _SLACK_FRAGMENTED, _SLACK_DORA = 355e6, 1.13, 1.7, 1.42
_TENSOR_BYTES: dict[str, int] = {}  # by the part of the config that decides it
_DECIDING = ("model", "precision", "task", "optim", "train", "eval", "data", "resources")


def predicted_bytes(run: RunConfig, vocab_size: int, *, steps: int = 1, gpu: bool = False) -> int:
    """Return the expected peak memory of one rank, in bytes.

    With train.parallel=fsdp or train.compile it is that of ddp and eager mode, an upper bound. The
    processes of data.num_workers are not counted.

    Args:
        steps: 0: the run evaluates only.
        gpu: return the bytes of the tensors alone.
    """
    plain = freeze(run)
    science = {key: plain[key] for key in _DECIDING}
    trains = steps > 0
    for changes_nothing in ("steps", "tokens", "flops", "tokens_per_parameter", "checkpoint"):
        science["train"].pop(changes_nothing)
    attributes = ("mask_documents", "sequences_per_sample")
    science["data"] = [type(run.data).__name__, *(getattr(run.data, a, None) for a in attributes)]
    # Learning rates and other floats allocate nothing: cells that differ in them share a result.
    science["optim"] = {k: v for k, v in science["optim"].items() if not isinstance(v, float)}
    key = json.dumps([science, vocab_size, trains], sort_keys=True)
    if key not in _TENSOR_BYTES:
        _TENSOR_BYTES[key] = _tensor_bytes(run, vocab_size, trains=trains)
    if gpu:
        return _TENSOR_BYTES[key]
    return int(_PROCESS + _slack(run) * _TENSOR_BYTES[key])


def _slack(run: RunConfig) -> float:
    adapter = getattr(run.model, "adapter", None)
    if run.train.activation_checkpointing:
        return _SLACK_FRAGMENTED
    if adapter is None:
        return _SLACK
    return _SLACK_DORA if adapter.kind == "dora" else _SLACK_FRAGMENTED


def _tensor_bytes(run: RunConfig, vocab: int, *, trains: bool) -> int:
    train = run.train
    micro = train.forward_samples(run.resources.num_processes)
    micro_batches = train.batch_size // (run.resources.num_processes * micro)
    with FakeTensorMode(allow_non_fake_inputs=True), _Storages() as storages:
        model = run.model.build(vocab, 0)
        precision = run.precision.build(torch.device("cpu"), planning=True)
        precision.prepare(model)
        if train.activation_checkpointing:
            recompute_blocks(model, precision)
        optimizers, average = build_optimizers(run.optim, model), train.average.build(model)
        task = run.task.build(model, _AnyTokenizer(vocab, contracts.added_tokens(run.task)), {})

        def forward(samples: int) -> Any:
            batch = _batch(run.data, samples, train.sequence_length)
            noise = NoiseKey(seed=0, step=0, samples=batch["index"])
            with torch.no_grad(), precision.autocast():
                drawn = contracts.planned(task, model, batch, noise)
            noise = NoiseKey(seed=0, step=0, samples=drawn["index"])
            with precision.autocast(noise):
                return task.loss(model, drawn, noise)

        if trains:
            # The largest step is the second: it has the optimiser's state from its beginning. So
            # the first needs no forward pass, and the second's update no more than the first's.
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            for step in (1, 2) if average is not None else ():
                average.update(step)
            for _ in precision.reserve():
                with precision.same_weights(micro_batches > 1):
                    for _ in range(min(2, micro_batches)):
                        forward(micro).total.backward()
                model.zero_grad(set_to_none=True)
        if not trains or run.eval.batch_size > micro:  # else it needs less than training does
            with torch.no_grad():
                forward(run.eval.batch_size)
    return int(storages.peak)


def _batch(data: Any, samples: int, seq: int) -> contracts.Batch:
    """Return a batch of the shapes of the data's, all zeros."""
    own = getattr(data, "planned_batch", None)
    if own is not None:
        return dict(own(samples, seq))
    tokens, index = torch.zeros(samples, seq).long(), torch.zeros(samples).long()
    batch = {"tokens": tokens, "targets": tokens.clone(), "index": index}
    if getattr(data, "mask_documents", False):
        batch["documents"] = tokens.clone()
    return batch


class _AnyTokenizer:
    """Stands for a tokenizer that is not trained yet; its last ids are those a task has added."""

    def __init__(self, vocab_size: int, added: Sequence[str]) -> None:
        self.vocab_size, first = vocab_size, vocab_size - len(added)
        self.eos, self.num_added = first - 1, len(added)
        self.token_ids = {name: first + place for place, name in enumerate(added)}

    def decode(self, ids: Sequence[int]) -> str:
        return "a" * len(ids)

    def bytes_per_id(self) -> np.ndarray:
        return np.ones(self.vocab_size, dtype=np.int32)


class _Storages(TorchDispatchMode):
    """Counts the bytes of all live storages, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the wrapper costs as much as an operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, count: int) -> None:
        self.live -= count
