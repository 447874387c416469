r"""Answers that are numbers or formulas, compared by the library math-verify in a process of its own.

Both texts are parsed and compared as values, so `\frac{1}{2}` is 0.5. A model may write `9^{9^{9}}`, whose
value no machine holds: neither the library's own time limit, which needs signals and a main thread, nor any
other inside this process stops Python's integers. So:

1. One child process per parent compares, `maths_worker.py`, run by its path: it imports math-verify and
   nothing of this package. It reads a JSON line and answers with one.
2. A comparison that takes longer than `SECONDS`, or more memory than the worker allows itself, is a wrong
   answer, and the verdict says so. The child is killed; the next comparison starts another.
3. The child ends with its input, so also when the parent is killed.

Cost: a second to start it; then well under a millisecond beside the comparison.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from stepflow_tl.errors import MissingExtraError, require
from stepflow_tl.evaluation.generation import Answer
from stepflow_tl.evaluation.grading import Grader, Question, Verdict, register_grader

SECONDS = 10.0
_START_SECONDS = 120.0
_WORKER = Path(__file__).with_name("maths_worker.py")


def maths(question: Question, answer: Answer) -> Verdict:
    """Whether the summary holds the right number or formula, by math-verify.

    Args:
        question: What was asked, with its right answer.
        answer: What was written.

    Raises:
        MissingExtraError: If math-verify is not installed.
    """
    _check_library()
    verdict = _CHILD.ask({"right": question.answer, "said": answer.summary})
    return Verdict(verdict == "right", "" if verdict in ("right", "wrong") else verdict)


class _Child:
    """The process that compares, started when it is first asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._parent = 0
        atexit.register(self.end)

    def ask(self, texts: dict[str, str]) -> str:
        """What the worker says of these texts, "right" or "wrong"; else why it did not."""
        with self._lock:
            if self._process is None or self._parent != os.getpid():  # a forked copy starts its own
                self._start()
            answer = self._exchange(texts, SECONDS)
            if answer is None:
                return f"its value was not found within {SECONDS:g} s"
            return answer or "the comparison ended without an answer"

    def end(self) -> None:
        """Let the process go."""
        process, self._process = self._process, None
        if process is not None and self._parent == os.getpid():
            process.kill()
            process.communicate()  # closes the pipes, too

    def _start(self) -> None:
        self._parent, self._answers = os.getpid(), queue.SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, "-B", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is the parent's
        )
        reader = threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True)
        reader.start()
        if self._exchange({"right": "1", "said": "1"}, _START_SECONDS) != "right":
            self.end()
            raise MissingExtraError(
                "math-verify does not compare 1 with 1 in a process of its own: reinstall it, "
                "pip install --force-reinstall math-verify"
            )

    def _exchange(self, texts: dict[str, str], seconds: float) -> str | None:
        """The worker's line; "" where it died of it, None where it took too long. Both end it."""
        assert self._process is not None and self._process.stdin is not None
        answer: str | None = ""
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(texts) + "\n")
            self._process.stdin.flush()
            try:
                answer = self._answers.get(timeout=seconds).strip()
            except queue.Empty:
                answer = None
        if not answer:
            self.end()
        return answer


def _read(lines: Iterable[str], answers: Any) -> None:
    """Hand on what the worker writes, and an empty text at its end."""
    with suppress(ValueError):  # closed by the parent, which has killed it
        for line in lines:
            answers.put(line)
    answers.put("")


_CHILD = _Child()


def _check_library() -> None:
    require("math_verify", purpose="The grader 'maths'", extra="maths")


register_grader(Grader("maths", {"question": "text", "answer": "text"}, maths, ready=_check_library))
