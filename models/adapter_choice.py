"""Several adapters on one model, of which each forward pass computes with one, or with none."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.adapter import adapted_layers, base_state


class AdapterChoice:
    """Which adapter a model computes with.

    Attributes:
        names: of the adapters there are.
        chosen: the one in use (None: the model without adapters).
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.chosen: str | None = None

    @contextmanager
    def of(self, name: str | None) -> Iterator[None]:
        """Compute with the adapter `name` inside the context."""
        self.chosen = name
        try:
            yield
        finally:
            self.chosen = None


class ChoosingLinear(nn.Module):
    """A linear layer that some of the adapters change.

    Args:
        layers: by name of the adapter the layer that it makes of `base`.
    """

    def __init__(self, base: nn.Module, layers: dict[str, nn.Module], choice: AdapterChoice):
        super().__init__()
        self.base, self.layers, self.choice = base, nn.ModuleList(layers.values()), choice
        # Not a ModuleDict: names may have dots.
        self.places: dict[str | None, int] = {name: i for i, name in enumerate(layers)}

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        place = self.places.get(self.choice.chosen)
        y: Tensor = self.base(x) if place is None else self.layers[place](x)
        return y


def put_adapters(model: nn.Module, adapted: Mapping[str, nn.Module]) -> AdapterChoice:
    """Put adapters on `model`, in place; return the choice among them, which is none at first.

    Args:
        adapted: by name of the adapter, a model of the same base in full that has it alone. Its
            base is given up for that of `model`.

    Raises:
        ValueError: one has no adapter, or its base is not `model`, bit for bit.
    """
    choice, layers = AdapterChoice(tuple(adapted)), dict[str, dict[str, nn.Module]]()
    if adapted_layers(model):
        raise ValueError("the model has an adapter itself; give the base that it was trained on")
    weights = model.state_dict()
    for name, other in adapted.items():
        own = adapted_layers(other)
        if not own:
            raise ValueError(f"adapter {name} is a whole model without an adapter")
        if not _same(weights, base_state(other)):
            raise ValueError(
                f"adapter {name} has another base than this model, or holds it in few bits; give "
                "the base that it was trained on, or the adapter's run alone"
            )
        for path, one in own.items():
            layers.setdefault(path, {})[name] = one
    for path, of_layer in layers.items():
        base: Any = model.get_submodule(path)
        for layer in of_layer.values():
            layer.base = base
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, ChoosingLinear(base, of_layer, choice))
    return choice


def _same(weights: Mapping[str, Tensor], others: Mapping[str, Any]) -> bool:
    return weights.keys() == others.keys() and all(
        isinstance(others[name], Tensor) and torch.equal(weight, others[name])
        for name, weight in weights.items()
    )
