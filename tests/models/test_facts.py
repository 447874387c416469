"""What is asked of a model: its kind, what fits into it, and how its attention is computed."""

from dataclasses import replace

import pytest
import torch
from tiny_architectures import build_bridge
from tiny_models import TINY_MODEL_KINDS, TL_GENERATION
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

from stepflow_tl.errors import ModelError
from stepflow_tl.models.facts import (
    attention_sinks,
    check_fit,
    check_heads,
    check_layers,
    computes_pattern_inside,
    delegates_attention,
    expand_heads,
    head_mask,
    is_bridge,
    is_transformerlens,
    model_facts,
    original_attention,
    score_function,
    tokenizer_of,
    wrapped_model,
)
from stepflow_tl.models.hook_names import refuse_delegated, resolve_hooks
from stepflow_tl.trace import ReasoningTrace

on_bridges = pytest.mark.skipif(TL_GENERATION < 4, reason="a TransformerBridge needs TransformerLens 4")


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
def test_each_kind_of_model_is_told_from_the_others(kind, tiny_model):
    model = tiny_model(kind)
    assert is_transformerlens(model)
    assert is_bridge(model) == (kind != "hooked")
    assert (wrapped_model(model) is model) == (kind == "hooked")
    assert computes_pattern_inside(original_attention(model, 0)) == (kind == "native")


def test_a_plain_transformers_model_has_the_same_facts_as_the_bridge_around_it(tiny_model):
    bridge = tiny_model("llama")
    plain = wrapped_model(bridge)
    assert not is_transformerlens(plain) and not is_bridge(plain) and wrapped_model(plain) is plain
    around, inside = model_facts(bridge), model_facts(plain)
    assert (inside.n_layers, inside.n_vocab, inside.n_ctx) == (4, 264, 256)
    for name in ("n_layers", "n_vocab", "n_ctx", "dtype", "device"):
        assert getattr(around, name) == getattr(inside, name), name


def test_what_is_no_language_model_is_refused():
    with pytest.raises(ModelError, match="Linear is neither a TransformerLens model .* nor a transformers"):
        model_facts(torch.nn.Linear(2, 2))


def test_a_model_without_a_tokenizer_is_named(tiny_model, monkeypatch):
    model = tiny_model()
    assert tokenizer_of(model) is model.tokenizer
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(ModelError, match=rf"model '{model.cfg.model_name}' comes without a tokenizer"):
        tokenizer_of(model)


def test_traces_that_do_not_fit_are_refused(tiny_model, tiny_tokenizer):
    facts = model_facts(tiny_model())
    trace = ReasoningTrace.from_parts(tiny_tokenizer, "Is 7 odd?", "It is.", "Yes.")
    check_fit(facts, trace)
    with pytest.raises(ModelError, match="but the model's context holds 256: shorten the trace"):
        check_fit(facts, ReasoningTrace.from_parts(tiny_tokenizer, "Is 7 odd?", "It is. " * 40, "Yes."))
    with pytest.raises(ModelError, match=rf"token id {trace.tokens[0]} at position 0 .* vocabulary of 5"):
        check_fit(replace(facts, n_vocab=5), trace)


@pytest.mark.parametrize(
    ("chosen", "problem"),
    [
        ([4], r"\[4\] are outside it"),
        ([-1, 0], r"\[-1\] are outside it"),
        ([1, 1], "distinct"),
        ([], "least"),
    ],
)
def test_layers_and_heads_that_are_not_there_are_refused(chosen, problem, tiny_model):
    model = tiny_model()
    assert check_layers(model_facts(model), None) == (0, 1, 2, 3) and check_heads(model, None) is None
    assert check_layers(model_facts(model), [3, 1]) == check_heads(model, [3, 1]) == (3, 1)
    with pytest.raises(ModelError, match=f"the model has layers 0..3; .*{problem}"):
        check_layers(model_facts(model), chosen)
    with pytest.raises(ModelError, match=f"the model has query heads 0..3; .*{problem}"):
        check_heads(model, chosen)


def test_a_head_mask_marks_the_chosen_heads():
    assert head_mask([2, 0], 3, torch.device("cpu"))[:, 0].tolist() == [True, False, True]
    with pytest.raises(ModelError, match=r"heads \[-1, 3\] do not exist: the layer has query heads 0..2"):
        head_mask([-1, 3], 3, torch.device("cpu"))


def test_consecutive_query_heads_share_a_key_value_head():
    held = torch.tensor([[1.0], [2.0]])
    assert expand_heads(held, 6, dim=0)[:, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert expand_heads(held, 2, dim=0) is held
    with pytest.raises(ModelError, match="3 query heads cannot share 2 KV heads evenly"):
        expand_heads(held, 3, dim=0)


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
def test_the_score_function_gives_the_scores_that_the_model_computes(kind, tiny_model):
    model = tiny_model(kind)
    hooks, seen = resolve_hooks(model, [1]).layers[0], {}
    if hooks.scores is None:
        pytest.skip("the native source forms its scores inside; per-token saliency tests them by differences")

    def keep(tensor, hook):
        seen[hook.name] = tensor

    names = (hooks.query, hooks.key, hooks.scores)
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, keep) for name in names]):
        model(torch.arange(6)[None])
    query, key, scores = (seen[name] for name in names)
    own = (query * expand_heads(key, query.shape[2], dim=2)).sum(-1).transpose(1, 2)
    torch.testing.assert_close(score_function(model, 1)(own), scores.diagonal(dim1=-2, dim2=-1))


@on_bridges
def test_scale_and_cap_of_other_attentions_are_read_off_the_module():
    capped, products = build_bridge("gemma2"), torch.linspace(-80, 80, 5, dtype=torch.float64)
    attention = original_attention(capped, 0)
    cap = attention.attn_logit_softcapping
    expected = cap * torch.tanh(products * attention.scaling / cap)
    torch.testing.assert_close(score_function(capped, 0)(products), expected)
    native = build_bridge("llama")
    torch.testing.assert_close(
        score_function(native, 0)(products), products * original_attention(native, 0).scaling
    )


@on_bridges
def test_sinks_are_found_where_there_are_some():
    sinks = attention_sinks(build_bridge("gpt_oss"), 1)
    assert sinks is not None and sinks.ndim == 1
    assert attention_sinks(build_bridge("llama"), 1) is None


@on_bridges
def test_a_layer_that_leaves_attention_to_the_wrapped_module_is_refused(monkeypatch):
    model = build_bridge("llama")
    hooks = resolve_hooks(model, [2]).layers[0]
    assert not delegates_attention(model, 2)
    refuse_delegated(model, hooks, "Do without.")
    monkeypatch.setattr(type(model.blocks[2].attn), "forward", AttentionBridge.forward)
    assert delegates_attention(model, 2)
    with pytest.raises(ModelError, match=r"layer 2: .* leaves attention to the wrapped .* Do without\."):
        refuse_delegated(model, hooks, "Do without.")
