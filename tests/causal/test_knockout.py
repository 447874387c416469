"""Knockout from a shared prefix against the obvious loop; what it must find, refuse and leave behind."""

import pytest
import torch
from causal.knockout_oracle import all_effects, effect, predictions
from tiny_architectures import build_bridge, build_hf_model
from tiny_models import TINY_MODEL_KINDS, TL_GENERATION, build_tiny_model, count_hooks

from stepflow_tl import StepFlow, errors
from stepflow_tl import step_knockout as knockout
from stepflow_tl.errors import KnockoutError, ModelError
from stepflow_tl.models import prefix_cache
from stepflow_tl.models.prefix_cache import fill_prefix
from stepflow_tl.saliency import LogitDifference
from stepflow_tl.trace import ReasoningTrace

EXACT = dict(rtol=0, atol=1e-8)
# GQA everywhere; besides it: windows, windows and soft-capped scores, windows and sinks, a joint projection.
ARCHITECTURES = ("llama", "mistral", "gemma2", "gpt_oss", "phi3")


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("measure", ["nll", "kl"])
def test_a_bridge_with_a_shared_prefix_equals_the_loop(
    name, measure, bridges, tiny_trace, float64_throughout
):
    found = knockout(bridges(name), tiny_trace, measure=measure, method="cached")
    expected = all_effects(bridges(name), tiny_trace, measure=measure)
    assert found.provenance.backend == "cached"
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found.effects, expected, **EXACT)


def test_every_tiny_model_equals_the_loop(each_tiny_model, tiny_trace, float64_throughout):
    found = knockout(each_tiny_model, tiny_trace)
    is_native = type(getattr(each_tiny_model, "original_model", None)).__name__ == "NativeModel"
    assert found.provenance.backend == ("full" if is_native else "cached")
    assert ("takes no key-value cache" in found.provenance.notes.get("not_cached", "")) == is_native
    expected = all_effects(each_tiny_model, tiny_trace)
    assert (expected.abs() > 0.1).sum() >= 3
    torch.testing.assert_close(found.effects, expected, **EXACT)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_the_full_method_is_the_same_with_bands_and_heads(name, bridges, tiny_trace, float64_throughout):
    options = dict(layers=[1, 3], heads=[0, 3])
    fast = knockout(bridges(name), tiny_trace, method="cached", **options)
    slow = knockout(bridges(name), tiny_trace, method="full", **options)
    torch.testing.assert_close(fast.effects, slow.effects, **EXACT)
    torch.testing.assert_close(slow.effects, all_effects(bridges(name), tiny_trace, **options), **EXACT)
    everywhere = knockout(bridges(name), tiny_trace)
    assert (everywhere.effects - fast.effects).abs().max() > 0.01


@pytest.mark.parametrize("method", ["cached", "full"])
@pytest.mark.parametrize("measure", ["nll", "kl"])
def test_the_effect_carried_on_to_the_summary(method, measure, bridges, tiny_trace, float64_throughout):
    model, pairs = bridges("gpt_oss"), [("T2", "T1"), ("T1", "Q"), ("S1", "T3")]
    found = knockout(model, tiny_trace, pairs=pairs, onto="summary", measure=measure, method=method)
    assert found.onto == "summary" and found.measured.sum() == 3
    for query, key in [(2, 1), (1, 0), (4, 3)]:
        expected = effect(model, tiny_trace, query, key, measure=measure, onto="summary")
        assert abs(expected) > 1e-3
        assert float(found.effects[query, key]) == pytest.approx(expected, abs=1e-8)
    assert not found.effects[~found.measured].any()


@pytest.mark.skipif(TL_GENERATION >= 4, reason="HookedTransformer is gone in 4.x")
def test_hooked_transformer_and_bridge_agree_on_the_same_weights(tiny_trace, float64_throughout):
    bridge = build_tiny_model("llama")
    hooked = build_tiny_model("hooked", d_mlp=48)
    for module in hooked.modules():  # each norm holds its own copy of the number
        if hasattr(module, "eps"):
            module.eps = bridge.original_model.config.rms_norm_eps
    copy_llama(bridge.original_model, hooked)
    a, b = (knockout(model, tiny_trace, method="cached") for model in (hooked, bridge))
    assert a.effects.abs().max() > 0.1
    # transformers holds the rotary frequencies in float32, so the two agree to about its precision
    torch.testing.assert_close(a.effects, b.effects, rtol=2e-6, atol=2e-6)


