"""Export of our tokenizers to the files of transformers, with the same ids."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runner.data.corpus import end_ids
from runner.data.special_tokens import WithTokens
from runner.data.tokenizer_folder import DELETE, EXPAND, GENERATION, MASK, as_ids
from runner.data.tokenizers import ByteTokenizer, CharTokenizer, SubwordTokenizer, Tokenizer

_END, _MAP = "<|endoftext|>", "special_tokens_map.json"


def can_write(tokenizer: object) -> bool:
    """Return whether `write_tokenizer` has a form for `tokenizer`."""
    if isinstance(tokenizer, WithTokens):
        tokenizer = tokenizer.inner
    return isinstance(tokenizer, (SubwordTokenizer, CharTokenizer, ByteTokenizer))


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and what else its folder had beside them.

    Those of a folder keep what they said (special tokens, chat template, generation_config.json).
    `context` is the model's, in tokens.
    """
    if isinstance(tokenizer, WithTokens):
        write_tokenizer(tokenizer.inner, folder, context)
        _add_tokens(tokenizer, folder)
        return
    given: dict[str, Any] = {}
    if isinstance(tokenizer, SubwordTokenizer):
        text, end = tokenizer.serialised, tokenizer.eos_token
        given = dict(tokenizer.beside.files)
        if _MAP in given:
            given[_MAP] = {**given[_MAP], "eos_token": end}
    elif isinstance(tokenizer, CharTokenizer):
        text, end = _bpe_without_merges(tokenizer.characters, by_bytes=False), _END
    else:
        assert isinstance(tokenizer, ByteTokenizer)
        text, end = _bpe_without_merges(_byte_characters(), by_bytes=True), _END
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **given.pop("tokenizer_config.json", {}),
        "eos_token": end,
        "model_max_length": context,
    }
    for name, content in {"tokenizer_config.json": config, **given}.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def _add_tokens(tokenizer: WithTokens, folder: Path) -> None:
    """Add the special tokens to the files of the inner tokenizer, under their ids.

    The mask is named in tokenizer_config.json, `<expand>` and `<delete>` are in
    generation_config.json, where DreamOn has them. Where a folder's model has rows without a token,
    these get one, so that the ids fit.
    """
    from tokenizers import Tokenizer as Inner  # noqa: PLC0415

    inner: Any = Inner.from_file(str(folder / "tokenizer.json"))
    known = inner.get_vocab_size(with_added_tokens=True)
    rows = [f"<unused{row}>" for row in range(known, tokenizer.inner.vocab_size)]
    inner.add_special_tokens([*rows, *tokenizer.names])
    inner.save(str(folder / "tokenizer.json"))
    ids = tokenizer.token_ids
    named = {"mask_token": MASK} if MASK in ids else {}
    resizing = {f"{name[1:-1]}_token_id": ids[name] for name in (EXPAND, DELETE) if name in ids}
    for file, keys in (("tokenizer_config.json", named), (GENERATION, resizing)):
        config = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        if keys:
            text = json.dumps(config | keys, indent=2) + "\n"
            (folder / file).write_text(text, encoding="utf-8")


def model_ids(tokenizer: Any) -> dict[str, Any]:
    """Return the ids of special tokens for config.json, as the folder had them that it came from.

    If that named no such end, it is all the ids that end a text.
    """
    ends = list(end_ids(tokenizer))
    if isinstance(tokenizer, WithTokens):
        tokenizer = tokenizer.inner
    own = {"bos_token_id": getattr(tokenizer, "bos", None)}
    if isinstance(tokenizer, SubwordTokenizer):
        own |= tokenizer.beside.model_ids
    if tokenizer.eos in as_ids(own.get("eos_token_id")):
        return own
    return own | {"eos_token_id": ends if len(ends) > 1 else ends[0]}


def _bpe_without_merges(characters: Iterable[str], *, by_bytes: bool) -> str:
    """Return tokenizer.json of a BPE without merges: character (or byte) i has id i."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers  # noqa: PLC0415
    from tokenizers import Tokenizer as Inner  # noqa: PLC0415

    vocabulary = {character: index for index, character in enumerate(characters)}
    inner: Any = Inner(models.BPE(vocab=vocabulary, merges=[]))
    if by_bytes:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel() if by_bytes else decoders.Fuse()
    inner.add_special_tokens([AddedToken(_END, special=True, normalized=False)])
    return str(inner.to_str())


def _byte_characters() -> list[str]:
    """Return the character that represents each byte in byte-level tokenizers (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]
