"""The least that a model must have: an nn.Module with `forward` and `vocab_size`.

`forward(tokens, targets=None, ...)` returns logits [batch, seq, vocab], or with targets a
`TokenLoss`; it is passed `documents`, `noise` and `weights` only if it has such parameters.
All else has a default in this file: embeddings, heads and filters are recognised by type.
`LanguageModel` has the whole interface.
Its config must have `build(vocab_size, seed)`; `models/sizes.py` counts what it leaves out.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from kernels.logit_rows import IGNORE
from models.cache import State
from models.canvas import Canvas
from models.language_model import TokenLoss
from models.text_state import TextState

Pass = tuple[Tensor, State, Tensor | None]  # tokens, state and counts, as `read` takes them


def token_loss(
    model: Any,
    tokens: Tensor,
    targets: Tensor,
    *,
    documents: Tensor | None = None,
    noise: Any = None,
    weights: Any = None,
    spans: Tensor | None = None,
    visible: Tensor | None = None,
    divisor: Tensor | None = None,
) -> TokenLoss:
    """Return the loss of a batch; `model` is called once, and may be wrapped (DDP, torch.compile).

    Args:
        tokens, targets, documents: ids [batch, seq]; targets of -100 do not count.
        noise: `NoiseKey` of dropout (None: no dropout).
        weights: of the targets; see `kernels.cross_entropy.Weights`.
        spans: ids of spans whose tokens see each other, 0 elsewhere; see `Decoder.forward`.
        visible: visible[i, j] says whether token i sees token j, [seq, seq].
        divisor: see `Decoder.forward`: the task's `count` where that is no number of targets.

    Raises:
        ValueError: `weights`, `spans` or `visible` are given and the model's forward has no such
            parameter.
    """
    optional = {"documents": documents, "noise": noise, "weights": weights, "divisor": divisor}
    passed = _passed(model, optional | {"spans": spans, "visible": visible})
    names = _parameters(type(_unwrapped(model)).forward)
    if names is not None and "targets" not in names:
        return _loss_of(model(tokens, **passed), targets)
    out = model(tokens, targets, **passed)
    return out if isinstance(out, TokenLoss) else _loss_of(out, targets)


def logits(
    model: Any,
    tokens: Tensor,
    *,
    documents: Tensor | None = None,
    noise: Any = None,
    spans: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Return the logits of a batch, [batch, seq, vocab]; for the arguments see `token_loss`."""
    optional = {"documents": documents, "noise": noise, "spans": spans, "visible": visible}
    result: Tensor = model(tokens, **_passed(model, optional))
    return result


def batch_logits(model: Any, batch: Mapping[str, Tensor], *, noise: Any = None) -> Tensor:
    """Return the logits of a batch's `tokens` under its masks, [batch, seq, vocab].

    Its `documents` and `spans` are who sees whom, where it has them; see `token_loss`.
    """
    masks = {"documents": batch.get("documents"), "spans": batch.get("spans")}
    return logits(model, batch["tokens"], noise=noise, **masks)


_NEEDED = {
    "weights": "this task needs; add the parameter",
    "spans": "would see each other; use a decoder of attention, or data.bidirectional_prompt=false",
    "visible": "this task needs; use a decoder of attention",
}


