"""What the house asks of a model: `forward` and `vocab_size` of an nn.Module; all else has a default here.

`LanguageModel` is such a module with everything said. Of another one: `forward(tokens, targets=None, ...)` returns
logits [batch, seq, vocab], or with targets a `TokenLoss`; it gets `documents`, `noise`, `weights` only if it takes them.
Which of its parameters are embeddings, heads and filters is found by type. Its config must have `build(vocab_size,
seed)`; the sizes that it does not say are counted: `models/sizes.py`.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from kernels.cross_entropy import IGNORE
from models.language_model import TokenLoss


def token_loss(
    model: Any,
    tokens: Tensor,
    targets: Tensor,
    *,
    documents: Tensor | None = None,
    noise: Any = None,
    weights: Any = None,
) -> TokenLoss:
    """Return the loss of a batch under `model`, which may be wrapped (DDP, FSDP, torch.compile) and is called once.

    Raises:
        ValueError: `weights` are given and the model takes none.
    """
    taken = _parameters(type(_unwrapped(model)).forward)
    given = {"documents": documents, "noise": noise, "weights": weights}
    more = {k: v for k, v in given.items() if v is not None and (taken is None or k in taken)}
    if weights is not None and "weights" not in more:
        name = type(_unwrapped(model)).__name__
        raise ValueError(f"{name}.forward takes no `weights` of tokens, which this task needs")
    if taken is not None and "targets" not in taken:
        return _loss_of(model(tokens, **more), targets)
    out = model(tokens, targets, **more)
    return out if isinstance(out, TokenLoss) else _loss_of(out, targets)


def logits(model: Any, tokens: Tensor, *, documents: Tensor | None = None) -> Tensor:
    """Return the logits of a batch, [batch, seq, vocab]; see `token_loss`."""
    taken = _parameters(type(_unwrapped(model)).forward)
    more = (
        {}
        if documents is None or (taken and "documents" not in taken)
        else {"documents": documents}
    )
    found: Tensor = model(tokens, **more)
    return found


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
    """Return the names of what `forward` takes, None where it takes any."""
    found = inspect.signature(forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in found.values()):
        return None
    return frozenset(found)


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the layers in order, units of recomputation and sharding: by default those of the first nn.ModuleList."""
    own = getattr(model, "blocks", None)
    if callable(own):
        return list(own())
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList))
    return list(next(lists, []))


def start(model: Any, batch: int, capacity: int, *, static: bool = False) -> Any:
    """Return the state of rows that have read nothing; see `LanguageModel.start`.

    Raises:
        NotImplementedError: the model keeps none; it is asked to read its text anew for each token.
    """
    if not hasattr(model, "start"):
        raise NotImplementedError(f"{type(model).__name__} keeps no state")
    return model.start(batch, capacity, static=static)


def for_inference(model: Any, *, compiled: bool = False) -> Any:
    """Return the model laid out for decoding; by default as it is."""
    prepare = getattr(model, "for_inference", None)
    return prepare(compiled=compiled) if prepare is not None else model


def read_vocabulary(model: nn.Module, texts: Callable[[], Sequence[str]]) -> None:
    """Tell the modules that have a `read_vocabulary` what text each id stands for."""
    curious: list[Any] = [m for m in model.modules() if hasattr(m, "read_vocabulary")]
    told = texts() if curious else ()
    for module in curious:
        module.read_vocabulary(told)


def learning_rate_scales(model: nn.Module) -> dict[str, float]:
    """Return the learning-rate factor of each parameter that is not 1, by name.

    A module says so of its own by an attribute `learning_rate_scale` (name -> factor), a model by a method
    `learning_rate_scales`.
    """
    own = getattr(model, "learning_rate_scales", None)
    return dict(own()) if own is not None else dict(scales_of_modules(model))


def scales_of_modules(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Yield (name, factor) as the modules of `model` say."""
    for prefix, module in model.named_modules():
        scales: Mapping[str, float] = getattr(module, "learning_rate_scale", {})
        for name, factor in scales.items():
            yield _joined(prefix, name), factor


def lookups(model: nn.Module) -> set[str]:
    """Return the parameters that modules list as `lookups`: tables that are read by row, never decayed, no matrices."""
    return _listed(model, "lookups")


def embeddings(model: nn.Module) -> set[str]:
    """Return the weights of embeddings: those of nn.Embedding."""
    return {
        _joined(prefix, "weight")
        for prefix, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }


def heads(model: nn.Module) -> set[str]:
    """Return the weights of output heads: of linear layers outside the blocks with a row for each id."""
    inside = {id(m) for block in blocks(model) for m in block.modules()}
    return {
        _joined(prefix, "weight")
        for prefix, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and id(module) not in inside
        and module.out_features == model.vocab_size
    }


def filters(model: nn.Module) -> set[str]:
    """Return the weights of depthwise convolutions, a filter a row: of nn.Conv*d, and what modules list as `filters`."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = {
        _joined(prefix, "weight")
        for prefix, module in model.named_modules()
        if isinstance(module, convolutions) and module.groups == module.in_channels > 1
    }
    return found | _listed(model, "filters")


def _listed(model: nn.Module, attribute: str) -> set[str]:
    return {
        _joined(prefix, name)
        for prefix, module in model.named_modules()
        for name in getattr(module, attribute, ())
    }


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}".removeprefix(".")
