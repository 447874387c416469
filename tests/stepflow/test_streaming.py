"""Decoding with a cache, without one, in chunks, in batches: the same logits as one pass over the finished
text."""

import numpy as np
import pytest
import torch
from float64 import float64_everywhere
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TINY_MODEL_KINDS, TL_GENERATION
from transformers import DynamicCache

from stepflow_tl.errors import ModelError
from stepflow_tl.stepflow import StepFlow
from stepflow_tl.stepflow.streaming import TokenStream
from stepflow_tl.trace import ReasoningTrace
from stepflow_tl.trace.splitting import TokenTracker

STRENGTH = dict(tau_max=0.3, alpha=0.5)
CACHED = tuple(kind for kind in TINY_MODEL_KINDS if kind != "native") + ("mistral", "gemma2", "gpt_oss")

words = st.text(st.sampled_from(list("ab <é–1.")) | st.sampled_from(["\n"]), min_size=1, max_size=14)
paragraphs = st.lists(words.filter(lambda w: w.strip()), min_size=1, max_size=3).map("\n\n".join)
parts = st.tuples(words.map(lambda w: w + "?"), paragraphs, paragraphs)


def left_padded(traces, pad):
    longest = max(map(len, traces))
    ids = torch.full((len(traces), longest), pad)
    mask = torch.zeros_like(ids)
    for row, trace in enumerate(traces):
        ids[row, longest - len(trace) :] = trace.tokens
        mask[row, longest - len(trace) :] = 1
    return ids, mask


def one_pass(model, flow, traces, ids, mask):
    hooks = flow.hooks(model, traces)
    with model.hooks(fwd_hooks=hooks):
        logits = model(ids, return_type="logits", attention_mask=mask)
    return logits, hooks.report()


def same_counts(one, other):
    return all(
        (a["adjusted"], a["injections"]) == (b["adjusted"], b["injections"])
        for a, b in zip(one.to_json(), other.to_json(), strict=True)
    )


