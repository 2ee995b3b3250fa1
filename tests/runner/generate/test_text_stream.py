"""Streams: what all ids decode to more than the prompt, whole characters, in linear time."""

from collections.abc import Callable, Iterable, Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from runner.data.tokenizers import ByteTokenizer, SubwordTokenizer
from runner.data.tokenizers_config import TokenizerConfig
from runner.generate.text_stream import TextStream

TEXT = "the cat sat on a mat;  héllo 日本語 🙂 two\n\n spaces and the end."


def _sentence_piece() -> SubwordTokenizer:
    """Llama-2's parts: Metaspace, byte fallback, a decoder that strips the first space."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz.;", "▁t", "th", "▁th", "▁the", "at", "▁c", "▁cat"]
    merges = [("▁", "t"), ("t", "h"), ("▁t", "h"), ("▁th", "e"), ("a", "t"), ("▁", "c")]
    inner = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[*merges, ("▁c", "at")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    inner.add_special_tokens(["<s>", "</s>"])
    return SubwordTokenizer(inner.to_str(), "</s>")


def _streamed(stream: TextStream, ids: Iterable[int]) -> list[str]:
    return [*map(stream.push, ids), stream.finish()]


TOKENIZERS: dict[str, Callable[[], object]] = {
    "sentencepiece": _sentence_piece,
    "bytes": ByteTokenizer,
    "bpe": lambda: TokenizerConfig(kind="bpe", vocab_size=300).build([TEXT] * 3),
    "wordpiece": lambda: TokenizerConfig(kind="wordpiece", vocab_size=120).build([TEXT] * 3),
    "char": lambda: TokenizerConfig(kind="char").build([TEXT]),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_prompt_and_stream_are_the_text_wherever_it_is_cut(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = [int(index) for index in tokenizer.encode(TEXT)]  # type: ignore[attr-defined]
    decode: Callable[[Sequence[int]], str] = tokenizer.decode  # type: ignore[attr-defined]
    whole = decode(ids)
    for cut in range(len(ids) + 1):
        before = decode(ids[:cut])
        pieces = _streamed(TextStream(decode, prompt=ids[:cut]), ids[cut:])
        assert not any("\ufffd" in piece for piece in pieces)
        if "\ufffd" not in before:
            assert before + "".join(pieces) == whole
        else:  # the character that the prompt begins belongs to the stream
            assert "".join(pieces)
            assert whole.endswith("".join(pieces))


def test_special_tokens_between_words_take_no_space_away() -> None:
    tokenizer = _sentence_piece()
    the, cat = tokenizer.encode("the"), tokenizer.encode("the cat")
    bos, eos = 1, tokenizer.eos
    ids = [*the.tolist(), *[eos] * 40, bos, *cat[len(the) :].tolist()]
    assert "".join(_streamed(TextStream(tokenizer.decode, prompt=[bos]), ids)) == "the cat"
    assert "".join(_streamed(TextStream(tokenizer.decode, prompt=ids), ids)) == " the cat"


def test_bytes_that_are_no_text_are_given_up_after_four() -> None:
    decode = ByteTokenizer().decode
    junk = [0xFF, 0xC3] * 30
    pieces = _streamed(TextStream(decode), [*b"ok", *junk, *"é".encode()])
    assert "".join(pieces) == decode([*b"ok", *junk, *"é".encode()])
    assert sum(bool(piece) for piece in pieces) > 50  # it goes on


@pytest.mark.parametrize("token", [ord("a"), 0xFF, ByteTokenizer.eos])
def test_the_ids_decoded_grow_with_the_text_not_with_its_square(token: int) -> None:
    ids, decoded = [token] * 600, 0

    def decode(given: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(given)
        return ByteTokenizer().decode(given)

    _streamed(TextStream(decode, prompt=[*b"prompt "]), ids)
    assert decoded < 50 * len(ids)
