"""Looking inside: what a model's layers attend to, would say, and hold, for one text. By hooks, so that nothing is
computed differently while nobody looks.

Shape legend: layers, heads, seq.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.attention import Attention
from models.branch import split_notes
from models.contract import blocks
from models.engram import Engram
from models.language_model import LanguageModel, TokenLoss
from runner.data.corpus import token_texts
from runner.machine.errors import ConfigError
from runner.records.cells import Cell
from runner.records.trained_model import load_model


@dataclass
class Watched:
    """What the hooks saw in the last forward and backward pass.

    Args:
        attention: by layer, [batch, heads, seq, seq].
        gates: of a memory of n-grams, by layer, [batch, seq].
        streams: the residual stream after each block.
        statistics: by block, rms, largest magnitude and kurtosis of its output; after a backward pass the
            rms of the gradient there too.
    """

    attention: dict[int, Tensor] = field(default_factory=dict)
    gates: dict[int, Tensor] = field(default_factory=dict)
    streams: dict[int, Tensor] = field(default_factory=dict)
    statistics: dict[int, dict[str, float]] = field(default_factory=dict)


@contextmanager
def watching(model: LanguageModel) -> Iterator[Watched]:
    """Watch every forward (and backward) pass of `model` inside the context; the losses are what they are without."""
    seen, handles = Watched(), []
    for index, block in enumerate(blocks(model)):
        handles.append(block.register_forward_hook(_stream_hook(seen, index)))
        for module in block.modules():
            if isinstance(module, Attention):
                handles.append(
                    module.register_forward_pre_hook(
                        _input_hook(seen.attention, index, module.probabilities), with_kwargs=True
                    )
                )
            if isinstance(module, Engram):
                handles.append(
                    module.register_forward_pre_hook(
                        _input_hook(seen.gates, index, module.gates), with_kwargs=True
                    )
                )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(found: dict[int, Tensor], index: int, compute: Callable[..., Tensor]) -> Any:
    """Keep what `compute` makes of a module's input."""

    def hook(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        with torch.no_grad():
            found[index] = compute(*given, **named)

    return hook


def _stream_hook(seen: Watched, index: int) -> Any:
    def hook(_module: nn.Module, _given: Any, returned: Any) -> None:
        out, _ = split_notes(returned)
        if out.ndim == 4:  # several residual streams: their mean is what is read at the end
            out = out.mean(dim=2)
        values = out.detach().float()
        seen.streams[index] = out.detach()
        centred = values - values.mean()
        seen.statistics[index] = {
            "rms": float(values.square().mean().sqrt()),
            "largest": float(values.abs().max()),
            "kurtosis": float(centred.pow(4).mean() / centred.square().mean().square()),
        }
        if out.requires_grad:
            out.register_hook(note)  # type: ignore[no-untyped-call]

    def note(grad: Tensor) -> None:
        seen.statistics[index]["gradient_rms"] = float(grad.float().square().mean().sqrt())

    return hook


@dataclass(frozen=True)
class Look:
    """What one text does in a model.

    Args:
        tokens: their texts; losses: of each but the first, nats; ranks: of each under the model, 0 the likeliest.
        attention: [layers, heads, seq, seq], NaN in layers without attention; gates: how much of a memory of n-grams
            each token takes, by layer where there is one.
        lens: for each layer and place the likeliest next token's text and its probability, and the probability of
            the true one; statistics: by layer.
    """

    tokens: list[str]
    losses: list[float]
    ranks: list[int]
    attention: Float[Tensor, "layers heads seq seq"]
    gates: dict[int, list[float]]
    lens: list[list[dict[str, Any]]]
    statistics: list[dict[str, float]]


def look(model: LanguageModel, ids: Int64[Tensor, " seq"], names: list[str]) -> Look:
    """Return what the text of `ids` (each named by `names`) does in `model`, gradients of its loss included.

    Raises:
        ValueError: fewer than two tokens.
    """
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; at least 2 are needed to look at")
    with watching(model) as seen, torch.enable_grad():
        logits = model(ids[None])
        assert isinstance(logits, Tensor)
        own = torch.log_softmax(logits[0, :-1], dim=-1)
        losses = -own.gather(1, ids[1:, None])[:, 0]
        torch.autograd.backward(losses.sum())
    model.zero_grad(set_to_none=True)
    ranks = (own > -losses[:, None]).sum(dim=-1)
    layers = range(len(seen.streams))
    with torch.no_grad():
        lens = [
            _lens(model.unembed(seen.streams[layer][0, :-1]), ids[1:], names) for layer in layers
        ]
    return Look(
        [names[i] for i in ids.tolist()],
        losses.tolist(),
        ranks.tolist(),
        _stacked(seen.attention, len(layers), len(ids)),
        {layer: gates[0].tolist() for layer, gates in seen.gates.items()},
        lens,
        [seen.statistics[layer] for layer in layers],
    )


def _stacked(
    found: dict[int, Tensor], layers: int, seq: int
) -> Float[Tensor, "layers heads seq seq"]:
    """Return the maps of all layers, NaN where a layer has none."""
    heads = max((weights.shape[1] for weights in found.values()), default=1)
    whole = torch.full((layers, heads, seq, seq), torch.nan)
    for layer, weights in found.items():
        whole[layer, : weights.shape[1]] = weights[0].detach()
    return whole


def look_at(cell: Cell, text: str) -> dict[str, Any]:
    """Return a look at `text` in the newest weights of a cell, as plain data; what passes the context is left out.

    Raises:
        ConfigError: fewer than two tokens.
    """
    model, tokenizer, context = load_model(cell.folder)
    ids = torch.from_numpy(tokenizer.encode(text).astype("int64"))[:context]
    try:
        found = look(model, ids, token_texts(tokenizer))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return vars(found) | {"attention": found.attention.tolist()}


def _lens(logits: Tensor, truth: Tensor, names: list[str]) -> list[dict[str, Any]]:
    found = torch.softmax(logits, dim=-1)
    best, choice = found.max(dim=-1)
    true = found.gather(1, truth[:, None])[:, 0]
    rows = zip(choice.tolist(), best.tolist(), true.tolist(), strict=True)
    return [{"says": names[c], "probability": p, "true": t} for c, p, t in rows]


@torch.no_grad()
def induction(
    model: LanguageModel, vocab_size: int, length: int, *, samples: int = 8, seed: int = 0
) -> dict[str, float]:
    """Return what tells of induction heads, on `length` random tokens said twice (Olsson et al., arXiv 2209.11895).

    `prefix_matching/LAYER.HEAD`: mean attention from a repeated token to the one behind its first occurrence, near 1
    in an induction head; `repeat_gain`: nats per token by which the second time is easier than the first.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    half = torch.randint(0, vocab_size, (samples, length), generator=generator).to(device)
    tokens = torch.cat((half, half), dim=1)
    with watching(model) as seen:
        loss = model(tokens[:, :-1], tokens[:, 1:])
    assert isinstance(loss, TokenLoss)
    place = torch.arange(length, 2 * length - 1, device=device)
    found = {
        f"prefix_matching/{layer}.{head}": float(weights[:, head, place, place - length + 1].mean())
        for layer, weights in seen.attention.items()
        for head in range(weights.shape[1])
    }
    # The first token of the second half cannot be foreseen, nor that there is one.
    gain = loss.nll[:, : length - 1].mean() - loss.nll[:, length:].mean()
    return found | {"repeat_gain": float(gain)}
