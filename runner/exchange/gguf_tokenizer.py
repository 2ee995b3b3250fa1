"""The tokenizer inside a GGUF file as the files of transformers, and back.

Two kinds are read: byte-level BPE (`gpt2`), whose pre-tokenizer the file names, and SentencePiece's
BPE with byte fallback (`llama`), whose merges follow from the scores. Byte-level BPE is written.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.data.chat_template import template_of
from runner.data.corpus import encode_with_special
from runner.data.tokenizers import SubwordTokenizer
from runner.exchange.gguf_file import GGUFFile
from runner.machine.errors import ConfigError, DataError

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED = 1, 2, 3, 4, 5
_PREFIX = "tokenizer.ggml"
_ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id"}
_ROLES |= {"pad": "padding_token_id"}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2: dict[str, Any] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    parts = [split | {"invert": False}, _GPT2 | {"use_regex": False}]
    return {"type": "Sequence", "pretokenizers": parts}


_DIGITS = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2],
}
_PRE: dict[str, dict[str, Any]] = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "llama-bpe": _split(_WORDS % "{1,3}"),
    "qwen2": _split(_WORDS % ""),
}
# Names that llama.cpp gives the same rules; of each rule the first name is written.
_SAME = {"starcoder": "smollm", "refact": "smollm", "command-r": "smollm", "codeshell": "smollm"}
_SAME |= {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "smaug-bpe": "llama-bpe"}
_SAME |= {"gpt2": "gpt-2", "phi-2": "gpt-2", "deepseek-r1-qwen": "qwen2"}


def tokenizer_files(source: GGUFFile) -> dict[str, Any]:
    """Return the content of the tokenizer's files by name: what a Hugging Face folder has.

    Raises:
        DataError: the tokenizer is of a kind that is not read, or a key of it is missing.
    """
    kind = source.key(f"{_PREFIX}.model", str)
    if kind not in ("gpt2", "llama"):
        raise DataError(
            f"{source.file}: {_PREFIX}.model={kind!r} is not read; read are: gpt2, llama"
        )
    tokens = source.key(f"{_PREFIX}.tokens", list)
    types = source.key(f"{_PREFIX}.token_type", list, [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise DataError(
            f"{source.file} has {len(tokens)} tokens and {len(types)} token types; convert it again"
        )
    named = _named_tokens(source, tokens)
    parts = _byte_level(source) if kind == "gpt2" else _sentencepiece(source, tokens, types)
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
    added = [i for i, kind_ in enumerate(types) if kind_ in (_UNKNOWN, _CONTROL, _USER)]
    model = {"type": "BPE", "vocab": vocabulary, "fuse_unk": False, **parts.pop("model")}
    bos = named.get("bos") if _adds_bos(source, kind) else None
    content = {
        "version": "1.0",
        "added_tokens": [_added(i, tokens[i], special=types[i] != _USER) for i in added],
        "post_processor": _before(bos, vocabulary) if bos else None,
        "model": model,
        **parts,
    }
    config = {f"{role}_token": token for role, token in named.items()}
    template = source.metadata.get("tokenizer.chat_template")
    ends = [source.metadata.get(f"{_PREFIX}.{k}_token_id") for k in ("eos", "eot")]
    generation: dict[str, Any] = {"eos_token_id": sorted({int(i) for i in ends if i is not None})}
    if "bos" in named:
        generation["bos_token_id"] = vocabulary[named["bos"]]
    return {
        "tokenizer.json": content,
        "tokenizer_config.json": config | ({"chat_template": template} if template else {}),
        "generation_config.json": generation,
    }


def _named_tokens(source: GGUFFile, tokens: Sequence[str]) -> dict[str, str]:
    """Return the text of the special tokens by role: bos, eos, unk, pad."""
    named = {}
    for role, key in _ROLES.items():
        index = source.metadata.get(f"{_PREFIX}.{key}")
        if index is not None and not 0 <= index < len(tokens):
            raise DataError(
                f"{source.file}: {_PREFIX}.{key}={index} is no id of its {len(tokens)} tokens"
            )
        if index is not None:
            named[role] = str(tokens[index])
    if "eos" not in named:
        raise DataError(f"{source.file} has no key {_PREFIX}.eos_token_id; convert it again")
    return named


def _adds_bos(source: GGUFFile, kind: str) -> bool:
    default = kind == "llama" or source.metadata.get(f"{_PREFIX}.pre") in ("llama-bpe", "llama3")
    return bool(source.metadata.get(f"{_PREFIX}.add_bos_token", default))


def _byte_level(source: GGUFFile) -> dict[str, Any]:
    pre = source.key(f"{_PREFIX}.pre", str, "gpt-2")
    pre = _SAME.get(pre, pre)
    if pre not in _PRE:
        raise DataError(
            f"{source.file}: {_PREFIX}.pre={pre!r} is not read; read are: "
            f"{', '.join(sorted([*_PRE, *_SAME]))}"
        )
    return {
        "normalizer": None,
        "pre_tokenizer": _PRE[pre],
        "decoder": _GPT2,
        "model": {
            "merges": source.key(f"{_PREFIX}.merges", list, []),
            "ignore_merges": pre == "llama-bpe",
        },
    }


def _sentencepiece(source: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    prefix = source.key(f"{_PREFIX}.add_space_prefix", bool, True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    before = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    scores = source.key(f"{_PREFIX}.scores", list)
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, replace]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "merges": _merges(tokens, types, scores),
            "byte_fallback": True,
            "unk_token": unknown,
        },
    }


def _merges(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[str]:
    """Return the merges, of which SentencePiece does that of the highest score first."""
    score = {
        token: scores[i] for i, token in enumerate(tokens) if types[i] in (_NORMAL, _USER) and token
    }
    pairs = [
        (-value, score[token[:cut]] + score[token[cut:]], token, cut)
        for token, value in score.items()
        for cut in range(1, len(token))
        if token[:cut] in score and token[cut:] in score
    ]
    return [f"{token[:cut]} {token[cut:]}" for _, _, token, cut in sorted(pairs)]


def _added(index: int, token: str, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": token, "special": special, **flags}


def _before(token: str, vocabulary: Mapping[str, int]) -> dict[str, Any]:
    """Return the post-processor that puts `token` before a text."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB")]
    known = {"id": token, "ids": [vocabulary[token]], "tokens": [token]}
    return {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": [first, texts[0], first, texts[1]],
        "special_tokens": {token: known},
    }


