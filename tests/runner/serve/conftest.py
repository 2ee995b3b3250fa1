"""One run for all tests of servers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runner.serve.running import Server, make_run, serving


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained run with a chat template; it is only read."""
    return make_run(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(made: Path) -> Iterator[Server]:
    """One server for a file's tests: in one shape, so that texts can be compared bit for bit."""
    with serving(made, "--invariant", "--rows", "8", "--max-waiting", "128") as running:
        yield running
