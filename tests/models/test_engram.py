"""Engram: the rows that it looks up, its output, what it learns, and the claims of all models."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels.short_conv import short_conv
from models.branch import Context
from models.contract import read_vocabulary
from models.decoder_config import DecoderConfig
from models.engram import Engram
from models.engram_config import EngramConfig, primes
from runner.data.corpus import token_texts
from runner.data.tokenizers_config import TokenizerConfig
from runner.learn.optim.groups_config import AdamWConfig, MuonConfig
from tests.conftest import ROOT
from tests.models import backbone

PART = EngramConfig(table_size=61, slot_dim=4, num_heads=2)
CFG = DecoderConfig(depth=3, width=32, num_heads=4, pattern="naf af", parts={"n": PART})


def _perturbed() -> Any:
    return backbone.perturbed(CFG)


@pytest.mark.slow
def test_it_satisfies_the_claims_of_all_models(tmp_path: Path) -> None:
    backbone.satisfies_all_claims(CFG, tmp_path / "m")
    backbone.compiles(CFG)


def test_every_table_of_every_layer_has_a_prime_of_its_own() -> None:
    layers = [layer.engram for layer in CFG.build(50, 0).blocks() if hasattr(layer, "engram")]
    sizes = [size for engram in layers for size in engram.sizes]
    assert sizes == [61, 67, 71, 73, 79, 83, 89, 97]
    assert len({tuple(engram.multipliers) for engram in layers}) == 2
    assert all(m % 2 for engram in layers for m in engram.multipliers)
    assert primes(10**6, 3) == (1000003, 1000033, 1000037)


def test_the_row_is_the_hash_of_the_last_tokens() -> None:
    """Computed with Python's integers, token by token, within its document."""
    engram = _perturbed().blocks()[0].engram
    assert isinstance(engram, Engram)
    tokens = backbone.text(2, 11)
    documents = torch.tensor([[0] * 4 + [1] * 7, [0] * 11])
    rows = engram.rows(Context(tokens, torch.arange(11), documents=documents))
    for row in range(2):
        for position in range(11):
            first, slot = 0, 0
            for order in (2, 3):
                mixed = 0
                for back in range(order):
                    earlier, document = position - back, documents[row, position]
                    inside = earlier >= 0 and documents[row, earlier] == document
                    token = int(tokens[row, earlier]) if inside else -1
                    mixed ^= (token + 1) * engram.multipliers[back]
                assert mixed < 2**63
                for _ in range(2):
                    assert int(rows[row, position, slot]) == first + mixed % engram.sizes[slot]
                    first, slot = first + engram.sizes[slot], slot + 1


def test_the_output_is_the_formula() -> None:
    engram = _perturbed().blocks()[0].engram
    tokens = backbone.text(1, 9)
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    context = Context(tokens, torch.arange(9))
    with torch.no_grad():
        out, notes = engram(x, context)
        e = engram.table[engram.rows(context)].flatten(2)
        k, v = e @ engram.key.weight.T, e @ engram.value.weight.T

        def rms(t: torch.Tensor, norm: Any) -> torch.Tensor:
            return t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

        agreement = rms(x, engram.stream_norm) * rms(k, engram.key_norm)
        gate = torch.sigmoid(agreement.sum(-1, keepdim=True) / 32**0.5)
        inner = rms(gate * v, engram.conv_norm)
        mixed = torch.zeros_like(inner)
        for position in range(9):
            for tap in range(4):
                if position - 3 * tap >= 0:
                    mixed[:, position] += engram.conv[:, 3 - tap] * inner[:, position - 3 * tap]
    torch.testing.assert_close(out, F.silu(mixed) + gate * v, rtol=1e-4, atol=1e-5)
    assert float(notes["gate"]) == pytest.approx(float(gate.mean()), rel=1e-5)


def test_tokens_that_differ_in_case_accents_or_spaces_share_their_rows() -> None:
    model = CFG.build(6, 0)
    read_vocabulary(model, lambda: ["The", "the", " thé", "a", " ", "\n"])
    engram = model.blocks()[0].engram
    assert engram.canonical.tolist() == [0, 0, 0, 3, 4, 4]
    rows = [
        engram.rows(Context(torch.tensor([[3, i]]), torch.arange(2)))[0, 1].tolist()
        for i in range(4)
    ]
    assert rows[0] == rows[1] == rows[2] != rows[3]
    part = EngramConfig(table_size=7, compress=False)
    cfg = DecoderConfig(depth=1, width=32, num_heads=4, pattern="n", parts={"n": part})
    off = cfg.build(2, 0)
    read_vocabulary(off, lambda: ["a", "A"])
    assert off.blocks()[0].engram.canonical.tolist() == [0, 1]


