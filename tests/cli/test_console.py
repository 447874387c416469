"""Progress and text on a terminal."""

import io
import sys

import pytest

from stepflow_tl.cli import console
from stepflow_tl.cli.console import Progress
from stepflow_tl.results.tables import printable


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_control_characters_are_escaped_and_letters_are_left():
    assert printable("é 问题 \x1b[2J\n\u202e\ud800") == "é 问题 \\x1b[2J\\n\\u202e\\ud800"


def test_a_log_gets_plain_lines_with_speed_and_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr(console, "_SECONDS_BETWEEN_LINES", 0.0)
    progress = Progress(70)
    for done in range(1, 11):
        progress.advance(n_tokens=300, seconds=60.0, tokens_left=300.0 * (70 - done))
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "1 of 70 traces, 5 tokens/s, 60.0 s per trace, about 1:09:00 left"
    assert lines[-1] == "10 of 70 traces, 5 tokens/s, 60.0 s per trace, about 1:00:00 left"


def test_a_log_is_not_flooded(capsys):
    progress = Progress(1000)
    for _ in range(1000):
        progress.advance()
    assert capsys.readouterr().err == ""


def test_traces_that_cost_nothing_do_not_count_as_speed():
    progress = Progress(10)
    progress.advance(n_tokens=500)
    assert progress.line() == "1 of 10 traces"
    progress.advance(n_tokens=100, seconds=2.0, tokens_left=800.0)
    assert progress.line() == "2 of 10 traces, 50 tokens/s, 2.0 s per trace, about 0:16 left"


def test_the_time_left_goes_by_tokens_and_replicas_share_it():
    progress = Progress(10, replicas=2)
    progress.advance(n_tokens=900, seconds=9.0, tokens_left=1000.0)
    assert progress.line() == "1 of 10 traces, 200 tokens/s, 9.0 s per trace, about 0:05 left"


def test_a_terminal_gets_a_bar_that_messages_do_not_break(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(2)
    progress.advance(n_tokens=10, seconds=1.0)
    progress.note("line 2: no thinking")
    progress.advance(n_tokens=10, seconds=1.0)
    progress.close()
    shown = terminal.getvalue()
    assert "line 2: no thinking\n" in shown
    assert "2/2" in shown and "10 tokens/s" in shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.0, "0:00"), (59.6, "1:00"), (3599.0, "59:59"), (3600.0, "1:00:00")]
)
def test_the_clock_carries_minutes_and_hours(seconds, shown):
    assert console._clock(seconds) == shown
