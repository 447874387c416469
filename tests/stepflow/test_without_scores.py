"""StepFlow inside attention calls while a model generates: the hooks on eager scores are the oracle."""

import pytest
import torch
from float64 import float64_everywhere
from tiny_architectures import ATTENTION_VARIETIES, build_bridge, build_hf_model
from tiny_models import TL_GENERATION
from transformers import DynamicCache, pipeline

from stepflow_tl.errors import ModelError
from stepflow_tl.models.attention_interface import without_scores
from stepflow_tl.stepflow import StepFlow

pytestmark = pytest.mark.skipif(TL_GENERATION < 4, reason="the oracle needs a TransformerBridge")
FLOW = dict(tau_max=0.3, alpha=0.5, shallow=[0, 1, 2], deep=[1, 3])


def switched_state(model):
    """What the installation touches, as comparable values."""
    inner = getattr(model, "original_model", model)
    configs = [module.__dict__.get("config") for module in inner.modules()]
    modules = [*inner.modules(), *model.modules()]
    return (
        [config._attn_implementation for config in configs if hasattr(config, "_attn_implementation")],
        sum("forward" in module.__dict__ for module in modules),
        sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in modules),
    )


def logits_in_pieces(model, ids, cuts):
    cache, pieces = DynamicCache(config=model.config), []
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        out = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
        pieces.append(out.logits)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("name", ATTENTION_VARIETIES)
