"""Step patching against loops written here, its laws, the restricted path, and every refusal."""

from dataclasses import replace

import pytest
import torch
import transformer_lens.utilities as utilities
from tiny_models import FLOAT64_KINDS, TINY_MODEL_KINDS, count_hooks
from transformer_lens.patching import get_act_patch_resid_pre
from transformer_lens.utilities import get_act_name

from stepflow_tl import StepFlow, causal, errors
from stepflow_tl.causal import step_patching
from stepflow_tl.causal.alignment import answer_logit_difference, match_steps, step_patch_setter
from stepflow_tl.errors import ModelError
from stepflow_tl.models import hook_names
from stepflow_tl.models.hook_names import COMPONENTS as NAMES
from stepflow_tl.models.hook_names import component_hook
from stepflow_tl.saliency import LogitDifference
from stepflow_tl.trace import ReasoningTrace, Segment, Step

COMPONENTS = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "v", "k")


def patch(*arguments, **options):
    return step_patching(*arguments, **{"metric": "S1", **options})


def nll_of_step(logits, trace, label):
    step = next(step for step in trace.steps if step.label == label)
    rows = torch.log_softmax(logits[0, step.token_start - 1 : step.token_end - 1].double(), -1)
    return -rows.gather(-1, trace.tokens[slice(*step.token_span), None]).mean().item()


def test_the_component_names_are_those_of_transformer_lens():
    assert set(NAMES) == set(COMPONENTS)
    for component, name in NAMES.items():
        assert name.format(layer=3) == utilities.get_act_name(component, 3)


@pytest.mark.parametrize(
    ("kind", "component"),
    [(TINY_MODEL_KINDS[0], component) for component in COMPONENTS]
    + [(kind, component) for kind in TINY_MODEL_KINDS[1:] for component in ("resid_pre", "k", "z")],
)
def test_effects_equal_a_loop_over_run_with_hooks(
    tiny_model, right_trace, wrong_trace, hooks_untouched, kind, component
):
    model = tiny_model(kind)
    layers, steps = [0, 2], [wrong_trace.steps[i] for i in (1, 3, 4)]
    names = [get_act_name(component, layer) for layer in layers]
    _, cache = model.run_with_cache(right_trace.tokens[None])
    tokens, fired = wrong_trace.tokens[None], 0
    base = nll_of_step(model(tokens), wrong_trace, "S1")
    expected = torch.zeros(len(names), len(steps), dtype=torch.float64)
    for row, name in enumerate(names):
        for column, step in enumerate(steps):

            def write(activation, hook, name=name, step=step):
                nonlocal fired
                fired += 1
                activation = activation.clone()
                span = slice(*step.token_span)
                activation[:, span] = cache[name][:, span]
                return activation

            logits = model.run_with_hooks(tokens, fwd_hooks=[(model.hook_dict[name].name, write)])
            expected[row, column] = nll_of_step(logits, wrong_trace, "S1") - base
    assert fired == expected.numel(), "every hook of the oracle fired once"
    with hooks_untouched(model):
        found = patch(
            model, right_trace, wrong_trace, component=component, layers=layers, steps=["T1", "T3", "S1"]
        )
    assert expected.abs().max() > 1e-3
    assert torch.allclose(found.effects, expected, atol=1e-10 if kind in FLOAT64_KINDS else 1e-5)
    assert found.corrupted_value == pytest.approx(base, abs=1e-6)
    assert found.clean_value == pytest.approx(
        nll_of_step(model(right_trace.tokens[None]), right_trace, "S1"), abs=1e-6
    )


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss", "phi3"])
@pytest.mark.parametrize("component", ["resid_pre", "z"])
def test_windows_sinks_and_soft_caps_equal_the_loop_too(
    bridges, right_trace, wrong_trace, name, component, float64_throughout
):
    model, layer, step = bridges(name), 1, wrong_trace.steps[3]
    point = model.hook_dict[get_act_name(component, layer)].name
    _, cache = model.run_with_cache(right_trace.tokens[None])
    tokens, span, fired = wrong_trace.tokens[None], slice(*step.token_span), []

    def write(activation, hook):
        fired.append(hook.name)
        activation = activation.clone()
        activation[:, span] = cache[get_act_name(component, layer)][:, span]
        return activation

    patched = model.run_with_hooks(tokens, fwd_hooks=[(point, write)])
    assert len(fired) == 1
    expected = nll_of_step(patched, wrong_trace, "S1") - nll_of_step(model(tokens), wrong_trace, "S1")
    found = patch(model, right_trace, wrong_trace, component=component, layers=[layer], steps=["T3"])
    assert abs(expected) > 1e-3
    assert float(found.effects) == pytest.approx(expected, abs=1e-8)


