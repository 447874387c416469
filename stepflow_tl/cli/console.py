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
    """Counts traces against a known total, and tells the time left by the tokens left.

    Args:
        total: Traces expected.
        replicas: Models that work at once.
    """

    def __init__(self, total: int, replicas: int = 1) -> None:
        """Start counting."""
        self._total, self._replicas = total, replicas
        self._done = self._tokens = self._analysed = 0
        self._seconds = self._tokens_left = 0.0
        self._last_line = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            # The time left is said with the speed: a bar would tell it by traces, whatever their length.
            layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
            self._bar = tqdm(
                total=total, unit="trace", file=sys.stderr, dynamic_ncols=True, bar_format=layout
            )

    def advance(self, n_tokens: int = 0, seconds: float = 0.0, tokens_left: float = 0.0) -> None:
        """One trace is dealt with; `seconds` is 0 for one that cost no analysis."""
        self._done += 1
        self._tokens += n_tokens if seconds else 0
        self._analysed += seconds > 0
        self._seconds += seconds
        self._tokens_left = tokens_left
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._pace()), refresh=False)
            self._bar.update()
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
        return ", ".join([f"{self._done} of {self._total} traces", *self._pace()])

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def _pace(self) -> list[str]:
        if not self._analysed:
            return []
        speed = self._tokens / self._seconds * self._replicas
        left = self._tokens_left / speed if speed else 0.0
        each = self._seconds / self._analysed
        return [f"{speed:.0f} tokens/s", f"{each:.1f} s per trace", f"about {_clock(left)} left"]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
