"""`init=hf:DIR` or `init=hf:ORG/NAME[@REVISION]`: a run that starts from a pretrained model.

The folder determines model and tokenizer; its content, not its path, enters the fingerprint.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from models.config import plain
from runner.data.tokenizer_folder import added_token, as_ids, named_token
from runner.data.tokenizers_config import TokenizerConfig
from runner.machine.errors import ConfigError, DataError
from runner.machine.text_files import read_text
from runner.machine.typed_json import read_record

_FILES = ["*.json", "*.safetensors", "*.jinja"]
_DETERMINED = ("model", "tokenizer")
_OF_TRAINING = ("dropout", "z_loss", "neftune", "adapter")
# `causal=false` opens the attention of a model that masked diffusion starts from.
_KEPT = (
    "model.causal",
    *(f"model.{name}" for name in _OF_TRAINING),
    "tokenizer.kind",
    "tokenizer.eos_token",
)


def pretrained_folder(init: str) -> Path:
    """Return the folder that `init` names, downloaded from the hub if it is not a local one.

    Raises:
        ConfigError: `init` is malformed, or neither a folder nor on the hub.
    """
    kind, _, name = init.partition(":")
    if kind != "hf" or not name:
        raise ConfigError(f"init={init!r} must be hf:DIR or hf:ORG/NAME[@REVISION]")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError  # noqa: PLC0415

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=_FILES))
    except (HFValidationError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"init={init}: no such folder, and the hub does not give it ({reason})"
        ) from None


def with_pretrained(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return a composed node with model and tokenizer replaced by those of its `init`, if any.

    What a pretrained folder does not determine (dropout, NEFTune, adapters) stays as composed, and
    so does `model.causal=false`, and `tokenizer.eos_token` with tokenizer.kind=folder.

    Raises:
        ConfigError: the folder's model or tokenizer cannot be used.
    """
    if not node.get("init"):
        return _with_own_end(node)
    from models.pretrained import read_config  # noqa: PLC0415

    folder = pretrained_folder(str(node["init"]))
    cfg: Any
    try:
        cfg, vocab_size = read_config(folder)
    except (ValueError, TypeError, FileNotFoundError, ImportError) as error:
        raise ConfigError(f"init: {error}") from error
    model = plain(cfg, target=True)
    given_model = node["model"]
    composed = given_model if given_model.get("_target_") == model["_target_"] else {}
    model |= {name: composed[name] for name in _OF_TRAINING if name in composed}
    if given_model.get("adapter") is not None:  # whatever model was composed
        if "adapter" not in model:
            raise ConfigError(
                f"init={node['init']}: {type(cfg).__name__} takes no adapter; leave model.adapter "
                "out"
            )
        model["adapter"] = given_model["adapter"]
    model |= {"causal": False} if composed.get("causal") is False else {}
    given = node["tokenizer"] if node["tokenizer"].get("kind") == "folder" else {}
    eos = given.get("eos_token") or _eos_token(folder)
    tokenizer = {
        "_target_": "runner.data.tokenizers_config.TokenizerConfig",
        "kind": "folder",
        "path": str(folder),
        "eos_token": eos,
        "vocab_size": vocab_size,
    }
    return {**node, "init": f"hf:{folder}", "model": model, "tokenizer": tokenizer}


def _with_own_end(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return a node whose tokenizer folder ends documents by the token that it names itself.

    Not where one is given, or where it has the default one, which earlier runs are named by.
    """
    tokenizer = node.get("tokenizer")
    if not isinstance(tokenizer, Mapping) or tokenizer.get("kind") != "folder":
        return dict(node)
    named = None
    if "eos_token" not in tokenizer:
        with suppress(DataError, ValueError):  # building the tokenizer says what is wrong
            folder = Path(str(tokenizer.get("path"))).expanduser()
            if json.dumps(TokenizerConfig.eos_token) not in read_text(folder / "tokenizer.json"):
                named = named_token(folder, "eos_token")
    return {**node, "tokenizer": {**tokenizer, "eos_token": named}} if named else dict(node)


def refuse_determined(init: str | None, keys: Iterable[str]) -> None:
    """Check that `keys`, those that the user sets, do not contradict the folder of `init`.

    Raises:
        ConfigError: one of them is determined by the folder.
    """
    lost = [
        k
        for k in keys
        if init
        and k.partition(".")[0] in _DETERMINED
        and not any(k == kept or k.startswith(f"{kept}.") for kept in _KEPT)
    ]
    if lost:
        raise ConfigError(
            f"init={init} determines model and tokenizer: leave out {', '.join(sorted(lost))} "
            f"(what stays yours: {', '.join(_KEPT)})"
        )


def content_hash(init: str) -> str:
    """Return the hash of the weights that `init` names; this reads all of them."""
    digest = hashlib.sha256()
    for file in sorted(pretrained_folder(init).glob("*.safetensors")):
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]


def _eos_token(folder: Path) -> str:
    """Return the end-of-document token that the folder's tokenizer or model config names."""
    token = named_token(folder, "eos_token")
    if token is not None:
        return token
    file = folder / "tokenizer.json"
    if not file.exists():
        raise ConfigError(
            f"init: {folder} holds no tokenizer.json; transformers writes it: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) with a fast tokenizer"
        )
    ends = as_ids(read_record(folder / "config.json").get("eos_token_id"))
    named = added_token(folder, ends[0]) if ends else None
    if named is not None:
        return named
    raise ConfigError(
        f"init: {folder} does not say which token ends a document; give tokenizer.kind=folder "
        "tokenizer.eos_token=..."
    )
