"""Linear recurrences over a sequence: in chunks by matrix products, or element by element.

    plain      S_t = a_t S_(t-1) + k_t v_t^T                      (linear attention, gated; Mamba-2)
    delta      S_t = a_t (I - b_t k_t k_t^T) S_(t-1) + b_t k_t v_t^T          (DeltaNet, gated)
    o_t = q_t S_t

A chunk depends on itself and on the state at its beginning, so a sequence takes seq / chunk steps;
decoding is the same with one token. On a GPU the states alone are passed from chunk to chunk, by
`kernels/state_pass.py`, and the rest is computed for all chunks at once. All is computed in fp32,
or in fp64 if given so.

Shape legend: batch, heads, seq, k = key width, v = value width, c = tokens of a chunk.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from kernels.at_least_fp32 import at_least_fp32
from kernels.recurrence_flops import PER_DIMENSION
from kernels.state_pass import WIDEST_ERASED, has_state_pass, pass_states

_LEAST = -4.0  # log of a decay for each key dimension: 16 of them together stay within fp32


def recurrence(
    q: Float[Tensor, "batch heads seq k"],
    k: Float[Tensor, "batch heads seq k"],
    v: Float[Tensor, "batch heads seq v"],
    *,
    log_decay: Float[Tensor, "batch heads seq decays"] | None = None,
    beta: Float[Tensor, "batch heads seq"] | None = None,
    state: Float[Tensor, "batch heads k v"] | None = None,
    documents: Int64[Tensor, "batch seq"] | None = None,
    chunk: int = 64,
) -> tuple[Float[Tensor, "batch heads seq v"], Float[Tensor, "batch heads k v"]]:
    """Return (outputs, the state after the last token).

    Args:
        log_decay: log a_t <= 0, one for the state (decays = 1) or one for each key dimension (above
            -4; not with `beta`). None: no decay.
        beta: b_t of the delta rule; None: the plain recurrence.
        state: before the first token; None: zeros.
        documents: an id for each token; the state becomes 0 where a document begins.
        chunk: tokens of a chunk, at most 16 where each key dimension has its decay.

    Source: Yang et al., arXiv 2312.06635 (chunks), 2406.06484 (delta rule), 2412.06464 (its gate).
    """
    with torch.autocast(q.device.type, enabled=False):
        return _recurrence(q, k, v, log_decay, beta, state, documents, chunk)


def _recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor | None,
    documents: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    out_type, (batch, heads, seq, width) = v.dtype, q.shape
    if log_decay is None:
        log_decay = q.new_zeros(batch, heads, seq, 1)
    wide = log_decay.shape[-1] > 1
    size = min(chunk, PER_DIMENSION if wide else chunk, seq)
    missing = -seq % size
    q, k, v, log_decay = (F.pad(at_least_fp32(x), (0, 0, 0, missing)) for x in (q, k, v, log_decay))
    if documents is None:
        documents = torch.zeros(1, seq, dtype=torch.int64, device=q.device)
    documents = torch.cat((documents, documents[:, -1:].expand(-1, missing)), dim=1)
    at_once = _at_once(q, chunks=q.shape[2] // size, delta=beta is not None)
    # [batch, heads, chunks, c, ...] as in memory, or chunks first where a loop runs over them.
    place = 2 if at_once else 0
    q, k, v, log_decay = (_chunks(x, size, place) for x in (q, k, v, log_decay))
    document = documents.view(len(documents), 1, -1, size).movedim(2, place)
    same = document[..., :, None] == document[..., None, :]
    gone = log_decay.clamp(min=_LEAST).cumsum(dim=-2) if wide else log_decay.cumsum(dim=-2)
    if wide:
        fade = None
        reading, writing = q * gone.exp(), k * (-gone).exp()
    else:
        apart = gone - gone.mT
        fade = torch.where(same.tril(), apart, -torch.inf).exp()
        reading, writing = q, k
    scores = (reading @ writing.mT) * (same.tril() if fade is None else fade)
    # The part of each key that reaches the state at the end of its chunk.
    last = gone[..., -1:, :]
    to_end = k * (last - gone).exp() * (document == document[..., -1:])[..., None]
    correction = None
    if beta is not None:
        assert fade is not None
        rate = _chunks(F.pad(at_least_fp32(beta), (0, missing))[..., None], size, place)
        below = (rate * (k @ k.mT) * fade).tril(-1)
        unit = torch.eye(size, dtype=q.dtype, device=q.device) + below
        both = torch.cat((rate * v, rate * k * gone.exp()), dim=-1)
        solved = torch.linalg.solve_triangular(unit, both, upper=False, unitriangular=True)
        v, correction = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    if state is None:
        state = q.new_zeros(batch, heads, width, v.shape[-1])
    parts = _Chunks(scores, q, gone, last, v, to_end, correction, document)
    out, state = (_all_at_once if at_once else _one_by_one)(parts, at_least_fp32(state))
    out = out.view(batch, heads, -1, v.shape[-1])
    return out[:, :, :seq].to(out_type), state


class _Chunks(NamedTuple):
    """What chunks are before a state enters them: batch, heads and chunks, then [c, ...].

    Args:
        scores: of the tokens of a chunk for each other, with the decay between them.
        gone: log of the decay since the beginning of the chunk, the token's own included.
        last: `gone` of the last token, c being 1.
        to_end: the part of each key that reaches the state at the end of its chunk.
        correction: of the delta rule, what turns the entering state into what values lack.
        document: ids, heads being 1.
    """

    scores: Tensor
    q: Tensor
    gone: Tensor
    last: Tensor
    v: Tensor
    to_end: Tensor
    correction: Tensor | None
    document: Tensor


def _one_by_one(chunks: _Chunks, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs [batch, heads, chunks, c, v] and the last state; chunks come first."""
    scores, q, gone, last, v, to_end, correction, document = chunks
    outputs, before = [], document[0, ..., :1]
    for index in range(len(q)):
        goes_on = (document[index] == before).to(q.dtype)[..., None]
        values = v[index]
        if correction is not None:
            values = values - (correction[index] * goes_on) @ state
        outputs.append(scores[index] @ values + (q[index] * gone[index].exp() * goes_on) @ state)
        remaining = goes_on[..., -1:, :] * last[index].exp().mT
        state = remaining * state + to_end[index].mT @ values
        before = document[index, ..., -1:]
    return torch.stack(outputs, dim=2), state


