"""Models as folders that transformers can read, where it has the architecture.

    DIR/config.json          the architecture
    DIR/model.safetensors    the weights, or shards and model.safetensors.index.json

Other models are written with `model_type: espalier` and the config of their class; only this module
reads those.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.adapter import FrozenLinear, base_loaded, base_state
from models.compressed_layout import IN_FULL, compressed_state
from models.config import plain, target_class, thaw
from models.contract import with_added_rows
from models.decoder_config import DecoderConfig
from models.diffusion_layouts import Dream, LLaDA
from models.encoder_decoder_config import EncoderDecoderConfig
from models.language_model import LanguageModel
from models.layouts import GPT2, Layout, Llama, Mixtral, Qwen2, Qwen3, TensorSource
from models.rounded_linear import start_steps, step_names
from models.stored_linear import stored_layers

OWN, T5, _HEAD = "espalier", "t5", "lm_head.weight"
LAYOUTS: tuple[Layout, ...] = (Llama(), Qwen2(), Qwen3(), Mixtral(), GPT2(), Dream(), LLaDA())
_IGNORED = (  # computed by our models, copies, or of no use
    ".attn.bias",
    ".attn.masked_bias",
    ".rotary_emb.inv_freq",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    ".EncDecAttention.relative_attention_bias.weight",
)


def save_pretrained(
    model: LanguageModel,
    folder: Path,
    *,
    layout: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    extra_keys: Mapping[str, Any] | None = None,
) -> str:
    """Write config.json and weights; return the name of the architecture written.

    Weights that are stored in few bits are written so, see `models.compressed_layout`.

    Args:
        layout: llama, qwen2, qwen3, mixtral, gpt2 or espalier (None: the first that can hold the
            model).
        dtype: of the weights (None: unchanged).
        max_shard_size: of a file, "200MB" for example.
        extra_keys: further keys of config.json (ids of special tokens, ...).

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: the layout is unknown or cannot hold the model, or its few bits.
    """
    from huggingface_hub import save_torch_state_dict  # noqa: PLC0415

    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; choose a new folder")
    cfg: Any = model.cfg
    chosen, keys = _choose(cfg, model.vocab_size, layout)
    if stored_layers(model):
        if chosen is None:
            raise ValueError(f"compressed-tensors has no form of layout={OWN}; {IN_FULL}")
        state, keys["quantization_config"] = compressed_state(model, chosen, dtype)
    else:
        state = _state(model, chosen, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(state, folder, max_shard_size=max_shard_size, metadata={"format": "pt"})
    kind = str(dtype or next(iter(state.values())).dtype).removeprefix("torch.")
    keys |= {"dtype": kind, "torch_dtype": kind, **(extra_keys or {})}
    (folder / "config.json").write_text(json.dumps(keys, indent=2) + "\n")
    for file in folder.glob("*.safetensors"):  # made for their owner alone, whatever the umask
        shutil.copymode(folder / "config.json", file)
    return str(keys["architectures"][0])


def _state(
    model: LanguageModel, layout: Layout | None, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return the tensors of a model by their names in `layout`, None: its own."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if layout is not None:
        sources = layout.sources(model.cfg)  # type: ignore[arg-type]
        split = [sources[name].split(tensor) for name, tensor in state.items()]
        state = {name: part for parts in split for name, part in parts.items()}
    return state if dtype is None else {name: part.to(dtype) for name, part in state.items()}


def _choose(cfg: Any, vocab_size: int, layout: str | None) -> tuple[Layout | None, dict[str, Any]]:
    """Return (layout, keys of config.json); the layout is None for a model written as our own."""
    names = [known.model_type for known in LAYOUTS]
    if layout not in (None, OWN, *names):
        raise ValueError(f"layout={layout!r} is none of: {', '.join(names)}, {OWN}")
    for known in LAYOUTS:
        if layout not in (None, known.model_type):
            continue
        reason = type(cfg).__name__
        if isinstance(cfg, DecoderConfig):
            keys = known.write(cfg, vocab_size)
            if isinstance(keys, dict):
                return known, keys
            reason = keys
        if layout is not None:
            raise ValueError(
                f"layout={layout} cannot hold this model ({reason}); "
                f"leave the layout out, or take {OWN}"
            )
    architecture = type(cfg).__name__.removesuffix("Config")
    return None, {
        "model_type": OWN,
        "architectures": [architecture],
        "vocab_size": vocab_size,
        "config": plain(cfg, target=True),
    }


def read_config(folder: Path) -> tuple[Any, int]:
    """Return (config, vocabulary size) of the model in a folder.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: the architecture, or one of its options, is not supported.
    """
    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{file} does not exist; a model folder holds config.json and *.safetensors"
        )
    config = _read_json(file)
    kind = config.get("model_type")
    layout = None if kind in (OWN, T5) else _layout_of(config, file)
    try:
        if kind == T5:
            stored = _TensorFiles(folder).file_of if any(folder.glob("*.safetensors")) else {}
            own_head = _HEAD in stored
            t5 = EncoderDecoderConfig.from_transformers(config, own_head=own_head)
            return t5, int(config["vocab_size"])
        if layout is None:
            own = dict(config["config"])
            return thaw(target_class(own.pop("_target_")), own), int(config["vocab_size"])
        cfg, vocab_size = layout.read({**layout.defaults, **config}), layout.rows(config)
    except KeyError as error:
        raise ValueError(f"{file} lacks the key {error.args[0]}") from None
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"{file}: {error}") from error
    if cfg.tied and any(folder.glob("*.safetensors")):
        _TensorFiles(folder).refuse_other_head(layout.sources(cfg)["embedding.weight"].names[0])
    return cfg, vocab_size


def is_shifted(folder: Path) -> bool:
    """Return whether the output of a folder's diffusion model at a token predicts the next one.

    Raises:
        ValueError: see `read_config`.
    """
    file = folder / "config.json"
    config = _read_json(file)
    own = config.get("model_type") in (OWN, T5)
    return bool(config.get("shift", False if own else _layout_of(config, file).shift))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); restore it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object; restore it")
    return content


def _layout_of(config: Mapping[str, Any], file: Path) -> Layout:
    if config.get("quantization_config"):
        raise ValueError(f"{file} has a quantization_config; only weights in full are read")
    for layout in LAYOUTS:
        if layout.model_type == config.get("model_type"):
            return layout
    names = ", ".join((*(layout.model_type for layout in LAYOUTS), T5, OWN))
    raise ValueError(
        f"{file}: model_type={config.get('model_type')!r} is not read; read are: {names}"
    )


def load_pretrained(folder: Path) -> LanguageModel:
    """Return the model in a folder, its weights in fp32.

    Raises:
        FileNotFoundError, ValueError: see `read_config` and `load_weights`.
    """
    cfg, vocab_size = read_config(folder)
    with torch.device("meta"):
        built: LanguageModel = cfg.build(vocab_size, 0)
    model = built.to_empty(device="cpu")
    load_weights(folder, model)
    return model


def load_weights(
    folder: Path, model: nn.Module, *, put: Callable[[Tensor, Tensor], Tensor] | None = None
) -> None:
    """Fill `model` in place from the files of a folder, one tensor at a time; its adapters stay.

    Args:
        put: called with (tensor read, parameter), returns what is copied into the parameter: its
            shard of the tensor, for example.

    Raises:
        FileNotFoundError: the folder has no safetensors.
        ValueError: a tensor is missing, left over or of another shape.
    """
    config = _read_json(folder / "config.json")
    parameters = _stored_parameters(folder, model)
    if config.get("model_type") in (OWN, T5):
        sources = {name: TensorSource((name,)) for name in parameters}
    else:
        layout = _layout_of(config, folder / "config.json")
        sources = layout.sources(model.cfg)  # type: ignore[arg-type]
    files = _TensorFiles(folder)
    if "head.weight" not in sources and "embedding.weight" in sources:
        files.refuse_other_head(sources["embedding.weight"].names[0])
    with torch.no_grad():
        for name, parameter in parameters.items():
            source = sources[name]
            tensor = source.join([files.read(stored) for stored in source.names])
            if isinstance(parameter, Tensor):
                tensor = with_added_rows(model, name, tensor, parameter)
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"{folder}: {source.names[0]} is {tuple(tensor.shape)}, "
                    f"{tuple(parameter.shape)} wanted; config.json is of another model"
                )
            if isinstance(parameter, FrozenLinear):
                parameter.take(tensor)
            else:
                parameter.copy_(put(tensor, parameter) if put else tensor)
    base_loaded(model, put)
    if step_names(model) - parameters.keys():
        start_steps(model)
    files.refuse_unread()


def _stored_parameters(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Return what a folder holds of a model: not LSQ's steps, where it was trained in full."""
    there, steps = _TensorFiles(folder).file_of, step_names(model)
    return {n: p for n, p in base_state(model).items() if n not in steps or n in there}


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers would read the weights from."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        shards = set(_read_json(index)["weight_map"].values())
        files = [folder / name for name in sorted(shards)]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no *.safetensors; transformers writes them: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
        )
    if missing := [file.name for file in files if not file.exists()]:
        raise FileNotFoundError(f"{folder} lacks {missing[0]}, which {index.name} names")
    return files