def test_tokens_count_as_one_where_the_published_normaliser_says_so() -> None:
    """The vocabulary of a tokenizer of code, and characters at which Unicode's forms differ."""
    from tokenizers import Regex, normalizers

    published = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), "\ue000"),
            normalizers.Strip(),
            normalizers.Replace("\ue000", " "),
        ]
    )
    code = [file.read_text() for file in sorted((ROOT / "models").glob("*.py"))]
    cfg = TokenizerConfig(kind="bpe", vocab_size=1000)
    texts = [text for text in token_texts(cfg.build(code)) if "\ufffd" not in text]
    texts += [
        "\n",
        "\t\n",
        "\r\n  ",
        "\u00a0",
        "\u2003",
        "\u3000\n",
        "\x0b",
        "\x0c",
        "\x1c",
        "\x85",
        "",
    ]
    texts += ["\u0301", " \u0301", "\u0903", "ﬁ", "Ⅻ", "İ", "ẞ", "Å", "\u200b", "\ufeff", "a  b\n"]
    model = CFG.build(len(texts), 0)
    read_vocabulary(model, lambda: texts)
    ours = model.blocks()[0].engram.canonical.tolist()
    first: dict[str, int] = {}
    theirs = [
        first.setdefault(published.normalize_str(text) or text, index)
        for index, text in enumerate(texts)
    ]
    assert ours == theirs
    assert len({ours[texts.index(text)] for text in ("\n", "\t\n", "\r\n  ", "\u00a0")}) == 1


def test_tables_learn_faster_and_never_decay_and_are_no_matrix_to_muon() -> None:
    model = CFG.build(50, 0)
    table = model.blocks()[0].engram.table
    (optimizer,) = AdamWConfig(lr=1e-3).build(model)
    (group,) = (g for g in optimizer.param_groups if any(p is table for p in g["params"]))
    assert group["lr"] == pytest.approx(5e-3)
    assert group["weight_decay"] == 0.0
    muon, adamw = MuonConfig(lr=1e-3).build(model)
    assert not any(p is table for g in muon.param_groups for p in g["params"])
    assert any(p is table for g in adamw.param_groups for p in g["params"])


def test_the_convolution_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12 + 9, 5, generator=generator)
    weight = torch.randn(5, 4, generator=generator)
    expected = F.conv1d(x.transpose(1, 2), weight[:, None], groups=5, dilation=3).transpose(1, 2)
    torch.testing.assert_close(short_conv(x, weight, dilation=3), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_tri_gram_that_attention_cannot_see_is_remembered() -> None:
    """The next token is a random function of the last two: Engram learns it, an MLP cannot."""
    generator = torch.Generator().manual_seed(0)
    rule = torch.randint(0, 50, (50, 50), generator=generator)
    text = torch.zeros(64, 34, dtype=torch.int64)
    text[:, :2] = torch.randint(0, 50, (64, 2), generator=generator)
    for position in range(2, 34):
        text[:, position] = rule[text[:, position - 2], text[:, position - 1]]
    losses = {}
    for pattern in ("nf", "f"):
        part = EngramConfig(table_size=4096, slot_dim=8, num_heads=2)
        cfg = DecoderConfig(depth=1, width=64, num_heads=4, pattern=pattern, parts={"n": part})
        model = cfg.build(50, 0)
        (optimizer,) = AdamWConfig(lr=3e-3).build(model)
        for _ in range(120):
            out = model(text[:, :-1], text[:, 1:])
            (out.total / text[:, 1:].numel()).backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[pattern] = float(out.nll[:, 2:].mean())
    assert losses["nf"] < 0.5 < 1.0 < losses["f"], losses


@pytest.mark.parametrize("recipe", ["bf16", "nvfp4"])
def test_it_trains_under_low_precision(recipe: str) -> None:
    backbone.trains_under(CFG, recipe)


@pytest.mark.parametrize("bad", [{"table_size": 0}, {"orders": ()}, {"kernel": 0}])
def test_impossible_memories_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        EngramConfig(**{"table_size": 8} | bad)
