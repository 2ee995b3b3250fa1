"""T5 and FLAN-T5 folders as models of `source </s> target </s>`: equal to transformers, adapted."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import T5ForConditionalGeneration

from models.adapter import adapted_layers, adapter_names, adapters_off, merge
from models.adapter_config import AdapterConfig
from models.contract import heads, token_loss
from models.encoder_decoder_config import EncoderDecoderConfig
from models.pretrained import load_pretrained, load_weights, read_config
from models.sizes import check_formulas, num_trained_parameters
from tests.folders import t5

END, IGNORE = 1, -100
SOURCES, TARGETS = [[5, 6, 7, 8], [9, 10]], [[20, 21], [30, 31, 32]]


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return (tokens, targets) of the texts, padded by the end token as problems are."""
    tokens, targets = torch.full((2, 9), END), torch.full((2, 9), IGNORE)
    for row, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        ids = torch.tensor([*source, END, *target, END])
        tokens[row, : len(ids) - 1] = ids[:-1]
        targets[row, len(source) : len(ids) - 1] = ids[len(source) + 1 :]
    return tokens, targets


@pytest.fixture(scope="module", params=[False, True], ids=["t5", "flan-t5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return t5(tmp_path_factory.mktemp("t5"), flan=request.param)


def test_logits_and_loss_are_those_of_transformers(folder: Path) -> None:
    theirs = T5ForConditionalGeneration.from_pretrained(folder).eval()
    ours = load_pretrained(folder)
    tokens, targets = _batch()
    logits, total = ours(tokens), 0.0
    for row, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        labels = torch.tensor([[*target, END]])
        out = theirs(input_ids=torch.tensor([[*source, END]]), labels=labels)
        own = logits[row, len(source) : len(source) + labels.shape[1]]
        torch.testing.assert_close(own, out.logits[0], rtol=1e-4, atol=1e-4)
        total += float(out.loss.detach()) * labels.shape[1]
    loss = token_loss(ours, tokens, targets)
    assert float(loss.total.detach()) == pytest.approx(total, rel=1e-4)
    later = tokens.clone()
    later[0, 6:] = 40
    torch.testing.assert_close(ours(later)[0, 4:6], logits[0, 4:6])
    assert not torch.equal(ours(later)[0, 6:], logits[0, 6:])
    for lost in (tokens[:, :2], torch.where(tokens == END, 50, tokens)):
        with pytest.raises(ValueError, match=r"a source does not end with the token 1.*form="):
            ours(lost)
    with pytest.raises(ValueError, match="read what the decoder should write"):
        ours(tokens, torch.where(tokens == 5, 6, targets))
    assert heads(ours) == ({"lm_head.weight"} if ours.lm_head is not None else set())


@pytest.mark.parametrize("base", ["full", "nf4"])
def test_adapters_start_from_the_same_bits_and_alone_are_trained(folder: Path, base: str) -> None:
    cfg, vocab = read_config(folder)
    adapter = AdapterConfig(rank=2, targets=("*.q", "*.v"), base=base)
    model = replace(cfg, adapter=adapter).build(vocab, 3)
    load_weights(folder, model)
    tokens, targets = _batch()
    assert len(adapted_layers(model)) == 2 * (2 + 2 * 3), "of attention, and of that to the source"
    with adapters_off(model):
        before = model(tokens)
    assert torch.equal(model(tokens), before)
    token_loss(model, tokens, targets).total.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.requires_grad}
    assert trained == adapter_names(model)
    assert num_trained_parameters(model.cfg, vocab) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for b in layer.b.values():
                b.normal_(std=0.1)
    adapted = model(tokens)
    torch.testing.assert_close(merge(model)(tokens), adapted, rtol=1e-4, atol=1e-4)


def test_formulas_agree_with_the_counter_and_a_seed_gives_the_weights() -> None:
    cfg = EncoderDecoderConfig(dim=32, head_dim=12, hidden=48, num_heads=2, encoder_layers=2)
    assert check_formulas(cfg, 64, 20) is None
    one, two = (cfg.build(64, 5).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["shared.weight"], cfg.build(64, 6).state_dict()["shared.weight"])
    with pytest.raises(ValueError, match="feed_forward_proj='gated-silu' is not read"):
        EncoderDecoderConfig.from_transformers({"feed_forward_proj": "gated-silu"}, own_head=False)
