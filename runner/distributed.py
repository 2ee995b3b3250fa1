"""One process or several (torchrun): who am I, and the few collectives that training needs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# Dense peak of one device in FLOP/s, vendor datasheets without sparsity: (bf16, fp32 as TF32).
_PEAKS = {
    "A100": (312e12, 156e12),
    "H100": (989e12, 495e12),
    "H200": (989e12, 495e12),
    "B200": (2250e12, 1125e12),
}


class Ranks:
    """This process among `world`; collectives are no-ops where it is alone."""

    def __init__(self, device: str) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")

    @property
    def first(self) -> bool:
        """True in the process that writes."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the module whose backward pass averages gradients over ranks."""
        return model if self.world == 1 else DistributedDataParallel(model)

    @contextmanager
    def sync_if(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Exchange gradients only with the last micro-batch of a step."""
        if self.world == 1 or last:
            yield
        else:
            assert isinstance(model, DistributedDataParallel)
            with model.no_sync():
                yield

    def sum(self, value: float) -> float:
        """Return the sum of `value` over ranks."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return float(tensor)

    def any(self, flag: bool) -> bool:
        """True where any rank says so."""
        return self.sum(float(flag)) > 0

    def peak_flops(self, compute: str) -> float | None:
        """Return the peak of all devices together, None where the device is not in the table."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        for key, (bf16, fp32) in _PEAKS.items():
            if key in name:
                return self.world * (bf16 if compute == "bf16" else fp32)
        return None
