"""Emulated low precision: quantising against torchao, a training step against bf16.

python -m tests.bench.precision                   quantise and dequantise 4096 x 4096 in bf16
python -m tests.bench.precision --step gpt_10m    training steps under each recipe
python -m tests.bench.precision --fused           on a GPU: the fused kernel against a copy
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from kernels.emulate import Quantiser, emulate
from models.compiled_kernels import compile_kernels

SIZE = 4096


def best_ms(run: Callable[[], Any], repeats: int = 15) -> float:
    """Return the least time of a call in ms."""
    run()
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def quantising() -> None:
    """Print the times of ours, torchao eager and torchao compiled, all to bf16 values."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    compile_kernels()
    x = torch.randn(SIZE, SIZE).bfloat16()
    quantiser = Quantiser(format="nvfp4", block=(1, 16))

    def ours(dim: int = 1) -> torch.Tensor:
        operand = emulate(x, quantiser, dim)
        assert operand.numerator is not None
        return operand.values * (operand.numerator / operand.denominator).bfloat16()

    def theirs(tensor: torch.Tensor) -> torch.Tensor:
        scale = per_tensor_amax_to_scale(tensor.abs().max().float())
        return NVFP4Tensor.to_nvfp4(tensor, per_tensor_scale=scale).dequantize(torch.bfloat16)

    compiled = torch.compile(theirs)
    rows = {
        "copy": best_ms(lambda: x.clone()),
        "ours, rows": best_ms(ours),
        "ours, columns": best_ms(lambda: ours(0)),
        "torchao, compiled": best_ms(lambda: compiled(x)),
        "torchao, eager": best_ms(lambda: theirs(x), 5),
    }
    for name, ms in rows.items():
        print(f"{name:20s} {ms:8.1f} ms  {ms / rows['ours, rows']:6.1f} x ours")


def fused() -> None:
    """Print the bandwidth of quantising a gradient along rows and columns, against a copy's.

    n bf16 elements must move 8n bytes: 2n are read for the magnitudes, 2n read and 2 x 2n written
    for the values. A copy moves 4n.
    """
    from kernels.emulate import triton_agrees
    from kernels.hadamard import hadamard_matrix
    from kernels.triton_nvfp4 import quantise_both

    if not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU here")
    device = torch.device("cuda")
    agrees = f"Triton equals the reference: {triton_agrees(device)}"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {agrees}")
    matrix = hadamard_matrix(16, device=device)
    for rows, cols in ((4096, 4096), (16384, 4096), (16384, 2048)):
        x = torch.randn(rows, cols, device=device).bfloat16()
        copy, ours = best_ms(lambda x=x: x.clone()), best_ms(lambda x=x: quantise_both(x, matrix))  # type: ignore[misc]
        share = f"{2 * copy / ours:.0%} of the floor"
        print(f"{rows} x {cols}: copy {copy:.3f} ms, fused {ours:.3f} ms, {share}")


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
    from hydra import compose, initialize_config_dir

    from kernels.philox import NoiseKey
    from runner.commands.composer import to_plain
    from runner.commands.hydra_plugin import register
    from runner.records.config import validate
    from tests.conftest import ROOT

    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        keys = [f"model={model_name}", f"precision={recipe}", "data=stdlib"]
        run = validate(to_plain(compose("config", keys)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = run.model.build(8192, 0).to(device)
    precision = run.precision.build(device)
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
    parser.add_argument("--fused", action="store_true", help="the fused kernel on a GPU")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    if given.fused:
        fused()
    elif given.step:
        steps(given.step, given.recipes, given.batch, given.seq, profile=given.profile)
    else:
        quantising()
