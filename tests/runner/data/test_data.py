import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from models.config import revision
from runner.data.corpus import end_ids, loads, prompt_ids
from runner.data.order import TrainingSamples, validation_batches
from runner.data.pretrained import with_pretrained
from runner.data.sources import SourceConfig
from runner.data.tokenizers import ByteTokenizer
from runner.data.tokenizers_config import TokenizerConfig
from runner.data.tokens import TokenFile, prepare
from runner.data.tokens_config import DataConfig
from runner.machine.errors import DataError
from tests.folders import llama3

SHAKESPEARE = Path(__file__).parents[4] / "shared/data/tinyshakespeare/input.txt"


def test_empty_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="holds no text"):
        list(SourceConfig(path=str(tmp_path / "empty.txt")).documents())


@pytest.mark.parametrize("kind", ["bytes", "char", "bpe", "unigram"])
def test_tokenizers_round_trip_and_count_bytes(kind: str) -> None:
    texts = ["The cat sat on the mat. Ünïcode!\n" * 20, "Another line, another day.\n" * 20]
    size = 300 if kind in ("bpe", "unigram") else None
    built = TokenizerConfig(kind=kind, vocab_size=size).build(texts)  # type: ignore[arg-type]
    for tokenizer in (built, loads(built.dumps())):
        ids = tokenizer.encode(texts[0])
        assert tokenizer.decode(ids.tolist()) == texts[0]
        assert tokenizer.bytes_per_id()[ids].sum() == len(texts[0].encode())
        assert tokenizer.bytes_per_id()[tokenizer.eos] == 0


def _files(sizes: list[int]) -> list[TokenFile]:
    return [TokenFile(np.arange(n) + 10_000 * i, np.array([0])) for i, n in enumerate(sizes)]


def test_an_epoch_visits_every_window_once() -> None:
    samples = TrainingSamples(_files([1001]), [1.0], seq=10, seed=3, eos=0)
    starts = [int(samples[i]["tokens"][0]) for i in range(99)]
    assert len(set(starts)) == 99
    assert len({s % 10 for s in starts}) == 1
    other = [int(samples[i]["tokens"][0]) for i in range(99, 198)]
    assert len(set(other)) == 99
    assert starts != other


def test_sources_are_mixed_by_weight_and_sample_i_is_always_the_same() -> None:
    files, weights = _files([5000, 5000]), [3.0, 1.0]
    samples = TrainingSamples(files, weights, seq=10, seed=0, eos=0)
    owner = [int(samples[i]["tokens"][0]) >= 10_000 for i in range(4096)]
    assert sum(owner) == 1024
    fresh = TrainingSamples(files, weights, seq=10, seed=0, eos=0)
    assert np.array_equal(fresh[3000]["tokens"], samples[3000]["tokens"])


def test_a_single_document_is_split_at_its_tail(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 90 + "b" * 10)  # bytes: ids 97 and 98, then eos
    data = DataConfig(sources=(SourceConfig(path=str(tmp_path / "a.txt")),), val_fraction=0.1)
    corpus = prepare(data, TokenizerConfig(), tmp_path / "cache")
    assert [f[0].ids.tolist() for f in (corpus.train, corpus.val)] == [
        [97] * 90 + [256],
        [98] * 10 + [256],
    ]


def test_documents_are_split_whole(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(f"document {i} " * 30)
    data = DataConfig(sources=(SourceConfig(path=str(folder)),), val_fraction=0.3)
    corpus = prepare(data, TokenizerConfig(), tmp_path / "cache")
    halves = [ByteTokenizer().decode(f[0].ids.tolist()) for f in (corpus.train, corpus.val)]
    numbers = [{w for w in half.split() if w.isdigit()} for half in halves]
    assert numbers[0] | numbers[1] == {str(i) for i in range(40)}
    assert not numbers[0] & numbers[1]


def test_too_little_text_for_one_sequence_at_every_offset_is_an_error() -> None:
    for size in (30, 40):
        with pytest.raises(DataError, match=r"lower train\.sequence_length"):
            TrainingSamples(_files([size]), [1.0], seq=20, seed=0, eos=0)
    enough = TrainingSamples(_files([41]), [1.0], seq=20, seed=0, eos=0)
    assert all(int(enough[i]["targets"][-1]) <= 40 for i in range(50))


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"needs {SHAKESPEARE}")
def test_shakespeare_has_65_characters(tmp_path: Path) -> None:
    data = DataConfig(
        sources=(SourceConfig(path=str(SHAKESPEARE)),), split="tail", val_fraction=0.1
    )
    corpus = prepare(data, TokenizerConfig(kind="char"), tmp_path)
    assert corpus.tokenizer.vocab_size == 66
    assert len(corpus.train[0].ids) == 1_003_855  # 90% of 1,115,394 characters, and eos


