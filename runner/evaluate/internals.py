"""Internals of a model on one text: attention maps, logit lens, activation statistics.

Hooks read them, so that a forward pass without them computes nothing else.

Shape legend: batch, layers, heads, seq.
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
from models.contract import blocks, token_loss
from models.engram import Engram
from models.language_model import LanguageModel
from runner.data.corpus import encode_with_special, token_texts
from runner.machine.errors import ConfigError
from runner.records.cells import Cell
from runner.records.trained_model import load_model


@dataclass
class Recording:
    """The activations that the hooks recorded in the last forward and backward pass.

    Args:
        attention: probabilities by layer, [batch, heads, seq, seq].
        gates: of an n-gram memory (Engram) by layer, [batch, seq].
        streams: the residual stream after each block, [batch, seq, width].
        statistics: by block: rms, largest magnitude and kurtosis of its output, and after a
            backward pass the rms of its gradient.
    """

    attention: dict[int, Tensor] = field(default_factory=dict)
    gates: dict[int, Tensor] = field(default_factory=dict)
    streams: dict[int, Tensor] = field(default_factory=dict)
    statistics: dict[int, dict[str, float]] = field(default_factory=dict)


@contextmanager
def recording(model: LanguageModel) -> Iterator[Recording]:
    """Record every forward and backward pass of `model` inside the context.

    The losses are bit-identical to those outside it.
    """
    recorded, handles = Recording(), []
    for index, block in enumerate(blocks(model)):
        handles.append(block.register_forward_hook(_stream_hook(recorded, index)))
        for module in block.modules():
            if isinstance(module, Attention):
                hook = _input_hook(recorded.attention, index, module.probabilities)
            elif isinstance(module, Engram):
                hook = _input_hook(recorded.gates, index, module.gates)
            else:
                continue
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(outputs: dict[int, Tensor], index: int, compute: Callable[..., Tensor]) -> Any:
    """Return a hook that stores `compute` of a module's input as outputs[index]."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            outputs[index] = compute(*args, **kwargs)

    return hook


def _stream_hook(recorded: Recording, index: int) -> Any:
    def hook(_module: nn.Module, _args: Any, returned: Any) -> None:
        out, _ = split_notes(returned)
        if out.ndim == 4:  # several residual streams: the head reads their mean
            out = out.mean(dim=2)
        values = out.detach().float()
        recorded.streams[index] = out.detach()
        centred = values - values.mean()
        recorded.statistics[index] = {
            "rms": float(values.square().mean().sqrt()),
            "largest": float(values.abs().max()),
            "kurtosis": float(centred.pow(4).mean() / centred.square().mean().square()),
        }
        if out.requires_grad:
            out.register_hook(note)  # type: ignore[no-untyped-call]

    def note(grad: Tensor) -> None:
        recorded.statistics[index]["gradient_rms"] = float(grad.float().square().mean().sqrt())

    return hook


@dataclass(frozen=True)
class Look:
    """A model's internals on one text.

    Args:
        tokens: the text of each token.
        losses: of each token but the first, in nats.
        ranks: of each token but the first under the model; 0 is the most likely.
        attention: [layers, heads, seq, seq], NaN in layers without attention.
        gates: how much of its n-gram memory each token takes, by layer that has one.
        lens: for each layer and position the text of the most likely next token (`says`), its
            `probability`, and that of the true one (`true`).
        statistics: of each layer, see `Recording`.
    """

    tokens: list[str]
    losses: list[float]
    ranks: list[int]
    attention: Float[Tensor, "layers heads seq seq"]
    gates: dict[int, list[float]]
    lens: list[list[dict[str, Any]]]
    statistics: list[dict[str, float]]


