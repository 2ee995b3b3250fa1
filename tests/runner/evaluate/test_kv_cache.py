"""Keys and values in few bits: what they cost a trained model, and that its texts stay its own."""

import pytest
import torch

from models.attention_config import AttentionConfig
from models.decoder_config import DecoderConfig
from runner.evaluate.kv_cache_config import KvCacheConfig
from runner.generate.kv_cache import store_keys_and_values
from runner.generate.sampling import Sampling
from runner.generate.text_generator import TextGenerator
from runner.machine.errors import ConfigError
from runner.records import metrics
from runner.records.cells import Cell, freeze_cell, make_cells
from tests.conftest import compose_tiny, write_text
from tests.workers import train_here

DIM = 32  # of a head


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Cell:
    root = tmp_path_factory.mktemp("kv_cache")
    overrides = ["+eval/also@eval.also.kept=kv_cache", "train.sequence_length=256", "optim.lr=1e-2"]
    sizes = ["model.width=64", "model.num_heads=2", "model.num_kv_heads=1", "train.steps=60"]
    node = compose_tiny(root, write_text(root / "text.txt"), *overrides, *sizes, "eval.tokens=1024")
    (cell,) = make_cells([("", node)])
    freeze_cell(cell)
    train_here(cell)
    return cell


def test_fewer_bits_cost_more_and_are_counted(trained: Cell) -> None:
    values = metrics.latest(trained.folder)
    assert values["kv_loss/full"] == pytest.approx(values["val_loss"], abs=1e-4)
    kl = [values[f"kv_kl/{name}"] for name in ("int8", "int4", "int2")]
    assert 0 < kl[0] < kl[1] < kl[2]
    deltas = [values[f"kv_loss_delta/{name}"] for name in ("int8", "int4", "int2")]
    assert abs(deltas[0]) < 1e-3
    assert max(deltas[:2]) < deltas[2]
    assert values["kv_kl/int8"] < values["kv_kl/fp8"] < values["kv_kl/nvfp4"]
    bits = {name: values[f"kv_bits/{name}"] for name in KvCacheConfig().formats}
    scale = 16 / DIM
    assert bits == {
        "int8": 8 + scale,
        "fp8": 8 + scale,
        "nvfp4": 4.5 + scale,
        "int4": 5.0,  # 32 bits for each 32 numbers
        "int2": 3.0,
    }
    assert values["kv_bytes/full"] == 256 * 2 * DIM * 4 * 2  # two layers
    assert values["kv_bytes/int8"] == values["kv_bytes/full"] * bits["int8"] / 32


def test_a_text_depends_neither_on_its_company_nor_on_drafts(trained: Cell) -> None:
    """Prompts of which the longest is rounded at once, others as they are written, or never."""
    text = (trained.folder.parents[1] / "text.txt").read_text()
    prompts = [text[:n] for n in (90, 40, 3)]
    hows = [Sampling(max_new_tokens=38, temperature=t, seed=5) for t in (0.0, 1.0, 0.0)]
    generator = TextGenerator(trained.folder, kv_cache="int4")
    alone = [generator.generate([p], how)[0].ids for p, how in zip(prompts, hows, strict=True)]
    for more in ({"rows": 3}, {"rows": 2, "invariant": True}):
        together = generator.generate(prompts, hows, **more)
        assert [one.ids for one in together] == alone
    greedy = Sampling(max_new_tokens=38, temperature=0.0)
    drafted = TextGenerator(trained.folder, kv_cache="int4", draft="layers:1")
    assert drafted.generate(prompts[:1], greedy)[0].ids == alone[0]
    assert TextGenerator(trained.folder).generate(prompts[:1], greedy)[0].ids != [] != alone[0]


def test_a_cache_that_cannot_be_is_refused() -> None:
    windowed = DecoderConfig(
        depth=1, width=16, num_heads=2, pattern="wf", parts={"w": AttentionConfig(window=4)}
    ).build(7, 0)
    with pytest.raises(ConfigError, match="keeps no keys and values of all tokens"):
        store_keys_and_values(windowed, "int4")
    with pytest.raises(ConfigError, match="'int3' is none of: int8, fp8, nvfp4, int4, int2"):
        store_keys_and_values(torch.nn.Linear(1, 1), "int3")
    with pytest.raises(ValueError, match="each named once"):
        KvCacheConfig(formats=("int4", "int4"))
