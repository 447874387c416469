"""`score="cut"` of whole models against the derivative of the loss towards z without the step, one by one.

The oracle knows nothing of mass and gain. For each layer and step a forward pass in which that layer's scores
on the step are -inf gives `z_cut`. One more pass has `z + eps (z_cut - z)` in its place, eps 0, of every
layer, step, head and row; and `dL_t / d eps`, a backward pass for each t, is the score before rows are added
up.
"""

from functools import partial

import pytest
import torch
from saliency_oracles import nll
from tiny_architectures import ATTENTION_VARIETIES, N_LAYERS, build_bridge

from stepflow_tl.models.hook_names import by_heads, resolve_hooks
from stepflow_tl.saliency.fused.run import fused_backend
from stepflow_tl.saliency.hooks_backend import hooks_backend
from stepflow_tl.saliency.objectives import Objective, token_log_odds

# Windows hide the first of them from the last; a step of one token, TEMPLATE at the start and inside.
STEP_IDS = torch.tensor([-1] * 2 + [0] * 4 + [1] + [-1] * 2 + [2] * 5 + [3] * 4)
N_TOKENS, N_BINS = len(STEP_IDS), 5
TOKENS = torch.randint(3, 260, (N_TOKENS,), generator=torch.Generator().manual_seed(0))
LAYERS = tuple(range(N_LAYERS))
BINS = [STEP_IDS == (j if j < N_BINS - 1 else -1) for j in range(N_BINS)]


def per_token_losses(logits, kind):
    if kind == "per_token":
        return nll(logits, TOKENS)
    p = torch.softmax(logits[0, :-1], -1).gather(-1, TOKENS[1:, None])[:, 0]
    return -torch.log(p / (1 - p))


def cut_outputs(model, layer, keys, names):
    """z of one layer, `[token, head, d]`, scores on `keys` at -inf; rows left without a key as they are."""
    kept = {}

    def cut(scores, hook):
        cut = scores.masked_fill(keys, -torch.inf)
        # Masks are -inf, or a number so low that nothing is left of it.
        empty = (cut < -1e30).all(-1, keepdim=True)
        return cut if names["sink"] else torch.where(empty, scores, cut)

    def keep(z, hook):
        kept["z"] = z[0].detach()

    hooks = [(names["scores"], cut), (names["z"], by_heads(model, names["z"], keep))]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model(TOKENS[None], return_type="logits")
    return kept["z"]


def directional_derivatives(model, kind):
    """`[layer, head, query_step, key_bin]`."""
    hooks = {h.layer: h for h in resolve_hooks(model).layers}
    names = {
        layer: {
            "scores": h.scores,
            "z": str(h.z),
            "sink": hasattr(model.blocks[layer].attn.original_component, "sinks"),
        }
        for layer, h in hooks.items()
    }
    cuts = {layer: [cut_outputs(model, layer, keys, names[layer]) for keys in BINS] for layer in LAYERS}
    n_heads = cuts[0][0].shape[1]
    doses = torch.zeros(N_LAYERS, n_heads, N_TOKENS, N_BINS, dtype=torch.float64, requires_grad=True)

    def dose(z, hook, *, layer):
        moved = sum(
            doses[layer, ..., j].T[..., None] * (z_cut - z[0].detach()) for j, z_cut in enumerate(cuts[layer])
        )
        return z + moved[None]

    fwd_hooks = [(names[x]["z"], by_heads(model, names[x]["z"], partial(dose, layer=x))) for x in LAYERS]
    with model.hooks(fwd_hooks=fwd_hooks):
        losses = per_token_losses(model(TOKENS[None], return_type="logits"), kind)
    rows = torch.zeros_like(doses)
    for t, loss in enumerate(losses):
        (slope,) = torch.autograd.grad(loss, doses, retain_graph=True)
        rows[:, :, t] = slope[:, :, t]
    return torch.stack([rows[:, :, STEP_IDS == i].sum(2) for i in range(N_BINS - 1)], dim=2).detach()


@pytest.mark.parametrize("kind", ["per_token", "log_odds"])
@pytest.mark.parametrize("name", ATTENTION_VARIETIES)
def test_the_cut_score_is_the_derivative_towards_z_without_the_step(name, kind, float64_throughout):
    model = build_bridge(name)
    expected = directional_derivatives(model, kind)
    loss = {"token_loss": token_log_odds} if kind == "log_odds" else {}
    objective = Objective(kind, torch.arange(1, N_TOKENS), per_token=True, **loss)
    scale = expected.abs().amax((1, 2, 3), keepdim=True)
    assert scale.min() > 1e-4 and (expected < -1e-4).any() and (expected > 1e-4).any()
    for backend in (hooks_backend, fused_backend):
        found = backend(model, TOKENS, STEP_IDS, objective, LAYERS, score="cut")
        assert ((found - expected).abs() / scale).max() < 1e-8
