"""Claims that hold for every model, a function each; each architecture's test file calls them."""

import json
import math
import os
import subprocess
import sys
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kernels.compilation import eager, use_compiler
from kernels.philox import NoiseKey
from models.config import plain
from models.language_model import LanguageModel, ModelConfig, TokenLoss
from models.precision_config import PrecisionConfig
from models.pretrained import load_pretrained, save_pretrained
from runner.records.config import typed
from tests.conftest import ROOT

VOCAB = 50


def perturbed(cfg: ModelConfig, seed: int = 0) -> LanguageModel:
    """Return a model whose weights are far from the small ones of an initialisation."""
    model = cfg.build(VOCAB, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(len(name) * 7919 + parameter.numel())
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def text(*shape: int, seed: int = 1) -> Tensor:
    """Return random tokens."""
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def satisfies_all_claims(
    cfg: ModelConfig,
    folder: Any,
    *,
    bound: float = 1e-5,
    causal: float = 1e-6,
    flops: bool = True,
    in_halves: ModelConfig | None = None,
) -> None:
    """Assert all claims but compilation and low precision, which take longer.

    Args:
        bound: of differences that come from another order of sums.
        causal: of what a later token may change, likewise.
        flops: check the FLOPs too; False where the model computes more than its formula counts.
        in_halves: config for the claim on micro-batches (None: `cfg`), where the loss of `cfg` is
            not a sum over samples.
    """
    has_the_parameters_of_its_formula(cfg)
    if flops:
        has_the_flops_of_its_formula(cfg, 24)
    is_causal(cfg, bound=causal)
    starts_at_ln_vocab(cfg)
    reads_piece_by_piece_what_it_reads_at_once(cfg, bound)
    keeps_documents_apart(cfg)
    trains_alike_recomputed_and_in_halves(in_halves or cfg, bound)
    comes_back_from_a_folder(cfg, folder)


def has_the_parameters_of_its_formula(cfg: ModelConfig) -> None:
    built = cfg.build(97, 0)
    assert cfg.num_parameters(97) == sum(p.numel() for p in built.parameters())
    assert cfg.num_active_parameters(97) <= cfg.num_parameters(97)  # type: ignore[attr-defined]


def has_the_flops_of_its_formula(cfg: ModelConfig, seq: int) -> None:
    """torch's counter counts fused attention on a CPU as 0: then all pairs are left out."""
    model = cfg.build(97, 0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(text(1, seq))
    full, causal = cfg.forward_flops_per_sequence(97, seq)
    assert counter.get_total_flops() in (full, full - 2 * (full - causal)), (full, causal)


def is_causal(cfg: ModelConfig, seq: int = 24, changed: int = 13, bound: float = 1e-6) -> None:
    model = perturbed(cfg)
    tokens = text(2, seq)
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(tokens), model(other)
    torch.testing.assert_close(before[:, :changed], after[:, :changed], rtol=0, atol=bound)
    assert (before[:, changed] - after[:, changed]).abs().max() > 1e-4
    assert (before[:, changed + 1 :] - after[:, changed + 1 :]).abs().max() > 1e-6


def starts_at_ln_vocab(cfg: ModelConfig, bound: float = 0.05) -> None:
    model = cfg.build(97, 0)
    tokens = torch.randint(0, 97, (8, 33), generator=torch.Generator().manual_seed(2))
    out = model(tokens[:, :-1], tokens[:, 1:])
    assert isinstance(out, TokenLoss)
    assert abs(float(out.nll.mean()) - math.log(97)) < bound


@torch.no_grad()
def reads_piece_by_piece_what_it_reads_at_once(cfg: ModelConfig, bound: float = 1e-5) -> None:
    """Token by token, in pieces, in padded batches, in selected rows, in a static state.

    `bound` is relative to the largest logit.
    """
    model = perturbed(cfg)
    row = text(1, 23)
    at_once = model(row)[0]
    size = float(at_once.abs().max())

    def assert_close(logits: Tensor, expected: Tensor) -> None:
        difference = float((logits - expected).abs().max())
        assert difference < bound * max(1.0, size), difference

    for pieces in ([1] * 23, [10, 1, 1, 11], [23]):
        state, first = model.start(1, 4), 0
        for length in pieces:
            logits = model(row[:, first : first + length], state=state)
            first += length
            assert_close(logits[0], at_once[first - 1])
    rows = [text(n, seed=n) for n in (3, 17, 9)]
    counts = torch.tensor([3, 17, 9])
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=7)
    more = text(3, 4, seed=5)
    for static in (False, True):
        state = model.start(3, 32, static=static)
        steps = [model(padded, state=state, counts=counts)]
        steps += [model(more[:, i : i + 1], state=state) for i in range(3)]
        for index, start in enumerate(rows):
            alone = model(torch.cat((start, more[index]))[None])[0]
            for i, step in enumerate(steps):
                assert_close(step[index], alone[len(start) - 1 + i])
    chosen = state.select(torch.tensor([2, 2, 0]))
    logits = model(more[:, 3:], state=chosen)
    for row_logits, index in zip(logits[1:], (2, 0), strict=True):
        text_of = torch.cat((rows[index], more[index, :3], more[1 if index == 2 else 2, 3:]))
        assert_close(row_logits, model(text_of[None])[0, -1])
    assert chosen.num_bytes() > 0


def keeps_documents_apart(cfg: ModelConfig) -> None:
    """What stands before a document changes nothing in its logits."""
    model = perturbed(cfg)
    tokens, documents = text(1, 24), torch.tensor([[0] * 7 + [1] * 12 + [2] * 5])
    other = tokens.clone()
    other[:, :7] = (other[:, :7] + 3) % VOCAB
    with torch.no_grad():
        one, two = model(tokens, documents=documents), model(other, documents=documents)
    assert (one[:, 7:] - two[:, 7:]).abs().max() < 1e-5
    assert (one[:, :7] - two[:, :7]).abs().max() > 1e-4


def trains_alike_recomputed_and_in_halves(cfg: ModelConfig, bound: float = 1e-5) -> None:
    """Activation checkpointing and two micro-batches give the gradients of the plain pass."""
    from runner.learn.setup import recompute_blocks

    tokens = text(4, 25)
    grads: list[dict[str, Tensor]] = []
    for way in ("plain", "recomputed", "halves"):
        model = perturbed(cfg)
        if way == "recomputed":
            recompute_blocks(model, PrecisionConfig().build(torch.device("cpu")))
        for part in tokens.split(2) if way == "halves" else (tokens,):
            out = model(part[:, :-1], part[:, 1:])
            (out.total / 96).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for other in grads[1:]:
        assert other.keys() == grads[0].keys()
        for name, grad in grads[0].items():
            assert float((other[name] - grad).norm()) <= bound * max(1e-3, float(grad.norm())), name


def trains_under(cfg: ModelConfig, recipe: str) -> None:
    """Twenty steps of AdamW under a recipe of conf/precision lower the loss on one batch."""
    node = yaml.safe_load((ROOT / "conf" / "precision" / f"{recipe}.yaml").read_text())
    del node["_target_"]
    given = {"pad": True, "keep_last": 0} if recipe != "bf16" else {}
    bound = typed("precision", PrecisionConfig, node | given).build(torch.device("cpu"))
    model = cfg.build(VOCAB, 0)
    with mock.patch.dict(os.environ):  # the kernels of nvfp4 are compiled for other tests too
        os.environ.pop("ESPALIER_EAGER_KERNELS", None)
        bound.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens, losses = text(4, 33), []
    for step in range(20):
        bound.begin(step, 20)
        noise = NoiseKey(seed=0, step=step, samples=torch.arange(4))
        with bound.autocast(noise):
            out = model(tokens[:, :-1], tokens[:, 1:], noise=noise)
        (out.total / 128).backward()
        losses.append(float(out.nll.mean()))
        optimizer.step()
        optimizer.zero_grad()
    use_compiler(eager)
    assert losses[-1] < losses[0] - 0.3, losses


_COMPILED = """
import json, sys
import torch
from models.config import target_class, thaw
torch.set_num_threads(1)
for node in json.loads(sys.stdin.read()):
    cls = target_class(node.pop("_target_"))
    model = thaw(cls, node).build(50, 0)
    tokens = torch.randint(0, 50, (2, 18), generator=torch.Generator().manual_seed(0))
    totals = []
    for forward in (model, torch.compile(model, backend=sys.argv[1])):
        total = forward(tokens[:, :-1], tokens[:, 1:]).total
        total.backward()
        norms = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
        totals.append(torch.tensor([float(total), *norms]))
        model.zero_grad()
    torch.testing.assert_close(*totals, rtol=1e-3, atol=1e-4)
"""


def compiles(*cfgs: ModelConfig, backend: str = "aot_eager") -> None:
    """Loss and gradients of the compiled model equal the eager ones.

    They are computed in a process without the tests' type checks.
    """
    nodes = json.dumps([plain(cfg, target=True) for cfg in cfgs])
    done = subprocess.run(
        [sys.executable, "-c", _COMPILED, backend],
        input=nodes,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def comes_back_from_a_folder(cfg: ModelConfig, folder: Any) -> None:
    model = perturbed(cfg)
    save_pretrained(model, folder, layout="espalier")
    back = load_pretrained(folder)
    assert back.cfg == model.cfg
    with torch.no_grad():
        assert torch.equal(model(text(2, 9)), back(text(2, 9)))