def look(model: LanguageModel, ids: Int64[Tensor, " seq"], names: list[str]) -> Look:
    """Return the internals of `model` on the text of `ids`; `names` are the texts of all ids.

    Raises:
        ValueError: fewer than two tokens.
    """
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; at least 2 are needed to look at")
    with recording(model) as recorded, torch.enable_grad():
        logits = model(ids[None])
        assert isinstance(logits, Tensor)
        logprobs = torch.log_softmax(logits[0, :-1], dim=-1)
        losses = -logprobs.gather(1, ids[1:, None])[:, 0]
        torch.autograd.backward(losses.sum())
    model.zero_grad(set_to_none=True)
    ranks = (logprobs > -losses[:, None]).sum(dim=-1)
    layers = range(len(recorded.streams))
    lens = []
    with torch.no_grad():
        for layer in layers:
            lens.append(_lens(model.unembed(recorded.streams[layer][0, :-1]), ids[1:], names))
    return Look(
        [names[i] for i in ids.tolist()],
        losses.tolist(),
        ranks.tolist(),
        _stack_maps(recorded.attention, len(layers), len(ids)),
        {layer: gates[0].tolist() for layer, gates in recorded.gates.items()},
        lens,
        [recorded.statistics[layer] for layer in layers],
    )


def _stack_maps(
    maps: dict[int, Tensor], layers: int, seq: int
) -> Float[Tensor, "layers heads seq seq"]:
    """Return the attention maps of all layers, NaN for a layer without attention."""
    heads = max((weights.shape[1] for weights in maps.values()), default=1)
    stacked = torch.full((layers, heads, seq, seq), torch.nan)
    for layer, weights in maps.items():
        stacked[layer, : weights.shape[1]] = weights[0].detach()
    return stacked


def look_at(cell: Cell, text: str) -> dict[str, Any]:
    """Return `look` at `text` by the newest weights of a cell, as plain data.

    The text is truncated to the context.

    Raises:
        ConfigError: fewer than two tokens, or the model does not say what a layer's output means.
    """
    model, tokenizer, context = load_model(cell.folder)
    if not hasattr(model, "unembed"):
        raise ConfigError(
            f"{type(model).__name__} has no unembed(x), the logits of a layer's output, which the "
            "logit lens reads"
        )
    ids = torch.from_numpy(encode_with_special(tokenizer, text).astype("int64"))[:context]
    try:
        result = look(model, ids, token_texts(tokenizer))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return vars(result) | {"attention": result.attention.tolist()}


def _lens(logits: Tensor, truth: Tensor, names: list[str]) -> list[dict[str, Any]]:
    probs = torch.softmax(logits, dim=-1)
    best, choice = probs.max(dim=-1)
    true = probs.gather(1, truth[:, None])[:, 0]
    rows = zip(choice.tolist(), best.tolist(), true.tolist(), strict=True)
    return [{"says": names[c], "probability": p, "true": t} for c, p, t in rows]


@torch.no_grad()
def induction(
    model: LanguageModel, vocab_size: int, length: int, *, samples: int = 8, seed: int = 0
) -> dict[str, float]:
    """Return signs of induction heads on `length` random tokens, repeated once.

    `prefix_matching/LAYER.HEAD` is the mean attention from a repeated token to the token after its
    first occurrence, near 1 in an induction head. `repeat_gain` is the loss of the first half minus
    that of the second, in nats per token (Olsson et al., arXiv 2209.11895).
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    half = torch.randint(0, vocab_size, (samples, length), generator=generator).to(device)
    tokens = torch.cat((half, half), dim=1)
    with recording(model) as recorded:
        loss = token_loss(model, tokens[:, :-1], tokens[:, 1:])
    position = torch.arange(length, 2 * length - 1, device=device)
    scores = {
        f"prefix_matching/{layer}.{head}": float(
            weights[:, head, position, position - length + 1].mean()
        )
        for layer, weights in recorded.attention.items()
        for head in range(weights.shape[1])
    }
    # Position length - 1 predicts the first token of the second half: that one is random.
    gain = loss.nll[:, : length - 1].mean() - loss.nll[:, length:].mean()
    return scores | {"repeat_gain": float(gain)}
