"""The step tracker: labels token by token, late markers, split characters, forks."""

import pytest

from stepflow_tl.errors import TraceError
from stepflow_tl.trace.decoding import TextPiece
from stepflow_tl.trace.formats import FormatScanner, SpanScanner, get_format
from stepflow_tl.trace.splitting import StepTracker
from stepflow_tl.trace.steps import Segment

FRAGMENT = TextPiece("", is_fragment=True)


def thinking(*pieces, splitter="paragraph"):
    tracker = StepTracker(SpanScanner([(10**6, Segment.THINKING)]), splitter)
    return [tracker.push(piece) for piece in pieces]


def tagged(*pieces):
    """A tracker inside a ChatML answer, after the markers that open it."""
    tracker = StepTracker(FormatScanner(get_format("chatml")), "paragraph")
    for piece in ("<|im_start|>", "assistant", "\n", "<think>", "\n"):
        tracker.push(piece)
    return tracker, [tracker.push(piece) for piece in pieces]


def steps(labels):
    return [label.step for label in labels]


def test_a_token_belongs_to_the_step_of_its_first_character():
    labels = thinking("One", ".\n\nTw", "o.\n", "\nThree")
    assert steps(labels) == [0, 0, 1, 1]
    assert [label.begins_step for label in labels] == [True, False, True, False]


def test_a_step_that_owns_no_token_merges_into_the_one_before():
    assert steps(thinking("A", "\n\nB\n\nC", "D")) == [0, 0, 1]


def test_a_fragment_begins_the_step_that_its_character_begins():
    labels = thinking("A\n\n", FRAGMENT, FRAGMENT, "🙂", " b")
    assert steps(labels) == [0, 1, 1, 1, 1]
    assert [label.begins_step for label in labels] == [True, True, False, False, False]


def test_a_token_without_text_goes_where_the_token_before_it_goes():
    nothing = TextPiece("", is_fragment=False)
    assert steps(thinking("A\n\n", nothing, "B", nothing)) == [0, 0, 1, 1]


def test_tokens_of_a_marker_are_provisional_and_become_template_when_it_completes():
    tracker, labels = tagged("Hm", "</", "th", "ink>", "\n\n", "So")
    assert [label.is_final for label in labels] == [True, False, False, True, True, True]
    assert steps(labels) == [0, 0, 0, -1, -1, 1]
    first = labels[0].token
    assert labels[3].relabelled == (first + 1, first + 3)
    assert labels[3].segment == Segment.TEMPLATE
    assert labels[5].segment == Segment.SUMMARY and labels[5].begins_step


def test_where_a_marker_is_disproved_the_step_that_was_due_begins_with_the_disproving_token():
    _, labels = tagged("Hm\n\n", "<", "/", "b")
    assert steps(labels) == [0, 0, 0, 1]
    assert [label.is_final for label in labels] == [True, False, False, True]
    assert labels[3].settled == (labels[1].token, labels[3].token)
    assert labels[3].begins_step


def test_a_marker_that_a_single_token_completes_is_never_provisional():
    _, labels = tagged("Hm.", "</think>", "So")
    assert all(label.is_final for label in labels)
    assert steps(labels) == [0, -1, 1]


def test_within_template_text_nothing_is_provisional():
    tracker = StepTracker(FormatScanner(get_format("chatml")))
    labels = [tracker.push(piece) for piece in ("<", "|im_start|>", "us", "er", "\n", "Hi")]
    assert all(label.is_final for label in labels)
    assert [label.segment for label in labels] == [Segment.TEMPLATE] * 5 + [Segment.QUESTION]


def test_a_fragment_within_a_marker_of_wide_characters_waits_with_it():
    tracker = StepTracker(FormatScanner(get_format("deepseek-r1")))
    for piece in ("<｜Assistant｜>", "Hm\n\n"):
        tracker.push(piece)
    labels = [tracker.push(piece) for piece in ("<", FRAGMENT, "｜", "User｜>", "Q")]
    assert steps(labels) == [0, 0, 0, -1, 1]
    assert labels[3].relabelled == (labels[0].token, labels[3].token)
    disproved = StepTracker(FormatScanner(get_format("deepseek-r1")))
    for piece in ("<｜Assistant｜>", "Hm\n\n"):
        disproved.push(piece)
    assert steps([disproved.push(piece) for piece in ("</", FRAGMENT, "é")]) == [0, 1, 1]


def boxed(*pieces):
    tracker = StepTracker(FormatScanner(get_format("boxed")), "paragraph", keep_log=True)
    for piece in ("<|im_start|>", "assistant", "\n"):
        tracker.push(piece)
    return tracker, [tracker.push(piece) for piece in pieces]


def test_where_the_marker_is_the_answers_beginning_its_last_token_begins_the_answer():
    tracker, labels = boxed("It is $", "\\", "boxed", "{", "18", "}$.", "\n\n", "Done")
    segments = [label.segment for label in labels]
    assert segments == [Segment.THINKING] * 3 + [Segment.SUMMARY] * 5
    assert [label.is_final for label in labels] == [True, False, False] + [True] * 5
    assert steps(labels) == [0, 0, 0, 1, 1, 1, 1, 2]
    assert labels[3].begins_step and labels[3].settled == (labels[1].token, labels[3].token)
    assert labels[3].relabelled == (0, 0)
    # The text of the answer begins with the marker all the same.
    begins = {start.step: start.char for start in tracker.log}
    assert begins[1] == len("<|im_start|>assistant\nIt is $")


def test_a_token_that_holds_the_answers_whole_beginning_begins_it():
    _, labels = boxed("It is ", "\\boxed{", "18", "}")
    assert steps(labels) == [0, 1, 1, 1] and all(label.is_final for label in labels)


def test_what_only_looked_like_the_answers_beginning_stays_thinking():
    _, labels = boxed("It is ", "\\", "box", "{", "18", "}")
    assert steps(labels) == [0] * 6


def test_a_marker_unfinished_at_the_end_leaves_its_provisional_labels():
    tracker, labels = tagged("Hm\n\n", "</th")
    assert tracker.finish() == (labels[1].token, labels[1].token + 1)
    assert steps(labels) == [0, 0]


def test_white_space_after_a_marker_is_template_and_before_one_belongs_to_the_step():
    _, labels = tagged(" \n", "Hm", "\n", "</think>", "\n\n", "So", "\n", "<|im_end|>", "\n")
    assert steps(labels) == [-1, 0, 0, -1, -1, 1, 1, -1, -1]


def test_a_clone_goes_its_own_way():
    tracker, _ = tagged("Hm", "\n\n")
    fork = tracker.clone()
    assert fork.push("</think>").segment == Segment.TEMPLATE
    assert fork.push("So").segment == Segment.SUMMARY
    label = tracker.push("More")
    assert (label.segment, label.begins_step) == (Segment.THINKING, True)
    assert fork.n_steps == tracker.n_steps == 2


def test_a_clone_in_the_middle_of_a_marker_waits_on_its_own():
    tracker, _ = tagged("Hm", "</th")
    fork = tracker.clone()
    assert fork.push("ink>").relabelled == (6, 7)
    assert tracker.push("x").settled == (6, 7)


def test_unknown_splitters_are_refused_where_the_tracker_is_made():
    with pytest.raises(TraceError, match="Unknown splitter 'words'"):
        StepTracker(SpanScanner([]), summary_splitter="words")
