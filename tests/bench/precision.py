"""Emulated low precision: quantising against torchao, a training step against bf16.

python -m tests.bench.precision                   quantise and dequantise 4096 x 4096 in bf16
python -m tests.bench.precision --step gpt_10m    training steps under each recipe

The fused kernel on a GPU: tests/bench/gpu_kernels.py.
"""

import argparse
import time
from collections.abc import Callable

import torch

from kernels.emulate import emulate
from kernels.philox import NoiseKey
from kernels.quantiser import Quantiser
from models.compiled_kernels import compile_kernels
from tests.bench.timing import best_ms, interleaved
from tests.plain_nodes import shipped


def quantising(size: int, rounds: int, clock: Callable[[], float]) -> None:
    """Print the times of ours, torchao eager and torchao compiled, all to bf16 values."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    compile_kernels()
    x = torch.randn(size, size).bfloat16()
    quantiser = Quantiser(format="nvfp4", block=(1, 16))

    def ours(dim: int = 1) -> torch.Tensor:
        operand = emulate(x, quantiser, dim)
        assert operand.numerator is not None
        return operand.values * (operand.numerator / operand.denominator).bfloat16()

    def theirs(tensor: torch.Tensor) -> torch.Tensor:
        scale = per_tensor_amax_to_scale(tensor.abs().max().float())
        return NVFP4Tensor.to_nvfp4(tensor, per_tensor_scale=scale).dequantize(torch.bfloat16)

    compiled = torch.compile(theirs)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "copy": lambda: x.clone(),
        "ours, rows": ours,
        "ours, columns": lambda: ours(0),
        "torchao, compiled": lambda: compiled(x),
        "torchao, eager": lambda: theirs(x),
    }
    rows = interleaved(calls, rounds, clock)
    for name, seconds in rows.items():
        ratio = seconds / rows["ours, rows"]
        print(f"{name:20s} {1e3 * seconds:8.1f} ms  {ratio:6.1f} x ours")


def steps(model_name: str, recipes: list[str], batch: int, seq: int, *, profile: bool) -> None:
    """Print the time of forward, backward and update under each recipe, taken in turns."""
    runs = {name: _trainer(model_name, name, batch, seq) for name in recipes}
    for run in runs.values():
        run()
    times = {name: float("inf") for name in recipes}
    for _ in range(5):
        for name, run in runs.items():
            times[name] = min(times[name], best_ms(run, 1))
    for name, ms in times.items():
        print(f"{name:20s} {ms:8.1f} ms  {ms / times[recipes[0]]:6.2f} x {recipes[0]}")
    if profile:
        with torch.profiler.profile() as trace:
            runs[recipes[-1]]()
        print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=14))


def _trainer(model_name: str, recipe: str, batch: int, seq: int) -> Callable[[], None]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = shipped("model", model_name).build(8192, 0).to(device)
    precision = shipped("precision", recipe).build(device)
    precision.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(0, 8192, (batch, seq), device=device)
    noise = NoiseKey(seed=0, step=0, samples=torch.arange(batch, device=device))

    def step() -> None:
        precision.begin(0, 10)
        with precision.autocast(noise):
            loss = model(tokens, tokens).total / tokens.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step", metavar="MODEL", help="time training steps of this size")
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=["bf16", "nvfp4", "mxfp4", "mxfp8", "fp8_current", "nvfp4_all_layers"],
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--size", type=int, default=4096, help="rows and columns to quantise")
    parser.add_argument("--rounds", type=int, default=10, help="of quantising")
    parser.add_argument("--cpu", action="store_true", help="by CPU time, on a busy machine")
    given = parser.parse_args()
    if given.step:
        steps(given.step, given.recipes, given.batch, given.seq, profile=given.profile)
    else:
        quantising(given.size, given.rounds, time.process_time if given.cpu else time.perf_counter)
