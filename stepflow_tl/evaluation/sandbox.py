"""Running code that a model wrote, and finding out whether it is right, without trusting it in anything.

1. Two processes are started, each in a cage of its own (`caged`): the candidate runs the model's
   code, the judge runs the question's test. They share one socket and nothing else.
2. The test calls the function; each call goes over the socket to the candidate, its result comes back as
   plain data, and the test's assertions are decided in the judge, where the code never is.
3. The judge writes its verdict to a pipe that the candidate does not have. No verdict is a failure; so is a
   test that never called the function.
4. When the verdict is in, or the time is up, both cages are emptied: all that the code started is killed.

So there is no mark to print, no checker to overwrite and no exit code to fake: the code can do nothing but
answer calls, and it does not see what answers the test expects.

The cage: no network, not even localhost; no process outside is visible; the file system is read-only, with
nothing in it but the interpreter and the system's libraries, and one folder in memory to write to; no
environment; no privileges; limits on wall-clock time, processor time, memory, processes, file size and
files. A cage that cannot be built whole is not used: `SandboxError` says what is missing. Needs Linux 5.12.

What it does not protect against: faults of the kernel itself, and of the processor (it is a container, not a
virtual machine); reading what stands in the interpreter's folders and in /usr; using up its time. The limit
on memory is one per process: all of them together can take `processes` times as much, plus files in memory.
What a test can see differs in this: arguments and results are copies, so it notices neither an argument that
the function changed in place nor identity, and both must be plain data.

Cost: 0.1 to 0.2 s per answer, most of it two starts of Python.
"""

from __future__ import annotations

import functools
import json
import os
import select
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stepflow_tl.errors import SandboxError

_CHILD = Path(__file__).with_name("caged")
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_SECONDS_TO_START = 60.0
_SIGNALS = {
    137: "it was killed",
    139: "it crashed",
    152: "it used up its processor time",
    153: "a file grew too large",
}
_ADVICE = (
    "Code is only run in a whole sandbox, so nothing was run. It needs Linux 5.12 or later with namespaces: "
    "as root with CAP_SYS_ADMIN (Docker: --cap-add SYS_ADMIN --security-opt apparmor=unconfined), or as a "
    "user who may make user namespaces (sysctl kernel.unprivileged_userns_clone=1, "
    "kernel.apparmor_restrict_unprivileged_userns=0)."
)