@pytest.mark.parametrize("kind", CACHED)
@pytest.mark.parametrize("tags", ["added", "plain"])
@given(data=st.data())
@settings(max_examples=6)
def test_cached_decoding_equals_one_pass_at_every_position(
    flow_model, tokenizers, run_cached, kind, tags, data
):
    tokenizer, traces = tokenizers[tags], []
    for question, thinking, summary in data.draw(st.lists(parts, min_size=1, max_size=3)):
        ids = ReasoningTrace.from_parts(tokenizer, question, thinking, summary).tokens
        traces.append(ReasoningTrace.from_tokens(tokenizer, ids))
    model = flow_model(kind, padded=len(traces) > 1)
    flow = StepFlow(
        granularity=data.draw(st.sampled_from(["segment", "step"])),
        window=data.draw(st.sampled_from([None, 2])),
        placebo=data.draw(st.sampled_from([None, None, "both"])),
        **STRENGTH,
    )
    ids, mask = left_padded(traces, tokenizer.pad_token_id)
    n_padding = ids.shape[1] - min(map(len, traces))
    # A prefix at once, then chunks, and single tokens for a stretch of its own.
    cuts, single = (
        [data.draw(st.integers(n_padding + 1, n_padding + 40))],
        data.draw(st.integers(20, max(20, ids.shape[1]))),
    )
    while cuts[-1] < ids.shape[1]:
        cuts.append(cuts[-1] + (1 if single <= cuts[-1] < single + 24 else 9))
    cuts = [cut for cut in cuts if cut < ids.shape[1]]
    expected, one_report = one_pass(model, flow, traces, ids, mask)
    with flow.generating(model, tokenizer) as run:
        found = run_cached(model, ids, mask, cuts)
    assert (found - expected)[mask.bool()].abs().max() < 1e-4
    assert same_counts(one_report, run.report())
    assert torch.equal(torch.tensor(run.stream.tokens), ids)


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
@pytest.mark.parametrize("tags", ["added", "plain"])
def test_growing_sequences_without_a_cache_are_followed(flow_model, make_trace, tokenizers, kind, tags):
    model, flow, trace = flow_model(kind), StepFlow(**STRENGTH), make_trace(tags=tags)
    ids = trace.tokens[None]
    expected, _ = one_pass(model, flow, [trace], ids, torch.ones_like(ids))
    with flow.generating(model, tokenizers[tags]):
        for end in range(len(trace) - 25, len(trace) + 1, 3):
            found = model(ids[:, :end], return_type="logits")
            assert (found - expected[:, :end]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", CACHED)
def test_a_cache_that_was_cut_back_is_followed(flow_model, make_trace, run_cached, kind):
    """As assisted decoding does: tokens are tried, rejected, and others take their place."""
    model, flow, trace = flow_model(kind), StepFlow(**STRENGTH), make_trace()
    other = make_trace(thinking="First, another\n\nproduct: 12.", summary="No.")
    ids, mask = trace.tokens[None], torch.ones_like(trace.tokens[None])
    expected, _ = one_pass(model, flow, [trace], ids, mask)
    prefix = next(i for i in range(200) if trace.tokens[i] != other.tokens[i])
    with flow.generating(model) as run:
        run_cached(model, other.tokens[None], torch.ones_like(other.tokens[None]), [10])
        assert run.stream.tokens.shape[1] == len(other)
        # The prefix alone, as a pass: everything known after it is forgotten.
        found = run_cached(model, ids, mask, [prefix - 3, prefix, prefix + 70])
    assert (found - expected).abs().max() < 1e-4


def test_going_back_inside_a_cache_replays_the_labels(tokenizers, make_trace):
    for tags in ("plain", "added"):
        tokenizer, trace = tokenizers[tags], make_trace(tags=tags)
        stream = TokenStream(lambda tokenizer=tokenizer: TokenTracker(tokenizer))
        ids = trace.tokens[None].numpy()
        nothing = np.zeros_like(ids, dtype=bool)
        junk = np.full((1, 30), 60)
        stream.advance(ids[:, :20], 0, nothing[:, :20])
        for start in range(20, len(trace) - 9, 9):
            stream.advance(ids[:, start : start + 9], start, nothing[:, :9])
            stream.advance(junk, start + 9, np.zeros((1, 30), dtype=bool))
        stream.advance(ids[:, start + 9 :], start + 9, nothing[:, start + 9 :])
        final = trace.causal
        labels = stream.state.labels
        assert labels.segment[0].tolist() == final.segment_ids.tolist()
        assert labels.step[0].tolist() == final.step_ids.tolist()
        is_template = (labels.template_from[0] < 10**9).tolist()
        assert is_template == (trace.segment_ids == 0).tolist()


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("batch", [False, True])
def test_generate_under_stepflow_equals_greedy_decoding_by_single_passes(
    flow_model, make_trace, tokenizers, kind, use_cache, batch, hooks_untouched
):
    """Each generated token is the argmax of one pass, under StepFlow, over everything before it."""
    model, tokenizer, flow = flow_model(kind, padded=batch), tokenizers["added"], StepFlow(**STRENGTH)
    # The thinking is open, so generation goes on inside it and steps depend on what is generated.
    prompts = [tokenizer.decode(make_trace(thinking="One.\n\nTwo", summary="").tokens)]
    if batch:
        prompts.append(tokenizer.decode(make_trace("Why?", "So", summary="").tokens))
    with hooks_untouched(model), flow.generating(model, splitter="sentence") as run:
        options = dict(do_sample=False, stop_at_eos=False, use_past_kv_cache=use_cache, verbose=False)
        model.generate(prompts if batch else prompts[0], max_new_tokens=12, prepend_bos=False, **options)
    sequences, report = run.stream.tokens, run.report()
    assert report.adjusted > 0 and sequences.shape[0] == len(prompts)
    for row, prompt in enumerate(prompts):
        ids = sequences[row][run.stream.state.padding[row] :]
        n_prompt = len(ids) - 11  # the last token is chosen but never enters
        # Where BOS is also the padding, TransformerLens lets the row keep one of it.
        assert tokenizer.decode(ids[:n_prompt]).removeprefix("<|endoftext|>") == prompt
        trace = ReasoningTrace.from_tokens(tokenizer, ids.tolist(), splitter="sentence")
        logits, _ = one_pass(model, flow, [trace], trace.tokens[None], torch.ones_like(trace.tokens[None]))
        chosen = logits[0, n_prompt - 1 : -1].argmax(-1)
        assert torch.equal(chosen, trace.tokens[n_prompt:])


@pytest.mark.parametrize("kind", [kind for kind in CACHED if kind != "hooked"])
def test_hf_generate_and_sampling_are_followed(flow_model, make_trace, tokenizers, kind, hooks_untouched):
    model, tokenizer, flow = flow_model(kind), tokenizers["added"], StepFlow(**STRENGTH)
    prompt = make_trace(thinking="One.\n\nTwo", summary="").tokens[None]
    torch.manual_seed(0)
    with hooks_untouched(model), flow.generating(model) as run:
        model.hf_generate(
            prompt,
            max_new_tokens=12,
            do_sample=False,
            stop_at_eos=False,
            attention_mask=torch.ones_like(prompt),
        )
        greedy = run.stream.tokens.copy()
        torch.manual_seed(0)
        model.generate(
            prompt, max_new_tokens=12, do_sample=True, temperature=2.0, stop_at_eos=False, verbose=False
        )
        sampled = run.stream.tokens
    assert greedy.shape == sampled.shape and (greedy != sampled).any()
    trace = ReasoningTrace.from_tokens(tokenizer, greedy[0].tolist())
    logits, _ = one_pass(model, flow, [trace], trace.tokens[None], torch.ones_like(trace.tokens[None]))
    assert torch.equal(logits[0, prompt.shape[1] - 1 : -1].argmax(-1), trace.tokens[prompt.shape[1] :])
    assert torch.equal(
        torch.tensor(run.stream.state.labels.segment[0][: prompt.shape[1]]),
        trace.causal.segment_ids[: prompt.shape[1]],
    )


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
def test_several_sequences_in_turn_do_not_know_of_each_other(flow_model, make_trace, kind):
    model, flow = flow_model(kind), StepFlow(**STRENGTH)
    traces = [make_trace(), make_trace("Why?", "It is so.\n\nYes.", "So."), make_trace()]
    with float64_everywhere(), flow.generating(model):
        found = [model(trace.tokens[None], return_type="logits") for trace in traces]
    for trace, logits in zip(traces, found, strict=True):
        ids = trace.tokens[None]
        with float64_everywhere():
            expected, _ = one_pass(model, flow, [trace], ids, torch.ones_like(ids))
        assert torch.allclose(logits, expected, atol=1e-10)


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["blocks.0.hook_resid_pre", "blocks.3.hook_resid_post"])
def test_nothing_is_left_after_an_exception_during_generation(
    flow_model, make_trace, kind, error, where, hooks_untouched
):
    model, prompt = flow_model(kind), make_trace(summary="").tokens[None]
    plain = model(prompt, return_type="logits")
    n_module_hooks = count_module_hooks(model)
    seen = []

    def explode(tensor, hook):
        seen.append(tensor.shape[1])
        if len(seen) == 3:
            raise error("from inside")

    with hooks_untouched(model), pytest.raises(error, match="from inside"):
        with StepFlow().generating(model), model.hooks(fwd_hooks=[(model.hook_dict[where].name, explode)]):
            model.generate(prompt, max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False)
    assert len(seen) == 3
    assert count_module_hooks(model) == n_module_hooks
    assert torch.equal(model(prompt, return_type="logits"), plain)