def _at_once(q: Tensor, *, chunks: int, delta: bool) -> bool:
    """Return whether `_all_at_once` computes so many chunks; the other way is the reference."""
    fits = not delta or q.shape[-1] <= WIDEST_ERASED
    return chunks > 1 and fits and q.dtype is torch.float32 and has_state_pass(q.device)


def _all_at_once(chunks: _Chunks, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return `_one_by_one` to rounding, with a number of kernels that does not grow with seq.

    Values that lack W S are values apart from their state: K^T (V - W S) = K^T V - (K^T W) S.
    """
    scores, q, gone, last, v, to_end, correction, document = chunks
    before = torch.cat((document[..., :1, :1], document[..., :-1, -1:]), dim=-2)
    goes_on = (document == before).to(q.dtype)[..., None]
    decay = goes_on[..., -1:, :] * last.exp().mT
    erase = None
    if correction is not None:
        correction = correction * goes_on
        erase = to_end.mT @ correction
    entering, state = pass_states(to_end.mT @ v, decay, erase, state)
    values = v if correction is None else v - correction @ entering
    return scores @ values + (q * gone.exp() * goes_on) @ entering, state


def _chunks(x: Tensor, size: int, place: int) -> Tensor:
    return x.view(*x.shape[:2], -1, size, x.shape[-1]).movedim(2, place)


def scan(
    decay: Float[Tensor, "batch seq dim"],
    added: Float[Tensor, "batch seq dim"],
    first: Float[Tensor, "batch dim"] | None = None,
) -> Float[Tensor, "batch seq dim"]:
    """Return h_t = decay_t h_(t-1) + added_t, elementwise, in log2(seq) passes.

    Args:
        first: h before the first token; None: zeros.

    Source: Hillis and Steele, Data parallel algorithms, CACM 29 (1986).
    """
    if first is not None:
        added = torch.cat((added[:, :1] + decay[:, :1] * first[:, None], added[:, 1:]), dim=1)
    back = 1
    while back < added.shape[1]:
        added = torch.cat(
            (added[:, :back], added[:, back:] + decay[:, back:] * added[:, :-back]), dim=1
        )
        decay = torch.cat((decay[:, :back], decay[:, back:] * decay[:, :-back]), dim=1)
        back *= 2
    return added
