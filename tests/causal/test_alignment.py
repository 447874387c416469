"""Steps of two traces meet by label, or an error says which do not; what is written over a step."""

import pandas as pd
import pytest
import torch
from tiny_models import TINY_MODEL_KINDS
from transformer_lens.patching import generic_activation_patch

from stepflow_tl.causal import step_patching
from stepflow_tl.causal.alignment import (
    answer_logit_difference,
    match_steps,
    patched_step,
    shared_labels,
    step_patch_setter,
)
from stepflow_tl.errors import AlignmentError, TraceError
from stepflow_tl.saliency import LogitDifference


def match(first, second, **options):
    return match_steps(first, second, **{"alignment": "tokens", **options})


def test_steps_meet_by_label(right_trace, wrong_trace):
    found = match(right_trace, wrong_trace)
    assert [m.corrupted.label for m in found] == ["Q", "T1", "T2", "T3", "S1"]
    assert all(m.clean.label == m.corrupted.label for m in found)
    assert found[1].clean.text != found[1].corrupted.text


def test_a_choice_keeps_its_order(right_trace, wrong_trace):
    assert [m.clean.label for m in match(right_trace, wrong_trace, steps=["S1", "T1"])] == ["S1", "T1"]


def test_other_labels_are_refused_with_those_that_both_have(make_trace, right_trace):
    shorter = make_trace("7 = 2*3 + 1.\n\nSo yes.", "Yes, odd.")
    with pytest.raises(AlignmentError, match=r"only the clean trace has T3.*steps=\['Q', 'T1', 'T2', 'S1'\]"):
        match(right_trace, shorter)
    with pytest.raises(AlignmentError, match="only the corrupted trace has T3"):
        match(shorter, right_trace)
    chosen = shared_labels(right_trace, shorter)
    assert chosen == ("Q", "T1", "T2", "S1")
    assert len(match(right_trace, shorter, steps=chosen, alignment="mean")) == 4


def test_other_lengths_are_refused_under_tokens_only(longer_trace, wrong_trace):
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
        ({"steps": []}, "expected at least one step label"),
        ({"steps": ["T1", "T1"]}, "each of them once"),
        ({"steps": ["T1"], "sources": {"T2": "T1"}}, r"sources names \['T2'\], which are not among"),
    ],
)
def test_what_cannot_be_matched_is_an_error(right_trace, wrong_trace, options, message):
    with pytest.raises(AlignmentError, match=message):
        match(right_trace, wrong_trace, **options)
    with pytest.raises(TraceError, match="no step 'T9': its steps are Q, T1, T2, T3, S1"):
        match(right_trace, wrong_trace, steps=["T9"])


def test_the_answer_is_read_where_the_two_versions_part(right_trace, make_trace):
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


def activations(trace, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(trace), 3, 4, generator=generator, dtype=torch.float64)


def test_tokens_are_written_as_they_are(right_trace, wrong_trace):
    matches = match(right_trace, wrong_trace)
    base, clean = activations(wrong_trace), activations(right_trace, seed=1)
    before = base.clone()
    patched = step_patch_setter(matches)(base[None], [0, 2], clean[None])[0]
    step = slice(*matches[2].corrupted.token_span)
    assert torch.equal(patched[step], clean[step])
    outside = torch.ones(len(wrong_trace), dtype=torch.bool)
    outside[step] = False
    assert torch.equal(patched[outside], base[outside])
    assert torch.equal(base, before), "the activation it was given is not written to"


def test_the_mean_is_replaced_and_differences_within_the_step_stay(longer_trace, wrong_trace):
    found = match(longer_trace, wrong_trace, alignment="mean")[1]
    base, clean = activations(wrong_trace), activations(longer_trace, seed=1)
    here = base[slice(*found.corrupted.token_span)]
    patched = patched_step(base, clean, found, "mean")
    assert found.clean.n_tokens != found.corrupted.n_tokens
    assert torch.allclose(patched.mean(0), clean[slice(*found.clean.token_span)].mean(0))
    assert torch.allclose(patched - patched[0], here - here[0])


@pytest.mark.parametrize("alignment", ["tokens", "mean"])
def test_the_placebo_moves_each_vector_just_as_far_and_elsewhere(right_trace, wrong_trace, alignment):
    found = match(right_trace, wrong_trace, alignment=alignment)[1]
    base, clean = activations(wrong_trace), activations(right_trace, seed=1)
    here = base[slice(*found.corrupted.token_span)]
    moved = patched_step(base, clean, found, alignment) - here
    placebo = patched_step(base, clean, found, alignment, placebo_seed=3, layer=1) - here
    assert torch.allclose(placebo.norm(dim=-1), moved.norm(dim=-1))
    assert not torch.allclose(placebo, moved, atol=1e-2)
    again = patched_step(base, clean, found, alignment, placebo_seed=3, layer=1) - here
    other_layer = patched_step(base, clean, found, alignment, placebo_seed=3, layer=2) - here
    assert torch.equal(placebo, again) and not torch.allclose(placebo, other_layer, atol=1e-2)


@pytest.mark.filterwarnings("ignore::Warning")  # TransformerLens' own, of its progress bar and frames
@pytest.mark.parametrize(
    ("kind", "component"),
    [(TINY_MODEL_KINDS[0], "resid_pre"), (TINY_MODEL_KINDS[0], "v"), (TINY_MODEL_KINDS[1], "z")],
)
def test_transformer_lens_patching_runs_our_setter_with_our_result(
    tiny_model, right_trace, wrong_trace, kind, component
):
    model, metric = tiny_model(kind), LogitDifference(len(wrong_trace) - 3, 7, 11)
    matches = match(right_trace, wrong_trace)
    tokens = wrong_trace.tokens[None]
    _, clean_cache = model.run_with_cache(right_trace.tokens[None])
    theirs = generic_activation_patch(
        model,
        tokens,
        clean_cache,
        lambda logits: metric(logits, tokens),
        step_patch_setter(matches),
        component,
        index_df=pd.DataFrame([(0, 1), (0, 3), (2, 1), (2, 3)], columns=["layer", "step"]),
    )
    ours = step_patching(
        model,
        right_trace,
        wrong_trace,
        metric=metric,
        component=component,
        layers=[0, 2],
        steps=["T1", "T3"],
    )
    assert isinstance(theirs, torch.Tensor)
    absolute = (ours.effects + ours.corrupted_value).flatten()
    assert ours.effects.abs().max() > 1e-2
    assert torch.allclose(theirs.double(), absolute, atol=1e-5), "theirs is kept in float32"
