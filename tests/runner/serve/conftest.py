"""One run for all tests of servers."""

from pathlib import Path

import pytest

from tests.runner.serve.running import make_run


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained run with a chat template; it is only read."""
    return make_run(tmp_path_factory.mktemp("served"))
