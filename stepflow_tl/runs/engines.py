"""Where a run's tasks are done: in this process, or on the replicas of a Ray cluster.

The driver hands out tasks and takes back what became of them, in any order; it alone writes the ledger. What
a task is, and what becomes of it, the worker knows: the same engines analyse traces and write answers.

`RayEngine` has model replicas as Ray actors, one per GPU:

1. Each replica is an actor with a worker of its own. Where a worker writes files, their folder must be one
   that all machines of the cluster see; ledger and report stay with the driver, their only writer.
2. A replica has one task at work and one waiting. Tasks are drawn from the plan as replicas become free, so
   the plan streams here too.
3. A replica that dies is started again, and its tasks are done again, first in the queue; a result that it
   had saved is found and kept. A task that was at work through `MOST_DEATHS` deaths is given up.
4. On a CPU, cores are shared out over the replicas as torch threads: sums, and so bits, depend on that
   number.

Actors and not `map_batches` of Ray Data, because only so the driver knows which task a dead worker was at:
Ray Data would run the block again without end, or give up the whole data set for one trace. A Ray cluster
that is running is used (`RAY_ADDRESS`); else one is started on this machine and ended with the run.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch

from stepflow_tl.errors import DiskFullError, ModelError, StepflowError, require
from stepflow_tl.models.loading import load_model

MOST_DEATHS = 3
_TASKS_PER_REPLICA = 2

Loader = Callable[[], Any]
Task = TypeVar("Task")


@runtime_checkable
class Worker(Protocol):
    """A loaded model, and what is done with one task."""

    @property
    def settings(self) -> Any:
        """What the driver must know of the model before the first task."""
        ...

    def take(self, task: Any) -> Any:
        """Deal with one task.

        Raises:
            StepflowError: If that ends the run.
        """
        ...


MakeWorker = Callable[[], Worker]
"""Makes a worker in the process that is to use it; for another process it must be one that pickles."""


@runtime_checkable
class Engine(Protocol):
    """What the driver needs of the place where tasks are done."""

    settings: Any
    replicas: int

    def results(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Any]]:
        """Each task with what became of it; tasks are asked for as they can be taken up."""
        ...

    def close(self) -> None:
        """Let go of models and processes."""
        ...


def open_engine(
    make: MakeWorker, *, engine: str, replicas: int | None, given_up: Callable[[Any], Any]
) -> Engine:
    """The engine of that name, its models loaded.

    Args:
        make: Makes a worker.
        engine: "local" or "ray".
        replicas: As in `RayEngine`.
        given_up: What becomes of a task of which workers die.

    Raises:
        StepflowError: As `make` and `RayEngine` do.
    """
    return RayEngine(make, replicas, given_up) if engine == "ray" else LocalEngine(make)


def loader_of(model: Any) -> Loader:
    """A function that loads the model: of a name or path, of a model in memory, or the function it is."""
    if isinstance(model, str):
        return partial(load_model, model)
    if callable(model) and not hasattr(model, "cfg"):
        return model
    return lambda: model


def stop_of(
    work: Callable[[], None], note: Callable[[str], None], how_far: Callable[[], str]
) -> Literal["", "interrupted", "disk full"]:
    """Do a run's work; why it ended early, which `note` is told with `how_far` it came, or nothing."""
    try:
        work()
    except KeyboardInterrupt:
        note(f"interrupted{how_far()}; run the same command again to go on")
        return "interrupted"
    except DiskFullError as error:
        note(f"the disk is full: {error}")
        note(f"stopped{how_far()}; free some space and run the same command again to go on")
        return "disk full"
    return ""


class LocalEngine:
    """One model in this process, one task after the other."""

    replicas = 1

    def __init__(self, make: MakeWorker) -> None:
        """Load the model.

        Raises:
            StepflowError: As `make` does.
        """
        self._worker = make()
        self.settings = self._worker.settings

    def results(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Any]]:
        """Each task with what became of it, in order."""
        for task in tasks:
            yield task, self._worker.take(task)

    def close(self) -> None:
        """Nothing to let go of."""