def _passed(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those `given` that are not None and that the model's forward takes.

    Raises:
        ValueError: it does not take one that changes the result.
    """
    names = _parameters(type(_unwrapped(model)).forward)
    there = {name: value for name, value in given.items() if value is not None}
    passed = {k: v for k, v in there.items() if names is None or k in names}
    for name in (there.keys() - passed.keys()) & _NEEDED.keys():
        whose = type(_unwrapped(model)).__name__
        raise ValueError(f"{whose}.forward takes no `{name}` of tokens, which {_NEEDED[name]}")
    return passed


def part_logits(model: Any, tokens: Tensor, canvas: Canvas) -> Tensor:
    """Return the logits of a part of texts whose keys and values `canvas` keeps.

    Raises:
        ValueError: the model's forward has no parameter `canvas`.
    """
    names = _parameters(type(_unwrapped(model)).forward)
    if names is not None and "canvas" not in names:
        raise ValueError(
            f"{type(_unwrapped(model)).__name__}.forward keeps no keys and values of a canvas; "
            "use cache=none"
        )
    result: Tensor = model(tokens, canvas=canvas)
    return result


def _loss_of(logits: Tensor, targets: Tensor) -> TokenLoss:
    nll = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return TokenLoss(total=nll.sum(), nll=nll.detach().view(targets.shape))


def _unwrapped(model: Any) -> Any:
    for name in ("_orig_mod", "module"):  # torch.compile's, then DDP's
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return _unwrapped(inner)
    return model


@lru_cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str] | None:
    """Return the names of the parameters of `forward`, None where it takes any (**kwargs)."""
    parameters = inspect.signature(forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return frozenset(parameters)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the layers in order: the units of activation checkpointing and of sharding.

    Default: the members of the first nn.ModuleList.
    """
    own = getattr(model, "blocks", None)
    if callable(own):
        return list(own())
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList))
    return list(next(lists, []))


def start(model: Any, batch: int, capacity: int, *, static: bool = False) -> State:
    """Return the state of `batch` rows before their first token; see `LanguageModel.start`.

    Default, for a model without a state: a `TextState`, by which each pass reads all text anew.
    """
    own = _unwrapped(model)
    names = _parameters(type(own).forward)
    if hasattr(own, "start") and (names is None or {"state", "counts"} <= names):
        try:
            state = own.start(batch, capacity, static=static)
        except NotImplementedError:
            state = None
        if isinstance(state, State):
            return state
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return TextState(batch, capacity=capacity, device=device, static=static)


def reads_side_by_side(model: Any) -> bool:
    """Return whether `read_side_by_side` takes the model. Default: no."""
    return bool(getattr(_unwrapped(model), "reads_side_by_side", False))


def read_side_by_side(model: Any, passes: Sequence[Pass]) -> list[Tensor]:
    """Return of each pass the logits after the last token of each row, [batch, vocab].

    They are those of `read` for each, but every weight is read once: a few tokens of many texts
    and many tokens of one take little longer than the larger of them alone.
    """
    own = _unwrapped(model)
    return list(own.read_side_by_side(passes))


def read(
    model: Any,
    tokens: Tensor,
    state: State,
    *,
    counts: Tensor | None = None,
    every: bool = False,
    spans: Tensor | None = None,
) -> Tensor:
    """Read tokens [batch, seq] into `state`; return the logits after the last of each row.

    They are [batch, vocab].

    The model may be wrapped (torch.compile). A model whose forward has no parameter `every` reads
    a token at a time where that is wanted.

    Args:
        state: from `start`; it is updated.
        counts: number of real tokens in each row, the rest being padding (None: all are real); a
            row with 0 stays as it is, and its logits mean nothing.
        every: return the logits after every token, [batch, seq, vocab].
        spans: ids of spans whose tokens see each other, 0 elsewhere; each is read whole.

    Raises:
        ValueError: `spans` are given and the model's forward has no such parameter.
    """
    given: dict[str, Any] = {"state": state, "counts": counts}
    given |= _passed(model, {"spans": spans})
    if isinstance(state, TextState):
        return _read_anew(model, tokens, state, counts, every=every)
    result: Tensor
    if not every:
        result = model(tokens, **given)
        return result
    names = _parameters(type(_unwrapped(model)).forward)
    if names is not None and "every" in names:
        result = model(tokens, **given, every=True)
        return result
    added = torch.full_like(state.lengths, tokens.shape[1]) if counts is None else counts
    steps = [
        model(token[:, None], state=state, counts=(added > index).to(added.dtype))
        for index, token in enumerate(tokens.unbind(1))
    ]
    return torch.stack(steps, dim=1)


def _read_anew(
    model: Any, tokens: Tensor, state: TextState, counts: Tensor | None, *, every: bool
) -> Tensor:
    before = state.lengths
    result = logits(model, state.append(tokens, counts))
    rows = torch.arange(len(tokens), device=tokens.device)
    if not every:
        return result[rows, state.lengths - 1]
    offsets = torch.arange(tokens.shape[1], device=tokens.device)
    positions = (before[:, None] + offsets).clamp(max=result.shape[1] - 1)
    return result[rows[:, None], positions]