@pytest.mark.filterwarnings("ignore::Warning")  # TransformerLens' own, of its progress bar and frames
def test_single_token_steps_equal_transformer_lens_positions(tiny_model, right_trace, wrong_trace):
    def first_tokens(trace, n=9):
        starts = torch.arange(n)
        return ReasoningTrace(
            tokens=trace.tokens[trace.steps[1].token_start :][:n],
            text="abcdefghi",
            token_char_spans=torch.stack([starts, starts + 1], 1),
            segment_ids=torch.full((n,), int(Segment.THINKING)),
            step_ids=starts,
            steps=tuple(
                Step(i, Segment.THINKING, f"T{i + 1}", i, i + 1, i, i + 1, "abcdefghi"[i]) for i in range(n)
            ),
            format="plain",
        )

    model, clean, corrupted = tiny_model(), first_tokens(right_trace), first_tokens(wrong_trace)
    assert not torch.equal(clean.tokens, corrupted.tokens)
    metric = LogitDifference(8, 5, 9)
    _, cache = model.run_with_cache(clean.tokens[None])
    theirs = get_act_patch_resid_pre(
        model, corrupted.tokens[None], cache, lambda logits: metric(logits, corrupted.tokens[None])
    )
    ours = patch(model, clean, corrupted, metric=metric)
    assert ours.effects.abs().max() > 1e-2
    assert torch.allclose(theirs.double(), ours.effects + ours.corrupted_value, atol=1e-5)


@pytest.mark.parametrize("alignment", ["tokens", "mean"])
@pytest.mark.parametrize("component", ["resid_pre", "attn_out", "z", "v"])
def test_a_trace_patched_into_itself_changes_nothing(tiny_model, wrong_trace, component, alignment):
    found = patch(
        tiny_model(), wrong_trace, wrong_trace, component=component, alignment=alignment, layers=[0, 3]
    )
    assert found.effects.abs().max() < 1e-12  # rows of a batch may round differently
    with pytest.raises(ValueError, match="there is no distance to recover"):
        _ = found.recovered


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
def test_the_only_step_that_differs_carries_the_whole_difference_at_the_embeddings(
    tiny_model, make_trace, wrong_trace, kind
):
    other = make_trace("7 = 3*2 + 0.\n\nSo yes!\n\nEve it is.", "No., eve.")
    metric = LogitDifference(len(wrong_trace) - 2, 60, 70)
    found = patch(tiny_model(kind), other, wrong_trace, metric=metric, layers=[0, 1])
    assert abs(found.clean_value - found.corrupted_value) > 1e-2
    expected = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    assert torch.allclose(found.recovered[0], expected, atol=1e-9 if kind in FLOAT64_KINDS else 1e-4)
    assert (found.recovered[1] - expected).abs().max() > 1e-3, "above, other steps know of it too"


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
def test_all_steps_patched_at_layer_0_give_the_other_run(tiny_model, right_trace, wrong_trace, kind):
    model = tiny_model(kind)
    matches = match_steps(right_trace, wrong_trace, alignment="tokens")
    name, setter = component_hook(model, "resid_pre", 0), step_patch_setter(matches)
    _, cache = model.run_with_cache(right_trace.tokens[None])

    def write_all(activation, hook):
        for column in range(len(matches)):
            activation = setter(activation, [0, column], cache["blocks.0.hook_resid_pre"])
        return activation

    logits = model.run_with_hooks(wrong_trace.tokens[None], fwd_hooks=[(name, write_all)])
    clean, corrupted = model(right_trace.tokens[None]), model(wrong_trace.tokens[None])
    template = wrong_trace.step_ids < 0
    assert torch.equal(right_trace.tokens[template], wrong_trace.tokens[template])
    assert torch.equal(logits, clean) and not torch.allclose(logits, corrupted)


def test_what_leaves_a_block_is_what_enters_the_next(tiny_model, right_trace, wrong_trace):
    model = tiny_model()
    after = patch(model, right_trace, wrong_trace, component="resid_post", layers=[0, 2])
    before = patch(model, right_trace, wrong_trace, component="resid_pre", layers=[1, 3])
    assert torch.equal(after.effects, before.effects)


