"""Reading token by token, in batches of any lengths, gives the logits of reading at once."""

import pytest
import torch
from torch import Tensor

from models.attention_config import AttentionConfig, Stored
from models.decoder import Decoder
from models.decoder_config import DecoderConfig
from models.operand_config import OperandConfig
from models.precision_config import FpropConfig, PrecisionConfig

SHAPES = {
    "rope": DecoderConfig(depth=2, width=32, num_heads=4),
    "grouped, qk norm, softcap": DecoderConfig(
        depth=2, width=32, num_heads=4, num_kv_heads=2, qk_norm=True, softcap=20.0
    ),
    "gpt2": DecoderConfig(
        depth=2,
        width=32,
        num_heads=4,
        positions="learned",
        norm="layernorm",
        activation="gelu",
        bias=True,
        context_length=64,
    ),
    "mup, untied": DecoderConfig(
        depth=1, width=64, num_heads=2, init="mup", base_width=32, tied=False
    ),
}


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> Decoder:
    built = SHAPES[request.param].build(50, 0)
    with torch.no_grad():
        for parameter in built.parameters():  # far from the small numbers of an initialisation
            parameter.add_(
                torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
                )
                * 0.1
            )
    return built


def _rows(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 50, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def test_token_by_token_and_in_pieces_equal_a_full_pass(model: Decoder) -> None:
    (row,) = _rows(23)
    at_once = model(row[None])[0]
    for pieces in ([1] * 23, [10, 1, 1, 11], [23]):
        state, first = model.start(1, 4), 0  # it must grow
        for size in pieces:
            logits = model(row[None, first : first + size], state=state)
            first += size
            torch.testing.assert_close(logits[0], at_once[first - 1], rtol=1e-5, atol=1e-5)
        assert state.lengths.tolist() == [23]


@torch.no_grad()
def test_rows_of_different_lengths_do_not_see_each_other(model: Decoder) -> None:
    rows = _rows(3, 17, 9)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=7)
    state = model.start(3, 32)
    logits = model(padded, state=state, counts=torch.tensor([3, 17, 9]))
    more = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    steps = [logits, *(model(more[:, i : i + 1], state=state) for i in range(3))]
    for index, row in enumerate(rows):
        alone = model(torch.cat((row, more[index]))[None])[0]
        for i, step in enumerate(steps):
            torch.testing.assert_close(step[index], alone[len(row) - 1 + i], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_selected_rows_go_on_where_they_were(model: Decoder) -> None:
    rows = _rows(5, 8)
    state = model.start(2, 16)
    model(
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        state=state,
        counts=torch.tensor([5, 8]),
    )
    chosen = state.select(torch.tensor([1, 1, 0]))
    logits = model(torch.tensor([[1], [2], [3]]), state=chosen)
    for row, token, row_logits in zip((1, 1, 0), (1, 2, 3), logits, strict=True):
        expected = model(torch.cat((rows[row], torch.tensor([token])))[None])[0, -1]
        torch.testing.assert_close(row_logits, expected, rtol=1e-5, atol=1e-5)
    assert state.lengths.tolist() == [5, 8]


@torch.no_grad()
def test_a_static_state_gives_the_same_logits_in_one_shape(model: Decoder) -> None:
    """tests/runner/generate/test_compiled_generation.py shows that it compiles to one graph."""
    tokens = torch.stack(_rows(20, 20, 20))
    counts = torch.tensor([3, 5, 4])
    growing, static = model.start(3, 4), model.start(3, 32, static=True)
    for state in (growing, static):
        model(tokens[:, :5], state=state, counts=counts)
    for token in tokens[:, 5:12].split(1, dim=1):
        expected, logits = model(token, state=growing), model(token, state=static)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert static.lengths.tolist() == growing.lengths.tolist() == [10, 12, 11]
    assert {memory["keys"].shape[2] for memory in static.memories.values()} == {32}


@torch.no_grad()
@pytest.mark.parametrize("stored", [None, "int8", "nvfp4", "int4"])
def test_a_static_state_keeps_what_it_has_read_in_another_capacity(stored: Stored | None) -> None:
    model = DecoderConfig(depth=2, width=64, num_heads=2).build(50, 0)
    model.stored = stored
    tokens = torch.stack(_rows(120, 120))
    same, resized = model.start(2, 256, static=True), model.start(2, 128, static=True)
    for state in (same, resized):
        model(tokens[:, :100], state=state, counts=torch.tensor([100, 90]))
    for number, capacity in enumerate((192, 104, 256), start=100):
        resized.resize(capacity)
        assert resized.num_bytes() <= same.num_bytes()
        expected, logits = (
            model(tokens[:, number : number + 1], state=state) for state in (same, resized)
        )
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    resized.resize(98)  # row 0 has read 103 and is left alone from here on; row 1 has read 93
    assert resized.lengths.tolist() == [98, 93]
    expected, logits = (
        model(tokens[:, 103:104], state=state, counts=torch.tensor([0, 1]))[1]
        for state in (same, resized)
    )
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("stored", [None, "int8", "nvfp4", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sink", [False, True])
def test_row_by_row_neither_capacity_nor_company_changes_a_bit(
    stored: Stored | None, dtype: torch.dtype, sink: bool
) -> None:
    """With int4 a mask alone does not do it: beyond 512 positions kernels sum in another order."""
    parts = {"a": AttentionConfig(learned_sink=sink, num_kv_heads=2)}
    cfg = DecoderConfig(depth=2, width=96, num_heads=4, pattern="af", parts=parts)
    model, (first, *others) = cfg.build(50, 0).to(dtype), _rows(100, 20, 390, 60)
    model.stored = stored
    new = torch.stack(_rows(12, 12, 12))

    def read(capacity: int, company: list[Tensor]) -> Tensor:
        state = model.start(3, capacity, static=True)
        state.row_by_row = True
        for row, text in enumerate((first, *company)):
            alone = model.start(1, 1)
            model(text[None], state=alone)
            state.put(torch.tensor([row]), alone)
        steps = []
        for width, begin in ((1, 0), (1, 1), (3, 2), (1, 5)):
            counts = torch.tensor([width, width * (begin % 2), width])
            steps.append(model(new[:, begin : begin + width], state=state, counts=counts)[0])
        return torch.stack(steps)

    expected = read(128, [others[0], others[2]])
    assert torch.equal(read(600, [others[1], others[0]]), expected)
    assert torch.equal(read(1000, [others[2], others[1]]), expected)


@pytest.mark.slow
@torch.no_grad()
def test_a_memory_has_the_dtype_that_its_layer_computes_in() -> None:
    model = DecoderConfig(depth=2, width=32, num_heads=2, hidden=64).build(50, 0)
    operand = OperandConfig(format="nvfp4")
    cfg = PrecisionConfig(compute="bf16", fprop=FpropConfig(x=operand, w=operand), keep_first=1.0)
    cfg.build(torch.device("cpu")).prepare(model)
    state = model.start(1, 8)
    for token in (1, 2):
        assert model(torch.tensor([[token]]), state=state).isfinite().all()
    dtypes = [memory["keys"].dtype for memory in state.memories.values()]
    assert dtypes == [torch.float32, torch.bfloat16]


@torch.no_grad()
@pytest.mark.parametrize(
    ("stored", "error", "bits"),
    [("int8", 0.02, 8), ("fp8", 0.1, 8), ("nvfp4", 0.3, 4.5)],
)
@pytest.mark.parametrize("static", [False, True])
def test_keys_and_values_of_few_bits_are_near_and_take_no_more(
    model: Decoder, stored: Stored, error: float, bits: float, static: bool
) -> None:
    rows = _rows(23, 9)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    counts, sizes, given = torch.tensor([23, 9]), [], []
    for model.stored in (None, stored):
        state = model.start(2, 32, static=static)
        model(padded[:, :9], state=state)
        model(padded[:, 9:], state=state, counts=counts - 9)
        other = model.start(2, 32, static=static)
        other.put(torch.tensor([1, 0]), state)
        other.truncate(torch.tensor([9, 20]))
        logits = model(torch.tensor([[1], [2]]), state=other)
        given.append(logits)
        sizes.append(other.num_bytes())
    model.stored = None
    assert 0 < float((given[1] - given[0]).norm() / given[0].norm()) < error
    dim = model.cfg.attention_dim
    padded_dim = dim if stored != "nvfp4" else dim + -dim % 16
    assert sizes[1] * 32 * dim == sizes[0] * (padded_dim * bits + 16)


@torch.no_grad()
@pytest.mark.parametrize(("stored", "levels"), [("int4", 16), ("int2", 4)])
def test_keys_are_rounded_by_channel_and_the_newest_tokens_not_at_all(
    model: Decoder, stored: Stored, levels: int
) -> None:
    """Against KIVI's own definition, in plain code, on the keys and values of the first layer."""
    (ids,) = _rows(64)
    memories = []
    for model.stored in (None, stored):
        state = model.start(1, 4)
        model(ids[None], state=state)
        memories.append(state.memories[0])
    model.stored = None
    full, memory = memories
    length, rounded = 64, 32
    dim = model.cfg.attention_dim
    for name in ("keys", "values"):
        exact = full[name][0, :, :length]
        seen = memory._numbers(name, dim, None)[0, :, :rounded]
        spans = exact[:, :rounded].unflatten(1, (-1, 32))
        axis = 2 if name == "keys" else 3
        least, most = spans.amin(axis, keepdim=True), spans.amax(axis, keepdim=True)
        step = (most - least) / (levels - 1)
        nearest = (((spans - least) / step).round() * step + least).flatten(1, 2)
        steps = step.expand_as(spans).flatten(1, 2)
        far = (seen - nearest).abs() > steps / 4  # all but ties that fp16 decides otherwise
        assert float(far.float().mean()) < 0.02
        bound = steps / 2 + exact.abs().amax() * 2.0**-10
        assert bool(((seen - exact[:, :rounded]).abs() <= bound).all())
        newest = torch.arange(rounded, length)
        assert torch.equal(memory[name][0, :, newest % 64], exact[:, newest])
    assert memory["keys_codes"].nbytes * 8 // (memory["keys_codes"].shape[2] * 32) == (
        full["keys"].shape[1] * dim * (4 if levels == 16 else 2)
    )