def count_module_hooks(model):
    modules = {id(m): m for m in [*model.modules(), *getattr(model, "original_model", model).modules()]}
    wrapped = sum("forward" in m.__dict__ for m in modules.values())
    return wrapped + sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules.values())


def test_zero_strength_while_generating_attaches_nothing(flow_model, make_trace):
    model, prompt = flow_model(TINY_MODEL_KINDS[0]), make_trace(summary="").tokens[None]
    n_hooks = count_module_hooks(model)
    plain = model(prompt, return_type="logits")
    with StepFlow(tau_max=0.0, alpha=0.0).generating(model):
        assert count_module_hooks(model) == n_hooks
        assert torch.equal(model(prompt, return_type="logits"), plain)
    with StepFlow(alpha=0.0).generating(model):
        assert not torch.equal(model(prompt, return_type="logits"), plain)


@pytest.mark.parametrize("kind", CACHED)
def test_a_prefix_that_ran_outside_cannot_be_continued(flow_model, make_trace, kind, run_cached):
    if kind == "hooked":
        pytest.skip("its cache is made inside run_cached")
    model, trace = flow_model(kind), make_trace()
    ids = trace.tokens[None]
    _, cache = model(ids[:, :30], return_type="logits_and_cache", use_cache=True)
    with StepFlow().generating(model):
        with pytest.raises(
            ModelError, match="holds 30 tokens of 1 rows, but 0 tokens of 0 rows were followed"
        ):
            model(ids[:, 30:31], return_type="logits_and_cache", past_key_values=cache)


