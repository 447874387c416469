"""The samples that other engines' runs left behind, as scores and texts.

* lm-evaluation-harness (`--log_samples --output_path`): `samples_<task>_<time>.jsonl`, one line per question
  and filter. A question is `<task>/<doc_id>`; its hash tells whether two runs asked the same. Its score is a
  metric of the line.
* Inspect: `.eval` or `.json` logs, read by Inspect itself. A question is `<task>/<id>`, an epoch is a sample;
  its score is a scorer's value, with C, P and I as 1, 1/2 and 0.

A run is a file, or a folder of the files of one run; of several runs in one folder nothing is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepflow_tl.errors import InputFileError, require

_HARNESS_FILE = re.compile(r"samples_(.+)_\d{4}-\d\d-\d\dT[\d.:-]+\.jsonl")
_GRADES = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}


@dataclass(frozen=True)
class RunSample:
    """One scored answer.

    Attributes:
        question: Id of its question, its task included.
        score: 0 for wrong, 1 for right, or between.
        subject: The class by which scores are reported apart.
        digest: What is equal for equal questions; empty if the engine keeps nothing of the kind.
        parts: The fields of a trace: `text`, or `question`, `thinking` and `summary`.
    """

    question: str
    score: float
    subject: str
    digest: str
    parts: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class Reading:
    """What of a run's samples is read.

    Attributes:
        metric: Name of the metric (harness) or scorer (Inspect); the only one, or the first, by default. Of
            several tasks of the harness, those without it count by their first.
        filter: Name of the harness' filter; needed where a task has several, and left aside where it has one.
        subject: Field of the document (harness) or of the sample's metadata (Inspect) that names the subject;
            the task by default.
    """

    metric: str | None = None
    filter: str | None = None
    subject: str | None = None


def read_samples(path: Path, reading: Reading | None = None) -> list[RunSample]:
    """The scored answers of one run.

    Args:
        path: A samples file, a log, or a folder of them.
        reading: Which scores; the first metric by default.

    Raises:
        InputFileError: If there is nothing to read, a file is damaged, or what is asked for is not there.
        MissingExtraError: If it is a log of Inspect, which is not installed.
    """
    reading = reading or Reading()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    ours = [file for file in files if file.suffix == ".jsonl" and (path.is_file() or _task_of(file))]
    logs = [file for file in files if file.suffix == ".eval" or path.is_file() and file.suffix == ".json"]
    if not ours and not logs:
        raise InputFileError(
            f"{path} has no samples: expected samples_*.jsonl of lm-eval --log_samples, or logs of Inspect"
        )
    tasks = [_task_of(file) or file.stem for file in ours]
    if ours and logs or len(set(tasks)) < len(tasks):
        raise InputFileError(f"{path} holds several runs, of the same task perhaps: name the file of one")
    samples = list(_harness(dict(zip(ours, tasks, strict=True)), reading))
    samples += _inspect_all(logs, reading)
    if not samples:
        raise InputFileError(f"{path} holds no scored answer")
    return samples


def _task_of(file: Path) -> str | None:
    found = _HARNESS_FILE.fullmatch(file.name)
    return found[1] if found else None


def _harness(files: Mapping[Path, str], reading: Reading) -> Iterator[RunSample]:
    """The samples of each file of one run; `files` gives their tasks."""
    read = {path: list(_rows(path)) for path in files}
    filters = {path: sorted({row["filter"] for row in rows}) for path, rows in read.items()}
    every = [row for rows in read.values() for row in rows]
    for kind, wanted, known in (
        ("filter", reading.filter, {row["filter"] for row in every}),
        ("metric", reading.metric, {metric for row in every for metric in row["metrics"]}),
    ):
        if every and wanted is not None and wanted not in known:
            names, expected = ", ".join(map(str, files)), ", ".join(sorted(known))
            raise InputFileError(f"{names}: no {kind} {wanted!r}: expected {expected}")
    for path, task in files.items():
        if len(filters[path]) > 1 and reading.filter not in filters[path]:
            names = ", ".join(filters[path])
            raise InputFileError(f"{path} has scores of several filters: name one of {names} (--filter)")
        for number, row in enumerate(read[path], start=1):
            if len(filters[path]) == 1 or row["filter"] == reading.filter:
                try:
                    yield _sample(task, row, reading)
                except (KeyError, IndexError, TypeError, ValueError) as error:
                    raise _not_a_sample(path, number, error) from error


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            row["filter"], row["metrics"] = str(row["filter"]), list(row["metrics"])
        except (KeyError, TypeError, ValueError) as error:
            raise _not_a_sample(path, number, error) from error
        yield row


def _not_a_sample(path: Path, number: int, error: Exception) -> InputFileError:
    return InputFileError(
        f"{path}, line {number} is not a scored sample of lm-eval, or lacks what was asked for "
        f"({type(error).__name__}: {error})"
    )


def _sample(task: str, row: Mapping[str, Any], reading: Reading) -> RunSample:
    response = row["resps"][0]
    response = response[0] if isinstance(response, list) else response
    metric = next((each for each in row["metrics"] if each == reading.metric), row["metrics"][0])
    return RunSample(
        f"{task}/{row['doc_id']}",
        float(row[metric]),
        task if reading.subject is None else str(row["doc"][reading.subject]),
        str(row.get("doc_hash", "")),
        {"text": _prompt(row["arguments"]) + response} if isinstance(response, str) else {},
    )


def _prompt(arguments: Any) -> str:
    """What was asked: `{"gen_args_0": {"arg_0": ...}}` in files, lists in memory."""
    first = arguments["gen_args_0"] if isinstance(arguments, dict) else arguments[0]
    return first["arg_0"] if isinstance(first, dict) else first[0]


def _inspect_all(paths: Sequence[Path], reading: Reading) -> Iterator[RunSample]:
    seen: dict[tuple[str, int], Path] = {}
    for path in paths:
        for epoch, sample in _inspect(path, reading):
            other = seen.setdefault((sample.question, epoch), path)
            if other != path:
                raise InputFileError(
                    f"{other.name} and {path.name} both hold epoch {epoch} of {sample.question}, as a log "
                    "and its retry do: name the file of one run"
                )
            yield sample


def _inspect(path: Path, reading: Reading) -> Iterator[tuple[int, RunSample]]:
    logs: Any = require("inspect_ai.log", purpose="a log of Inspect", extra="inspect")
    try:
        log = logs.read_eval_log(str(path))
    except Exception as error:  # whatever its reader meets in a file that is not a log
        raise InputFileError(f"{path} cannot be read as a log of Inspect: {error}") from error
    for sample in log.samples or ():
        if not sample.scores:
            continue  # it ended in an error, or the run was cut
        name = reading.metric or next(iter(sample.scores))
        metadata = sample.metadata or {}
        if name not in sample.scores or (reading.subject is not None and reading.subject not in metadata):
            wanted, known = (
                (f"score {name!r}", sample.scores)
                if name not in sample.scores
                else (f"metadata {reading.subject!r}", metadata)
            )
            raise InputFileError(f"{path}, sample {sample.id} has no {wanted}: expected {', '.join(known)}")
        question = sample.input if isinstance(sample.input, str) else sample.input[-1].text
        yield (
            sample.epoch,
            RunSample(
                f"{log.eval.task}/{sample.id}",
                _value(sample.scores[name].value, path),
                log.eval.task if reading.subject is None else str(metadata[reading.subject]),
                question,
                {"question": question, **_answer(sample.output)},
            ),
        )


def _answer(output: Any) -> dict[str, str]:
    content = output.choices[0].message.content if output.choices else ""
    if isinstance(content, str):
        return {"thinking": "", "summary": content}
    kinds = {"thinking": "reasoning", "summary": "text"}
    return {
        name: "\n\n".join(getattr(part, kind) for part in content if part.type == kind)
        for name, kind in kinds.items()
    }


def _value(value: Any, path: Path) -> float:
    if isinstance(value, str) and value in _GRADES:
        return _GRADES[value]
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InputFileError(f"{path} has the score {value!r}: expected C, P, I, N or a number") from error