class RayEngine:
    """A pool of replicas."""

    def __init__(self, make: MakeWorker, replicas: int | None, given_up: Callable[[Any], Any]) -> None:
        """Start Ray if it is not running, and the replicas.

        Args:
            make: Makes a worker, in the replica's process.
            replicas: Models at once; by default one per GPU, or one if there is none.
            given_up: What becomes of a task that was at work through `MOST_DEATHS` deaths.

        Raises:
            MissingExtraError: If ray is not installed.
            ModelError: If a replica cannot be started.
            StepflowError: As `make` does.
        """
        self._ray = _import_ray()
        self._given_up = given_up
        self._is_ours = not self._ray.is_initialized()
        if self._is_ours:
            self._ray.init(
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=False,
            )
        self._actors: list[Any] = []
        try:
            resources = self._ray.cluster_resources()
            n_gpus = int(resources.get("GPU", 0))
            self.replicas = replicas or max(1, n_gpus)
            n_cpus = int(resources.get("CPU", 1))
            gpus = 1 if n_gpus >= self.replicas else 0
            threads = None if gpus else max(1, n_cpus // self.replicas)
            # A replica on a CPU takes no slot of Ray's: its threads are counted above.
            kind = self._ray.remote(num_cpus=0, num_gpus=gpus, max_restarts=0)(_Replica)
            self._new = lambda: kind.remote(make, threads)
            self._actors = [self._new() for _ in range(self.replicas)]
            self.settings = self._unwrap(self._ray.get(self._actors[0].settings.remote()))
        except self._ray.exceptions.RayActorError as error:
            self.close()
            raise ModelError(f"a replica could not be started by ray: {error}") from error
        except BaseException:
            self.close()
            raise

    def results(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Any]]:
        """Each task with what became of it, as they come in.

        Raises:
            StepflowError: If a worker's `take` raised it, such as `DiskFullError`.
            ModelError: If a replica cannot be started again.
        """
        source, again = iter(tasks), deque[Task]()
        at_work: dict[Any, tuple[int, Task]] = {}
        queues: list[deque[Any]] = [deque() for _ in self._actors]
        deaths: Counter[int] = Counter()  # by `id`: a task that waits to be done again is held in a queue

        def fill(replica: int) -> None:
            while len(queues[replica]) < _TASKS_PER_REPLICA:
                task = again.popleft() if again else next(source, None)
                if task is None:
                    return
                ref = self._actors[replica].take.remote(task)
                queues[replica].append(ref)
                at_work[ref] = replica, task

        for replica in range(len(self._actors)):
            fill(replica)
        while at_work:
            # Only the first of each replica: it takes its tasks in order, so a death is the first one's.
            (ref, *_), _ = self._ray.wait([queue[0] for queue in queues if queue], num_returns=1)
            replica, task = at_work[ref]
            try:
                outcome = self._unwrap(self._ray.get(ref))
            except self._ray.exceptions.RayActorError:
                lost = [at_work.pop(each)[1] for each in queues[replica]]
                queues[replica].clear()
                self._actors[replica] = self._new()
                culprit = lost[0]
                deaths[id(culprit)] += 1
                if deaths[id(culprit)] >= MOST_DEATHS:
                    del deaths[id(lost.pop(0))]
                    yield culprit, self._given_up(culprit)
                again.extendleft(reversed(lost))
            else:
                deaths.pop(id(task), None)
                del at_work[ref]
                queues[replica].remove(ref)
                yield task, outcome
            for each in range(len(self._actors)):
                fill(each)

    def close(self) -> None:
        """End the replicas, and Ray if it was started here."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._is_ours:
            self._ray.shutdown()

    def process_ids(self) -> list[int]:
        """Of the replicas, as the operating system knows them."""
        return self._ray.get([actor.process_id.remote() for actor in self._actors])

    @staticmethod
    def _unwrap(found: Any) -> Any:
        if isinstance(found, StepflowError):
            raise found
        return found


class _Replica:
    """What runs in a worker process. Errors of ours are returned: ray would dress them up as its own."""

    def __init__(self, make: MakeWorker, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._worker: Worker | None = None
        self._error: StepflowError | None = None
        try:
            self._worker = make()
        except StepflowError as error:
            self._error = error

    def settings(self) -> Any:
        return self._error or (self._worker and self._worker.settings)

    def take(self, task: Any) -> Any:
        if self._worker is None:
            return self._error
        try:
            return self._worker.take(task)
        except StepflowError as error:
            return error

    def process_id(self) -> int:
        return os.getpid()


def _import_ray() -> Any:
    # Replicas that ask Ray for no GPU see what the machine has, as every other process does.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray = require("ray", purpose='engine="ray"', extra="ray")
    require("ray.exceptions", purpose='engine="ray"', extra="ray")
    return ray
