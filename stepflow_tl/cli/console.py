"""What reaches the terminal on stderr: messages and progress.

On a terminal, progress is one tqdm bar with throughput and the time left. Anywhere else (a log file, a
pipe) it is one plain line every half minute.
"""

import sys
import time
from typing import Any

_SECONDS_BETWEEN_LINES = 30.0


def say(message: str) -> None:
    """One message on stderr."""
    print(message, file=sys.stderr, flush=True)


class Progress:
    """Counts traces, or whatever a run deals with, and tells the time left by the tokens left.

    Args:
        total: How many are expected.
        replicas: Models that work at once.
        unit: What is counted.
        done: How many are done already.
    """

    def __init__(self, total: int, replicas: int = 1, *, unit: str = "trace", done: int = 0) -> None:
        """Start counting."""
        self._total, self._replicas, self._unit, self._done = total, replicas, unit, done
        self._tokens = self._measured = 0
        self._seconds = self._tokens_left = 0.0
        self._last_line = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            # The time left is said with the speed: a bar would tell it by traces, whatever their length.
            layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
            self._bar = tqdm(
                total=total,
                initial=done,
                unit=unit,
                file=sys.stderr,
                dynamic_ncols=True,
                bar_format=layout,
            )

    def advance(
        self, n_tokens: int = 0, seconds: float = 0.0, tokens_left: float = 0.0, *, n: int = 1
    ) -> None:
        """So many more are dealt with; `seconds` is 0 for one that cost no work of the model."""
        self._done += n
        self._tokens += n_tokens if seconds else 0
        self._measured += n if seconds else 0
        self._seconds += seconds
        self._tokens_left = tokens_left
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._pace()), refresh=False)
            self._bar.update(n)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            say(self.line())

    def note(self, message: str) -> None:
        """A message that does not break the bar."""
        if self._bar is None:
            say(message)
        else:
            self._bar.write(message, file=sys.stderr)

    def line(self) -> str:
        """How far the run is, in words."""
        return ", ".join([f"{self._done} of {self._total} {self._unit}s", *self._pace()])

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def _pace(self) -> list[str]:
        if not self._measured:
            return []
        speed = self._tokens / self._seconds * self._replicas
        left = self._tokens_left / speed if speed else 0.0
        each = self._seconds / self._measured
        return [f"{speed:.0f} tokens/s", f"{each:.1f} s per {self._unit}", f"about {_clock(left)} left"]


class Watcher:
    """Who watches a run: messages and progress, the bar begun when the run says how much there is."""

    def __init__(self) -> None:
        """Nothing has begun."""
        self.progress: Progress | None = None

    def note(self, message: str) -> None:
        """A message, above the bar if there is one."""
        if self.progress is None:
            say(message)
        else:
            self.progress.note(message)

    def advance(self, n_tokens: int, seconds: float, tokens_left: float) -> None:
        """A trace is dealt with."""
        assert self.progress is not None
        self.progress.advance(n_tokens, seconds, tokens_left)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.progress is not None:
            self.progress.close()
            self.progress = None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