@dataclass(frozen=True)
class Limits:
    """What code may use.

    Args:
        seconds: Wall-clock time of one answer's whole test.
        cpu_seconds: Processor time of each process.
        memory: Address space of each process, in bytes.
        processes: Processes and threads at once.
        disk: Size of the folder it may write to, and of one file, in bytes.

    Raises:
        ValueError: If a limit is not above 0.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory: int = 1 << 30
    processes: int = 4
    disk: int = 16 << 20

    def __post_init__(self) -> None:
        """Refuse a limit that would let nothing run."""
        for name, value in asdict(self).items():
            if value <= 0:
                raise ValueError(f"{name} is {value}: expected a limit above 0")


class Outcome(NamedTuple):
    """Whether the code passed its test, and if not, why."""

    right: bool
    reason: str


def run_test(
    sources: Sequence[str], *, prompt: str, test: str, entry_point: str, limits: Limits | None = None
) -> Outcome:
    """Run code against a test, each in a cage of its own.

    Args:
        sources: The code under test: texts, executed one after another in one namespace.
        prompt: Executed before the test, on the test's side: what it needs of imports and helpers.
        test: Defines `check(candidate)`, which raises where the candidate is wrong.
        entry_point: Name of the function that the code defines; `check` gets it.
        limits: What the code may use.

    Raises:
        SandboxError: If the cages cannot be built; nothing was run then.
    """
    if sys.platform != "linux":
        raise SandboxError(f"code cannot be run safely on {sys.platform}. {_ADVICE}")
    limits = Limits() if limits is None else limits
    shared = {"limits": asdict(limits), "visible": _visible(), "entry_point": entry_point}
    judge_end, candidate_end = socket.socketpair()
    with tempfile.TemporaryDirectory(prefix="stepflow-sandbox-") as folder:
        cages: list[_Cage] = []
        try:
            cages.append(_Cage("judge", {**shared, "prompt": prompt, "test": test}, judge_end, folder))
            cages.append(_Cage("candidate", {**shared, "sources": list(sources)}, candidate_end, folder))
            judge_end.close()
            candidate_end.close()
            start = time.monotonic()
            for cage in cages:
                cage.wait_until_closed(start + _SECONDS_TO_START)
            verdict = cages[0].line(time.monotonic() + limits.seconds)
        finally:
            codes = [cage.clear() for cage in cages]
            judge_end.close()
            candidate_end.close()
    if verdict is None:
        return Outcome(False, f"not done within {limits.seconds:g} s")
    if not verdict:
        return Outcome(False, f"the test's own process ended without a verdict (exit code {codes[0]})")
    reason = str(verdict["reason"])
    if reason == "its process ended":
        reason = f"its process ended: {_SIGNALS.get(codes[1], f'exit code {codes[1]}')}"
    return Outcome(verdict["right"] is True, reason)


@functools.cache
def check_sandbox() -> None:
    """Make sure that the sandbox works here, with one right and one wrong piece of code.

    Raises:
        SandboxError: If it does not; the message says what is missing.
    """
    test = "def check(candidate):\n    assert candidate(1) == 2\n"
    for source, right in (("def f(x): return x + 1", True), ("def f(x): return x", False)):
        found = run_test([source], prompt="", test=test, entry_point="f", limits=Limits(seconds=30.0))
        if found.right != right:
            raise SandboxError(f"the sandbox does not work here: {source!r} gave {found}. {_ADVICE}")


class _Cage:
    """One caged process, seen from outside."""

    def __init__(self, role: str, job: dict[str, Any], channel: socket.socket, folder: str) -> None:
        root = Path(folder, role)
        root.mkdir()
        data = json.dumps({**job, "root": str(root)}).encode()
        self._report, theirs = os.pipe()
        self._unread = b""
        descriptors = (theirs, channel.fileno())
        command = [sys.executable, "-I", "-B", str(_CHILD), role, str(len(data)), *map(str, descriptors)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_ENVIRONMENT,
                pass_fds=descriptors,
                start_new_session=True,
                cwd="/",
            )
        except OSError as error:
            os.close(self._report)
            raise SandboxError(f"cannot start {sys.executable}: {error}. {_ADVICE}") from error
        finally:
            os.close(theirs)
        self._code: int | None = None
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and `wait_until_closed` says how

    def line(self, deadline: float) -> dict[str, Any] | None:
        """The next line that it reports; None if the time is up, an empty one if it has ended."""
        poll = select.poll()
        poll.register(self._report, select.POLLIN)
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            if poll.poll(left * 1000):
                piece = os.read(self._report, 65536)
                if not piece:
                    return {}
                self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def wait_until_closed(self, deadline: float) -> None:
        """Wait until the cage is built.

        Raises:
            SandboxError: If it cannot be, with the step that failed.
        """
        line = self.line(deadline)
        if not line or not line.get("caged"):
            why = "it did not start" if not line else line.get("failed", line)
            raise SandboxError(f"the sandbox for code cannot be set up: {why}. {_ADVICE}")

    def clear(self) -> int:
        """Kill everything in it; the exit code of what ran there."""
        if self._code is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._code = self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:  # the guard cannot be stopped from inside, but may be by others
                self._process.kill()
                self._code = self._process.wait()
            os.close(self._report)
        return self._code


_ENVIRONMENT = {
    "HOME": "/box",
    "TMPDIR": "/box",
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}


@functools.cache
def _visible() -> list[str]:
    """The system's folders and the interpreter's, without those inside another one."""
    interpreter = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    interpreter |= {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    found: list[str] = []
    for path in sorted({*_SYSTEM, *_DEVICES, *map(os.path.abspath, interpreter)}):
        if os.path.exists(path) and not any(path.startswith(other + "/") for other in found):
            found.append(path)
    return found