def test_steps_after_what_the_metric_reads_have_no_effect(tiny_model, right_trace, wrong_trace):
    found = patch(tiny_model(), right_trace, wrong_trace, metric="T2", layers=[0, 2])
    assert (found.effects[:, :3].abs().amax(0)[1:] > 0).all() and (found.effects[:, 3:] == 0).all()


def test_steps_of_other_lengths_are_patched_in_their_mean(tiny_model, longer_trace, wrong_trace):
    model = tiny_model()
    found = patch(model, longer_trace, wrong_trace, alignment="mean", layers=[1], steps=["T1", "T2"])
    name = model.hook_dict["blocks.1.hook_resid_pre"].name
    _, cache = model.run_with_cache(longer_trace.tokens[None])
    clean = cache["blocks.1.hook_resid_pre"][0]
    for column, index in enumerate((1, 2)):
        there, here = longer_trace.steps[index], wrong_trace.steps[index]

        def shift(activation, hook, there=there, here=here):
            activation = activation.clone()
            own = activation[:, slice(*here.token_span)]
            own += clean[slice(*there.token_span)].mean(0) - own.mean(1, keepdim=True)
            return activation

        logits = model.run_with_hooks(wrong_trace.tokens[None], fwd_hooks=[(name, shift)])
        expected = nll_of_step(logits, wrong_trace, "S1") - found.corrupted_value
        assert found.effects[0, column].item() == pytest.approx(expected, abs=1e-10)
        assert abs(expected) > 1e-4


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
def test_values_read_by_one_step_alone_equal_the_weighted_difference(
    tiny_model, right_trace, wrong_trace, hooks_untouched, kind
):
    model, layer, receiving = tiny_model(kind), 1, wrong_trace.steps[3]
    _, clean = model.run_with_cache(right_trace.tokens[None])
    _, corrupted = model.run_with_cache(wrong_trace.tokens[None])
    difference = (clean[f"blocks.{layer}.attn.hook_v"] - corrupted[f"blocks.{layer}.attn.hook_v"])[0]
    difference = difference.repeat_interleave(2, dim=1)  # 4 query heads share 2 KV heads
    pattern = corrupted[f"blocks.{layer}.attn.hook_pattern"][0]
    with hooks_untouched(model):
        found = patch(
            model, right_trace, wrong_trace, component="v", layers=[layer], receiving_step="T3"
        ).effects[0]
    rows, tolerance = slice(*receiving.token_span), 1e-10 if kind in FLOAT64_KINDS else 1e-5
    for step in wrong_trace.steps[:4]:
        keys = slice(*step.token_span)
        moved = torch.einsum("hqk,khd->qhd", pattern[:, rows, keys], difference[keys].to(pattern.dtype))

        def add(z, hook, moved=moved):
            z = z.clone()
            z[0, rows] += moved.to(z.dtype)
            return z

        name = model.hook_dict[f"blocks.{layer}.attn.hook_z"].name
        logits = model.run_with_hooks(wrong_trace.tokens[None], fwd_hooks=[(name, add)])
        expected = nll_of_step(logits, wrong_trace, "S1") - nll_of_step(
            model(wrong_trace.tokens[None]), wrong_trace, "S1"
        )
        assert found[step.index].item() == pytest.approx(expected, abs=tolerance)
    assert (found[1:4].abs() > 1e-5).all() and found[4] == 0, "S1 comes after T3"


@pytest.mark.parametrize("component", ["resid_pre", "k", "v"])
def test_a_restricted_path_equals_two_rows_of_which_one_lends_its_z(
    tiny_model, right_trace, wrong_trace, component
):
    model, layer = tiny_model(), 0
    rows = slice(*wrong_trace.steps[2].token_span)
    name, z_name = get_act_name(component, layer), get_act_name("z", layer)
    _, cache = model.run_with_cache(right_trace.tokens[None])
    found = patch(model, right_trace, wrong_trace, component=component, layers=[layer], receiving_step="T2")
    for step in wrong_trace.steps[:3]:
        span = slice(*step.token_span)

        def write(activation, hook, span=span):
            activation = activation.clone()
            activation[0, span] = cache[name][0, span]
            return activation

        def lend(z, hook):
            z = z.clone()
            z[1, rows] = z[0, rows]
            return z

        pairs = [(model.hook_dict[name].name, write), (model.hook_dict[z_name].name, lend)]
        logits = model.run_with_hooks(wrong_trace.tokens.repeat(2, 1), fwd_hooks=pairs)[1:]
        expected = nll_of_step(logits, wrong_trace, "S1") - found.corrupted_value
        assert found.effects[0, step.index].item() == pytest.approx(expected, abs=1e-10)
    assert (found.effects[0, 1:3].abs() > 1e-4).all() and (found.effects[0, 3:] == 0).all()


