"""OsciReset: which weights it sets, when, and that a resume inside a window changes no bit."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from kernels.compilation import eager, use_compiler
from models.decoder_config import DecoderConfig
from models.operand_config import OperandConfig
from models.osci_reset_config import OsciResetConfig
from models.precision import Precision
from models.precision_config import FpropConfig, PrecisionConfig
from models.quantised_layer import QuantisedLinear
from runner.learn.memory import predicted_bytes
from runner.machine.ranks import gather_full
from runner.records.config import validate
from tests.plain_nodes import shipped

MODEL = DecoderConfig(depth=1, width=128, num_heads=4, hidden=136)  # mlp.down is padded to 256
STEPS, WINDOW = 60, 10
OSCI_RESET = OsciResetConfig(start_at=0.5, every=20, window=WINDOW, threshold=8.0)  # at 30, at 50


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The eager references: compiling takes longer than these steps."""
    monkeypatch.setenv("ESPALIER_EAGER_KERNELS", "1")
    yield
    use_compiler(eager)


def _prepared(**options: Any) -> tuple[Precision, dict[str, Tensor]]:
    """Return tetrajet_v2 with `OSCI_RESET`, and the weights of the linear layers by their names."""
    cfg = replace(shipped("precision", "tetrajet_v2"), osci_reset=OSCI_RESET, **options)
    model = MODEL.build(256, 0)
    precision = cfg.build(torch.device("cpu"))
    precision.prepare(model)
    return precision, {linear.name: linear.weight for linear in precision._linears}


def _update(precision: Precision, weights: dict[str, Tensor], step: int) -> None:
    """Take a step that moves each weight by an amount of (step, layer)."""
    precision.begin(step, STEPS)
    with torch.no_grad():
        for number, weight in enumerate(weights.values()):
            generator = torch.Generator().manual_seed(100 * step + number)
            moved = 2e-3 * torch.randn(weight.shape, generator=generator)
            weight += _sharded_as(weight, moved)
    precision.after_update()


def _sharded_as(weight: Tensor, whole: Tensor) -> Tensor:
    if isinstance(weight, DTensor):
        return distribute_tensor(whole, weight.device_mesh, weight.placements)
    return whole