@pytest.mark.parametrize("granularity", ["segment", "step"])
def test_a_transformers_model_gives_what_hooks_give_at_every_position(
    make_trace, tokenizers, name, granularity
):
    trace, tokenizer = make_trace(), tokenizers["added"]
    placebo = "both" if granularity == "step" and name in ("llama", "gemma2") else None
    flow = StepFlow(**FLOW, granularity=granularity, placebo=placebo)
    bridge, model = build_bridge(name), build_hf_model(name)
    hooks = flow.hooks(bridge, trace)
    with bridge.hooks(fwd_hooks=hooks), torch.no_grad(), float64_everywhere():
        expected = bridge(trace.tokens[None], return_type="logits")
        assert hooks.report().adjusted and hooks.report().injections
    before = switched_state(model)
    for cuts in ([], [25, *range(40, len(trace), 1 if granularity == "segment" else 9)]):
        with flow.generating(model, tokenizer) as run, torch.no_grad(), float64_everywhere():
            found = logits_in_pieces(model, trace.tokens[None], cuts)
        assert torch.allclose(found, expected, atol=1e-8 * float(expected.abs().max()), rtol=0)
        assert run.report().injections == hooks.report().injections
        assert run.report().adjusted == hooks.report().adjusted
    assert switched_state(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_rows_that_are_left_alone_keep_the_bits_of_sdpa(make_trace, tokenizers, name, dtype):
    """A floor so low that no row is below it: everything is computed, and nothing may change."""
    ids, tokenizer = make_trace().tokens[None], tokenizers["added"]
    model = build_hf_model(name, dtype=dtype)
    model.set_attn_implementation("sdpa")
    cuts = [25, *range(60, ids.shape[1])]
    with torch.no_grad():
        plain = logits_in_pieces(model, ids, cuts)
        with StepFlow(tau_max=1e-30, alpha=0.0).generating(model, tokenizer) as run:
            found = logits_in_pieces(model, ids, cuts)
        with StepFlow(alpha=0.0).generating(model, tokenizer):
            moved = logits_in_pieces(model, ids, cuts)
    report = run.report().to_json()
    assert sum(row["rows"] for row in report) > 0 and run.report().adjusted == 0
    assert torch.equal(found, plain) and not torch.equal(moved, plain)


def test_generate_and_pipeline_run_under_stepflow(make_trace, tokenizers):
    tokenizer, flow = tokenizers["added"], StepFlow(**FLOW)
    model, bridge = build_hf_model("llama", dtype=torch.float32), build_bridge("llama", dtype=torch.float32)
    prompt = make_trace(thinking="One.\n\nTwo", summary="").tokens[None]
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=256)
    options["attention_mask"] = torch.ones_like(prompt)
    plain = model.generate(prompt, **options)
    with flow.generating(model, tokenizer) as run:
        found = model.generate(prompt, **options)
    assert run.report().adjusted and run.report().injections
    with flow.generating(bridge, tokenizer):
        expected = bridge.hf_generate(
            prompt,
            max_new_tokens=12,
            do_sample=False,
            stop_at_eos=False,
            attention_mask=torch.ones_like(prompt),
        )
    assert found.tolist() == torch.as_tensor(expected).tolist() != plain.tolist()
    text = tokenizer.decode(prompt[0])
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    with flow.generating(model, tokenizer):
        (said,) = generate(
            text, max_new_tokens=12, do_sample=False, return_full_text=False, add_special_tokens=False
        )
    assert said["generated_text"] == tokenizer.decode(found[0, prompt.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_stays_on_a_transformers_model_after_an_exception(make_trace, tokenizers, error):
    model, ids = build_hf_model("gemma2"), make_trace().tokens[None]
    before, plain = switched_state(model), model(ids).logits

    def explode(*_):
        raise error("from inside")

    with pytest.raises(error, match="from inside"), StepFlow(**FLOW).generating(model, tokenizers["added"]):
        handle = model.model.layers[2].register_forward_pre_hook(explode)
        try:
            model(ids)
        finally:
            handle.remove()
    assert switched_state(model) == before
    assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_oss"])
@pytest.mark.parametrize("point", ["hook_attn_scores", "hook_pattern"])
def test_a_listener_gets_the_scores_and_the_same_flow(make_trace, tokenizers, name, point):
    """A layer where somebody listens forms its scores; the others do not."""
    trace, flow = make_trace(), StepFlow(**FLOW)
    model = build_bridge(name, tokenizer=tokenizers["added"])
    with torch.no_grad(), float64_everywhere(), model.hooks(fwd_hooks=flow.hooks(model, trace)):
        expected = model(trace.tokens[None], return_type="logits")
    seen = []
    hook = (model.hook_dict[f"blocks.1.attn.{point}"].name, lambda x, hook: seen.append(x.shape))
    with torch.no_grad(), float64_everywhere(), flow.generating(model) as run:
        with model.hooks(fwd_hooks=[hook]):
            found = model(trace.tokens[None], return_type="logits")
        assert len(seen) == 1 and seen[0][-2:] == (len(trace), len(trace))
        again = model(trace.tokens[None], return_type="logits")
        assert len(seen) == 1
    scale = float(expected.abs().max())
    for logits in (found, again):
        assert torch.allclose(logits, expected, atol=1e-8 * scale, rtol=0)
    assert all(row["rows"] for row in run.report().to_json() if row["layer"] in FLOW["shallow"])


def test_gradients_go_through_the_flow_while_it_generates(make_trace, tokenizers):
    trace, flow = make_trace(), StepFlow(**FLOW)
    found = {}
    for kind, model in {"calls": build_hf_model("qwen2"), "hooks": build_bridge("qwen2")}.items():
        inner = getattr(model, "original_model", model)
        weight = inner.get_input_embeddings().weight.detach().clone()
        embedded = weight[trace.tokens][None].requires_grad_()
        start = inner.get_input_embeddings().register_forward_hook(lambda *_, e=embedded: e)
        try:
            if kind == "calls":
                with float64_everywhere(), flow.generating(model, tokenizers["added"]):
                    loss = model(input_ids=trace.tokens[None]).logits[0, -2].logsumexp(-1)
            else:
                with float64_everywhere(), model.hooks(fwd_hooks=flow.hooks(model, trace)):
                    loss = model(trace.tokens[None], return_type="logits")[0, -2].logsumexp(-1)
        finally:
            start.remove()
        (found[kind],) = torch.autograd.grad(loss, embedded)
    scale = float(found["hooks"].abs().max())
    assert torch.allclose(found["calls"], found["hooks"], atol=1e-8 * scale, rtol=0) and scale > 0


def test_plain_attention_without_scores_is_sdpa_and_leaves_nothing(make_trace):
    model, plain = build_bridge("qwen3", dtype=torch.float32), build_hf_model("qwen3", dtype=torch.float32)
    plain.set_attn_implementation("sdpa")
    ids = make_trace().tokens[None]
    model(ids, return_type="logits")  # TransformerLens puts hooks of its own on, once
    before = switched_state(model)
    with torch.no_grad(), without_scores(model):
        found = model(ids, return_type="logits")
    assert switched_state(model) == before
    with torch.no_grad():
        assert torch.allclose(found, plain(ids).logits, atol=1e-5 * float(found.abs().max()), rtol=0)


def test_a_model_that_cannot_be_served_says_why(make_trace, tokenizers):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match="neither a TransformerLens model"):
        with StepFlow().generating(model, tokenizers["added"]):
            pass
