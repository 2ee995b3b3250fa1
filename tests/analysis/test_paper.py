"""A paper's folder: it compiles, its numbers are macros, its text is kept, its provenance told."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from analysis.paper import macro_name, write_paper
from analysis.plots import forest, save
from analysis.runs import Runs
from runner.commands.cli import app

LATEX = shutil.which("latexmk")
Run = Callable[..., subprocess.CompletedProcess[str]]


def _write(folder: Path, mean: float) -> Path:
    runs = Runs(
        pd.DataFrame({"fingerprint": ["a", "b"], "state": ["finished", "failed"]}), pd.DataFrame()
    )
    gap = pd.DataFrame(
        {
            "value": ["nvfp4_no_sr", "mxfp8"],
            "difference": [0.01, mean],
            "low": [0.0, -0.1],
            "high": [0.02, 0.3],
            "n": [3, 3],
        }
    )
    save(folder / "figures", "gap_50%", *forest(gap, baseline="bf16"))
    gap.to_csv(folder / "results.csv", index=False)
    (folder / "README.md").write_text(
        "# x\n\n**Question.** Does 50% of `nvfp4_no_sr`\nhelp & hurt?\n\n**Verdict.** No.\n"
    )
    return write_paper(
        runs,
        "my_sweep",
        folder / "paper",
        figures=[folder / "figures" / "gap_50%.pdf"],
        results=folder / "results.csv",
        readme=folder / "README.md",
        provenance={"commits": ["abc_1"], "command": "x"},
    )


@pytest.mark.skipif(LATEX is None, reason="needs latexmk: make latex")
def test_the_paper_compiles_and_its_numbers_follow_the_data(tmp_path: Path) -> None:
    main = _write(tmp_path, 0.005)
    main.write_text(
        main.read_text().replace(
            r"\section*{Provenance}", r"Gap: \MxfpEightDifference. \section*{Provenance}"
        )
    )
    assert main == _write(tmp_path, 0.123456)
    assert (
        r"\newcommand{\MxfpEightDifference}{\ensuremath{0.1235}}"
        in (main.parent / "numbers.tex").read_text()
    )
    assert r"\MxfpEightDifference" in main.read_text(), "what was written by hand is lost"
    command = ["latexmk", "-pdf", "-interaction=nonstopmode", "-halt-on-error", "-cd", str(main)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert main.with_suffix(".pdf").stat().st_size > 10_000
    assert "undefined" not in main.with_suffix(".log").read_text(errors="replace").lower()


def test_macros_have_letters_only_and_one_meaning(tmp_path: Path) -> None:
    assert macro_name("nvfp4_no_sr", "low") == "NvfpFourNoSrLow"
    assert macro_name("-0.5") == macro_name("minus 0 5")
    table = pd.DataFrame({"choice": ["a", "A"], "mean": [1.0, 2.0]})
    table.to_csv(tmp_path / "results.csv", index=False)
    runs = Runs(pd.DataFrame({"fingerprint": ["a"], "state": ["finished"]}), pd.DataFrame())
    with pytest.raises(ValueError, match="several numbers would be called AMean"):
        write_paper(
            runs,
            "x",
            tmp_path / "p",
            figures=[],
            results=tmp_path / "results.csv",
            readme=None,
            provenance={},
        )


def test_the_command_gathers_a_sweep(espalier: Run, tmp_path: Path) -> None:
    assert espalier("-m", "seed=1,2", "name=p").returncode == 0
    refused = CliRunner().invoke(app, ["paper", "p", "--root", str(tmp_path)])
    assert "run `espalier plots p` first" in str(refused.exception)
    assert CliRunner().invoke(app, ["plots", "p", "--root", str(tmp_path)]).exit_code == 0
    made = CliRunner().invoke(app, ["paper", "p", "--root", str(tmp_path)])
    assert made.exit_code == 0, made.output
    facts = json.loads((tmp_path / "papers/p/provenance.json").read_text())
    assert len(facts["fingerprints"]) == 2
    assert len(facts["commits"][0]) == 40
