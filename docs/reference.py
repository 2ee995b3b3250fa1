"""Write the pages of docs/reference/ that are made from the code: keys, verbs, API."""

import subprocess
import sys
from pathlib import Path

from runner.commands.key_reference import blocks, groups
from runner.commands.keys import as_yaml, in_yaml

FOLDER = Path(__file__).parent / "reference"
MODULES = {
    "Runs": ("runs", "stores", "foreign", "source"),
    "Figures": ("plots", "run_plots", "law_plots", "defaults"),
    "Comparison": ("paired", "ablation", "tables", "pooling"),
    "Scaling laws": ("fit", "laws", "isoflop", "envelope", "forecast", "chain", "design"),
}


def main() -> None:
    """Write the three pages."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "keys.md").write_text("\n".join(_keys()), encoding="utf-8")
    (FOLDER / "verbs.md").write_text(_verbs(), encoding="utf-8")
    (FOLDER / "api.md").write_text("\n".join(_api()), encoding="utf-8")


def _keys() -> list[str]:
    lines = [
        "# Keys",
        "",
        "Every key that can be set; `espalier keys NODE` prints the same. What is",
    ]
    lines += ["marked *execution* cannot change a result: a run keeps its name.", ""]
    for group in groups():
        lines += [f"## {group or 'A run'}", ""]
        for block in blocks(group):
            if block.choices:
                lines += [f"### `{group}={'|'.join(block.choices)}`", ""]
            lines += [in_yaml(block.summary), ""]
            if block.keys:
                lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
            for key in block.keys:
                cells = (f"`{key.path}`", f"`{key.kind}`", as_yaml(key), in_yaml(key.meaning))
                half = " *execution*" if key.execution else ""
                escaped = (cell.replace("|", "\\|") for cell in cells)
                lines.append(f"| {' | '.join(escaped)}{half} |")
            lines.append("")
    return lines


def _verbs() -> str:
    """Return the page of the verbs, which typer writes."""
    command = [sys.executable, "-m", "typer", "runner.commands.cli", "utils", "docs"]
    done = subprocess.run(
        [*command, "--name", "espalier"], capture_output=True, text=True, check=True
    )
    return done.stdout.replace("# `espalier`", "# Verbs", 1)


def _api() -> list[str]:
    lines = ["# API of analysis", "", "What a figures.py or a notebook calls.", ""]
    for title, modules in MODULES.items():
        lines += [f"## {title}", ""]
        for module in modules:
            lines += [f"### analysis.{module}", "", "```{eval-rst}"]
            lines += [f".. automodule:: analysis.{module}", "   :members:", "```", ""]
    return lines


if __name__ == "__main__":
    main()
