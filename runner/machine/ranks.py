"""The ranks of a run, one process or several (torchrun), and the collectives that training needs.

Several processes train under DDP (`train.parallel=ddp`: each holds the full model) or FSDP2
(`fsdp`: each holds its shard of every parameter, gradient and optimiser state).
"""

import os
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from models.contract import blocks
from runner.machine.errors import ConfigError
from runner.machine.hardware import gpu_named

# Wrapped models refer to the process group, so they live until os._exit ends the process: the
# group's destructor holds the GIL while it joins a thread that may wait for it (torch 2.13, gloo).
_WRAPPED: list[nn.Module] = []


class Ranks:
    """This process among `world`; collectives are no-ops where it is alone."""

    def __init__(self, device: str) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        if cuda and not torch.cuda.is_available():
            raise ConfigError("train.device=cuda but torch sees no GPU here; use train.device=auto")
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")

    @property
    def first(self) -> bool:
        """True on rank 0, the only one that writes files."""
        return self.rank == 0

    def shard(self, model: nn.Module) -> None:
        """Shard every parameter in place (FSDP2): each block is a unit, the rest is another."""
        mesh = init_device_mesh(self.device.type, (self.world,))
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        # The root reshards after its forward pass too: evaluation has no backward pass to do it.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the module whose backward pass averages gradients over ranks."""
        if self.world == 1:
            return model
        wrapped = model if isinstance(model, FSDPModule) else DistributedDataParallel(model)
        _WRAPPED.append(wrapped)
        return wrapped

    @contextmanager
    def sync_if(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Average gradients over ranks only with the `last` micro-batch of a step."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
            yield
        elif isinstance(model, DistributedDataParallel) and not last:
            with model.no_sync():
                yield
        else:
            yield

    def leave(self) -> None:
        """Wait for the other ranks; the process group ends with the process, see `_WRAPPED`."""
        if self.world > 1:
            dist.barrier()

    def sum(self, value: float) -> float:
        """Return the sum of `value` over ranks."""
        if self.world == 1:
            return value
        return float(self.add(torch.tensor(value, device=self.device, dtype=torch.float64)))

    def add(self, value: Tensor) -> Tensor:
        """Return the sum of a scalar over ranks, fp64 on the device: the host waits for nothing."""
        total = value.double()
        if self.world > 1:
            dist.all_reduce(total := total.clone())
        return total

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the mean over ranks of each scalar; all ranks call it with the same names."""
        if self.world == 1 or not values:
            return {name: float(value) for name, value in values.items()}
        stacked = torch.stack([values[name].double() for name in sorted(values)])
        dist.all_reduce(stacked)
        return dict(zip(sorted(values), (stacked / self.world).tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank; all ranks call it."""
        return self.sum(float(flag)) > 0

    def gather(self, value: Any) -> list[Any]:
        """Return the `value` of each rank, which can be pickled; all ranks call it."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def peak_flops(self, compute: str) -> float | None:
        """Return the peak FLOP/s of all ranks together, None for CPUs and unlisted GPUs."""
        if self.device.type != "cuda":
            return None
        gpu = gpu_named(torch.cuda.get_device_name(self.device))
        peak = gpu.peak(compute) if gpu else None
        return None if peak is None else self.world * peak

    def peak_memory(self) -> int:
        """Return this rank's peak memory in bytes: of its GPU, else of the process (resident)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def gather_full(tensor: Tensor) -> Tensor:
    """Return the full tensor of a sharded one (all ranks must call), any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