def for_inference(model: Any, *, compiled: bool = False) -> Any:
    """Return the model with its weights laid out for decoding. Default: unchanged."""
    prepare = getattr(model, "for_inference", None)
    return prepare(compiled=compiled) if prepare is not None else model


def read_vocabulary(model: nn.Module, texts: Callable[[], Sequence[str]]) -> None:
    """Hand the text of each id to every module that has a method `read_vocabulary`.

    `texts` is called only if there is such a module.
    """
    readers: list[Any] = [m for m in model.modules() if hasattr(m, "read_vocabulary")]
    vocabulary = texts() if readers else ()
    for module in readers:
        module.read_vocabulary(vocabulary)


def learning_rate_scales(model: nn.Module) -> dict[str, float]:
    """Return the learning-rate factors other than 1, by name of the parameter.

    Default: `scales_of_modules`; a model may have a method `learning_rate_scales` instead.
    """
    own = getattr(model, "learning_rate_scales", None)
    return dict(own()) if own is not None else dict(scales_of_modules(model))


def scales_of_modules(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Yield (name, factor) from the modules that have a dict `learning_rate_scale`."""
    for prefix, module in model.named_modules():
        scales: Mapping[str, float] = getattr(module, "learning_rate_scale", {})
        for name, factor in scales.items():
            yield _joined(prefix, name), factor


def lookups(model: nn.Module) -> set[str]:
    """Return the names of lookup tables: the parameters that modules list as `lookups`.

    They are read by row: no optimiser decays them or treats them as matrices. nn.Embedding is not
    among them; see `embeddings`.
    """
    return _listed(model, "lookups")


def embeddings(model: nn.Module) -> set[str]:
    """Return the names of the weights of nn.Embedding modules."""
    return {
        _joined(prefix, "weight")
        for prefix, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }


def heads(model: nn.Module) -> set[str]:
    """Return the names of the weights of output heads.

    A head is a linear layer outside the blocks with `vocab_size` outputs.
    """
    inside = {id(m) for block in blocks(model) for m in block.modules()}
    return {
        _joined(prefix, "weight")
        for prefix, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and id(module) not in inside
        and module.out_features == model.vocab_size
    }


def with_added_rows(model: Any, name: str, stored: Tensor, parameter: Tensor) -> Tensor:
    """Return `stored`, a weight by its name in `model`, with rows for tokens that a task has added.

    They are those that `parameter` has now. `model.added_rows` is their number (default: 0), of
    which the model that is read may know some. A weight that is no embedding or head, or has them
    all, is returned as it is.
    """
    added = getattr(model, "added_rows", 0)
    if not added or name not in embeddings(model) | heads(model):
        return stored
    missing = parameter.shape[0] - stored.shape[0]
    if stored.shape[1:] != parameter.shape[1:] or not 0 < missing <= added:
        return stored
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return torch.cat((stored, full[-missing:].detach().to(stored)))


def count_weights(model: nn.Module) -> int:
    """Return the number of parameters, and of packed weights, a module's `num_frozen`."""
    packed = sum(int(getattr(module, "num_frozen", 0)) for module in model.modules())
    return packed + sum(parameter.numel() for parameter in model.parameters())


def filters(model: nn.Module) -> set[str]:
    """Return the names of the weights of depthwise convolutions, one filter a row.

    They are those of depthwise nn.Conv1d, 2d and 3d, and what modules list as `filters`.
    """
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    by_type = {
        _joined(prefix, "weight")
        for prefix, module in model.named_modules()
        if isinstance(module, convolutions) and module.groups == module.in_channels > 1
    }
    return by_type | _listed(model, "filters")


def _listed(model: nn.Module, attribute: str) -> set[str]:
    return {
        _joined(prefix, name)
        for prefix, module in model.named_modules()
        for name in getattr(module, attribute, ())
    }


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}".removeprefix(".")
