"""No input to a parser or loader lets anything out but the package's own errors.

STEPFLOW_FUZZ_EXAMPLES says how many inputs each target gets (40); `benchmarks/fuzz.py` is for many.
"""

import os
import random

import pytest
from fuzz_targets import TARGETS, Refused, mutate
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_material import chat_texts, texts

EXAMPLES = int(os.environ.get("STEPFLOW_FUZZ_EXAMPLES", "40"))
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
TEXT_TARGETS = [
    target for target in TARGETS if target.name in ("format scanner", "splitters", "trace from text")
]
# Any text is a text, and any id gets a name.
NEVER_REFUSE = {"format scanner", "splitters", "file names"}
# The run-time type check makes a call a character slow; benchmarks/fuzz.py runs without it, on whole inputs.
SHORT = {"format scanner": 400, "splitters": 400, "streaming tracker": 200, "trace from text": 400}


def outcome(target, data):
    try:
        target.run(data[: SHORT.get(target.name)])
    except Refused:
        return "refused"
    return "taken"


@each_target
def test_valid_inputs_are_taken(target):
    assert [outcome(target, data) for data in target.seeds()] == ["taken"] * len(target.seeds())


@each_target
def test_changed_inputs_are_refused_or_hold(target):
    seeds = target.seeds()

    @settings(max_examples=EXAMPLES)
    @given(st.integers(0, 2**32), st.sampled_from(seeds))
    def check(seed, data):
        outcome(target, mutate(data, seeds, random.Random(seed)))

    check()


@each_target
def test_any_bytes_are_refused_or_hold(target):
    @settings(max_examples=EXAMPLES // 4)
    @given(st.binary(max_size=200))
    def check(data):
        outcome(target, data)

    check()


@pytest.mark.parametrize("target", TEXT_TARGETS, ids=lambda target: target.name)
def test_hostile_text_is_refused_or_holds(target):
    @settings(max_examples=EXAMPLES)
    @given(st.integers(0, 255), texts(markers=True) | chat_texts() | st.text(st.characters(), max_size=40))
    def check(first, text):
        outcome(target, bytes([first]) + text.encode("utf-8", "surrogatepass"))

    check()


@each_target
def test_the_changes_reach_both_outcomes(target):
    """Fuzzing that only ever meets the first check, or never meets one, shows nothing."""
    generator, seeds = random.Random(0), target.seeds()
    found = set()
    for _ in range(20 if target.name in NEVER_REFUSE else 400):
        found.add(outcome(target, mutate(generator.choice(seeds), seeds, generator)))
        if len(found) == 2:
            break
    assert found == ({"taken"} if target.name in NEVER_REFUSE else {"taken", "refused"})
