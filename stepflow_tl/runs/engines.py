"""Where traces are analysed: in this process, or elsewhere by something with the same face.

The driver hands out jobs and takes back what became of them, in any order; it alone writes the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from stepflow_tl.runs.entries import Entry, RunSettings
from stepflow_tl.runs.options import AnalysisOptions
from stepflow_tl.runs.plan import Task
from stepflow_tl.runs.worker import Taken, Worker

Loader = Callable[[], Any]


@dataclass(frozen=True)
class Job:
    """A task, and what the manifest says of its trace already."""

    task: Task
    previous: Entry | None


@runtime_checkable
class Engine(Protocol):
    """What the driver needs of the place where traces are analysed."""

    settings: RunSettings
    replicas: int

    def results(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Taken]]:
        """Each job with what became of it; jobs are asked for as they can be taken up."""
        ...

    def close(self) -> None:
        """Let go of models and processes."""
        ...


class LocalEngine:
    """One model in this process, one trace after the other."""

    replicas = 1

    def __init__(self, load: Loader, options: AnalysisOptions, out: Path) -> None:
        """Load the model.

        Raises:
            StepflowError: As `load` and `Worker` do.
        """
        self._worker = Worker(load(), options, out)
        self.settings = self._worker.settings

    def results(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Taken]]:
        """Each job with what became of it, in order."""
        for job in jobs:
            yield job, self._worker.take(job.task, job.previous)

    def close(self) -> None:
        """Nothing to let go of."""
