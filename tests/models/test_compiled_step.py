"""A training step under torch.compile: one graph, on a CPU and with the kernels of a GPU.

In processes of their own: Dynamo does not trace the type checks of these tests.
"""

import os
import subprocess
import sys

import pytest

# A step of a block, or of it the first and last linear only: what a recipe adds to a graph lies in
# those, and all of them are alike. A second graph is for steps whose number is no constant.
CODE = """
import sys
import torch
from torch._dynamo.utils import counters
from kernels import emulate, hadamard, operand_pairs, philox, scaled_mm
from kernels.philox import NoiseKey
from models import precision as recipes
from models.decoder_config import DecoderConfig
from models.quantised_layer import QuantisedLinear
from tests.plain_nodes import shipped

interpreted, names = sys.argv[1] == "interpreted", sys.argv[2:]
WHOLE = ("fp32", "bf16", "nvfp4_all_layers")
recipes.compile_kernels = lambda: None
if interpreted:
    MODULES = (emulate, hadamard, operand_pairs, philox)
    for module in MODULES:
        module.triton_agrees = lambda device, compare: True
    scaled_mm._applies_factor = lambda a, factor: False
graphs = []

def backend(graph, example):
    graphs.append(graph)
    return graph

def losses(name, compiled, kept=False):
    torch.compiler.reset()
    width = 32 if interpreted else 64
    model = DecoderConfig(depth=1, width=width, num_heads=2, dropout=0.1).build(50, 0)
    recipe = shipped("precision", name).build(torch.device("cpu"))
    recipe.prepare(model)
    forward = model
    if compiled and name in WHOLE:
        forward = torch.compile(model, backend=backend)
    elif compiled:
        parts = [m for m in model.modules() if isinstance(m, QuantisedLinear)]
        for part in (parts[0], parts[-1]):
            part.forward = torch.compile(part.forward, backend=backend)
    tokens = torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(0))
    for step in range(2 if interpreted else 1):
        recipe.begin(step, 3)
        noise = NoiseKey(seed=0, step=step, samples=torch.arange(2))
        with recipe.same_weights(kept):
            with recipe.autocast(noise):
                out = forward(tokens[:, :-1], tokens[:, 1:], noise=noise)
            (out.total / 32).backward()
    return [out.total.detach()] + [p.grad for p in model.parameters()]

for name in names:
    graphs.clear()
    compiled = losses(name, True)
    assert not counters["graph_break"], (name, dict(counters["graph_break"]))
    most = 1 if name in WHOLE and not interpreted else 2
    assert 1 <= len(graphs) <= most, (name, len(graphs))
    if name == "nvfp4_all_layers" and not interpreted:  # operands of weights enter the graph
        again = losses(name, True, kept=True)
        assert all(torch.equal(a, b) for a, b in zip(again, compiled, strict=True))
        assert not counters["graph_break"] and len(graphs) == 2
    if interpreted:
        by_triton = losses(name, False)
        for module in MODULES:
            module.triton_agrees = lambda device, compare: False
        reference = losses(name, False)
        assert all(torch.equal(a, b) for a, b in zip(by_triton, reference, strict=True)), name
"""


def _run(*arguments: str, interpreted: bool = False) -> None:
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if interpreted else {})
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_no_shipped_recipe_breaks_the_graph() -> None:
    from tests.plain_nodes import PRECISIONS

    _run("cpu", *PRECISIONS)


@pytest.mark.slow
def test_the_kernels_of_a_gpu_give_the_step_of_a_cpu_and_break_no_graph() -> None:
    """All of a step but its products: Triton's interpreter runs the kernels."""
    pytest.importorskip("triton", reason="needs triton")
    _run("interpreted", "nvfp4_all_layers", interpreted=True)
