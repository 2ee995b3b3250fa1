"""The report of benchmarks: scores with what makes them comparable, and every answer."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from runner.machine import storage

_SCHEMA = 1


@dataclass(frozen=True)
class Report:
    """The results of an evaluation.

    Args:
        scores: one for each task, metric and filter: value, stderr (None: not known), n, and what
            makes it comparable: the task's version, prompt hash, n-shot, lm-eval's version, and
            `cut_to`, the tokens read where more than a hundredth of the questions were longer.
        records: one for each question and filter.
    """

    scores: list[dict[str, Any]]
    records: list[dict[str, Any]]

    @property
    def values(self) -> dict[str, float]:
        """The scores by metric name, with standard errors (NAME_stderr) where they are known."""
        values = {}
        for row in self.scores:
            values[row["name"]] = row["value"]
            if row["stderr"] is not None:
                values[f"{row['name']}_stderr"] = row["stderr"]
        return values

    def write(self, folder: Path, step: int) -> None:
        """Write evals/<identity>.json and .parquet of a run, replacing those of an earlier step."""
        import pandas as pd  # noqa: PLC0415

        identity = hashlib.sha256(json.dumps([row["identity"] for row in self.scores]).encode())
        evals = folder / "evals"
        evals.mkdir(exist_ok=True)
        name = identity.hexdigest()[:16]
        partial = evals / f".{name}.parquet"
        pd.DataFrame(self.records).to_parquet(partial)
        os.replace(partial, evals / f"{name}.parquet")
        text = json.dumps({"schema": _SCHEMA, "step": step, "scores": self.scores}, indent=1)
        storage.write_atomically(evals / f"{name}.json", text)


def scores_of(
    results: dict[str, Any], suffix: str, cut: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    """Yield the scores of lm-eval's results.

    Args:
        suffix: ends their names.
        cut: the tokens that were read, by task, where questions were longer.
    """
    for task, values in results["results"].items():
        rows = results["samples"][task]
        prompts = hashlib.sha256("".join(row["prompt_hash"] for row in rows).encode()).hexdigest()
        protocol = {
            "version": results["versions"].get(task),
            "prompt_hash": prompts[:16],
            "num_fewshot": results["n-shot"].get(task, 0),
            "lm_eval": version("lm_eval"),
        }
        if task in cut:
            protocol["cut_to"] = cut[task]
        identity = hashlib.sha256(json.dumps([task, protocol, suffix]).encode()).hexdigest()[:16]
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue
            filtered = [row for row in rows if row["filter"] == filter_name]
            filter_suffix = f".{filter_name}" if filter_name != "none" else ""
            yield {
                "name": f"{task}/{metric}{filter_suffix}{suffix}",
                "task": task,
                "metric": metric,
                "filter": filter_name,
                "value": float(value),
                "stderr": _stderr(metric, float(value), [row.get(metric) for row in filtered]),
                "n": len(filtered),
                **protocol,
                "identity": identity,
            }


def _stderr(metric: str, value: float, per_question: list[Any]) -> float | None:
    """Return the standard error of a mean, or of exp(-mean) by the delta method; else None."""
    count = len(per_question)
    if count < 2 or not all(isinstance(score, (int, float)) for score in per_question):
        return None
    scores = torch.tensor(per_question, dtype=torch.float64)
    stderr_of_mean = float(scores.std()) / math.sqrt(count)
    if math.isclose(float(scores.mean()), value, rel_tol=1e-6, abs_tol=1e-9):
        return stderr_of_mean
    return value * stderr_of_mean if metric == "perplexity" else None


def record_of(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return a question with its prompts, responses and scores; nested parts as JSON."""
    nested = ("doc", "arguments", "resps", "filtered_resps", "target")
    flat = {key: value for key, value in row.items() if key not in (*nested, "metrics")}
    as_json = {key: json.dumps(row.get(key), default=str, ensure_ascii=False) for key in nested}
    return {"task": task} | flat | as_json