def test_a_hugging_face_folder_loads_and_a_missing_one_is_named(tmp_path: Path) -> None:
    trained = TokenizerConfig(kind="bpe", vocab_size=300).build(["some text " * 50])
    (tmp_path / "tokenizer.json").write_text(json.loads(trained.dumps())["json"])
    loaded = TokenizerConfig(kind="folder", path=str(tmp_path)).build([])
    assert loaded.encode("some text").tolist() == trained.encode("some text").tolist()
    with pytest.raises(DataError, match=r"tokenizer\.json does not exist"):
        TokenizerConfig(kind="folder", path=str(tmp_path / "no")).build([])
    for content, message in (
        ("no", "is not JSON"),
        ("{}", "is no tokenizer"),
        ("\xff", "not UTF-8"),
    ):
        (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
        with pytest.raises(DataError, match=rf"tokenizer\.json {message}|json is {message}"):
            TokenizerConfig(kind="folder", path=str(tmp_path)).build([])


def test_bits_per_byte_count_the_text_not_the_tokens(tmp_path: Path) -> None:
    """WordPiece drops white space; the bytes of the text are counted all the same."""
    file = tmp_path / "a.txt"
    file.write_text("the  cat   sat on the    mat\n\n" * 200)
    data = DataConfig(sources=(SourceConfig(path=str(file)),), split="tail", val_fraction=0.5)
    for kind, lossless in (("wordpiece", False), ("bpe", True), ("bytes", True)):
        size = None if kind == "bytes" else 300
        corpus = prepare(data, TokenizerConfig(kind=kind, vocab_size=size), tmp_path / "cache")  # type: ignore[arg-type]
        assert corpus.val[0].text_bytes == len(file.read_bytes()) // 2
        assert (corpus.bytes_per_counted_byte == 1.0) == lossless
        assert corpus.bytes_per_counted_byte >= 1.0


def test_wordpiece_decodes_its_words() -> None:
    tokenizer = TokenizerConfig(kind="wordpiece", vocab_size=300).build(
        ["the cat sat on the mat"] * 50
    )
    assert tokenizer.decode(tokenizer.encode("the cat sat").tolist()) == "the cat sat"


def test_the_last_window_of_the_validation_split_counts_its_targets_once() -> None:
    (file,) = _files([26])
    batches = list(validation_batches([file], seq=10, batch=2, max_tokens=1000))
    targets = np.concatenate([b["targets"].numpy().ravel() for b in batches])
    assert sorted(targets[targets >= 0]) == list(range(1, 26))
    tokens = np.concatenate([b["tokens"].numpy() for b in batches])
    assert tokens.shape == (3, 10)


def test_text_that_changed_after_the_cell_was_frozen_is_refused(tmp_path: Path, text: Path) -> None:
    data = DataConfig(sources=(SourceConfig(path=str(text)),), split="tail")
    frozen = data.content_hash()
    original = text.read_text()
    text.write_text(original + "!")
    with pytest.raises(DataError, match="has changed since the cell was frozen"):
        prepare(data, TokenizerConfig(), tmp_path / "cache", frozen)
    text.write_text(original)
    prepare(data, TokenizerConfig(), tmp_path / "cache", frozen)
    text.unlink()  # what is cached under the frozen hash needs no text any more
    prepare(data, TokenizerConfig(), tmp_path / "cache", frozen)


def test_a_tokenizers_own_special_tokens_stand_in_training_and_in_the_runs_name(
    tmp_path: Path,
) -> None:
    folder = llama3(tmp_path / "m")
    given = {"_target_": "", "kind": "folder", "path": str(folder)}
    end = with_pretrained({"tokenizer": given})["tokenizer"]["eos_token"]
    assert end == "<|end_of_text|>"  # the folder names it
    own = {"tokenizer": given | {"eos_token": "x"}}
    assert with_pretrained(own) == own
    cfg = TokenizerConfig(kind="folder", path=str(folder), eos_token=end)
    (tmp_path / "a.jsonl").write_text('{"text": "A cat sat"}\n{"text": "the mat"}\n' * 40)
    source = SourceConfig(format="jsonl", path=str(tmp_path / "a.jsonl"))
    data = DataConfig(sources=(source,), split="tail", val_fraction=0.3)
    corpus = prepare(data, cfg, tmp_path / "cache")
    bos, eos = 0, 1
    for file in (corpus.train[0], corpus.val[0]):
        assert len(file.starts) == 80
        assert (file.ids[file.starts] == bos).all()
        assert (file.ids[file.starts[1:] - 1] == eos).all()
        assert (file.ids == eos).sum() == (file.ids == bos).sum() == 80
    assert corpus.bytes_per_counted_byte == 1.0  # special tokens are no bytes
    back = loads(corpus.tokenizer.dumps())  # what a run writes down
    assert prompt_ids(back, "A cat") == [bos, *back.encode("A cat")]
    assert prompt_ids(back, "") == prompt_ids(back, "<|begin_of_text|>") == [bos]
    assert end_ids(back) == (1, 2)
    assert revision(cfg, None) == 2
    # The same tokenizer without them keeps the name that runs had before they counted.
    given = json.loads((folder / "tokenizer.json").read_text())
    text = json.dumps(given | {"post_processor": None})
    (folder / "tokenizer.json").write_text(text)
    assert revision(cfg, None) == revision(TokenizerConfig(), None) == 1
    assert cfg.content_hash() == hashlib.sha256(text.encode()).hexdigest()[:32]
    plain = prepare(data, cfg, tmp_path / "cache")
    assert bos not in plain.train[0].ids


def test_a_revision_of_the_numbers_makes_new_tokens(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(sources=(SourceConfig(path=str(text)),), split="tail")
    names = lambda: {f.name for f in (tmp_path / "cache").glob("tokens-*")}  # noqa: E731
    prepare(data, TokenizerConfig(), tmp_path / "cache")
    before = names()
    for cls in (SourceConfig, DataConfig):
        monkeypatch.setattr(cls, "numerics", 99)
        prepare(data, TokenizerConfig(), tmp_path / "cache")
        assert len(names() - before) == 1
        before = names()
