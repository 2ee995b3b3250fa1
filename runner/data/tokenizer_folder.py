"""What a Hugging Face folder says of its special tokens, read as transformers 5 reads it.

Which of them stand around a text, the post-processor of tokenizer.json says and nothing else
(`add_bos_token` of tokenizer_config.json is of older versions, which wrote it into the
post-processor too). Which tokens they are, tokenizer_config.json says, and which of them end a
text that the model generates, generation_config.json.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from runner.machine.errors import DataError
from runner.machine.text_files import read_text
from runner.machine.typed_json import read_record

_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
GENERATION, _TEMPLATE = "generation_config.json", "chat_template.jinja"

# Our names of the tokens of masked diffusion, whatever their text is.
MASK, EXPAND, DELETE = "<mask>", "<expand>", "<delete>"
_MODEL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Where tokenizer_config.json does not name it, the class of transformers does.
_BOS_OF_CLASS = {
    "LlamaTokenizer": "<s>",
    "CodeLlamaTokenizer": "<s>",
    "GemmaTokenizer": "<bos>",
    "GPT2Tokenizer": "<|endoftext|>",
}


@dataclass(frozen=True)
class FolderFiles:
    """What goes with a tokenizer.json: kept with a run, so that an export gives it back.

    Args:
        bos: the token that stands before an empty text (None: that which ends a document).
        ends: the ids that end a generated text, in the folder's order.
        files: the parsed content of the folder's further files by name; text of a template.
        model_ids: the ids of special tokens in config.json, by key.
        mask: the mask token of a masked-diffusion model.
    """

    bos: str | None = None
    ends: tuple[int, ...] = ()
    files: Mapping[str, Any] = field(default_factory=dict)
    model_ids: Mapping[str, Any] = field(default_factory=dict)
    mask: str | None = None


def read_folder(folder: Path) -> FolderFiles:
    """Return what the files of a folder say besides tokenizer.json.

    Raises:
        DataError: a file is not JSON, or not an object.
    """
    files: dict[str, Any] = {}
    for name in (_CONFIG, _MAP, GENERATION):
        if (folder / name).exists():
            files[name] = read_record(folder / name)
    for file in sorted([folder / _TEMPLATE, *folder.glob("additional_chat_templates/*.jinja")]):
        if file.exists():
            files[str(file.relative_to(folder))] = read_text(file)
    model = read_record(folder / "config.json") if (folder / "config.json").exists() else {}
    model_ids = {key: model[key] for key in model if key in _MODEL_IDS}
    ends = files.get(GENERATION, {}).get("eos_token_id", model_ids.get("eos_token_id"))
    bos = named_token(folder, "bos_token")
    return FolderFiles(bos, as_ids(ends), files, model_ids, mask_token(folder))


def as_ids(given: int | list[int] | None) -> tuple[int, ...]:
    """Return the ids of a key that holds one, several or none."""
    listed = given if isinstance(given, list) else [given]
    return tuple(int(index) for index in listed if index is not None)


def named_token(folder: Path, name: str) -> str | None:
    """Return the text of the special token `name`, such as bos_token; None if there is none."""
    config, legacy = (
        read_record(folder / file) if (folder / file).exists() else {} for file in (_CONFIG, _MAP)
    )
    if "added_tokens_decoder" in config and config.get(name):
        legacy = {}
    token = legacy.get(name) or config.get(name)
    if name == "bos_token" and name not in config and not token:
        token = _BOS_OF_CLASS.get(str(config.get("tokenizer_class")).removesuffix("Fast"))
    return str(token["content"] if isinstance(token, dict) else token) if token else None


def mask_token(folder: Path) -> str | None:
    """Return the text of the mask token, which LLaDA's config.json names by its id alone."""
    named, config = named_token(folder, "mask_token"), folder / "config.json"
    if named is not None or not config.exists():
        return named
    ids = as_ids(read_record(config).get("mask_token_id"))
    return added_token(folder, ids[0]) if ids else None


def named_tokens(folder: Path) -> tuple[str, ...]:
    """Return our names of the tokens of masked diffusion that a folder has."""
    file = folder / GENERATION
    resizing = resizing_ids(read_record(file)) if file.exists() else {}
    return (*([MASK] if mask_token(folder) is not None else []), *resizing)


def resizing_ids(generation: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of `<expand>` and `<delete>` that DreamOn's generation_config.json names."""
    ids = {EXPAND: generation.get("expand_token_id"), DELETE: generation.get("delete_token_id")}
    return {name: int(index) for name, index in ids.items() if index is not None}


def added_token(folder: Path, index: int) -> str | None:
    """Return the text of a token that tokenizer.json adds to the vocabulary, None if it does not.

    Raises:
        DataError: the file is missing, or no JSON object.
    """
    added = read_record(folder / "tokenizer.json").get("added_tokens", [])
    return next((str(token["content"]) for token in added if token["id"] == index), None)


@lru_cache(maxsize=4)  # asked for every cell of a sweep
def adds_special_tokens(serialised: str) -> bool:
    """Return whether a tokenizer.json puts special tokens around a text.

    Raises:
        DataError: it is not JSON.
    """
    from tokenizers import Tokenizer  # noqa: PLC0415

    try:
        data = json.loads(serialised)
    except ValueError as error:
        raise DataError(f"tokenizer.json is not JSON ({error}); restore the file") from None
    if not data.get("post_processor"):
        return False
    model = {"type": "BPE", "vocab": {}, "merges": []}  # the vocabulary takes a second to parse
    parts: dict[str, Any] = {
        "model": model,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
    }
    small = Tokenizer.from_str(json.dumps(data | parts | {"decoder": None}))
    return bool(small.num_special_tokens_to_add(is_pair=False))
