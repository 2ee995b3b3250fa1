"""Whole runs on a GPU: resume, sharding, generation, experts. No Hydra, no MLflow."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from kernels.grouped import can_group, grouped_feed_forward
from kernels.newton_schulz import orthogonalize
from kernels.philox import NoiseKey
from models.decoder_config import DecoderConfig
from models.language_model import TokenLoss
from models.linear_attention_config import LinearAttentionConfig
from runner.generate.autoregressive import Autoregressive
from runner.generate.engine import Engine
from runner.generate.generate import completions, generate
from runner.generate.request import Request
from runner.generate.sampling import Sampling
from runner.generate.text_row import TextRow
from runner.generate.tools import Call, Tools
from runner.machine.ranks import Ranks
from runner.records import checkpoint_folder
from runner.records.cells import Cell
from runner.records.journal import Journal, claim
from tests.gpu.device import CPU, DEVICE, HAS_GPU, needs_gpu
from tests.plain_nodes import CONF, shipped, tiny_cell

pytestmark = needs_gpu
TINY = DecoderConfig(depth=2, width=64, num_heads=4, num_kv_heads=2, hidden=128)
TWELVE = {
    "steps": 12,
    "sequence_length": 32,
    "batch_size": 4,
    "micro_batch": 2,
    "log_every": 1,
    "threads": 1,
    "deterministic": True,
}
# The engram's table is made from the texts of a vocabulary, which this test has not.
PARTS = sorted(f.stem for f in (CONF / "model" / "part").glob("*.yaml") if f.stem != "engram")
PARTS = PARTS if HAS_GPU else ["experts", "gated_delta", "window_sinks"]


def _run(cell: Cell, stop: Callable[[], bool]) -> str:
    attempt = claim(cell.folder)
    assert attempt is not None
    journal = Journal(cell.folder, attempt)
    outcome = cell.config.work.run(cell, cell.inputs, journal, Ranks("auto"), stop)
    journal.event(outcome)
    return str(outcome)


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["bf16", "nvfp4"] if HAS_GPU else ["bf16"])
def test_an_interrupted_run_resumes_bit_identically(
    precision: str, text: Path, tmp_path: Path
) -> None:
    weights = []
    with _deterministic():
        for name, stopped in (("whole", False), ("broken", True)):
            cell = tiny_cell(tmp_path / name, text, TWELVE, precision)
            if stopped:
                asked = iter(range(100))
                assert _run(cell, lambda asked=asked: next(asked) >= 7) == "interrupted"  # type: ignore[misc]
            assert _run(cell, lambda: False) == "finished"
            newest = checkpoint_folder.newest(cell.folder / "checkpoints")
            assert newest is not None
            weights.append(load_file(newest / "model.safetensors"))
    whole, broken = weights
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[key], broken[key]) for key in whole)


@pytest.mark.skipif(not HAS_GPU, reason="a CPU waits for nothing")
@pytest.mark.parametrize("name", ["bf16", "nvfp4", "fp8_current", "quartet2"])
def test_a_pass_lets_the_host_run_ahead(name: str) -> None:
    """Torch raises where a call would wait for the GPU; the first pass tests the kernels."""
    model = TINY.build(100, 0).to(DEVICE)
    precision = shipped("precision", name).build(DEVICE)
    precision.prepare(model)
    tokens = torch.arange(4 * 33, device=DEVICE).view(4, 33) % 100
    samples = torch.arange(4, device=DEVICE)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            precision.begin(0, 2)
            noise = NoiseKey(seed=0, step=0, samples=samples)
            with precision.autocast(noise):
                out = model(tokens[:, :-1], tokens[:, 1:], noise=noise)
            assert isinstance(out, TokenLoss)
            out.total.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _losses(*, shard: bool) -> list[float]:
    model, ranks = TINY.build(100, 0).to(DEVICE), Ranks("auto")
    if shard:
        ranks.shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(4 * 33, device=DEVICE).view(4, 33) * 7 % 100
    losses = []
    for _ in range(3):
        out = model(tokens[:, :-1], tokens[:, 1:])
        assert isinstance(out, TokenLoss)
        (out.total / 128).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(out.total.detach()))
    return losses


def test_sharded_on_one_rank_is_unsharded(tmp_path: Path) -> None:
    backend = "nccl" if HAS_GPU else "gloo"
    method = f"file://{tmp_path / 'rendezvous'}"
    dist.init_process_group(backend, init_method=method, rank=0, world_size=1)
    try:
        assert _losses(shard=True) == pytest.approx(_losses(shard=False), rel=1e-5)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True] if HAS_GPU else [False])
def test_greedy_text_is_that_of_the_cpu(compiled: bool) -> None:
    """Prompts of several lengths in one batch; weights in fp32, far from ties."""
    model = TINY.build(50, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    prompts = [torch.arange(3, 3 + n) for n in (1, 9, 20)]
    sampling = Sampling(max_new_tokens=12, temperature=0.0)

    def ids(device: torch.device, *, compiled: bool) -> list[list[int]]:
        done = generate(
            model.to(device),
            prompts,
            sampling,
            context=48,
            decode=str,
            ends=(),
            compiled=compiled,
        )
        return [one.ids for one in done]

    assert ids(CPU, compiled=False) == ids(DEVICE, compiled=compiled)


class _EveryThree:
    """A call after every three tokens, which says two."""

    def find(self, turn: Sequence[int]) -> Call | None:
        return Call(lambda text: text, "7 8") if len(turn) == 3 else None


class _Numbers:
    def encode(self, text: str) -> np.ndarray:
        return np.array([int(word) for word in text.split()])


@pytest.mark.parametrize("kind", ["keys", "delta"])
def test_texts_that_wait_for_tools_lie_in_the_memory_of_the_host(kind: str) -> None:
    """And go on, when they are back, as on the CPU, where nothing is moved."""
    shape = TINY
    if kind == "delta":
        delta = LinearAttentionConfig(kind="gated_delta", key_dim=16, conv=3)
        shape = replace(TINY, pattern="d", parts={"d": delta})
    model = shape.build(50, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    where: set[str] = set()

    class Noted(Autoregressive):
        def leave(self, row: TextRow) -> None:
            super().leave(row)
            assert row.state is not None
            where.add(row.state.lengths.device.type)

    def ids(device: torch.device) -> list[list[int]]:
        strategy = Noted(model.to(device), context=48, decode=str)
        requests = [
            Request(
                id=str(n),
                prompt=list(range(3, 4 + n)),
                how=Sampling(max_new_tokens=14, temperature=0.0, ends=()),
                tools=Tools([_EveryThree()], _Numbers()),
            )
            for n in (1, 9, 20)
        ]
        return [one.ids for one in completions(Engine(strategy, rows=2), requests)]

    assert ids(CPU) == ids(DEVICE)
    assert where == {"cpu"}


def test_products_of_experts_are_those_of_a_loop() -> None:
    """2**-7: two roundings to bf16. An expert without a token is among them."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([5, 0, 40, 19])
    x, up, down = (
        torch.randn(*size, generator=generator).bfloat16().to(DEVICE).requires_grad_()
        for size in ((64, 64), (4, 128, 64), (4, 64, 128))
    )
    if HAS_GPU:
        assert can_group(x, 128) == (torch.cuda.get_device_capability() >= (9, 0))
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("needs torch's grouped_mm")
    grouped = grouped_feed_forward(x, up, down, counts.to(DEVICE), torch.relu)
    parts = torch.split(x, counts.tolist())
    loop = torch.cat([torch.relu(p @ u.T) @ d.T for p, u, d in zip(parts, up, down, strict=True)])
    grad = torch.randn(64, 64, generator=generator).bfloat16().to(DEVICE)
    pairs: list[tuple[Tensor, Tensor]] = [(grouped, loop)]
    pairs += zip(
        torch.autograd.grad(grouped, (x, up, down), grad),
        torch.autograd.grad(loop, (x, up, down), grad),
        strict=True,
    )
    for theirs, plain in pairs:
        error = (theirs - plain).detach().float().norm() / plain.detach().float().norm()
        assert float(error) < 2**-7


