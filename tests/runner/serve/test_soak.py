"""50 clients that come and leave: no answer is lost, and nothing is left behind."""

import asyncio
from pathlib import Path

import pytest

from tests.bench.soak import OPTIONS, soak
from tests.runner.serve.running import serving


@pytest.mark.slow  # as long as --soak-seconds says
def test_clients_that_come_and_leave_lose_nothing_and_leave_nothing_behind(
    made: Path, pytestconfig: pytest.Config
) -> None:
    with serving(made, *OPTIONS) as server:
        seconds = pytestconfig.getoption("--soak-seconds")
        asyncio.run(soak(server.url, server.command.pid, seconds)).check()
