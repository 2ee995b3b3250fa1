"""Scores of many prompts at once; what several of them begin with is read once.

Prompts are grouped by what precedes their first scored token: the choices of a question are one
group. The beginning of all groups is read once, then the rest of each group's, then each prompt's
own tokens, in passes of similar lengths.

Shape legend: rows, groups, seq.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from kernels.at_least_fp32 import at_least_fp32
from models.cache import State
from models.contract import logits, read, start
from models.prefix_cache import PrefixCache
from models.text_state import TextState
from runner.generate.text_row import TextRow

# A pass takes at least as long as one over so many tokens: weights are read, kernels launched.
_LEAST_TOKENS = {"cpu": 64}
_LEAST_ON_AN_ACCELERATOR = 1024
MAX_LOGITS = 1 << 27  # elements in the logits of one forward pass

Ids = Sequence[int]


def score_prompts(model: Any, rows: Sequence[TextRow], prefixes: PrefixCache | None) -> None:
    """Score the prompts of rows that nothing is read of.

    Args:
        rows: of one salt.
        prefixes: what is known of earlier texts. None: read each prompt whole, in one pass, as a
            model needs whose forward pass couples the rows of a batch.
    """
    groups: dict[tuple[int, ...], list[TextRow]] = {}
    for row in rows:
        assert row.unscored is not None
        groups.setdefault(tuple(row.request.prompt[: row.unscored - 1]), []).append(row)
    device = next(model.parameters()).device
    least = _LEAST_TOKENS.get(device.type, _LEAST_ON_AN_ACCELERATOR)
    longest = max(len(row.request.prompt) - 1 for row in rows)
    if prefixes is not None and _cost(groups, least) < max(least, len(rows) * longest):
        state = start(model, 1, longest)
        if not isinstance(state, TextState):
            _score_groups(model, groups, state, prefixes, least)
            return
    _score_anew(model, rows)


def _cost(groups: dict[tuple[int, ...], list[TextRow]], least: int) -> int:
    """Return the cost in tokens of reading each group's beginning once, with padding."""
    trunk = _common(list(groups))
    rest = len(groups) * (max(map(len, groups)) - trunk)
    own = [len(row.request.prompt) - 1 - len(ids) for ids, group in groups.items() for row in group]
    passes = [trunk, rest, *(len(part) * own[part[0]] for part in _parts(own, least))]
    return sum(max(least, tokens) for tokens in passes if tokens)


def _parts(lengths: Sequence[int], least: int) -> list[list[int]]:
    """Return the indices of texts in passes of similar lengths, the longest first.

    A new pass begins where it saves more than `least` tokens of padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    parts: list[list[int]] = [order[:1]]
    for done, index in enumerate(order[1:], 1):
        padding = (lengths[parts[-1][0]] - lengths[index]) * (len(order) - done)
        if padding > least:
            parts.append([])
        parts[-1].append(index)
    return parts


def _score_groups(
    model: Any,
    groups: dict[tuple[int, ...], list[TextRow]],
    state: State,
    prefixes: PrefixCache,
    least: int,
) -> None:
    device, beginnings = state.lengths.device, list(groups)
    trunk = _common(beginnings)
    salt = next(row.request.salt for group in groups.values() for row in group)
    _read_trunk(model, beginnings[0][:trunk], state, prefixes, salt)
    state = state.select(torch.zeros(len(beginnings), dtype=torch.int64, device=device))
    rest = [ids[trunk:] for ids in beginnings]
    if any(rest):
        tokens, counts = padded(rest, device)
        read(model, tokens, state, counts=counts)
    owners = [index for index, group in enumerate(groups.values()) for _ in group]
    rows = [row for group in groups.values() for row in group]
    own = [
        row.request.prompt[len(beginnings[owner]) : -1]
        for row, owner in zip(rows, owners, strict=True)
    ]
    for part in _parts([len(ids) for ids in own], least):
        chosen = torch.tensor([owners[index] for index in part], device=device)
        _score_own(
            model, [rows[index] for index in part], [own[i] for i in part], state.select(chosen)
        )


def _score_own(model: Any, rows: Sequence[TextRow], own: Sequence[Ids], state: State) -> None:
    """Read each row's own tokens, the last of its beginning first, and score what they predict."""
    tokens, counts = padded(own, state.lengths.device)
    size = max(1, MAX_LOGITS // (len(rows) * model.vocab_size))
    for first in range(0, tokens.shape[1], size):
        piece = tokens[:, first : first + size]
        left = (counts - first).clamp(min=0, max=piece.shape[1])
        scores = at_least_fp32(read(model, piece, state, counts=left, every=True))
        for row, row_scores, count in zip(rows, scores, left.tolist(), strict=True):
            if count:
                row.score(row_scores[:count])


def _read_trunk(model: Any, ids: Ids, state: State, prefixes: PrefixCache, salt: str) -> None:
    """Read a text that many others may begin with into a state of one row."""
    known = prefixes.load(ids, state, salt=salt)
    while known < len(ids):
        end = known + prefixes.until_block_end(known, len(ids) - known)
        read(model, torch.tensor([ids[known:end]], device=state.lengths.device), state)
        prefixes.save(ids[:end], state, salt=salt)
        known = end


def _score_anew(model: Any, rows: Sequence[TextRow]) -> None:
    """Score prompts by passes over the whole of each, the longest first."""
    device = next(model.parameters()).device
    left = sorted(rows, key=lambda row: -len(row.request.prompt))
    while left:
        fitting = MAX_LOGITS // (len(left[0].request.prompt) * model.vocab_size)
        batch, left = left[: max(1, fitting)], left[max(1, fitting) :]
        tokens, _ = padded([row.request.prompt[:-1] for row in batch], device)
        for row, scores in zip(batch, logits(model, tokens), strict=True):
            assert row.unscored is not None
            end = len(row.request.prompt) - 1
            row.score(at_least_fp32(scores[row.unscored - 1 : end]))


def _common(texts: Sequence[Ids]) -> int:
    """Return the number of ids that all texts begin with."""
    columns = zip(*texts, strict=False)
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, columns))


def padded(texts: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (ids [rows, seq], the number of each row's)."""
    rows = [torch.tensor(ids, dtype=torch.int64) for ids in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids.to(device), torch.tensor([len(ids) for ids in texts], device=device)
