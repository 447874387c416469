"""StepFlow on models: bands, order, bit-exactness at zero, reports, and what it refuses."""

from functools import partial

import pytest
import torch
from tiny_models import TINY_MODEL_KINDS, TL_GENERATION, build_tiny_model
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

from stepflow_tl.errors import ModelError
from stepflow_tl.models.bands import deep_band, shallow_band
from stepflow_tl.stepflow import StepFlow
from stepflow_tl.stepflow.standing import standing_hooks

from_kinds = pytest.mark.parametrize("kind", (*TINY_MODEL_KINDS, "mistral", "gemma2", "gpt_oss"))


def logits_of(model, trace, hooks=()):
    with model.hooks(fwd_hooks=list(hooks)):
        return model(trace.tokens[None], return_type="logits")


@from_kinds
def test_both_halves_act_in_every_layer_of_their_band(flow_model, trace, kind, hooks_untouched):
    model, flow = flow_model(kind), StepFlow()
    n_layers = model.cfg.n_layers
    plain = logits_of(model, trace)
    with hooks_untouched(model):
        hooks = flow.hooks(model, trace)
        repaired = logits_of(model, trace, hooks)
    assert not torch.allclose(plain, repaired, atol=1e-3)
    for layer in range(n_layers):
        counts = hooks.report().of(layer)
        assert (counts.adjusted > 0) == (layer in shallow_band(n_layers))
        assert counts.injections == (len(trace.steps) - 1 if layer in deep_band(n_layers) else 0)


@from_kinds
@pytest.mark.parametrize(
    ("options", "points"),
    [
        ({"tau_max": 0.0, "alpha": 0.0}, set()),
        ({"alpha": 0.0}, {"bridge"}),
        ({"tau_max": 0.0}, {"momentum"}),
    ],
)
def test_a_half_of_strength_zero_attaches_nothing(flow_model, trace, kind, options, points):
    model = flow_model(kind)
    hooks = StepFlow(**options).hooks(model, trace)
    names = {function.func.__name__ for _, function in hooks}
    wanted = {
        "bridge": {"bridge_hook", "bridge_pattern_hook"},
        "momentum": {"momentum_hook", "capture_values_hook"},
    }
    assert {half for half, functions in wanted.items() if names & functions} == points
    if not points:
        assert torch.equal(logits_of(model, trace, hooks), logits_of(model, trace))


@from_kinds
def test_zero_strength_through_the_hooks_themselves_changes_no_bit(flow_model, trace, kind):
    model = flow_model(kind)
    zero = {
        "bridge_hook": {"tau_max": 0.0},
        "bridge_pattern_hook": {"tau_max": 0.0},
        "momentum_hook": {"alpha": 0.0},
    }
    hooks = [
        (name, partial(function, **zero.get(function.func.__name__, {})))
        for name, function in StepFlow().hooks(model, trace)
    ]
    assert len(hooks) >= 3
    assert torch.equal(logits_of(model, trace, hooks), logits_of(model, trace))


def test_a_rows_bridge_mass_meets_its_floor_inside_the_model(flow_model, trace):
    model = flow_model("llama" if TL_GENERATION == 4 else "hooked")
    patterns = {}

    def keep(pattern, hook):
        patterns[hook.name] = pattern.detach()

    names = [f"blocks.{layer}.attn.hook_pattern" for layer in (0, 1, 4)]
    hooks = StepFlow(alpha=0.0).hooks(model, trace) + [(name, keep) for name in names]
    logits_of(model, trace, hooks)
    question, template = trace.segment_ids == 1, trace.segment_ids == 0
    # From here on the cap does not bind, and there are enough thinking tokens for tau_max to.
    thinking = ((trace.segment_ids == 2) & (trace.causal.segment_ids == 2)).nonzero()[:, 0]
    below = {}
    for name, pattern in patterns.items():
        rows = pattern[0][:, thinking].double()
        bridge, other = rows[..., question].sum(-1), rows[..., template].sum(-1)
        below[name] = int((bridge < torch.minimum(torch.tensor(0.15), 0.9 * (1 - other)) - 1e-5).sum())
    assert below[names[0]] == below[names[1]] == 0
    assert below[names[2]] > 0, "a layer outside the band is left alone"


