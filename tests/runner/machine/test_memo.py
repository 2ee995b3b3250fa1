"""What a memo holds is only a saving: it can be missing or odd, and so can the user's name."""

import os
import tempfile
from pathlib import Path

import pytest

from runner.machine.memo import Memo


@pytest.mark.parametrize("contents", [None, "", '{"a": 1', "[1]", "null"])
def test_a_memo_that_holds_no_dictionary_is_empty_and_written_anew(
    contents: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if contents is not None:
        (tmp_path / f"espalier-odd-{os.getuid()}.json").write_text(contents)
    memo = Memo("odd")
    assert memo.entries == {}
    memo.entries["key"] = [1]
    memo.save()
    assert Memo("odd").entries == {"key": [1]}


def test_a_user_without_an_entry_in_the_password_file_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that is started with the number of a user of the host."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    memo = Memo("nobody")
    memo.entries["key"] = 1
    memo.save()
    assert (tmp_path / "espalier-nobody-54321.json").exists()