def _open(file: Path) -> Any:
    from safetensors import safe_open  # noqa: PLC0415

    return safe_open(file, framework="pt")  # type: ignore[no-untyped-call]


class _TensorFiles:
    """The tensors of a folder's safetensors by name, read one at a time.

    A file is opened for each: it is mapped into memory, and what was read of it would stay there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file_of: dict[str, Path] = {}
        for file in _weight_files(folder):
            with _open(file) as opened:
                names = opened.keys()
            if twice := sorted(self.file_of.keys() & set(names)):
                raise ValueError(
                    f"{folder} holds {twice[0]} in two files; delete the file that is not of this "
                    "model, or give model.safetensors.index.json"
                )
            self.file_of |= dict.fromkeys(names, file)
        self.unread = set(self.file_of)

    def read(self, name: str) -> Tensor:
        """Return the tensor `name`, or, as in GPT-2's first checkpoints, the one without prefix."""
        names = (name, name.removeprefix("transformer."))
        stored = next((n for n in names if n in self.file_of), None)
        if stored is None:
            raise ValueError(
                f"{self.folder} lacks the tensor {name}; config.json is of another model"
            )
        self.unread.discard(stored)
        with _open(self.file_of[stored]) as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor

    def refuse_other_head(self, embedding: str) -> None:
        """Raise ValueError if a head is stored that is not the embedding to which it is tied."""
        if _HEAD not in self.file_of:
            return
        if not torch.equal(self.read(_HEAD).float(), self.read(embedding).float()):
            raise ValueError(
                f"{self.folder}: config.json ties the head to the embedding, but {_HEAD} is not "
                f"{embedding}; set tie_word_embeddings to false there, or delete {_HEAD}"
            )

    def refuse_unread(self) -> None:
        """Raise ValueError if tensors were not read: the architecture is another one."""
        names = sorted(self.unread)
        others = [name for name in names if not name.endswith(_IGNORED)]
        if others:
            raise ValueError(
                f"{self.folder} holds tensors that its architecture does not have: "
                f"{', '.join(others[:3])}; config.json is of another model"
            )
