"""The decoder: its formulas, its causality, its initialisation; equal to transformers' GPT-2."""

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.philox import NoiseKey
from models.decoder_config import DecoderConfig
from models.language_model import TokenLoss

BASE: dict[str, Any] = {"depth": 2, "width": 32, "num_heads": 4}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 2, "qk_norm": True},
    {"norm": "layernorm", "positions": "learned", "activation": "gelu", "bias": True},
    {"activation": "relu2", "tied": False, "softcap": 15.0},
    {"head_dim": 16, "hidden": 40, "init": "mup", "base_width": 16},
]


@pytest.mark.parametrize("extra", VARIANTS, ids=str)
def test_parameter_formula_equals_numel(extra: dict[str, Any]) -> None:
    cfg = DecoderConfig(**BASE | extra)
    assert cfg.num_parameters(97) == sum(p.numel() for p in cfg.build(97, 0).parameters())


@pytest.mark.parametrize("extra", VARIANTS, ids=str)
def test_flops_equal_torchs_counter_on_meta(extra: dict[str, Any]) -> None:
    cfg = DecoderConfig(**BASE | extra)
    with torch.device("meta"):
        model = cfg.build(97, 0)
        tokens = torch.zeros(1, 24, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    counted = counter.get_total_flops()
    full, _ = cfg.forward_flops_per_sequence(97, 24)
    # SDPA may be decomposed on meta (counted) or not (0): then the scores are left out.
    scores = cfg.depth * 4 * 24 * 24 * cfg.num_heads * cfg.attention_dim
    assert counted in (full, full - scores)


@pytest.mark.parametrize("extra", VARIANTS, ids=str)
def test_a_future_token_changes_nothing_before_it(extra: dict[str, Any]) -> None:
    model = DecoderConfig(**BASE | extra).build(97, 0)
    tokens = torch.randint(0, 97, (2, 16))
    other = tokens.clone()
    other[:, 10] = (other[:, 10] + 1) % 97
    before, after = model(tokens), model(other)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10:], after[:, 10:])


@pytest.mark.parametrize("extra", VARIANTS, ids=str)
def test_loss_at_initialisation_is_ln_vocab(extra: dict[str, Any]) -> None:
    """Logits of std ~0.02 * sqrt(width) = 0.11 shift the mean loss by under 0.05 nats."""
    torch.manual_seed(0)
    model = DecoderConfig(**BASE | extra).build(97, 0)
    out = model(torch.randint(0, 97, (8, 32)), torch.randint(0, 97, (8, 32)))
    assert isinstance(out, TokenLoss)
    assert abs(out.nll.mean().item() - math.log(97)) < 0.05


def test_documents_do_not_see_each_other() -> None:
    model = DecoderConfig(**BASE).build(97, 0)
    tokens = torch.randint(0, 97, (1, 12))
    documents = torch.tensor([[0] * 5 + [1] * 7])
    other = tokens.clone()
    other[:, 2] += 1 if tokens[0, 2] < 96 else -1
    a, b = model(tokens, documents=documents), model(other, documents=documents)
    assert torch.equal(a[:, 5:], b[:, 5:])


def test_dropout_does_not_depend_on_the_micro_batch() -> None:
    model = DecoderConfig(**BASE, dropout=0.2).build(97, 0)
    tokens = torch.randint(0, 97, (4, 8))

    def nll(rows: slice) -> torch.Tensor:
        key = NoiseKey(seed=0, step=3, samples=torch.arange(4)[rows])
        return model(tokens[rows], tokens[rows], noise=key).nll

    torch.testing.assert_close(torch.cat((nll(slice(0, 2)), nll(slice(2, 4)))), nll(slice(0, 4)))


def test_neftune_adds_bounded_uniform_noise_in_training_only() -> None:
    model = DecoderConfig(**BASE, neftune=5.0).build(97, 0)
    tokens, seen = torch.randint(0, 97, (2, 8)), []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(tokens)
    model(tokens, noise=NoiseKey(seed=0, step=3, samples=torch.arange(2)))
    quiet, noisy = seen
    assert torch.equal(quiet, model.embedding(tokens))
    noise, bound = noisy - quiet, 5.0 / math.sqrt(8 * 32)  # alpha / sqrt(seq x width)
    assert noise.abs().max() <= bound * (1 + 1e-5)
    assert noise.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_equals_transformers_gpt2() -> None:
    """Same weights in GPT2LMHeadModel give the same logits, fp32, 1e-5."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = DecoderConfig(
        **BASE,
        norm="layernorm",
        positions="learned",
        activation="gelu",
        bias=True,
        context_length=16,
    ).build(50, 3)
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    ).eval()
    names = {
        "attn_norm": "ln_1",
        "mlp_norm": "ln_2",
        "attn.qkv": "attn.c_attn",
        "attn.out": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    state = theirs.state_dict()
    with torch.no_grad():
        for name, value in ours.named_parameters():
            mapped = name.replace("layers.", "transformer.h.")
            for mine, hf in names.items():
                mapped = mapped.replace(f".{mine}.", f".{hf}.")
            mapped = {
                "embedding.weight": "transformer.wte.weight",
                "positions.weight": "transformer.wpe.weight",
                "norm.weight": "transformer.ln_f.weight",
                "norm.bias": "transformer.ln_f.bias",
            }.get(mapped, mapped)
            matrix = value.ndim == 2 and ".h." in mapped
            state[mapped].copy_(value.T if matrix else value)
    tokens = torch.randint(0, 50, (2, 16))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "bad", [{"num_heads": 5}, {"num_kv_heads": 3}, {"dropout": 1.0}, {"init": "mup"}]
)
def test_impossible_shapes_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        DecoderConfig(**BASE | bad)


def _logit_change(width: int, init: str) -> float:
    """Return the mean change of a logit after 3 Adam steps: muP's coordinate check."""
    mup = {"init": "mup", "base_width": 32} if init == "mup" else {}
    cfg = DecoderConfig(depth=2, width=width, num_heads=4, **mup)
    model = cfg.build(64, 0)
    scales = model.learning_rate_scales()
    groups = [{"params": [p], "lr": 1e-2 * scales.get(n, 1.0)} for n, p in model.named_parameters()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    tokens = torch.randint(0, 64, (4, 33), generator=torch.Generator().manual_seed(0))
    before = model(tokens[:, :-1]).detach()
    for _ in range(3):
        model(tokens[:, :-1], tokens[:, 1:]).total.div(128).backward()
        optimizer.step()
        optimizer.zero_grad()
    return float((model(tokens[:, :-1]).detach() - before).abs().mean())


def test_mup_keeps_the_change_of_logits_flat_in_width() -> None:
    widths = (32, 64, 128, 256)
    mup = [_logit_change(w, "mup") for w in widths]
    standard = [_logit_change(w, "gpt2") for w in widths]
    assert max(mup) / min(mup) < 1.6
    assert standard[-1] / standard[0] > 2.0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("init", ["gpt2", "depth_scaled", "mup"])
def test_initial_weights_depend_on_nothing_but_the_seed(bias: bool, init: str) -> None:
    options = {
        "depth": 2,
        "width": 32,
        "num_heads": 2,
        "norm": "layernorm",
        "positions": "learned",
        "tied": False,
        "qk_norm": True,
        "bias": bias,
    }
    cfg = DecoderConfig(**options, init=init, base_width=16 if init == "mup" else None)  # type: ignore[arg-type]
    weights = []
    for state in (1, 2):
        torch.manual_seed(state)
        weights.append(cfg.build(50, seed=0).state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
        assert not name.endswith("bias") or not value.any()
