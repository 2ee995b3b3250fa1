"""Our tokenizers as files that transformers reads, id for id."""

import json
from pathlib import Path
from typing import Any

from runner.data.tokenizers import ByteTokenizer, CharTokenizer, SubwordTokenizer, Tokenizer

_END = "<|endoftext|>"


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json; `context` is the longest text in tokens."""
    if isinstance(tokenizer, SubwordTokenizer):
        text, end = tokenizer.serialised, tokenizer.eos_token
    elif isinstance(tokenizer, CharTokenizer):
        text, end = _units({c: i for i, c in enumerate(tokenizer.characters)}, by_bytes=False), _END
    else:
        assert isinstance(tokenizer, ByteTokenizer)
        text, end = _units({c: i for i, c in enumerate(_printable())}, by_bytes=True), _END
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


def _units(vocabulary: dict[str, int], *, by_bytes: bool) -> str:
    """Return a tokenizer of single characters (or bytes): BPE that merges nothing."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers  # noqa: PLC0415
    from tokenizers import Tokenizer as Inner  # noqa: PLC0415

    inner: Any = Inner(models.BPE(vocab=vocabulary, merges=[]))
    if by_bytes:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel() if by_bytes else decoders.Fuse()
    inner.add_special_tokens([AddedToken(_END, special=True, normalized=False)])
    return str(inner.to_str())


def _printable() -> list[str]:
    """Return the character that stands for each byte in byte-level tokenizers (GPT-2's table)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in kept]
    return [chr(b) if b in kept else chr(256 + moved.index(b)) for b in range(256)]
