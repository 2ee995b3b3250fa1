"""A model as a folder that others can read: config.json and safetensors, in transformers' layout where there is one.

    DIR/config.json                                     the architecture
    DIR/model.safetensors                               or shards and model.safetensors.index.json

What transformers does not know is written under its own class (`model_type: espalier`), and read back by it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.config import plain, target_class, thaw
from models.decoder_config import DecoderConfig
from models.language_model import LanguageModel, ModelConfig
from models.layouts import LAYOUTS, Layout, Source

OWN = "espalier"
_UNREAD = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # tables that models compute


def save_pretrained(
    model: LanguageModel,
    folder: Path,
    *,
    layout: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    more: Mapping[str, Any] | None = None,
) -> str:
    """Write config.json and weights; return the architecture written.

    Args:
        layout: llama, qwen3, gpt2 or espalier (None: the first that can hold the model).
        dtype: of the weights (None: as they are); max_shard_size: of a file, "200MB".
        more: further keys of config.json (ids of special tokens, ...).

    Raises:
        FileExistsError: the folder holds something. ValueError: the layout cannot hold the model.
    """
    from huggingface_hub import save_torch_state_dict  # noqa: PLC0415

    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; choose a new folder")
    cfg: Any = model.cfg
    chosen, given = _choose(cfg, model.vocab_size, layout)
    own = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if isinstance(chosen, Layout):
        sources = chosen.sources(cfg)
        state = {
            n: t for name, tensor in own.items() for n, t in sources[name].split(tensor).items()
        }
    else:
        state = own
    kept = {name: tensor.to(dtype) if dtype else tensor for name, tensor in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(kept, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
    kind = str(next(iter(kept.values())).dtype).removeprefix("torch.")
    whole = given | {"dtype": kind, "torch_dtype": kind} | dict(more or {})
    (folder / "config.json").write_text(json.dumps(whole, indent=2) + "\n")
    return str(given["architectures"][0])


def _choose(cfg: Any, vocab_size: int, layout: str | None) -> tuple[Layout | None, dict[str, Any]]:
    names = [known.model_type for known in LAYOUTS]
    if layout not in (None, OWN, *names):
        raise ValueError(f"layout={layout!r} is none of: {', '.join(names)}, {OWN}")
    for known in LAYOUTS:
        if layout not in (None, known.model_type):
            continue
        reason = type(cfg).__name__
        if isinstance(cfg, DecoderConfig):
            written = known.write(cfg, vocab_size)
            if isinstance(written, dict):
                return known, written
            reason = written
        if layout is not None:
            raise ValueError(
                f"layout={layout} cannot hold this model ({reason}); leave the layout out, or take {OWN}"
            )
    architecture = type(cfg).__name__.removesuffix("Config")
    return None, {
        "model_type": OWN,
        "architectures": [architecture],
        "vocab_size": vocab_size,
        "config": plain(cfg, target=True),
    }


def read_config(folder: Path) -> tuple[ModelConfig, int]:
    """Return (config, vocabulary size) of a folder.

    Raises:
        FileNotFoundError: no config.json. ValueError: an architecture that is not read.
    """
    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{file} does not exist; a model folder holds config.json and *.safetensors"
        )
    given = json.loads(file.read_text())
    if given.get("model_type") == OWN:
        own = dict(given["config"])
        return thaw(target_class(own.pop("_target_")), own), int(given["vocab_size"])
    layout = _layout_of(given, file)
    try:
        return layout.read(given), int(given["vocab_size"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}: {error.args[0]!s}") from error


def _layout_of(given: Mapping[str, Any], file: Path) -> Layout:
    for layout in LAYOUTS:
        if layout.model_type == given.get("model_type"):
            return layout
    names = ", ".join(layout.model_type for layout in LAYOUTS)
    raise ValueError(
        f"{file}: model_type={given.get('model_type')!r} is not read; read are: {names}, {OWN}"
    )


def load_pretrained(folder: Path) -> LanguageModel:
    """Return the model of a folder, its weights in fp32."""
    cfg, vocab_size = read_config(folder)
    with torch.device("meta"):
        model = cfg.build(vocab_size, 0)
    model = model.to_empty(device="cpu")
    load_weights(folder, model)
    return model


def load_weights(
    folder: Path, model: nn.Module, *, put: Callable[[Tensor, Tensor], Tensor] | None = None
) -> None:
    """Fill `model` in place from the folder's files, tensor by tensor; `put` (tensor, place) may shard one.

    Raises:
        FileNotFoundError: no safetensors. ValueError: a tensor is missing, left over or of another shape.
    """
    given = json.loads((folder / "config.json").read_text())
    wanted = model.state_dict()
    if given.get("model_type") == OWN:
        sources = {name: Source((name,)) for name in wanted}
    else:
        layout = _layout_of(given, folder / "config.json")
        sources = layout.sources(model.cfg)  # type: ignore[arg-type]
    shelf = _Shelf(folder)
    with torch.no_grad():
        for name, place in wanted.items():
            tensor = sources[name].join([shelf.take(theirs) for theirs in sources[name].names])
            if tensor.shape != place.shape:
                raise ValueError(
                    f"{folder}: {sources[name].names[0]} is {tuple(tensor.shape)}, {tuple(place.shape)} wanted"
                )
            place.copy_(put(tensor, place) if put else tensor)
    shelf.refuse_leftovers()


class _Shelf:
    """The tensors of a folder by name, read one at a time."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open  # noqa: PLC0415

        self.folder = folder
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"{folder} holds no *.safetensors; transformers writes them: "
                "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
            )
        opened = [safe_open(file, framework="pt") for file in files]  # type: ignore[no-untyped-call]
        self.places: dict[str, Any] = {name: file for file in opened for name in file.keys()}  # type: ignore[no-untyped-call]  # noqa: SIM118
        self.left = set(self.places)

    def take(self, name: str) -> Tensor:
        """Return a tensor; GPT-2's first checkpoints lack the prefix."""
        found = next(
            (n for n in (name, name.removeprefix("transformer.")) if n in self.places), None
        )
        if found is None:
            raise ValueError(f"{self.folder} lacks the tensor {name}")
        self.left.discard(found)
        tensor: Tensor = self.places[found].get_tensor(found)
        return tensor

    def refuse_leftovers(self) -> None:
        """What nobody reads is a sign of another architecture; a tied head may stand there twice."""
        odd = sorted(n for n in self.left if not n.endswith(_UNREAD) and n != "lm_head.weight")
        if odd:
            raise ValueError(
                f"{self.folder} holds tensors that its architecture does not have: {', '.join(odd[:3])}"
            )
