"""Planted failures: held against scores lowered one by one, on every path that a StepFlow has."""

import numpy as np
import pytest
import torch
from float64 import float64_everywhere
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_architectures import ATTENTION_VARIETIES, build_bridge, build_hf_model
from tiny_models import TINY_MODEL_KINDS, TL_GENERATION
from transformers import DynamicCache

from stepflow_tl import step_saliency
from stepflow_tl.errors import ModelError, TraceError
from stepflow_tl.evaluation import Decoding, evaluate, questions_of
from stepflow_tl.models.bands import deep_band, shallow_band
from stepflow_tl.models.hook_names import resolve_hooks
from stepflow_tl.stepflow import StepFlow, plant_decay, plant_lock_in
from stepflow_tl.testbed import ProblemSpec, load_testbed_model, make_problems
from stepflow_tl.trace import ReasoningTrace, Segment

KINDS = (*TINY_MODEL_KINDS, "mistral", "gemma2", "gpt_oss")
PLANTS = {"lock_in": plant_lock_in, "decay": plant_decay}
READ = {Segment.THINKING: Segment.QUESTION, Segment.SUMMARY: Segment.THINKING}
FLOW = StepFlow(tau_max=0.3, alpha=0.5, shallow=[0, 1, 2], deep=[1, 3])


def logits_of(model, trace, hooks=()):
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        return model(trace.tokens[None], return_type="logits")


def logits_in_pieces(model, ids, cuts):
    cache, pieces = DynamicCache(config=model.config), []
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        pieces.append(model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True).logits)
    return torch.cat(pieces, dim=1)


