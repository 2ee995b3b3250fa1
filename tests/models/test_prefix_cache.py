"""A text that goes on from a known prefix gives the logits of reading it anew."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.contract import read, start
from models.prefix_cache import PrefixCache
from tests.models.backbone import text
from tests.models.test_states import KINDS, model_of

BLOCK = 4


def _read(model: Any, ids: list[int], cache: PrefixCache) -> tuple[Tensor, int]:
    """Return (logits after the last token, number of tokens not read, since they were known)."""
    state = start(model, 1, len(ids))
    known = length = cache.load(ids[:-1], state)
    logits = torch.zeros(0)
    while length < len(ids):
        count = cache.until_block_end(length, min(6, len(ids) - length))
        logits = read(model, torch.tensor([ids[length : length + count]]), state)
        length += count
        cache.save(ids[:length], state)
    return logits[0], known


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_branches_of_a_text_are_bit_equal_to_reading_them_anew(kind: str) -> None:
    model = model_of(kind)
    trunk = text(14).tolist()
    texts = [[*trunk, 1, 2, 3], [*trunk, 4, 5, 6, 7, 8], [*trunk[:6], 9, 9, 9], [*trunk, 1, 2, 3]]
    cache = PrefixCache(block=BLOCK, max_bytes=1 << 20)
    known = []
    for ids in texts:
        logits, length = _read(model, ids, cache)
        anew, _ = _read(model, ids, PrefixCache(block=BLOCK, max_bytes=0))
        assert torch.equal(logits, anew)
        known.append(length)
    keeps_state = kind != "foreign"
    assert known == ([0, 12, 4, 16] if keeps_state else [0, 0, 0, 0])
    assert (cache.num_bytes() > 0) == keeps_state
    cache.clear()
    assert cache.num_bytes() == 0


@torch.no_grad()
@pytest.mark.parametrize("kind", ["rope", "hybrid"])
def test_it_holds_no_more_than_its_bytes_and_drops_what_was_not_used(kind: str) -> None:
    model = model_of(kind)
    cache = PrefixCache(block=BLOCK, max_bytes=1 << 20)
    old, used = text(9, seed=1).tolist(), text(9, seed=2).tolist()
    for ids in (used, old):
        _read(model, ids, cache)
    cache.max_bytes = both = cache.num_bytes()
    assert _read(model, used, cache)[1] == 2 * BLOCK
    _read(model, text(5, seed=3).tolist(), cache)  # the end of `old` makes room
    assert cache.num_bytes() <= both
    assert [_read(model, ids, cache)[1] for ids in (used, old)] == [2 * BLOCK, BLOCK]
    assert cache.num_bytes() <= both
    none = PrefixCache(block=BLOCK, max_bytes=0)
    _read(model, used, none)
    assert none.num_bytes() == 0
    with pytest.raises(ValueError, match="block=0"):
        PrefixCache(block=0, max_bytes=1)