def _fp64(weight: Tensor) -> Tensor:
    """Return Q(w) by definition: E2M1 to nearest, E4M3 for each 16, amax / 2688 for each 128."""
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    groups = weight.double().view(len(weight), -1, 8, 16)
    outer = groups.abs().amax((2, 3), keepdim=True) / 2688
    inner = (groups.abs().amax(3, keepdim=True) / outer / 6).to(torch.float8_e4m3fn).double()
    scale = outer * torch.where(inner == 0, 2.0**-9, inner)
    nearest = ((groups / scale).abs()[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * groups.sign() * scale).view(weight.shape)


def test_a_weight_that_oscillates_is_set_to_what_it_is_quantised_to_and_a_drifting_one_is_not() -> (
    None
):
    """Published: about the edge of a bin +-1e-4 has the ratio bin width * scale / 2e-4."""
    precision, weights = _prepared()
    weight = weights["layers.0.attn.qkv"]
    with torch.no_grad():
        weight.zero_()
        weight[:, 0] = 6.0  # blocks of scale 1: bins of 0.5 below 2
    moved, moved_quantised = (torch.zeros(weight.shape, dtype=torch.float64) for _ in range(2))
    for step in range(30, 30 + WINDOW):
        precision.begin(step, STEPS)
        before = weight.detach().clone()
        with torch.no_grad():
            weight[:, 1] = 0.25 + (1e-4 if step % 2 else -1e-4)  # oscillates
            weight[:, 2] += 0.06  # drifts over an edge
            weight[:, 3] = 1.0 + (1e-4 if step % 2 else -1e-4)  # far from an edge
        after = weight.detach().clone()
        precision.after_update()
        moved += (after.double() - before.double()).abs()
        moved_quantised += (_fp64(after) - _fp64(before)).abs()
    oscillates = moved_quantised / moved >= 8
    assert oscillates[:, 1].all()
    assert oscillates.sum() == len(weight)
    wanted = torch.where(oscillates, _fp64(after), after.double())
    torch.testing.assert_close(weight.detach().double(), wanted, rtol=2.0**-22, atol=0.0)
    assert set(weight[:, 1].tolist()) == {0.5}


def test_a_resume_inside_a_window_has_the_same_bits() -> None:
    precision, weights = _prepared()
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    saved: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    for step in range(STEPS):
        state = {name: tensor.clone() for name, tensor in precision.state().items()}
        assert bool(state) == (step in (*range(31, 40), *range(51, 60))), step
        saved[step] = state, {name: weight.detach().clone() for name, weight in weights.items()}
        _update(precision, weights, step)
    drawn = sum(
        2e-3 * torch.randn(128, 136, generator=torch.Generator().manual_seed(100 * step + 3))
        for step in range(STEPS)
    )
    without = start["layers.0.mlp.down"] + drawn
    assert not torch.allclose(weights["layers.0.mlp.down"], without, atol=1e-5)  # some were set
    for first in (30, 33, 39, 40, 55):
        again, own = _prepared()
        state, values = saved[first]
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(values[name])
        again.load(state)
        for step in range(first, STEPS):
            _update(again, own, step)
        assert all(torch.equal(own[name], weights[name]) for name in own), first


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A group of this process alone."""
    where = f"file://{tmp_path / 'group'}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_weights_are_watched_saved_and_set_as_whole_ones_are(mesh: DeviceMesh) -> None:
    ends = []
    for sharded in (False, True):
        state: dict[str, Tensor] = {}
        precision, weights = _prepared()
        for step in range(30, 40):
            if step == 35:  # resumed
                values, (precision, weights) = weights, _prepared()
                with torch.no_grad():
                    for name, weight in weights.items():
                        weight.copy_(gather_full(values[name].detach()))
            for linear in precision._linears if sharded and step in (30, 35) else ():
                linear.weight = nn.Parameter(distribute_tensor(linear.weight, mesh, [Shard(0)]))
            if step == 35:
                precision.load(state)
            weights = {linear.name: linear.weight for linear in precision._linears}
            _update(precision, weights, step)
            state = {
                name: gather_full(tensor).clone() for name, tensor in precision.state().items()
            }
        ends.append([gather_full(weight.detach()) for weight in weights.values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_forward_pass_that_is_no_longer_quantised_ends_its_window() -> None:
    precision, weights = _prepared(switch_at=35.0, switch="forward")
    for step in range(30, 36):
        assert bool(precision.state()) == (30 < step <= 35)
        _update(precision, weights, step)
    assert precision.state() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"osci_reset": OsciResetConfig(start_at=60.0)}, "start_at=60 is never reached in the 60"),
        ({"fprop": FpropConfig()}, "osci_reset needs a format of fprop.w"),
        (
            {"fprop": FpropConfig(w=OperandConfig(format="nvfp4"), hadamard=16)},
            "with neither hadamard, .*; fprop.w is nvfp4 1x16 te214 RNE, hadamard=16",
        ),
    ],
)
def test_a_recipe_in_which_it_would_not_count_is_refused(
    options: dict[str, Any], message: str
) -> None:
    cfg = PrecisionConfig(compute="bf16", **({"osci_reset": OSCI_RESET} | options))
    with pytest.raises(ValueError, match=message):
        cfg.check(STEPS)
    with pytest.raises(ValueError, match=r"window=50 must be 1 to every=20"):
        OsciResetConfig(every=20)


def test_native_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="backend=native: osci_reset compares weights"):
        _prepared(backend="native")


def test_the_plan_counts_the_sums_of_a_window(compose: Callable[..., dict[str, Any]]) -> None:
    """Two sums and a copy of each quantised weight, of four bytes each."""
    given = "precision.osci_reset={start_at: 0.5, every: 200, window: 50, threshold: 16}"
    run = validate(compose("model=gpt_pico", "precision=nvfp4", "train.micro_batch=1", given))
    without = replace(run, precision=replace(run.precision, osci_reset=None))
    more = predicted_bytes(run, 256, gpu=True) - predicted_bytes(without, 256, gpu=True)
    model = run.model.build(256, 0)
    run.precision.build(torch.device("cpu")).prepare(model)
    weights = [m.weight for m in model.modules() if isinstance(m, QuantisedLinear)]
    assert more == pytest.approx(3 * 4 * sum(weight.numel() for weight in weights), rel=0.05)