def tokenizer_keys(tokenizer: Any) -> dict[str, Any]:
    """Return the keys of a GGUF file for a tokenizer.

    Raises:
        ConfigError: it is no byte-level BPE, or its pre-tokenizer has no name in llama.cpp.
    """
    if not isinstance(tokenizer, SubwordTokenizer):
        raise ConfigError(
            f"{type(tokenizer).__name__} has no form in GGUF; train with tokenizer=bpe or folder"
        )
    content = json.loads(tokenizer.serialised)
    pre = next((n for n, rule in _PRE.items() if rule == content["pre_tokenizer"]), None)
    if content["model"]["type"] != "BPE" or pre is None or content["normalizer"]:
        raise ConfigError(
            "only byte-level BPE with the pre-tokenizer of "
            f"{', '.join(_PRE)} is written as GGUF; export to hf"
        )
    tokens = [f"[PAD{index}]" for index in range(tokenizer.vocab_size)]
    types = [_UNUSED] * len(tokens)
    for token, index in content["model"]["vocab"].items():
        tokens[index], types[index] = token, _NORMAL
    for token in content["added_tokens"]:
        kind = _CONTROL if token["special"] else _USER
        tokens[token["id"]], types[token["id"]] = token["content"], kind
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    template = template_of(tokenizer)
    started = encode_with_special(tokenizer, "")
    return {
        f"{_PREFIX}.model": "gpt2",
        f"{_PREFIX}.pre": pre,
        f"{_PREFIX}.tokens": tokens,
        f"{_PREFIX}.token_type": types,
        f"{_PREFIX}.merges": merges,
        f"{_PREFIX}.eos_token_id": tokenizer.eos,
        f"{_PREFIX}.add_bos_token": bool(len(started)) and int(started[0]) == tokenizer.bos,
        f"{_PREFIX}.add_space_prefix": False,
    } | _present(
        {
            f"{_PREFIX}.bos_token_id": tokenizer.bos,
            f"{_PREFIX}.eot_token_id": next(
                (i for i in tokenizer.ends if i != tokenizer.eos), None
            ),
            "tokenizer.chat_template": template,
        }
    )


def _present(keys: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if value is not None}


def write_files(files: Mapping[str, Any], folder: Path) -> None:
    """Write the files of `tokenizer_files`."""
    for name, content in files.items():
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (folder / name).write_text(text + "\n", encoding="utf-8")