@pytest.mark.parametrize("name", PARTS)
def test_a_branch_and_its_gradients_agree_with_the_cpu(name: str) -> None:
    """fp32 without TF32, sums in another order: 1e-3 of the norm of each gradient."""
    torch.backends.cuda.matmul.allow_tf32 = False
    parts = {"x": shipped("model/part", name)}
    cfg = DecoderConfig(depth=2, width=64, num_heads=4, pattern="xf", parts=parts)
    tokens = torch.arange(2 * 65).view(2, 65) * 7 % 100
    results = []
    for device in (CPU, DEVICE):
        model = cfg.build(100, 0).to(device)
        out = model(tokens[:, :-1].to(device), tokens[:, 1:].to(device))
        assert isinstance(out, TokenLoss)
        out.total.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append([t.detach().cpu() for t in (out.total.view(1), *grads)])
    for cpu, gpu in zip(*results, strict=True):
        assert float((cpu - gpu).norm()) <= 1e-3 * float(cpu.norm()) + 1e-6


@pytest.mark.parametrize("shape", [(64, 64), (48, 112)])
def test_orthogonalised_matrices_agree_with_the_cpu(shape: tuple[int, int]) -> None:
    """Five steps in bf16, each of a few roundings: 2**-5 of the norm."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    cpu, gpu = orthogonalize(matrix).float(), orthogonalize(matrix.to(DEVICE)).float().cpu()
    assert float((cpu - gpu).norm() / cpu.norm()) < 2**-5
