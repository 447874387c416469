"""`stepflow-tl analyze`: the command line of `analyze_dataset`.

The work is `stepflow_tl.runs`'s; here arguments go in, and progress, tables and the exit code come out: 0
if every row has a result, 1 if something failed or the disk is full, 130 after Ctrl-C. What stops the run
before it starts is an exception.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stepflow_tl.cli.console import Progress, say
from stepflow_tl.cli.device import present_device
from stepflow_tl.models import loading as models
from stepflow_tl.models.facts import tokenizer_of
from stepflow_tl.runs.entries import RunSettings
from stepflow_tl.runs.report import DatasetReport
from stepflow_tl.runs.run import analyze_dataset


@dataclass(frozen=True)
class AnalyzeOptions:
    """The command line, checked; see `stepflow-tl analyze --help`."""

    traces: Path
    out: Path
    model: str
    objective: str = "per_token"
    layers: tuple[int, ...] | None = None
    splitter: str = "paragraph"
    format: str = "auto"
    group_by: str | None = None
    pair_by: str | None = None
    unpaired: bool = False
    overwrite: bool = False
    retry_failed: bool = False
    limit: int | None = None
    shard: str | None = None
    engine: str = "local"
    replicas: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    device_map: str | None = None
    figures: bool = False
    causal: bool = False


def analyze(options: AnalyzeOptions) -> int:
    """Run the analysis and return the exit code.

    Raises:
        StepflowError: As `analyze_dataset`.
    """
    watcher = _Terminal(options)
    try:
        report = analyze_dataset(
            partial(load, options.model, options.device, options.dtype, options.device_map),
            options.traces,
            options.out,
            objective=options.objective,
            layers=options.layers,
            splitter=options.splitter,
            format=options.format,
            causal=options.causal,
            figures=options.figures,
            group_by=options.group_by,
            pair_by=options.pair_by,
            unpaired=options.unpaired,
            overwrite=options.overwrite,
            retry_failed=options.retry_failed,
            limit=options.limit,
            shard=options.shard,
            engine=options.engine,
            replicas=options.replicas,
            watcher=watcher,
        )
    finally:
        watcher.close()
    _print(options, report)
    return 130 if report.stopped == "interrupted" else 0 if report.is_complete else 1


def load(name: str, device: str, dtype: str, device_map: str | None) -> Any:
    """The model of the command line; at module level, so that another process can call it.

    Raises:
        ModelError: If it cannot be loaded, or the device is not there.
    """
    where = present_device(device)
    place = {} if device_map is None else {"device_map": device_map}
    model = models.load_model(name, device=where, dtype=getattr(torch, dtype), **place)
    tokenizer_of(model)  # refuses a model without one
    return model


class _Terminal:
    """Progress of the run on stderr."""

    def __init__(self, options: AnalyzeOptions) -> None:
        self._options = options
        self._progress: Progress | None = None

    def begin(self, total: int, settings: RunSettings, replicas: int) -> None:
        part = "" if self._options.shard is None else f", shard {self._options.shard}"
        where = "" if self._options.engine == "local" else f", {replicas} replicas by {self._options.engine}"
        traces = f"{total} traces from {self._options.traces}{part}"
        say(f"{traces}, model {settings.model_name}{where}, results in {self._options.out}")
        self._progress = Progress(total, replicas)

    def note(self, message: str) -> None:
        if self._progress is None:
            say(message)
        else:
            self._progress.note(message)

    def advance(self, n_tokens: int, seconds: float, tokens_left: float) -> None:
        assert self._progress is not None
        self._progress.advance(n_tokens, seconds, tokens_left)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()


def _print(options: AnalyzeOptions, report: DatasetReport) -> None:
    print(report)
    if report.agreement is not None:
        print(f"\n{report.agreement}")
    for problem in report.problems:
        say(problem)
    if report.comparison is not None:
        pairing = "" if report.paired_by is None else f", paired by {report.paired_by}"
        print(f"\nBy {options.group_by}{pairing}\n{report.comparison}", *report.notes, sep="\n")
    if options.shard is not None and (options.group_by is not None or options.causal):
        print("\nOne shard is compared with nothing: stepflow-tl summarize reads all of them together.")
    if report.written:
        print("\nwritten:", *map(str, report.written), sep="\n  ")
