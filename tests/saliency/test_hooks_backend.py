"""The hooks backend against oracles written here: separate backward passes and retained gradients."""

import pytest
import torch
from saliency_oracles import nll, patterns_and_logits, pool_by_loops, separate_backward_passes
from tiny_models import TINY_MODEL_KINDS, build_tiny_model, count_hooks

from stepflow_tl.errors import GradientError
from stepflow_tl.saliency.hooks_backend import hooks_backend
from stepflow_tl.saliency.objectives import Objective, token_log_odds

N_TOKENS = 14
# The native source keeps its rotation tables in float32, so a rotated product equals the unrotated one to
# 1e-8 only; softmax and norms of the transformers models run in float32 whatever the weights.
TOLERANCE = {"hooked": 1e-12, "native": 1e-7, "llama": 2e-6, "qwen2": 2e-6}


def step_ids() -> torch.Tensor:
    """Template, question, two unequal thinking steps, a template gap, a one-token step, a summary."""
    return torch.tensor([-1, 0, 0, 0, 1, 1, 1, 1, 2, 2, -1, 3, 4, 4])


def token_ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 250, (N_TOKENS,), generator=torch.Generator().manual_seed(seed))


def run_backend(model, tokens, ids, objective):
    return hooks_backend(model, tokens, ids, objective, tuple(range(model.cfg.n_layers)))


def per_token(tokens):
    return Objective("per_token", torch.arange(1, len(tokens)), per_token=True)


def mean_nll(targets):
    return Objective("mean", torch.tensor(targets))


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
def test_per_token_equals_separate_backward_passes(kind):
    model, tokens = build_tiny_model(kind), token_ids()
    expected = pool_by_loops(separate_backward_passes(model, tokens), step_ids())
    found = run_backend(model, tokens, step_ids(), per_token(tokens)).double()
    assert expected.amax((1, 2, 3)).min() > 1e-6, "the oracle must have mass in every layer"
    assert ((found - expected).abs() / expected.amax((1, 2, 3), keepdim=True)).max() < TOLERANCE[kind]


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
def test_an_ordinary_objective_equals_retained_gradients(kind):
    model, tokens = build_tiny_model(kind), token_ids()
    targets = [4, 5, 6, 9, 12]
    patterns, logits = patterns_and_logits(model, tokens)
    nll(logits, tokens)[torch.tensor(targets) - 1].mean().backward()
    saliency = torch.stack([(p.detach() * p.grad)[0].abs().double() for _, p in sorted(patterns.items())])
    expected = pool_by_loops(saliency, step_ids())
    found = run_backend(model, tokens, step_ids(), mean_nll(targets)).double()
    assert ((found - expected).abs() / expected.amax((1, 2, 3), keepdim=True)).max() < TOLERANCE[kind]


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
def test_log_odds_equal_separate_backward_passes(kind):
    model, tokens = build_tiny_model(kind), token_ids()
    rows = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, N_TOKENS, N_TOKENS, dtype=torch.float64)
    for t in range(N_TOKENS - 1):
        patterns, logits = patterns_and_logits(model, tokens)
        p = torch.softmax(logits[0, t].double(), -1)[tokens[t + 1]]
        (-torch.log(p / (1 - p))).backward()
        for layer, pattern in patterns.items():
            rows[layer, :, t] = (pattern.detach() * pattern.grad)[0, :, t].abs().double()
    expected = pool_by_loops(rows, step_ids())
    targets = torch.arange(1, N_TOKENS)
    objective = Objective("log_odds", targets, per_token=True, token_loss=token_log_odds)
    found = run_backend(model, tokens, step_ids(), objective).double()
    assert expected.amax((1, 2, 3)).min() > 1e-6
    assert ((found - expected).abs() / expected.amax((1, 2, 3), keepdim=True)).max() < TOLERANCE[kind]
    plain = run_backend(model, tokens, step_ids(), per_token(tokens)).double()
    assert (found >= plain * (1 - 1e-5)).all() and (found > 1.001 * plain).any(), (
        "the gradient of the log-odds is that of the NLL over 1 - p"
    )


def test_the_two_objectives_agree_in_the_last_layer_and_differ_below():
    model, tokens = build_tiny_model(), token_ids()
    each = torch.arange(N_TOKENS)
    own = run_backend(model, tokens, each, per_token(tokens))
    mean = run_backend(model, tokens, each, mean_nll(list(range(1, N_TOKENS)))) * (N_TOKENS - 1)
    difference = ((own - mean).abs().amax((1, 2, 3)) / own.amax((1, 2, 3))).tolist()
    assert difference[-1] < 1e-12, "above the last layer no path crosses positions"
    assert min(difference[:-1]) > 1e-3, "below it the mean loss counts what a row does to later tokens"


