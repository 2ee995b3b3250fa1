"""Compiled decoding: one graph for all lengths and capacities, the same text.

It runs in another process, without the tests' type checks.
"""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

SCRIPT = """
import torch
from torch._dynamo.utils import counters
from models.attention_config import AttentionConfig
from models.contract import start
from models.decoder_config import DecoderConfig
from models.linear_attention_config import LinearAttentionConfig
from runner.generate.generate import generate
from runner.generate.sampling import Sampling

model = DecoderConfig(depth=2, width=32, num_heads=4, num_kv_heads=2).build(50, 3)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(4.0)
prompts = [torch.arange(3, 3 + n) for n in (1, 9, 40)]
settings = ((150, 0.0), (3, 0.0), (30, 0.7))
wishes = [Sampling(max_new_tokens=n, temperature=t, seed=n) for n, t in settings]
# The state grows from 64 to 128 to 140 tokens; the first row passes that and goes on in less.
about = {"context": 140, "decode": str, "ends": ()}
plain = generate(model, prompts, wishes, **about)
compiled = generate(model, prompts, wishes, compiled=True, **about)
assert [one.ids for one in plain] == [one.ids for one in compiled]
assert [len(one.ids) for one in compiled] == [150, 3, 30]
assert counters["stats"]["unique_graphs"] == 1, counters["stats"]
assert not counters["graph_break"], counters["graph_break"]

model.for_inference(compiled=True)  # a single row has a product of its own
alone = generate(model, prompts[:1], wishes[:1], compiled=True, **about)
assert alone[0].ids == plain[0].ids
assert counters["stats"]["unique_graphs"] == 2, counters["stats"]
packed = generate(model, prompts, wishes, compiled=True, **about)
assert [one.ids for one in packed] == [one.ids for one in plain]
assert counters["stats"]["unique_graphs"] == 3, counters["stats"]
assert not counters["graph_break"], counters["graph_break"]

# Rows join and rest; the shapes stay.
parts = {"x": LinearAttentionConfig(kind="gated_delta"), "w": AttentionConfig(window=5, sinks=1)}
hybrid = DecoderConfig(
    depth=2, width=32, num_heads=4, pattern="axf wf", parts=parts, context_length=32
).build(50, 0)
step = torch.compile(hybrid, dynamic=False)
with torch.no_grad():
    state = start(hybrid, 3, 32, static=True)
    for row, length in enumerate((4, 29, 1, 7, 2)):
        alone = start(hybrid, 1, 1)
        hybrid(torch.arange(length)[None], state=alone)
        state.put(torch.tensor([row % 3]), alone)
        step(torch.ones(3, 1, dtype=torch.int64), state=state, counts=(state.lengths > 0).long())
assert counters["stats"]["unique_graphs"] == 4, counters["stats"]
assert not counters["graph_break"], counters["graph_break"]
"""


STORED = """
import torch
from torch._dynamo.utils import counters
from models.decoder_config import DecoderConfig
from runner.generate.generate import generate
from runner.generate.sampling import Sampling

model = DecoderConfig(depth=1, width=32, num_heads=2).build(50, 3)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(4.0)
prompts = [torch.arange(3, 3 + n) for n in (5, 40)]
greedy = Sampling(max_new_tokens=80, temperature=0.0)
about = {"context": 200, "decode": str, "ends": ()}
# One group of 32 rounded tokens, of int4 with room for 64, is a graph of its own.
for model.stored, number in (("nvfp4", 1), ("int4", 3)):
    plain, compiled = (
        generate(model, prompts, greedy, compiled=compiled, **about) for compiled in (False, True)
    )
    assert [one.ids for one in plain] == [one.ids for one in compiled], model.stored
    assert counters["stats"]["unique_graphs"] == number, counters["stats"]
assert not counters["graph_break"], counters["graph_break"]
"""


BESIDE = """
import torch
from torch._dynamo.utils import counters
from models.decoder_config import DecoderConfig
from models.prefix_cache import PrefixCache
from runner.generate.generate import generate, make_engine
from runner.generate.request import Request
from runner.generate.sampling import Sampling

model = DecoderConfig(depth=1, width=32, num_heads=4, num_kv_heads=2).build(50, 3)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(4.0)
model.for_inference(compiled=True)
shared = [*range(9)]
prompts = [shared, shared + [7] * 22, [5, 4] * 40, [*range(20)], [1]]
prompts = [torch.tensor(ids) for ids in prompts]
how = Sampling(max_new_tokens=30, temperature=0.0)
about = {"context": 140, "decode": str, "ends": ()}
plain = [one.ids for one in generate(model, prompts, how, **about)]

engine = make_engine(
    model, rows=3, compiled=True, chunk=5, prefixes=PrefixCache(block=4, max_bytes=2**20), **about
)
engine.whole = 11
ids, cached, read_beside = {}, {}, 0
together = engine.strategy.advance_and_read
def counted(*given):
    global read_beside
    read_beside += 1
    return together(*given)
engine.strategy.advance_and_read = counted
for number, prompt in enumerate(prompts):
    engine.submit(Request(id=str(number), prompt=prompt.tolist(), how=how))
while not engine.is_idle:
    for event in engine.step():
        ids.setdefault(event.id, []).extend(event.ids)
        cached[event.id] = max(cached.get(event.id, 0), event.num_cached or 0)
assert [ids[str(number)] for number in range(len(prompts))] == plain
assert read_beside > 20, read_beside
assert cached["3"] == 8, cached  # what another text had read goes on in a state of fixed shape
# One graph of a step, one of a step that reads too, for all pieces and capacities.
assert counters["stats"]["unique_graphs"] == 2, counters["stats"]
assert not counters["graph_break"], counters["graph_break"]
"""


TWO_MODELS = """
import torch
from models.decoder_config import DecoderConfig
from runner.generate.generate import generate
from runner.generate.sampling import Sampling

small, large = (DecoderConfig(depth=n, width=32, num_heads=2).build(50, n) for n in (1, 2))
with torch.no_grad():
    for parameter in (*small.parameters(), *large.parameters()):
        parameter.mul_(4.0)
prompts = [torch.arange(3, 3 + n) for n in (5, 40)]
about = {"context": 200, "decode": str, "ends": ()}
greedy = Sampling(max_new_tokens=20, temperature=0.0)

def texts(model, compiled):
    return [one.ids for one in generate(model, prompts, greedy, compiled=compiled, **about)]

told = []
for model in (small, large, small):
    told.append(texts(model, True))
    assert told[-1] == texts(model, False)
assert told[0] == told[2] != told[1]
with torch.no_grad():  # a graph has no values of weights
    small.embedding.weight.copy_(small.embedding.weight.flip(0))
assert texts(small, True) == texts(small, False) != told[0]
small.double()  # what is no value is looked at by the next batch
assert texts(small, True) == texts(small, False)
"""


@pytest.mark.slow
def test_each_model_has_compiled_steps_of_its_own() -> None:
    _run(TWO_MODELS)


@pytest.mark.slow
def test_a_compiled_step_is_one_graph_and_says_the_same() -> None:
    _run(SCRIPT)


@pytest.mark.slow
def test_a_compiled_step_reads_keys_and_values_of_few_bits() -> None:
    _run(STORED)


@pytest.mark.slow
def test_a_compiled_step_that_reads_of_a_prompt_too_is_one_graph_and_says_the_same() -> None:
    _run(BESIDE)


def _run(script: str) -> None:
    line = [sys.executable, "-c", script]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