def test_a_restricted_path_is_none_to_a_metric_read_before_it(tiny_model, right_trace, wrong_trace):
    options = dict(metric="T2", component="v", layers=[0])
    found = patch(tiny_model(), right_trace, wrong_trace, receiving_step="T3", **options)
    assert (found.effects == 0).all()
    open_path = patch(tiny_model(), right_trace, wrong_trace, **options)
    assert open_path.effects.abs().max() > 1e-4


def test_hooks_of_the_request_and_hooks_attached_outside_both_stay_in_force(
    tiny_model, right_trace, wrong_trace, hooks_untouched
):
    model, flow, made = tiny_model(), StepFlow(tau_max=0.5, alpha=0.5), []
    name = model.hook_dict["blocks.2.hook_mlp_out"].name

    def hooks(trace):
        made.append(trace)
        return flow.hooks(model, trace)

    def halve(activation, hook):
        return activation / 2

    options = dict(layers=[1], steps=["T1"], component="z")
    plain = patch(model, right_trace, wrong_trace, **options)
    with hooks_untouched(model), model.hooks(fwd_hooks=[(name, halve)]):
        found = patch(model, right_trace, wrong_trace, fwd_hooks=hooks, **options)
    assert made == [right_trace, wrong_trace, wrong_trace]
    with model.hooks(fwd_hooks=[(name, halve), *flow.hooks(model, wrong_trace)]):
        base = nll_of_step(model(wrong_trace.tokens[None]), wrong_trace, "S1")
    assert found.corrupted_value == pytest.approx(base, abs=1e-10)
    assert abs(found.corrupted_value - plain.corrupted_value) > 1e-3
    pairs = patch(model, right_trace, wrong_trace, fwd_hooks=[(name, halve)], **options)
    with model.hooks(fwd_hooks=[(name, halve)]):
        attached = patch(model, right_trace, wrong_trace, **options)
    assert torch.equal(pairs.effects, attached.effects)


@pytest.mark.parametrize("function", ["step_patching", "attribution_patching"])
@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
def test_stepflow_given_made_or_attached_outside_is_the_same(
    tiny_model, wrong_trace, kind, function, hooks_untouched
):
    model, flow = tiny_model(kind), StepFlow(tau_max=0.5, alpha=0.5)
    run = getattr(causal, function)
    # Hooks attached outside know the positions of one trace, so both traces have the same.
    clean = replace(wrong_trace, tokens=wrong_trace.tokens.clone())
    clean.tokens[wrong_trace.steps[1].token_start] += 1
    options = dict(metric="S1", layers=[1], steps=["T1", "T2"], component="v")
    plain = run(model, clean, wrong_trace, **options)
    with hooks_untouched(model):
        given = run(model, clean, wrong_trace, stepflow=flow, **options)
        made = run(model, clean, wrong_trace, fwd_hooks=lambda trace: flow.hooks(model, trace), **options)
    with model.hooks(fwd_hooks=flow.hooks(model, wrong_trace)):
        outside = run(model, clean, wrong_trace, **options)
    assert (given.effects[:, 0] != 0).all() and not torch.allclose(plain.effects, given.effects, rtol=1e-2)
    for other in (made, outside):
        assert torch.equal(given.effects, other.effects) and given.clean_value == other.clean_value
    assert given.provenance.notes == {"stepflow": repr(flow)}
    assert made.provenance.notes == {"fwd_hooks": "made for each trace"} and not outside.provenance.notes