def copy_llama(source, target):
    """Weights of a transformers llama into a HookedTransformer of the same shape."""
    cfg, state = target.cfg, {}

    def weight(module):
        inner = getattr(module, "original_component", module)
        return inner.weight.detach()

    model = source.model
    for layer, block in enumerate(model.layers):
        block = getattr(block, "original_component", block)
        attention = getattr(block.self_attn, "original_component", block.self_attn)
        mlp = getattr(block.mlp, "original_component", block.mlp)
        prefix = f"blocks.{layer}."
        for name, module, n in (("W_Q", attention.q_proj, 4), ("_W_K", attention.k_proj, 2),
                                ("_W_V", attention.v_proj, 2)):  # fmt: skip
            state[f"{prefix}attn.{name}"] = weight(module).reshape(n, cfg.d_head, -1).transpose(1, 2)
        state[f"{prefix}attn.W_O"] = weight(attention.o_proj).T.reshape(4, cfg.d_head, -1)
        state[f"{prefix}ln1.w"] = weight(block.input_layernorm)
        state[f"{prefix}ln2.w"] = weight(block.post_attention_layernorm)
        state[f"{prefix}mlp.W_gate"] = weight(mlp.gate_proj).T
        state[f"{prefix}mlp.W_in"] = weight(mlp.up_proj).T
        state[f"{prefix}mlp.W_out"] = weight(mlp.down_proj).T
    state["embed.W_E"], state["ln_final.w"] = weight(model.embed_tokens), weight(model.norm)
    state["unembed.W_U"] = weight(source.lm_head).T
    unembed = getattr(source.lm_head, "original_component", source.lm_head)
    if unembed.bias is not None:  # the bridge of 3.9 adds one
        state["unembed.b_U"] = unembed.bias.detach()
    for name, parameter in target.named_parameters():
        parameter.data.copy_(state[name] if name in state else torch.zeros_like(parameter))
    assert set(state) <= set(dict(target.named_parameters()))


def test_a_pair_out_of_every_window_has_no_effect_and_one_within_has(bridges, tiny_trace):
    found = knockout(bridges("mistral"), tiny_trace, onto=None)  # a window of 11 tokens in every layer
    assert tiny_trace.steps[4].token_start - tiny_trace.steps[1].token_end >= 11
    assert not found.effects[4, :2].any() and found.measured[4, :2].all()
    assert abs(float(found.effects[2, 1])) > 0.1


def test_what_comes_before_the_cut_step_is_left_alone(bridges, tiny_trace):
    """Onto an earlier step there is nothing to measure; onto a later one there is."""
    model = bridges("llama")
    with pytest.raises(KnockoutError, match="step T3 has no prediction to change: all of T1 comes before it"):
        knockout(model, tiny_trace, pairs=[("T3", "T2")], onto="T1")
    assert abs(float(knockout(model, tiny_trace, pairs=[("T1", "Q")], onto="T3").effects[1, 0])) > 1e-3


def test_a_step_cut_from_itself_keeps_each_token_to_itself(bridges, tiny_trace, float64_throughout):
    found = knockout(bridges("llama"), tiny_trace, pairs=[(2, 2), (0, 0)])
    for step in (0, 2):
        expected = effect(bridges("llama"), tiny_trace, step, step)
        assert abs(expected) > 0.01
        assert float(found.effects[step, step]) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("batch_tokens", [1, 200, 250, 10_000])
def test_the_batch_budget_changes_nothing_but_the_batches(
    batch_tokens, bridges, tiny_trace, monkeypatch, float64_throughout
):
    batches, run = [], prefix_cache._TransformersPrefix.run

    def counted(self, start, end, n_rows):
        batches.append((n_rows, end))
        return run(self, start, end, n_rows)

    monkeypatch.setattr(prefix_cache._TransformersPrefix, "run", counted)
    found = knockout(bridges("gemma2"), tiny_trace, method="cached", batch_tokens=batch_tokens)
    assert sum(n_rows - 1 for n_rows, _ in batches) == 10
    assert all(n_rows * end <= batch_tokens or n_rows == 2 for n_rows, end in batches)
    assert len(batches) == {1: 10, 200: 8, 250: 6, 10_000: 4}[batch_tokens]
    whole = knockout(bridges("gemma2"), tiny_trace, method="cached")
    torch.testing.assert_close(found.effects, whole.effects, **EXACT)