def test_hooks_attached_outside_stay_in_force():
    model, tokens = build_tiny_model(), token_ids()
    plain = run_backend(model, tokens, step_ids(), per_token(tokens))

    def uniform_head(pattern, hook):
        pattern = pattern.clone()
        pattern[:, 1] = torch.tril(torch.ones_like(pattern[0, 1])) / torch.arange(1, N_TOKENS + 1)[:, None]
        return pattern

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", uniform_head)]):
        edited = run_backend(model, tokens, step_ids(), per_token(tokens))
    assert not torch.allclose(plain[1, 1], edited[1, 1])
    assert count_hooks(model) == 0


def test_parameters_keep_their_flags_and_get_no_gradient():
    model, tokens = build_tiny_model(), token_ids()
    flags = [i % 2 == 0 for i, _ in enumerate(model.parameters())]
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    model.train()
    with torch.no_grad():
        run_backend(model, tokens, step_ids(), per_token(tokens))
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training and all(block.training for block in model.blocks)


@pytest.mark.parametrize("where", ["hook_embed", "blocks.2.attn.hook_pattern", "blocks.3.attn.hook_z"])
def test_no_hook_is_left_after_an_exception_inside(where):
    model, tokens = build_tiny_model(), token_ids()
    before = len(model.hook_dict)

    def explode(tensor, hook):
        raise RuntimeError("from inside")

    with model.hooks(fwd_hooks=[(model.hook_dict[where].name, explode)]):
        with pytest.raises(RuntimeError, match="from inside"):
            run_backend(model, tokens, step_ids(), per_token(tokens))
    assert count_hooks(model) == 0 and len(model.hook_dict) == before


def test_nan_in_a_gradient_is_an_error_that_names_the_layer():
    model, tokens = build_tiny_model(), token_ids()

    def poison(residual, hook):
        residual.register_hook(lambda grad: grad * float("nan"))

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", poison)]):
        with pytest.raises(GradientError, match=r"layer 0, head 0 is not finite .*float32"):
            run_backend(model, tokens, step_ids(), per_token(tokens))
    assert count_hooks(model) == 0


def test_a_constant_pattern_still_has_saliency():
    model, tokens = build_tiny_model(), token_ids()
    constant = [("blocks.2.attn.hook_pattern", lambda pattern, hook: pattern.detach())]
    plain = run_backend(model, tokens, step_ids(), mean_nll([5, 9]))
    with model.hooks(fwd_hooks=constant):
        found = run_backend(model, tokens, step_ids(), mean_nll([5, 9]))
    assert torch.allclose(found[2:], plain[2:], rtol=1e-12), "from layer 2 on nothing changed"
    assert not torch.allclose(found[1], plain[1], rtol=1e-3), "below, the path through the pattern is cut"


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
def test_per_token_stays_exact_under_hooks_that_edit_scores_pattern_values_and_z(kind):
    model, tokens = build_tiny_model(kind), token_ids()

    def scale(tensor, hook):
        return tensor * torch.linspace(0.5, 1.5, tensor.shape[-1], dtype=tensor.dtype)

    names = [
        f"blocks.1.attn.{name}" for name in ("hook_attn_scores", "hook_pattern", "hook_v", "hook_z", "hook_k")
    ]
    names += ["blocks.2.attn.hook_pattern", "blocks.2.attn.hook_q"]
    if kind == "native":
        names.remove("blocks.1.attn.hook_attn_scores")  # fires after the fact there
    with model.hooks(fwd_hooks=[(model.hook_dict[name].name, scale) for name in names]):
        expected = pool_by_loops(separate_backward_passes(model, tokens), step_ids())
        found = run_backend(model, tokens, step_ids(), per_token(tokens)).double()
    assert ((found - expected).abs() / expected.amax((1, 2, 3), keepdim=True)).max() < TOLERANCE[kind]


def test_a_residual_stream_cut_above_is_an_error():
    model, tokens = build_tiny_model(), token_ids()
    cut = [("blocks.2.hook_resid_post", lambda residual, hook: residual.detach() + 0)]
    with model.hooks(fwd_hooks=cut):
        with pytest.raises(GradientError, match=r"no gradient reached the pattern of layers \[0, 1, 2\]"):
            run_backend(model, tokens, step_ids(), per_token(tokens))