def test_the_placebo_is_seeded_and_is_another_effect(tiny_model, right_trace, wrong_trace):
    model, options = tiny_model(), dict(layers=[1], component="v", steps=["Q", "T1", "T2"])
    real = patch(model, right_trace, wrong_trace, **options)
    first, again, other = (
        patch(model, right_trace, wrong_trace, placebo_seed=seed, **options) for seed in (0, 0, 1)
    )
    assert torch.equal(first.effects, again.effects)
    assert not torch.allclose(first.effects, other.effects, rtol=1e-2)
    assert not torch.allclose(first.effects, real.effects, rtol=1e-2)
    assert (first.effects[:, 0] == 0).all(), "the same question: nothing moves, whatever the direction"
    assert first.provenance.notes == {"placebo": "norm-matched, seed 0"}


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
@pytest.mark.parametrize("receiving", [None, "T3"])
@pytest.mark.parametrize("placebo", [None, 3])
def test_batches_of_steps_equal_one_step_at_a_time(
    tiny_model, right_trace, wrong_trace, kind, receiving, placebo, hooks_untouched
):
    model = tiny_model(kind)
    options = dict(component="k", layers=[0, 3], receiving_step=receiving, placebo_seed=placebo)

    def run(batch_tokens):
        return patch(model, right_trace, wrong_trace, batch_tokens=batch_tokens, **options)

    n, n_reached = len(wrong_trace), 5 if receiving is None else 4
    passes = 1 if receiving is None else 2
    with hooks_untouched(model):
        slow, three, fast = (run(batch_tokens) for batch_tokens in (1, 3 * n, 10_000))
    tolerance = 1e-10 if kind in FLOAT64_KINDS else 1e-5
    assert slow.effects.abs().max() > 1e-3
    for found in (three, fast):
        assert torch.allclose(found.effects, slow.effects, atol=tolerance, rtol=0)
        assert torch.equal(found.measured, slow.measured)
    assert slow.measured.sum() == 2 * n_reached and slow.unreached == (() if receiving is None else ("S1",))
    assert slow.tokens_run == n * (2 + 2 * n_reached * passes)
    assert fast.tokens_run == n * (2 + 2 * (n_reached + 1) * passes)
    assert three.tokens_run == n * (2 + 2 * passes * {5: 3 + 3 + 1, 4: 3 + 3}[n_reached])


def test_rows_that_are_not_independent_are_run_one_at_a_time(
    tiny_model, right_trace, wrong_trace, monkeypatch
):
    model, options = tiny_model(), dict(layers=[1, 2], component="z")
    expected = patch(model, right_trace, wrong_trace, batch_tokens=1, **options)
    forward = model.forward

    def mixing(tokens, *args, **kwargs):
        logits = forward(tokens, *args, **kwargs)
        return logits + 0.1 * (logits.roll(1, 0) - logits)

    monkeypatch.setattr(type(model), "forward", lambda self, tokens, *a, **k: mixing(tokens, *a, **k))
    found = patch(model, right_trace, wrong_trace, **options)
    assert torch.equal(found.effects, expected.effects)


def test_hooks_that_may_know_a_batch_of_one_never_see_another(tiny_model, right_trace, wrong_trace):
    model, shapes = tiny_model(), []
    watch = (model.hook_dict["blocks.1.hook_mlp_out"].name, lambda x, hook: shapes.append(x.shape[0]))
    found = patch(model, right_trace, wrong_trace, layers=[1], fwd_hooks=[watch])
    assert set(shapes) == {1} and len(shapes) == 7 == found.tokens_run // len(wrong_trace)
    with model.hooks(fwd_hooks=[watch]):
        outside = patch(model, right_trace, wrong_trace, layers=[1])
    assert set(shapes) == {1} and torch.equal(outside.effects, found.effects)


def test_what_was_predicted_was_not_measured(tiny_model, right_trace, wrong_trace):
    found = causal.attribution_patching(tiny_model(), right_trace, wrong_trace, metric="S1", layers=[1])
    assert not found.measured.any() and found.measured.shape == (1, 5) and found.tokens_run is None


def test_a_callable_metric_and_the_modes_of_the_model_are_left_as_they_were(
    tiny_model, right_trace, wrong_trace
):
    model = tiny_model()
    model.train()
    try:
        found = patch(
            model, right_trace, wrong_trace, metric=lambda logits, tokens: logits[0, -1, 3], layers=[3]
        )
        assert model.training and all(block.training for block in model.blocks)
    finally:
        model.eval()
    assert found.effects.dtype == torch.float64 and found.effects.abs().max() > 0


