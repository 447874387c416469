"""What is written over a step, and that TransformerLens' own patching can use it."""

import pytest
import torch
from tiny_models import TINY_MODEL_KINDS


def activations(trace, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(trace), 3, 4, generator=generator, dtype=torch.float64)


def matches_of(first, second, alignment):
    from stepflow_tl.causal.alignment import match_steps

    return match_steps(first, second, alignment=alignment)


def test_tokens_are_written_as_they_are(right_trace, wrong_trace):
    from stepflow_tl.causal.step_edits import step_patch_setter

    matches = matches_of(right_trace, wrong_trace, "tokens")
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
    from stepflow_tl.causal.step_edits import patched_step

    match = matches_of(longer_trace, wrong_trace, "mean")[1]
    base, clean = activations(wrong_trace), activations(longer_trace, seed=1)
    here = base[slice(*match.corrupted.token_span)]
    patched = patched_step(base, clean, match, "mean")
    assert match.clean.n_tokens != match.corrupted.n_tokens
    assert torch.allclose(patched.mean(0), clean[slice(*match.clean.token_span)].mean(0))
    assert torch.allclose(patched - patched[0], here - here[0])


@pytest.mark.parametrize("alignment", ["tokens", "mean"])
def test_the_placebo_moves_each_vector_just_as_far_and_elsewhere(right_trace, wrong_trace, alignment):
    from stepflow_tl.causal.step_edits import patched_step

    match = matches_of(right_trace, wrong_trace, alignment)[1]
    base, clean = activations(wrong_trace), activations(right_trace, seed=1)
    here = base[slice(*match.corrupted.token_span)]
    moved = patched_step(base, clean, match, alignment) - here
    placebo = patched_step(base, clean, match, alignment, placebo_seed=3, layer=1) - here
    assert torch.allclose(placebo.norm(dim=-1), moved.norm(dim=-1))
    assert not torch.allclose(placebo, moved, atol=1e-2)
    again = patched_step(base, clean, match, alignment, placebo_seed=3, layer=1) - here
    other_layer = patched_step(base, clean, match, alignment, placebo_seed=3, layer=2) - here
    assert torch.equal(placebo, again) and not torch.allclose(placebo, other_layer, atol=1e-2)


@pytest.mark.filterwarnings("ignore::Warning")  # TransformerLens' own, of its progress bar and frames
@pytest.mark.parametrize(
    ("kind", "component"),
    [(TINY_MODEL_KINDS[0], "resid_pre"), (TINY_MODEL_KINDS[0], "v"), (TINY_MODEL_KINDS[1], "z")],
)
def test_transformer_lens_patching_runs_our_setter_with_our_result(
    tiny_model, right_trace, wrong_trace, kind, component
):
    import pandas as pd
    from transformer_lens.patching import generic_activation_patch

    from stepflow_tl.causal import step_patching
    from stepflow_tl.causal.step_edits import step_patch_setter
    from stepflow_tl.saliency import LogitDifference

    model, metric = tiny_model(kind), LogitDifference(len(wrong_trace) - 3, 7, 11)
    matches = matches_of(right_trace, wrong_trace, "tokens")
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