@pytest.mark.parametrize("kind", [kind for kind in TINY_MODEL_KINDS if kind not in ("native", "hooked")])
def test_compatibility_mode_runs_each_hook_once(kind, trace):
    model, compatible = (build_tiny_model(kind, n_layers=4) for _ in range(2))
    compatible.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    found = [
        logits_of(m, trace, StepFlow(alpha=0.4).hooks(m, trace)) - logits_of(m, trace)
        for m in (model, compatible)
    ]
    assert found[0].abs().max() > 1e-2
    assert torch.allclose(*found, atol=1e-4)


def test_layers_and_heads_can_be_given(flow_model, trace):
    model = flow_model(TINY_MODEL_KINDS[0])
    hooks = StepFlow(shallow=[3], deep=[0, 5]).hooks(model, trace)
    logits_of(model, trace, hooks)
    assert {layer for layer, counts in hooks.report().layers.items() if counts.adjusted} == {3}
    assert {layer for layer, counts in hooks.report().layers.items() if counts.injections} == {0, 5}
    few = StepFlow(heads={0: [1], 7: [2, 3]}).hooks(model, trace)
    assert {int(name.split(".")[1]) for name, _ in few} == {0, 7}
    logits_of(model, trace, few)
    every = StepFlow(shallow=[0], deep=[7]).hooks(model, trace)
    logits_of(model, trace, every)
    assert 0 < few.report().of(0).adjusted < every.report().of(0).adjusted


@pytest.mark.parametrize("placebo", ["bridge", "momentum", "both"])
def test_placebos_replace_one_half_and_keep_its_size(flow_model, trace, placebo):
    model = flow_model(TINY_MODEL_KINDS[0])
    reports, outputs = [], []
    for flow in (StepFlow(), StepFlow(placebo=placebo, seed=3), StepFlow(placebo=placebo, seed=3)):
        hooks = flow.hooks(model, trace)
        outputs.append(logits_of(model, trace, hooks))
        reports.append(hooks.report())
    assert torch.equal(outputs[1], outputs[2]), "the draw is fixed by the seed"
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-4)
    true, control = reports[0], reports[1]
    if placebo == "momentum":
        assert true.of(0).adjusted == control.of(0).adjusted
        assert true.of(6).mean_norm == pytest.approx(control.of(6).mean_norm)
    else:
        assert true.of(0).rows == control.of(0).rows and control.of(0).adjusted > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": float("nan")}, "alpha is nan: expected a finite number"),
        ({"window": 0}, "window is 0: expected at least 1 token"),
        ({"granularity": "token"}, "granularity is 'token': expected one of 'segment', 'step'"),
        ({"boundaries": "none"}, "boundaries is 'none': expected one of 'response'"),
        ({"placebo": "all"}, "placebo is 'all': expected one of None, 'bridge'"),
        ({"tau_max": 2}, "tau_max is 2: expected 0 <= tau_max < 1"),
    ],
)
def test_a_flow_that_makes_no_sense_cannot_be_made(options, message):
    with pytest.raises(Exception, match=message):
        StepFlow(**options)


def test_equal_flows_read_the_same():
    flow = StepFlow(tau_max=0, alpha=1, shallow=[0, 1], heads=[2], max_bridge_share=0.5)
    other = StepFlow(tau_max=0.0, alpha=1.0, shallow=range(2), heads=(2,), max_bridge_share=0.5)
    assert flow == other and repr(flow) == repr(other) and "tau_max=0.0" in repr(flow)


def test_layers_and_heads_that_do_not_exist_are_errors(flow_model, trace):
    with pytest.raises(ModelError, match=r"the model has layers 0..7; \[8, 9\] are outside it"):
        StepFlow(deep=[8, 9]).hooks(flow_model(TINY_MODEL_KINDS[0]), trace)
    for heads in ([1, 4], {7: [4]}):
        with pytest.raises(ModelError, match=r"the model has query heads 0..3; \[4\] are outside it"):
            StepFlow(heads=heads).hooks(flow_model(TINY_MODEL_KINDS[0]), trace)


