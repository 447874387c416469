"""The bridge's mathematics against a convex solver, the paper's equations, and the cases neither defines."""

import math

import pytest
import torch
from scipy.optimize import minimize

from stepflow_tl.stepflow.bridge import bridge_pattern, bridge_scores

N_OTHER, N_BRIDGE = 3, 4


def groups_of(n_keys, n_other=N_OTHER, n_bridge=N_BRIDGE):
    """O first (BOS and the like), then B, then S; `[2, 1, 1, 1, key]`, S first."""
    key = torch.arange(n_keys)
    bridge = (key >= n_other) & (key < n_other + n_bridge)
    return torch.stack([key >= n_other + n_bridge, bridge])[:, None, None, None]


def random_scores(n_rows, n_keys, *, spread=2.0, bridge=-2.0, seed=0, dtype=torch.float64):
    scores = torch.randn(
        1, 1, n_rows, n_keys, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    scores *= spread
    scores[..., N_OTHER : N_OTHER + N_BRIDGE] += bridge
    return scores.to(dtype)


def masses(pattern, groups):
    own, bridge = (pattern * groups).sum(-1)
    return own, bridge, (pattern * ~groups.any(0)).sum(-1)


def project(scores, groups, **options):
    return bridge_scores(scores, groups, **options)


def solve(p, own, bridge, tau):
    """argmin KL(q || p) subject to sum q = 1, q(O) = p(O), q(B) >= tau, by SLSQP."""
    other = ~(own | bridge)
    ones = torch.ones_like(p).numpy()
    constraints = [
        dict(type="eq", fun=lambda q: q.sum() - 1, jac=lambda q: ones),
        dict(type="eq", fun=lambda q: (q * other).sum() - float(p[other].sum()), jac=lambda q: other * 1.0),
        dict(type="ineq", fun=lambda q: (q * bridge).sum() - tau, jac=lambda q: bridge * 1.0),
    ]
    own, bridge, other, reference = own.numpy(), bridge.numpy(), other.numpy(), p.numpy()
    found = minimize(
        lambda q: float((q * (torch.tensor(q / reference).log().numpy())).sum()),
        reference.copy(),
        jac=lambda q: torch.tensor(q / reference).log().numpy() + 1,
        bounds=[(1e-12, 1)] * len(reference),
        constraints=constraints,
        method="SLSQP",
        options=dict(ftol=1e-15, maxiter=500),
    )
    assert found.success or found.status == 8, found.message
    return torch.tensor(found.x)


def test_the_result_is_the_kl_projection_that_a_convex_solver_finds():
    scores, groups = random_scores(40, 12, spread=1.5, bridge=-0.5), groups_of(12)
    own, bridge = groups[:, 0, 0, 0]
    tau = min(math.sqrt(bridge.sum() / (bridge.sum() + own.sum())), 0.3)
    projected, shifts = project(scores, groups, tau_max=0.3)
    p, q = scores.softmax(-1)[0, 0], projected.softmax(-1)[0, 0]
    feasible = tau < 0.9 * (1 - masses(p, groups[:, 0, 0])[2])
    active = shifts.active[0, 0, :, 0]
    assert 10 < int((active & feasible).sum()) < 40, "both kinds of rows must occur"
    for row in feasible.nonzero()[:, 0].tolist():
        assert (q[row] - solve(p[row], own, bridge, tau)).abs().max() < 1e-5


def test_a_thousand_feasible_rows_follow_the_published_rule():
    """Equations 5 to 8 of the paper, written out here."""
    scores = random_scores(4000, 20)
    groups = groups_of(20)
    p = scores.softmax(-1)
    p_own, p_bridge, p_other = masses(p, groups)  # equation 5
    tau_bridge = min(math.sqrt(N_BRIDGE / (N_BRIDGE + 13)), 0.15)  # equation 6
    tau_own = 1 - p_other - tau_bridge
    feasible = (p_bridge < tau_bridge) & (tau_bridge <= 0.9 * (1 - p_other))
    assert int(feasible.sum()) >= 1000
    lambda_bridge, lambda_own = (tau_bridge / p_bridge).log(), (tau_own / p_own).log()  # equation 8
    shift = groups[0] * lambda_own.unsqueeze(-1) + groups[1] * lambda_bridge.unsqueeze(-1)
    expected = (scores + shift)[feasible]  # equation 7
    found, shifts = project(scores, groups)
    assert (found[feasible] - expected).abs().max() < 1e-5
    assert torch.equal(found[p_bridge >= tau_bridge], scores[p_bridge >= tau_bridge])
    assert shifts.gain[feasible.unsqueeze(-1)].allclose((tau_bridge - p_bridge)[feasible])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_mass_of_other_keys_stays_and_the_bridge_meets_its_floor(dtype, tolerance):
    scores, groups = random_scores(500, 16, spread=3.0, dtype=dtype), groups_of(16)
    projected, shifts = project(scores, groups)
    before, after = masses(scores.softmax(-1), groups), masses(projected.softmax(-1), groups)
    assert shifts.active.any() and not shifts.active.all()
    assert (before[2] - after[2]).abs().max() < tolerance
    floor = torch.minimum(torch.tensor(0.15, dtype=dtype), 0.9 * (1 - before[2]))
    assert (after[1] >= floor - tolerance).all()


def test_untouched_rows_keep_every_bit():
    scores, groups = random_scores(300, 16, dtype=torch.float32), groups_of(16)
    scores[0, 0, :, 2] = -0.0
    projected, shifts = project(scores, groups)
    untouched = ~shifts.active[0, 0, :, 0]
    assert untouched.any() and shifts.active.any()
    bits = [t[0, 0].contiguous().view(torch.int32) for t in (scores, projected)]
    assert torch.equal(bits[0][untouched], bits[1][untouched])
    other = ~groups.any(0)[0, 0, 0]
    assert torch.equal(bits[0][:, other], bits[1][:, other]), "O is never touched"


def test_a_head_that_gives_bos_nearly_all_stays_finite_and_keeps_its_own_segment():
    groups = groups_of(10, n_other=1)
    p = torch.full((10,), 1e-5 * 0.99 / 5, dtype=torch.float32)
    p[0], p[1:5] = 0.99999, 1e-5 * 0.01 / 4
    scores = p.log()[None, None, None]
    for share in (0.5, 0.9):
        projected, shifts = project(scores, groups, max_bridge_share=share)
        own, bridge, other = masses(projected.double().softmax(-1), groups)
        assert projected.isfinite().all() and shifts.capped.all()
        assert abs(other.item() - 0.99999) < 1e-6
        assert own.item() / (own + bridge).item() == pytest.approx(1 - share, rel=1e-4)


@pytest.mark.parametrize("bos", [50.0, 200.0, 1e4])
def test_masses_that_underflow_beside_the_largest_score_are_still_projected(bos):
    scores, groups = random_scores(20, 12, dtype=torch.float32), groups_of(12)
    scores[..., 0] = bos
    projected, shifts = project(scores, groups)
    assert projected.isfinite().all() and shifts.active.any()
    within = projected.double()[..., N_OTHER:].softmax(-1)
    reached = (within * groups[1, ..., N_OTHER:]).sum(-1, keepdim=True)
    assert reached[shifts.active].allclose(torch.tensor(0.9, dtype=torch.float64), atol=1e-3)


def test_a_bridge_whose_mass_underflows_is_raised_all_the_same():
    scores, groups = random_scores(20, 12, bridge=-300.0, dtype=torch.float32), groups_of(12)
    assert (masses(scores.softmax(-1), groups)[1] == 0).all()
    projected, shifts = project(scores, groups)
    _, bridge, _ = masses(projected.double().softmax(-1), groups)
    assert shifts.active.all()
    floor = torch.minimum(torch.tensor(0.15), 0.9 * (1 - masses(scores.softmax(-1), groups)[2]))
    assert bridge.float().allclose(floor, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("mask", ["infinite", "lowest"])
def test_masked_keys_are_not_seen_not_counted_and_never_nan(dtype, mask):
    scores, groups = random_scores(60, 16, dtype=dtype), groups_of(16)
    hidden = torch.zeros(60, 16, dtype=torch.bool)
    hidden[:20, N_OTHER : N_OTHER + N_BRIDGE] = True  # no bridge
    hidden[20:30, N_OTHER + N_BRIDGE :] = True  # no own segment
    hidden[30:40] = True  # a padding row
    hidden[40:50, N_OTHER : N_OTHER + 3] = True  # one key of the bridge is left
    value = -torch.inf if mask == "infinite" else torch.finfo(dtype).min
    masked = scores.masked_fill(hidden, value)
    projected, shifts = project(masked, groups, tau_max=0.5)
    active = shifts.active[0, 0, :, 0]
    assert not projected.isnan().any() and projected.dtype == dtype
    assert not active[:40].any() and active[40:50].any() and active[50:].any()
    assert torch.equal(projected[:, :, :40], masked[:, :, :40])
    assert torch.equal(projected[0, 0][hidden], masked[0, 0][hidden])
    visible = projected[0, 0, 40:50].double().masked_fill(hidden[40:50], -torch.inf).softmax(-1)
    floor = math.sqrt(1 / (1 + 9))
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    other = masses(visible, groups[:, 0, 0])[2]
    expected = torch.minimum(torch.tensor(floor, dtype=torch.float64), 0.9 * (1 - other))
    reached = masses(visible, groups[:, 0, 0])[1]
    assert (reached - expected)[active[40:50]].abs().max() < tolerance


def test_sinks_count_into_the_other_keys():
    scores, groups = random_scores(50, 12).expand(1, 2, 50, 12), groups_of(12)
    sinks = torch.tensor([-1.0, 3.0], dtype=torch.float64)
    projected, shifts = project(scores, groups, sinks=sinks)
    with_sink = lambda s: torch.cat([s, sinks.view(1, 2, 1, 1).expand(1, 2, 50, 1)], -1).softmax(-1)  # noqa: E731
    before, after = with_sink(scores), with_sink(projected)
    assert shifts.active.any()
    wide = torch.cat([groups, torch.zeros_like(groups[..., :1])], -1)
    assert (masses(before, wide)[2] - masses(after, wide)[2]).abs().max() < 1e-12
    floor = torch.minimum(torch.tensor(0.15, dtype=torch.float64), 0.9 * (1 - masses(before, wide)[2]))
    assert masses(after, wide)[1][shifts.active[..., 0]].allclose(floor[shifts.active[..., 0]])
    ignored, _ = project(scores, groups)
    assert not torch.allclose(ignored, projected), "a sink changes what is feasible"


def test_on_probabilities_it_is_the_same_projection():
    scores, groups = random_scores(200, 14), groups_of(14)
    scores[..., :50, 5] = -torch.inf
    projected, shifts = project(scores, groups)
    pattern, other_shifts = bridge_pattern(scores.softmax(-1), groups)
    assert torch.equal(shifts.active, other_shifts.active) and shifts.active.any()
    assert torch.allclose(pattern, projected.softmax(-1), atol=1e-12)
    untouched = ~shifts.active[0, 0, :, 0]
    assert torch.equal(pattern[0, 0, untouched], scores.softmax(-1)[0, 0, untouched])


def test_a_bridge_of_probability_zero_is_left_alone():
    pattern = torch.full((1, 1, 1, 12), 0.1)
    pattern[..., N_OTHER : N_OTHER + N_BRIDGE] = 0
    projected, shifts = bridge_pattern(pattern, groups_of(12))
    assert torch.equal(projected, pattern) and not shifts.active.any()


def test_only_the_chosen_heads_change():
    scores, groups = random_scores(30, 12).expand(1, 3, 30, 12), groups_of(12)
    heads = torch.tensor([[False], [True], [False]])
    projected, shifts = project(scores, groups, heads=heads)
    assert shifts.active[:, 1].any() and not shifts.active[:, [0, 2]].any()
    assert torch.equal(projected[:, [0, 2]], scores[:, [0, 2]])


def test_the_gradient_is_finite_and_right_where_rows_are_masked_inactive_or_projected():
    scores, groups = random_scores(6, 12), groups_of(12)
    scores[0, 0, 0] = -torch.inf
    scores[0, 0, 1, N_OTHER : N_OTHER + N_BRIDGE] = -torch.inf
    scores[0, 0, 2, N_OTHER : N_OTHER + N_BRIDGE] = -800.0
    finite = scores.clone().requires_grad_(True)
    projected, shifts = project(finite, groups)
    assert shifts.active.any()
    weights = torch.randn(6, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (projected[0, 0, 1:].softmax(-1) * weights[1:]).sum().backward()
    assert finite.grad is not None and finite.grad.isfinite().all()
    row, step = 4, 1e-6
    for key in range(12):
        moved = []
        for sign in (1, -1):
            shifted = scores.clone()
            shifted[0, 0, row, key] += sign * step
            moved.append((project(shifted, groups)[0][0, 0, row].softmax(-1) * weights[row]).sum())
        assert float(finite.grad[0, 0, row, key]) == pytest.approx(
            float(moved[0] - moved[1]) / 2 / step, abs=1e-7
        )
