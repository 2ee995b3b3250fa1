"""A model and an evaluation that fail on demand, for tests of sweeps and of resuming."""

import os
import signal
import time
from functools import partial
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor

from models.config import config
from models.decoder import Decoder
from models.decoder_config import DecoderConfig
from runner.records.contracts import Trained


@config
class FaultyConfig(DecoderConfig):
    """A decoder with a fault.

    Args:
        fault: `oom` and `kernel_oom` cannot hold more than one sample, the latter until the kernel
            kills it; `slow` takes 0.2 s a step until the file that the environment variable
            ESPALIER_TEST_HURRY names is there; `stuck` takes an hour; `long_eval` computes for 17 s
            when it is first evaluated after 8 passes with a gradient.
    """

    fault: Literal[
        "none",
        "segfault",
        "exit0",
        "hang",
        "raise",
        "oom",
        "kernel_oom",
        "slow",
        "stuck",
        "long_eval",
    ] = "none"

    def build(self, vocab_size: int, seed: int) -> Decoder:
        """Return the model, or fail; the launcher, which builds models to plan, is spared."""
        if "ESPALIER_LAUNCHED" not in os.environ:
            return super().build(vocab_size, seed)
        if self.fault == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.fault == "exit0":
            os._exit(0)
        if self.fault == "hang":
            time.sleep(3600)
        if self.fault == "raise":
            raise ArithmeticError("asked to fail")
        model = super().build(vocab_size, seed)
        if self.fault == "oom":
            model.register_forward_pre_hook(_too_large)
        if self.fault == "kernel_oom":
            model.register_forward_pre_hook(_fill_memory)
        if self.fault in ("slow", "stuck"):
            seconds = 0.2 if self.fault == "slow" else 3600.0
            model.register_forward_pre_hook(partial(_wait, seconds))
        if self.fault == "long_eval":
            model.register_forward_pre_hook(_compute_once)
        return model


@config
class DyingEvaluation:
    """An evaluation whose process is killed the first time that it is made after a step."""

    every: str = "validation"

    def run(self, trained: Trained, step: int) -> dict[str, float]:
        """Return one value."""
        assert trained.folder is not None
        seen = trained.folder / f"died_at_{step}"
        if not seen.exists():
            seen.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"dying/step": float(step)}


def _wait(seconds: float, _: Any, arguments: tuple[Any, ...]) -> None:
    planned = any(isinstance(a, FakeTensor) or getattr(a, "is_meta", False) for a in arguments)
    if not planned and not os.path.exists(os.environ.get("ESPALIER_TEST_HURRY", "")):
        time.sleep(seconds)


def _compute_once(model: Any, _: tuple[Any, ...]) -> None:
    passes = getattr(model, "passes", 0) + torch.is_grad_enabled()
    model.passes = passes
    if passes > 8 and not torch.is_grad_enabled() and not hasattr(model, "has_computed"):
        model.has_computed = True
        end = time.monotonic() + 17.0
        while time.monotonic() < end:
            pass


def _too_large(_: Any, arguments: tuple[Any, ...]) -> None:
    if arguments and len(arguments[0]) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def _fill_memory(_: Any, arguments: tuple[Any, ...]) -> None:
    if arguments and len(arguments[0]) > 1:
        held = [torch.ones(1 << 24)]
        while sum(map(len, held)) < 1 << 31:  # 8 GB: a test's limit is far below
            held.append(torch.ones(1 << 24))