def test_running_other_tokens_than_the_trace_is_an_error(flow_model, trace, hooks_untouched):
    model = flow_model(TINY_MODEL_KINDS[0])
    hooks = StepFlow().hooks(model, trace)
    with hooks_untouched(model), pytest.raises(ModelError, match="Run the model on exactly the tokens"):
        with model.hooks(fwd_hooks=hooks):
            model(trace.tokens[None, :-1])


def test_attention_left_to_the_wrapped_module_is_refused(flow_model, trace, monkeypatch):
    if TL_GENERATION < 4:
        pytest.skip("HookedTransformer computes attention itself")
    model = flow_model("llama")
    monkeypatch.setattr(type(model.blocks[0].attn), "forward", AttentionBridge.forward)
    with pytest.raises(ModelError, match="layer 0: .* would be discarded"):
        StepFlow().hooks(model, trace)
    assert StepFlow(tau_max=0.0).hooks(model, trace)


@from_kinds
def test_momentum_moves_the_logits_as_its_gradient_says(flow_model, trace, kind):
    """The causal check: a small alpha has the effect that the derivative at 0 predicts."""
    model = flow_model(kind)
    shift = {
        alpha: logits_of(model, trace, StepFlow(tau_max=0.0, alpha=alpha).hooks(model, trace))
        - logits_of(model, trace)
        for alpha in (1e-3, -1e-3)
    }
    first = trace.steps[1].token_start
    assert torch.equal(shift[1e-3][:, :first], torch.zeros_like(shift[1e-3][:, :first])), (
        "nothing moves before"
    )
    assert shift[1e-3][:, first:].abs().max() > 1e-6
    odd = (shift[1e-3] + shift[-1e-3]).abs().max() / shift[1e-3].abs().max()
    assert odd < 0.1, "to first order the effect is linear in alpha"


def test_a_sink_of_the_model_is_counted_when_its_bridge_is_raised(flow_model, trace):
    """gpt-oss: the floor is met by the probabilities that the model really uses, sink included."""
    model = flow_model("gpt_oss")
    patterns = []

    def keep(pattern, hook):
        patterns.append(pattern[0].double())

    for tau_max in (0.0, 0.6):
        flow = StepFlow(tau_max=tau_max, alpha=0.0, shallow=[1])  # the first layer without a window
        logits_of(model, trace, [*flow.hooks(model, trace), ("blocks.1.attn.hook_pattern", keep)])
    thinking, question = trace.segment_ids == 2, trace.segment_ids == 1
    before, after = (pattern[:, thinking] for pattern in patterns)
    movable = before[..., question | thinking].sum(-1)
    n_own = 1.0 + torch.arange(int(thinking.sum()))
    tau = (question.sum() / (question.sum() + n_own)).sqrt().clamp_max(0.6).expand_as(movable)
    floor = torch.minimum(tau, 0.9 * movable)
    low = before[..., question].sum(-1) < floor - 1e-6
    assert (1 - before.sum(-1))[low].max() > 0.02, "the sink takes its share where it matters"
    assert (after[..., question].sum(-1) - floor)[low].abs().max() < 1e-5
    assert (after.sum(-1) - before.sum(-1)).abs().max() < 1e-6


def test_two_measurements_with_one_flow_have_reports_of_their_own(flow_model, trace):
    model, flow = flow_model(TINY_MODEL_KINDS[0]), StepFlow()
    first, second = flow.hooks(model, trace), flow.hooks(model, trace)
    logits_of(model, trace, second)
    assert first.report().adjusted == 0 < second.report().adjusted


def test_whole_numbers_are_real_numbers(flow_model, trace):
    model = flow_model(TINY_MODEL_KINDS[0])
    whole, real = (StepFlow(tau_max=zero, alpha=one) for zero, one in ((0, 1), (0.0, 1.0)))
    assert whole == real
    found = [logits_of(model, trace, flow.hooks(model, trace)) for flow in (whole, real)]
    assert torch.equal(*found) and not torch.equal(found[0], logits_of(model, trace))