def test_the_clean_value_of_a_metric_that_names_positions(tiny_model, longer_trace, wrong_trace):
    metric, clean_metric = answer_logit_difference(longer_trace, wrong_trace)
    model, options = tiny_model(), dict(alignment="mean", layers=[0], steps=["T1"])
    unknown = patch(model, longer_trace, wrong_trace, metric=metric, **options)
    assert unknown.clean_value is None
    with pytest.raises(ValueError, match="pass clean_metric="):
        _ = unknown.recovered
    known = patch(model, longer_trace, wrong_trace, metric=metric, clean_metric=clean_metric, **options)
    row = model(longer_trace.tokens[None])[0, clean_metric.position]
    expected = (row[clean_metric.token] - row[clean_metric.other_token]).item()
    assert known.clean_value == pytest.approx(expected)
    assert torch.allclose(known.recovered, known.effects / (expected - known.corrupted_value))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"component": "q"}, "ValueError", "unknown component 'q': expected one of resid_pre"),
        ({"alignment": "last"}, "ValueError", "unknown alignment 'last': expected one of tokens, mean"),
        ({"batch_tokens": 0}, "ValueError", "batch_tokens is 0: expected at least 1"),
        ({"method": "both"}, "ValueError", "method is 'both': expected one of patching, attribution"),
        ({"layers": [4]}, "ModelError", r"the model has layers 0..3; \[4\] are outside"),
        ({"metric": "per_token"}, "ObjectiveError", "metric='per_token' is a loss for each row"),
        ({"metric": "T9"}, "ObjectiveError", "unknown objective 'T9'"),
        ({"metric": lambda logits, tokens: logits[0, -1]}, "ObjectiveError", "expected a scalar tensor"),
        ({"receiving_step": "T9", "component": "v"}, "TraceError", "no step 'T9'"),
        ({"receiving_step": "T2", "component": "z"}, "ValueError", "'z' is not read by the attention of its"),
    ],
)
def test_what_cannot_be_done_is_an_error(tiny_model, right_trace, wrong_trace, options, error, message):
    with pytest.raises(getattr(errors, error, ValueError), match=message):
        patch(tiny_model(), right_trace, wrong_trace, **options)


@pytest.mark.parametrize("function", ["step_patching", "attribution_patching"])
def test_no_hook_is_left_when_the_metric_raises(tiny_model, right_trace, wrong_trace, function):

    model, calls = tiny_model(), []

    def explode(logits, tokens):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("from inside")
        return logits[0, -1, 0]

    with pytest.raises(RuntimeError, match="from inside"):
        getattr(causal, function)(model, right_trace, wrong_trace, metric=explode, receiving_step="T2")
    assert count_hooks(model) == 0


@pytest.mark.parametrize("function", ["step_patching", "attribution_patching"])
def test_a_hook_that_never_fires_is_an_error(
    tiny_model, right_trace, wrong_trace, monkeypatch, hooks_untouched, function
):

    monkeypatch.setitem(hook_names.COMPONENTS, "z", "blocks.{layer}.attn.hook_result")
    model = tiny_model()
    with hooks_untouched(model), pytest.raises(ModelError, match="hook_result` fired 0 times"):
        getattr(causal, function)(model, right_trace, wrong_trace, metric="S1", component="z")
    with hooks_untouched(model), pytest.raises(ModelError, match="hook_result` fired 0 times"):
        getattr(causal, function)(
            model, right_trace, wrong_trace, metric="S1", component="v", receiving_step="T2"
        )
    monkeypatch.setitem(hook_names.COMPONENTS, "z", "blocks.{layer}.attn.hook_nowhere")
    with pytest.raises(ModelError, match="the model has no `blocks.0.attn.hook_nowhere`: choose another"):
        getattr(causal, function)(model, right_trace, wrong_trace, metric="S1", component="z")


def test_a_result_says_what_it_is_and_refuses_what_it_cannot_be(tiny_model, right_trace, wrong_trace):

    found = patch(tiny_model(), right_trace, wrong_trace, layers=[2], component="v", receiving_step="T3")
    assert found.labels == ["Q", "T1", "T2", "T3", "S1"] and found.layers == (2,) and found.n_layers == 4
    assert repr(found).startswith("StepPatching(patching of v read by T3: 1 of 4 layers x 5 steps")
    assert found.provenance.objective == "S1" and found.provenance.backend == "patching"
    with pytest.raises(ValueError, match=r"effects has shape \(2, 5\), expected \(1, 5\)"):
        replace(found, effects=found.effects.repeat(2, 1))
    with pytest.raises(ValueError, match="must be finite, but is not at layer 2, step Q: run the model"):
        replace(found, effects=found.effects * float("nan"))
