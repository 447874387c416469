"""Steps of two traces meet by label, or an error says which do not and what to do."""

import pytest


def match(first, second, **options):
    from stepflow_tl.causal.alignment import match_steps

    return match_steps(first, second, **{"alignment": "tokens", **options})


def test_steps_meet_by_label(right_trace, wrong_trace):
    found = match(right_trace, wrong_trace)
    assert [m.corrupted.label for m in found] == ["Q", "T1", "T2", "T3", "S1"]
    assert all(m.clean.label == m.corrupted.label for m in found)
    assert found[1].clean.text != found[1].corrupted.text


def test_a_choice_keeps_its_order(right_trace, wrong_trace):
    assert [m.clean.label for m in match(right_trace, wrong_trace, steps=["S1", "T1"])] == ["S1", "T1"]


def test_other_labels_are_refused_with_those_that_both_have(make_trace, right_trace):
    from stepflow_tl.causal.alignment import shared_labels
    from stepflow_tl.errors import AlignmentError

    shorter = make_trace("7 = 2*3 + 1.\n\nSo yes.", "Yes, odd.")
    with pytest.raises(AlignmentError, match=r"only the clean trace has T3.*steps=\['Q', 'T1', 'T2', 'S1'\]"):
        match(right_trace, shorter)
    with pytest.raises(AlignmentError, match="only the corrupted trace has T3"):
        match(shorter, right_trace)
    chosen = shared_labels(right_trace, shorter)
    assert chosen == ("Q", "T1", "T2", "S1")
    assert len(match(right_trace, shorter, steps=chosen, alignment="mean")) == 4


def test_other_lengths_are_refused_under_tokens_only(longer_trace, wrong_trace):
    from stepflow_tl.errors import AlignmentError

    with pytest.raises(AlignmentError, match=r"step T1 has 14 tokens .* T1 has 21 .*alignment='mean'"):
        match(longer_trace, wrong_trace)
    assert len(match(longer_trace, wrong_trace, alignment="mean")) == 5
    assert len(match(longer_trace, wrong_trace, steps=["Q", "T3"])) == 2


def test_sources_choose_another_clean_step(right_trace, wrong_trace):
    (found,) = match(right_trace, wrong_trace, steps=["T2"], sources={"T2": "T1"}, alignment="mean")
    assert (found.clean.label, found.corrupted.label) == ("T1", "T2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": ["T9"]}, "no step 'T9': its steps are Q, T1, T2, T3, S1"),
        ({"steps": []}, "expected at least one step label"),
        ({"steps": ["T1", "T1"]}, "each of them once"),
        ({"steps": ["T1"], "sources": {"T2": "T1"}}, r"sources names \['T2'\], which are not among"),
    ],
)
def test_what_cannot_be_matched_is_an_error(right_trace, wrong_trace, options, message):
    from stepflow_tl.errors import AlignmentError

    with pytest.raises(AlignmentError, match=message):
        match(right_trace, wrong_trace, **options)


def test_a_pair_leads_backwards(right_trace):
    from stepflow_tl.causal.alignment import causal_pair
    from stepflow_tl.errors import AlignmentError

    query, key = causal_pair(right_trace, ("T2", "Q"))
    assert (query.label, key.label) == ("T2", "Q")
    with pytest.raises(AlignmentError, match="T2 comes after Q, so no attention leads there"):
        causal_pair(right_trace, ("Q", "T2"))


def test_the_answer_is_read_where_the_two_versions_part(right_trace, make_trace):
    from stepflow_tl.causal.alignment import answer_logit_difference
    from stepflow_tl.errors import AlignmentError

    other = make_trace("So it cannot be divided.\n\nSo yes.\n\nOdd it is.", "Yes, even.")
    on_other, on_right = answer_logit_difference(right_trace, other)
    for trace, difference, token in ((other, on_other, "e"), (right_trace, on_right, "o")):
        start, end = trace.token_char_spans[difference.position + 1].tolist()
        assert trace.text[start:end] == token
    assert (on_other.token, on_other.other_token) == (ord("o") - 33, ord("e") - 33)
    assert (on_right.token, on_right.other_token) == (on_other.token, on_other.other_token)
    assert on_other.position != on_right.position
    with pytest.raises(AlignmentError, match="step S1 reads the same in both"):
        answer_logit_difference(right_trace, right_trace)
