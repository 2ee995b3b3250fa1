"""The corpus of a run, including files written by the runs that are its inputs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.machine.errors import DataError
from runner.records.config import RunConfig
from runner.records.contracts import Inputs, added_tokens
from runner.records.inputs import PREFIX, output_file, read_files, read_numbers, sha256
from runner.records.journal import Journal


def build_corpus(cfg: RunConfig, inputs: Inputs, hashes: list[str], journal: Journal | None) -> Any:
    """Return the corpus of `cfg`; record the sha256 of each file of `inputs` in the journal.

    Args:
        hashes: content hashes of the sources, frozen with the cell. Those of an input's files are
            replaced: the files did not exist then.

    Raises:
        DataError: an input has no such output, a file has changed since an earlier attempt read it,
            or the number of weights differs from that of the sources.
    """
    data = cfg.data
    sources = list(getattr(data, "sources", ()))
    for index, source in enumerate(sources):
        path = str(getattr(source, "path", None) or "")
        if path.startswith(PREFIX):
            file = _read(path, inputs, journal)
            sources[index] = replace(source, path=str(file))
            hashes = [*hashes[:index], sources[index].content_hash(), *hashes[index + 1 :]]
    weights = getattr(data, "weights", None)
    if weights is not None:
        sources = data.with_weights(read_numbers(_read(weights, inputs, journal)))
        data = replace(data, weights=None)
    if sources:
        data = replace(data, sources=tuple(sources))
    corpus = data.build(cfg.tokenizer, Path(cfg.root) / "data_cache", hashes)
    added = added_tokens(cfg.task)
    if not added:
        return corpus
    from runner.data.special_tokens import with_tokens  # noqa: PLC0415

    return with_tokens(corpus, added)


def _read(reference: str, inputs: Inputs, journal: Journal | None) -> Path:
    file = output_file(reference, inputs)
    if journal is not None:
        run, digest = file.parent.parent.name, sha256(file)
        before = read_files(journal.run).get((run, file.name), digest)
        if before != digest:
            raise DataError(
                f"{file} has changed since an earlier attempt read it (sha256 {before[:8]}, now "
                f"{digest[:8]}); restore it, or delete {journal.run} to start over"
            )
        journal.event("read", run=run, output=file.name, sha256=digest)
    return file