def test_the_shared_prefix_is_not_written_to(bridges, tiny_trace):
    with torch.no_grad():
        prefix, _ = fill_prefix(bridges("gemma2"), tiny_trace.tokens)
        before = [held.clone() for layer in prefix._layers for held in layer]
        first = prefix.run(30, 45, 3)
        prefix.run(10, 77, 2)
        again = prefix.run(30, 45, 3)
    assert torch.equal(first, again) and first.shape == (3, 15, 264)
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, [held for layer in prefix._layers for held in layer], strict=True)
    )


@pytest.mark.parametrize("method", ["cached", "full"])
def test_a_callable_measure_gets_the_rows_of_the_query_step(method, bridges, tiny_trace):
    seen = []

    def first_logit(logits, clean, tokens):
        seen.append((logits.shape, clean.shape, tokens.tolist()))
        return (logits - clean)[0, 7]

    found = knockout(bridges("llama"), tiny_trace, measure=first_logit, pairs=[("T2", "T1")], method=method)
    following = tiny_trace.tokens[predictions(tiny_trace, 2, None)].tolist()
    assert seen == [((9, 264), (9, 264), following)]
    assert found.measure.endswith("first_logit") and abs(float(found.effects[2, 1])) > 1e-3


def test_a_step_that_ends_the_trace_is_measured_on_what_it_predicts(tiny_tokenizer, bridges):
    trace = ReasoningTrace.from_text(tiny_tokenizer, "Q? a.\n\nx", format="plain", question="Q?")
    assert trace.steps[-1].token_span == (len(trace) - 1, len(trace))
    found = knockout(bridges("llama"), trace)
    assert not found.measured[2].any() and found.measured[1, 0]
    with pytest.raises(KnockoutError, match="step T2 has no prediction to change: no token follows it"):
        knockout(bridges("llama"), trace, pairs=[("T2", "Q")])


def test_low_precision_gives_zero_where_nothing_is_cut(tiny_trace):
    model = build_bridge("mistral", dtype=torch.bfloat16)
    found = knockout(model, tiny_trace)
    assert not found.effects[4, :2].any() and found.effects.abs().max() > 0.1


def test_hooks_from_outside_stay_and_whole_passes_run(bridges, tiny_trace, float64_throughout):
    """A hook that knows positions sees whole passes; it runs before the cut, which so stays cut."""
    model, shapes = bridges("llama"), []
    name = model.hook_dict["blocks.0.attn.hook_attn_scores"].name

    def raise_question(scores, hook):
        shapes.append(scores.shape[-2:])
        scores = scores.clone()
        scores[..., 17:26] += 3.0
        return scores

    plain = knockout(model, tiny_trace)
    with model.hooks(fwd_hooks=[(name, raise_question)]):
        found = knockout(model, tiny_trace, pairs=[("T1", "Q")])
        assert count_hooks(model) == 1
        hooks = [(name, raise_question)]
    assert found.provenance.backend == "full" and "hooks are attached" in found.provenance.notes["not_cached"]
    assert set(shapes) == {(77, 77)} and len(shapes) == 2 and hooks
    assert abs(float(found.effects[1, 0] - plain.effects[1, 0])) > 1e-3


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
def test_stepflow_given_made_or_attached_outside_is_the_same(tiny_model, tiny_trace, kind, hooks_untouched):
    model, flow = tiny_model(kind), StepFlow(tau_max=0.5, alpha=0.5)
    options = dict(layers="deep", pairs=[("T2", "T1"), ("S1", "Q"), ("S1", "T3")])
    plain = knockout(model, tiny_trace, **options)
    with hooks_untouched(model):
        given = knockout(model, tiny_trace, stepflow=flow, **options)
        made = knockout(model, tiny_trace, fwd_hooks=lambda trace: flow.hooks(model, trace), **options)
    with model.hooks(fwd_hooks=flow.hooks(model, tiny_trace)):
        outside = knockout(model, tiny_trace, **options)
    assert (plain.effects - given.effects).abs().max() > 1e-3
    assert torch.equal(given.effects, made.effects) and torch.equal(given.effects, outside.effects)
    assert [found.provenance.backend for found in (given, made, outside)] == ["full"] * 3
    assert "may know the positions of a whole pass" in given.provenance.notes["not_cached"]
    assert given.provenance.notes["stepflow"] == repr(flow) and "fwd_hooks" not in given.provenance.notes
    assert made.provenance.notes["fwd_hooks"] == "made for each trace"
    assert not set(plain.provenance.notes) & {"stepflow", "fwd_hooks"}