@from_kinds
def test_standing_hooks_are_the_callers_then_those_of_stepflow(flow_model, trace, kind):
    model, flow, order = flow_model(kind), StepFlow(alpha=0.4), []

    def own(tensor, hook):
        order.append("own")

    name = flow.hooks(model, trace)[0][0]
    hooks = standing_hooks(model, trace, stepflow=flow, fwd_hooks=[(name, own)])
    assert hooks[0] == (name, own)
    assert [n for n, _ in hooks[1:]] == [n for n, _ in flow.hooks(model, trace)]
    found = logits_of(model, trace, hooks)
    assert order == ["own"], "a hook whose name matches nothing would be silent"
    assert torch.equal(found, logits_of(model, trace, flow.hooks(model, trace)))
    assert not torch.equal(found, logits_of(model, trace))


def test_standing_hooks_may_depend_on_the_trace(flow_model, trace, make_trace):
    model, flow = flow_model(TINY_MODEL_KINDS[0]), StepFlow(alpha=0.4)
    for measured in (trace, make_trace("Why?", "It is so.\n\nYes.", "So.")):
        made = standing_hooks(model, measured, fwd_hooks=lambda given: flow.hooks(model, given))
        given = standing_hooks(model, measured, stepflow=flow)
        assert torch.equal(logits_of(model, measured, made), logits_of(model, measured, given))
    assert standing_hooks(model, trace) == []


@pytest.mark.parametrize("detach_values", [False, True])
def test_standing_hooks_can_keep_gradients_off_the_values_that_momentum_carries(
    flow_model, trace, detach_values
):
    model, flow, seen = flow_model(TINY_MODEL_KINDS[0]), StepFlow(tau_max=0, deep=[7]), {}

    def watch_value(value, hook):
        seen["v"] = value.detach().requires_grad_(True)
        return seen["v"]

    def keep_z(z, hook):
        seen["z"] = z

    (value_point, _), (z_point, _) = flow.hooks(model, trace)
    own = [(value_point, watch_value), (z_point, lambda z, hook: z.detach())]  # only the injection is left
    hooks = standing_hooks(model, trace, stepflow=flow, fwd_hooks=own, detach_values=detach_values)
    logits_of(model, trace, [*hooks, (z_point, keep_z)])
    injected = seen["z"][0, trace.steps[2].token_start].sum()
    assert injected.requires_grad != detach_values
    if not detach_values:
        (gradient,) = torch.autograd.grad(injected, seen["v"])
        moved = gradient[0].abs().amax((-1, -2)).nonzero()[:, 0].tolist()
        assert moved == list(range(*trace.steps[1].token_span))


@pytest.mark.parametrize(
    "flow",
    [
        StepFlow(),
        StepFlow(tau_max=0.3, alpha=-1e-3, shallow=[0, 2], deep=(), granularity="step", window=4, seed=7),
        StepFlow(heads={0: [1, 2], 3: ()}, boundaries="all", max_bridge_share=0.5, placebo="both"),
        StepFlow(heads=[0, 1]),
    ],
)
def test_a_flow_is_read_back_from_its_repr(flow):
    assert StepFlow.parse(repr(flow)) == flow


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "StepFlow",
        "StepFlow(0.1)",
        "StepFlow(magic=1)",
        "StepFlow(tau_max=2)",
        "StepFlow(tau_max='a')",
        "StepFlow(alpha=np.float64(0.1))",
        "StepFlow(**{'alpha': 0.1})",
        "evil.StepFlow()",
        "__import__('os').abort()",
        "StepFlow(alpha=__import__('os').abort())",
        "StepFlow(" * 9999,
        "StepFlow(alpha=" + "-" * 9999 + "1)",
    ],
)
def test_what_is_not_the_repr_of_a_flow_is_refused_and_not_executed(text):
    with pytest.raises(ValueError):
        StepFlow.parse(text)