def lowered_by_hand(trace, dose, failure):
    """`[query, key]`: what is taken off each score."""
    segments = [Segment(int(segment)) for segment in trace.segment_ids]
    lowered = torch.zeros(len(trace), len(trace), dtype=torch.float64)
    for t, own in enumerate(segments):
        for k in range(t):
            planted = own == Segment.SUMMARY if failure == "decay" else own in READ
            if planted and segments[k] == READ[own]:
                lowered[t, k] = dose
    return lowered


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("failure", PLANTS)
def test_dose_zero_is_the_plain_model_bit_for_bit(flow_model, trace, kind, failure, hooks_untouched):
    model, plant = flow_model(kind), PLANTS[failure](0)
    plain = logits_of(model, trace)
    with hooks_untouched(model):
        assert plant.hooks(model, trace) == []
        with plant.generating(model):
            assert torch.equal(logits_of(model, trace), plain)
        for other in (PLANTS[failure](2), PLANTS[failure](0, flow=StepFlow())):
            assert not torch.equal(logits_of(model, trace, other.hooks(model, trace)), plain)
    repaired = logits_of(model, trace, StepFlow().hooks(model, trace))
    assert torch.equal(
        logits_of(model, trace, PLANTS[failure](0, flow=StepFlow()).hooks(model, trace)), repaired
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("failure", PLANTS)
@pytest.mark.parametrize("layers", [None, (0, 2)])
def test_scores_are_those_of_an_explicit_loop_in_the_layers_of_the_band_alone(
    flow_model, trace, kind, failure, layers
):
    model, dose = flow_model(kind), 2.3
    n_layers = model.cfg.n_layers
    band = shallow_band(n_layers) if failure == "lock_in" else deep_band(n_layers)
    expected = lowered_by_hand(trace, dose, failure)
    hooks = PLANTS[failure](dose, layers=layers).hooks(model, trace)
    points = [hooks_of.scores or hooks_of.pattern for hooks_of in resolve_hooks(model).layers]
    before, after = {}, {}

    def keep(where):
        return lambda tensor, hook: where.update({hook.name: tensor.clone()})

    around = [(name, keep(before)) for name in points]
    with float64_everywhere():
        logits_of(model, trace, [*around, *hooks, *((name, keep(after)) for name in points)])
    assert expected.any()
    for layer, name in enumerate(points):
        wanted = before[name].double()
        if layer in (band if layers is None else layers):
            if "pattern" in name:  # the odds say what the scores were, where no sink takes part
                wanted = wanted * (-expected).exp()
                wanted = wanted / wanted.sum(-1, keepdim=True)
            else:
                wanted = torch.where(wanted > -1e30, wanted - expected, wanted)
        seen = wanted > -1e30
        assert (after[name].double() - wanted)[seen].abs().max() < 1e-8


def test_the_bridge_loses_the_mass_that_the_dose_says(flow_model, trace):
    model, dose = flow_model(TINY_MODEL_KINDS[0]), 3.0
    kept = []
    name = resolve_hooks(model, [0]).layers[0].pattern
    keep = (name, lambda pattern, hook: kept.append(pattern[0].double()))
    for hooks in ([], plant_lock_in(dose).hooks(model, trace)):
        logits_of(model, trace, [*hooks, keep])
    thinking, question = trace.segment_ids == 2, trace.segment_ids == 1
    before, after = (pattern[:, thinking][..., question].sum(-1) for pattern in kept)
    left = np.exp(-dose)
    assert torch.allclose(after, before * left / (1 - before * (1 - left)), atol=1e-6)
    assert after.max() < before.max() and before.min() > 0


@pytest.mark.skipif(TL_GENERATION < 4, reason="the oracle needs a TransformerBridge")
@pytest.mark.parametrize("name", ATTENTION_VARIETIES)
@pytest.mark.parametrize("flow", [None, FLOW], ids=["alone", "under StepFlow"])
def test_without_scores_it_gives_what_hooks_give_at_every_position(make_trace, tokenizers, name, flow):
    trace = make_trace()
    plant = plant_lock_in(1.7, layers=[0, 2], flow=plant_decay(2.5, layers=[2, 3], flow=flow))
    bridge, model = build_bridge(name), build_hf_model(name)
    with float64_everywhere():
        plain = logits_of(bridge, trace)
        expected = logits_of(bridge, trace, plant.hooks(bridge, trace))
    scale = float(expected.abs().max())
    assert (expected - plain).abs().max() > 1e-3 * scale
    for cuts in ([], [25, *range(40, len(trace))]):
        with plant.generating(model, tokenizers["added"]) as run, torch.no_grad(), float64_everywhere():
            found = logits_in_pieces(model, trace.tokens[None], cuts)
        assert torch.allclose(found, expected, atol=1e-8 * scale, rtol=0)
        assert (run.report().adjusted > 0) == (flow is not None)
    tokenizer = tokenizers["added"]
    listener = (bridge.hook_dict["blocks.2.attn.hook_attn_scores"].name, lambda scores, hook: None)
    with torch.no_grad(), float64_everywhere(), plant.generating(bridge, tokenizer):
        for hooks in ([], [listener]):
            assert torch.allclose(logits_of(bridge, trace, hooks), expected, atol=1e-8 * scale, rtol=0)


@pytest.mark.skipif(TL_GENERATION < 4, reason="the oracle needs a TransformerBridge")
@pytest.mark.parametrize("flow", [StepFlow(granularity="step", alpha=0.0), StepFlow(placebo="both")])
def test_a_bridge_of_other_groups_reads_the_planted_scores_too(make_trace, tokenizers, flow):
    trace, plant = make_trace(), plant_lock_in(2.0, flow=flow)
    bridge, model = build_bridge("llama"), build_hf_model("llama")
    with float64_everywhere(), torch.no_grad():
        expected = logits_of(bridge, trace, plant.hooks(bridge, trace))
        with plant.generating(model, tokenizers["added"]):
            found = model(trace.tokens[None]).logits
    assert torch.allclose(found, expected, atol=1e-8 * float(expected.abs().max()), rtol=0)


TEXTS = ["One.\n\nTwo.", "So.", "It is 4, añadir.\n\nThen so.\n\nAnd 5."]


@settings(max_examples=12)
@given(data=st.data())
def test_cached_decoding_is_one_pass_in_batches_with_left_padding(flow_model, tokenizers, run_cached, data):
    kind = data.draw(st.sampled_from([kind for kind in KINDS if kind != "native"]))
    tokenizer, traces = tokenizers["added"], []
    for _ in range(data.draw(st.integers(1, 2))):
        parts = (data.draw(st.sampled_from(TEXTS)) for _ in range(3))
        traces.append(ReasoningTrace.from_parts(tokenizer, *parts))
    model = flow_model(kind, padded=len(traces) > 1)
    flow = data.draw(st.sampled_from([None, StepFlow(tau_max=0.4, alpha=0.3)]))
    plant = plant_lock_in(data.draw(st.floats(0.1, 9)), flow=plant_decay(3, flow=flow))
    n = max(map(len, traces))
    ids = torch.full((len(traces), n), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, trace in enumerate(traces):
        ids[row, n - len(trace) :], mask[row, n - len(trace) :] = trace.tokens, 1
    cuts = [data.draw(st.integers(n - min(map(len, traces)) + 1, n - 1))]
    while cuts[-1] < n - 1:
        cuts.append(min(n - 1, cuts[-1] + data.draw(st.sampled_from([1, 1, 9]))))
    with torch.no_grad():
        with model.hooks(fwd_hooks=plant.hooks(model, traces)):
            expected = model(ids, return_type="logits", attention_mask=mask)
        with plant.generating(model, tokenizer):
            found = run_cached(model, ids, mask, cuts)
    assert (found - expected)[mask.bool()].abs().max() < 1e-4
    for row, trace in enumerate(traces):  # and each row is what it is alone
        alone = logits_of(model, trace, plant.hooks(model, trace))[0]
        assert (expected[row, n - len(trace) :] - alone).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_compose_before_those_of_stepflow(flow_model, trace, kind):
    model, flow, plant = flow_model(kind), StepFlow(tau_max=0.3, alpha=0.5), plant_lock_in(3)
    composed = logits_of(model, trace, plant.hooks(model, trace) + flow.hooks(model, trace))
    assert torch.equal(composed, logits_of(model, trace, plant_lock_in(3, flow=flow).hooks(model, trace)))
    turned = logits_of(model, trace, flow.hooks(model, trace) + plant.hooks(model, trace))
    assert (composed - turned).abs().max() > 1e-4, "the bridge mends what was there before it"
    both = plant_lock_in(1, layers=[0], flow=plant_lock_in(2, layers=[0]))
    added = plant_lock_in(3, layers=[0]).hooks(model, trace)
    assert torch.allclose(
        logits_of(model, trace, both.hooks(model, trace)), logits_of(model, trace, added), atol=1e-5
    )


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
def test_nothing_stays_attached_after_an_exception(flow_model, trace, kind, error, hooks_untouched):
    model, plant = flow_model(kind), plant_lock_in(3, flow=StepFlow())
    plain = logits_of(model, trace)

    def explode(tensor, hook):
        raise error("from inside")

    bomb = (model.hook_dict["blocks.3.hook_resid_post"].name, explode)
    with hooks_untouched(model), pytest.raises(error, match="from inside"), plant.generating(model):
        logits_of(model, trace, [bomb])
    assert torch.equal(logits_of(model, trace), plain)


@pytest.mark.parametrize("dose", [-1, float("nan"), float("inf")])
@pytest.mark.parametrize("failure", PLANTS)
def test_a_dose_without_a_meaning_is_refused(failure, dose):
    with pytest.raises(ValueError, match=f"dose is {dose}.*: expected nats .* 0 or more and finite"):
        PLANTS[failure](dose)


@pytest.mark.parametrize("dose", [0, 2])
def test_layers_that_do_not_exist_are_refused(flow_model, trace, dose):
    model = flow_model(TINY_MODEL_KINDS[0])
    with pytest.raises(ModelError, match=r"the model has layers 0..7; \[8\] are outside it"):
        plant_decay(dose, layers=[1, 8]).hooks(model, trace)
    with (
        pytest.raises(ModelError, match=r"\[8\] are outside it"),
        plant_decay(dose, layers=[8]).generating(model),
    ):
        pass


def test_a_trace_in_which_nothing_can_be_planted_is_refused(flow_model, make_trace):
    model = flow_model(TINY_MODEL_KINDS[0])
    silent, unfinished = make_trace(thinking=""), make_trace(summary="")
    with pytest.raises(TraceError, match="no thinking: lock_in cannot be planted in it"):
        plant_lock_in(2).hooks(model, silent)
    with pytest.raises(TraceError, match="no summary: decay cannot be planted"):
        plant_decay(2).hooks(model, [make_trace(), unfinished])
    assert plant_lock_in(2).hooks(model, unfinished) and plant_decay(0).hooks(model, unfinished) == []


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
def test_maps_of_a_planted_model_with_and_without_stepflow(flow_model, trace, kind, hooks_untouched):
    model, plant, flow = flow_model(kind), plant_lock_in(3), StepFlow(tau_max=0.3)
    with hooks_untouched(model):
        plain = step_saliency(model, trace)
        planted = step_saliency(model, trace, fwd_hooks=lambda each: plant.hooks(model, each))
        as_flow = step_saliency(model, trace, stepflow=plant)
        mended = step_saliency(model, trace, fwd_hooks=plant.hooks(model, trace), stepflow=flow)
        at_once = step_saliency(model, trace, stepflow=plant_lock_in(3, flow=flow))
    assert planted.provenance.backend == as_flow.provenance.backend == "hooks"
    assert "Plant(failure='lock_in', dose=3.0" in as_flow.provenance.notes["stepflow"]
    for one, other in ((planted, as_flow), (mended, at_once)):
        assert torch.allclose(one.sums, other.sums, rtol=1e-6, atol=1e-12)
    for one, other in ((plain, planted), (planted, mended)):
        assert not torch.allclose(one.sums, other.sums, rtol=1e-2)


@pytest.mark.skipif(TL_GENERATION < 4, reason="the testbed model is a TransformerBridge")
def test_answers_are_written_under_a_plant_with_and_without_stepflow(hooks_untouched):
    model = load_testbed_model()
    questions = questions_of(make_problems(ProblemSpec(n_steps=6), 12, seed=3))
    flow = StepFlow()
    conditions = {
        "plain": None,
        "dose 0": plant_lock_in(0),
        "planted": plant_lock_in(8),
        "mended": plant_lock_in(8, flow=flow),
    }
    with hooks_untouched(model):
        found = evaluate(model, questions, conditions=conditions, decoding=Decoding(max_new_tokens=100))
    texts = {name: [a[0].tokens for a in result.answers] for name, result in found.results.items()}
    assert texts["dose 0"] == texts["plain"] != texts["planted"] != texts["mended"]
    assert found.accuracy("planted") < found.accuracy("plain")