def test_the_shared_prefix_refuses_hooks_that_stay_on(bridges, tiny_trace, hooks_untouched):
    model = bridges("llama")
    name = model.hook_dict["blocks.0.hook_mlp_out"].name
    for options in (dict(stepflow=StepFlow()), dict(fwd_hooks=[(name, lambda x, hook: x / 2)])):
        with (
            hooks_untouched(model),
            pytest.raises(ModelError, match="'cached' cannot serve .* hooks stay on"),
        ):
            knockout(model, tiny_trace, method="cached", **options)


@pytest.mark.parametrize("method", ["cached", "full"])
def test_nothing_is_left_behind_even_when_a_pass_fails(method, bridges, tiny_trace, hooks_untouched):
    model = bridges("llama")

    def fail(logits, clean, tokens):
        raise ZeroDivisionError("inside")

    model.train()
    try:
        with hooks_untouched(model), pytest.raises(ZeroDivisionError, match="inside"):
            knockout(model, tiny_trace, measure=fail, method=method)
        assert model.training
    finally:
        model.eval()
    with hooks_untouched(model):
        knockout(model, tiny_trace, method=method)


def test_a_cache_that_is_not_exact_is_found_out(bridges, tiny_trace, monkeypatch):
    model = bridges("smollm3")

    def mixed_up(self, keys, values, *args, **options):
        return torch.cat([self.keys.flip(-2), keys], -2), torch.cat([self.values, values], -2)

    monkeypatch.setattr(prefix_cache._shared_layer_class(), "update", mixed_up)
    with pytest.raises(
        prefix_cache.PrefixCacheRefusal, match="from the cache, the predictions of step T1 are off by"
    ):
        knockout(model, tiny_trace, method="cached")
    found = knockout(model, tiny_trace)
    assert found.provenance.backend == "full" and "are off by" in found.provenance.notes["not_cached"]
    monkeypatch.undo()
    torch.testing.assert_close(
        found.effects, knockout(model, tiny_trace, method="cached").effects, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (dict(pairs="some"), "KnockoutError", "pairs is 'some': expected 'all', 'screened' or a list"),
        (dict(pairs=[]), "KnockoutError", "there is no pair to cut"),
        (dict(pairs=["T1"]), "AlignmentError", r"pair 'T1': expected two steps, \(query, key\)"),
        (dict(pairs=[("T9", "Q")]), "TraceError", "no step 'T9': its steps are Q, T1, T2, T3, S1 .0..4."),
        (dict(pairs=[(7, 0)]), "TraceError", "no step 7"),
        (dict(pairs=[("Q", "T1")]), "AlignmentError", r"pair \(Q, T1\): the key step comes after"),
        (dict(heads=[4]), "ModelError", r"heads=\[4\]: the model has query heads 0..3; \[4\] are outside it"),
        (dict(heads=[]), "ModelError", "query heads 0..3; they must be distinct and at least one"),
        (dict(measure="loss"), "KnockoutError", "measure is 'loss': expected 'nll', 'kl', or a callable"),
        (dict(measure=lambda a, b, c: a), "KnockoutError", "returned a tensor of shape"),
        (dict(measure=lambda a, b, c: "x"), "KnockoutError", "returned str: expected one number"),
        (dict(measure=lambda a, b, c: float("nan")), "KnockoutError", "gave nan: the logits hold NaN"),
        (dict(method="fast"), "KnockoutError", "method is 'fast': expected one of auto, cached, full"),
        (dict(batch_tokens=0), "KnockoutError", "batch_tokens is 0: expected at least 1"),
        (dict(layers="middle"), "ValueError", "layers is 'middle': expected 'all', 'shallow', 'deep'"),
        (dict(layers=[4]), "ModelError", r"the model has layers 0..3; \[4\] are outside it"),
        (dict(onto="S9"), "ObjectiveError", "unknown objective 'S9'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_words(options, error, said, bridges, tiny_trace, hooks_untouched):
    model = bridges("llama")
    kind = getattr(errors, error, ValueError)
    with hooks_untouched(model), pytest.raises(kind, match=said):
        knockout(model, tiny_trace, **options)


def test_other_things_than_transformerlens_models_are_refused(tiny_trace):
    with pytest.raises(ModelError, match="expected a TransformerLens model"):
        knockout(build_hf_model("llama"), tiny_trace)


def test_onto_that_names_no_tokens_is_refused(bridges, tiny_trace):
    with pytest.raises(KnockoutError, match="names no tokens"):
        knockout(bridges("llama"), tiny_trace, onto=LogitDifference(3, 4, 5))