@pytest.mark.skipif(TL_GENERATION < 4, reason="one generation is enough: this is transformers' own loop")
def test_beam_search_is_refused_and_its_cache_is_left_as_it_was(flow_model, make_trace):
    model, prompt = flow_model("llama"), make_trace(summary="").tokens[None]
    cache = DynamicCache(config=model.original_model.config)
    options = dict(
        num_beams=2, max_new_tokens=3, attention_mask=torch.ones_like(prompt), past_key_values=cache
    )
    with StepFlow().generating(model), pytest.raises(ModelError, match="beam search .* Use num_beams=1"):
        model.original_model.generate(prompt, pad_token_id=256, **options)
    assert "reorder_cache" not in cache.__dict__


@pytest.mark.skipif(TL_GENERATION < 4, reason="one generation is enough: this is transformers' own cache")
def test_a_static_cache_is_refused(flow_model, make_trace):
    model, prompt = flow_model("llama"), make_trace(summary="").tokens[None]
    with StepFlow().generating(model), pytest.raises(ModelError, match=r"preallocated \(static\) cache"):
        model.original_model.generate(
            prompt,
            max_new_tokens=3,
            attention_mask=torch.ones_like(prompt),
            pad_token_id=256,
            cache_implementation="static",
        )


def test_embeddings_of_unknown_tokens_are_refused_and_known_ones_followed(flow_model, make_trace):
    if TL_GENERATION < 4:
        pytest.skip("a bridge is what takes embeddings")
    model, flow, trace = flow_model("llama"), StepFlow(**STRENGTH), make_trace()
    ids = trace.tokens[None]
    outside = model.embed(ids)
    with float64_everywhere():
        expected, _ = one_pass(model, flow, [trace], ids, torch.ones_like(ids))
    with float64_everywhere(), flow.generating(model):
        with pytest.raises(ModelError, match="token ids are not known"):
            model(outside)
        found = model(model.embed(ids), return_type="logits")
    assert torch.allclose(found, expected, atol=1e-10)


def test_text_is_followed_through_the_embedding(flow_model, make_trace, tokenizers):
    for kind in TINY_MODEL_KINDS:
        model, trace = flow_model(kind), make_trace(summary="")
        with StepFlow().generating(model) as run:
            model(tokenizers["added"].decode(trace.tokens), prepend_bos=False)
        assert run.stream.tokens[0].tolist() == trace.tokens.tolist()


def test_a_model_without_tokenizer_needs_one(flow_model, monkeypatch):
    model = flow_model(TINY_MODEL_KINDS[0])
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(ModelError, match="comes without a tokenizer, .* pass tokenizer="):
        with StepFlow().generating(model):
            raise AssertionError("must not be entered")
