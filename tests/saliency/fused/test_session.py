"""What is switched on a model while fused attention is installed, what is refused, and that it comes back."""

import pytest
import torch
from saliency_oracles import N_TOKENS, STEP_IDS, TOKENS
from tiny_architectures import N_LAYERS, build_bridge, build_hf_model
from tiny_models import TL_GENERATION, build_tiny_model, count_hooks

from stepflow_tl.errors import FusedRefusal
from stepflow_tl.models import attention_interface
from stepflow_tl.models.attention_interface import installed, refusal_reason
from stepflow_tl.saliency.fused import attention
from stepflow_tl.saliency.fused.run import fused_backend
from stepflow_tl.saliency.fused.session import FusedSession, band_mask, window_of
from stepflow_tl.saliency.fused.steps import StepTiles
from stepflow_tl.saliency.hooks_backend import hooks_backend
from stepflow_tl.saliency.objectives import Objective

ALL_LAYERS = tuple(range(N_LAYERS))


@pytest.fixture
def per_token():
    return Objective("per_token", torch.arange(1, N_TOKENS), per_token=True)


def state_of(model):
    """Everything the installation touches, as comparable values."""
    inner = getattr(model, "original_model", model)
    return {
        "forwards": [(name, module.__dict__.get("forward")) for name, module in model.named_modules()],
        "children": [(name, id(module)) for name, module in model.named_modules()],
        "implementations": [
            module.config._attn_implementation
            for module in inner.modules()
            if hasattr(module.__dict__.get("config"), "_attn_implementation")
        ],
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
    }


def logits_of(model):
    with torch.no_grad():
        output = model(TOKENS[None])
    return getattr(output, "logits", output)


MODELS = {
    "transformers": lambda: build_hf_model("gemma2"),
    "bridge": lambda: build_bridge("llama"),
    "joint bridge": lambda: build_bridge("phi3"),
    # Not qwen2: TransformerLens 3.9 leaves a float32 projection in a float64 model with biases.
    "compatibility mode": lambda: build_bridge("llama", compatibility_mode=True),
}


@pytest.mark.parametrize("kind", MODELS)
def test_everything_is_restored(kind, per_token):
    model = MODELS[kind]()
    before, logits = state_of(model), logits_of(model)
    fused_backend(model, TOKENS, STEP_IDS, per_token, ALL_LAYERS, checkpoint=True)
    assert state_of(model) == before and not attention_interface._ACTIVE
    torch.testing.assert_close(logits_of(model), logits, rtol=0, atol=0)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("where", ["forward", "objective", "backward"])
def test_everything_is_restored_after_an_exception(kind, where, per_token, monkeypatch):
    def fail(*args, **kwargs):
        raise InterruptedError(where)

    model, chosen = MODELS[kind](), per_token
    before = state_of(model)
    if where == "forward":
        monkeypatch.setattr(attention, "_forward", fail)
    elif where == "backward":
        monkeypatch.setattr(attention, "tiled_backward", fail)
    else:
        chosen = Objective("failing", None, function=fail)
    with pytest.raises(InterruptedError, match=where):
        fused_backend(model, TOKENS, STEP_IDS, chosen, ALL_LAYERS, checkpoint=True)
    assert state_of(model) == before and not attention_interface._ACTIVE


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_oss"])
def test_hooks_on_residual_and_projections_take_part(name, per_token, float64_throughout):
    model = build_bridge(name)
    plain = fused_backend(model, TOKENS, STEP_IDS, per_token, ALL_LAYERS)
    edits = [
        ("blocks.1.hook_resid_pre", lambda x, hook: x * 1.3),
        ("blocks.0.attn.hook_q", lambda x, hook: x * 0.5),
        ("blocks.1.attn.hook_k", lambda x, hook: x + 0.2),
        ("blocks.2.attn.hook_v", lambda x, hook: x * 1.7),
        ("blocks.2.attn.hook_z", lambda x, hook: x * 0.8),
        ("blocks.3.hook_attn_out", lambda x, hook: x * 1.1),
    ]
    for edit in edits:
        with model.hooks(fwd_hooks=[edit]):
            ours = fused_backend(model, TOKENS, STEP_IDS, per_token, ALL_LAYERS)
            theirs = hooks_backend(model, TOKENS, STEP_IDS, per_token, ALL_LAYERS)
        assert (ours - plain).abs().max() > 1e-3, f"{edit[0]} had no effect"
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    assert count_hooks(model) == 0


def test_hooks_see_the_same_activations_as_on_the_ordinary_path(per_token, float64_throughout):
    for name in ("llama", "phi3", "gemma2"):
        model = build_bridge(name)
        names = [f"blocks.2.attn.hook_{x}" for x in ("q", "k", "v", "z")] + [
            "blocks.2.hook_resid_post",
            "ln_final.hook_in",
        ]
        seen: dict = {}

        def keep(x, hook, seen=seen):
            seen.setdefault(hook.name, []).append(x.detach().clone())

        with model.hooks(fwd_hooks=[(n, keep) for n in names]):
            fused_backend(model, TOKENS, STEP_IDS, per_token, ALL_LAYERS)
            with torch.no_grad():
                model(TOKENS[None])
        assert len(seen) == len(names)
        for hook_name, (fused, ordinary) in seen.items():
            torch.testing.assert_close(fused, ordinary, rtol=1e-9, atol=1e-10, msg=f"{name}: {hook_name}")


@pytest.mark.parametrize("hook", ["hook_pattern", "hook_attn_scores", "hook_rot_q", "hook_hidden_states"])
def test_a_hook_that_cannot_fire_is_a_reason_to_refuse(hook, per_token):
    model = build_bridge("llama")
    assert refusal_reason(model) is None
    with model.hooks(fwd_hooks=[(f"blocks.1.attn.{hook}", lambda x, hook: x)]):
        assert hook in str(refusal_reason(model))
        with pytest.raises(FusedRefusal, match=f"{hook}.*does not exist on this path.*backend='hooks'"):
            fused_backend(model, TOKENS, STEP_IDS, per_token, ALL_LAYERS)
    with model.hooks(bwd_hooks=[(f"blocks.1.attn.{hook}", lambda x, hook: None)]):
        assert refusal_reason(model) is not None
    assert refusal_reason(model) is None


@pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_in", "use_attn_result"])
def test_flags_that_add_hook_points_are_refused(flag):
    model = build_bridge("llama")
    setattr(model.cfg, flag, True)
    assert flag in str(refusal_reason(model))


def test_what_is_no_transformers_model_is_refused(tiny_model):
    assert "not, and does not wrap, a transformers model" in str(refusal_reason(torch.nn.Linear(2, 2)))
    own = tiny_model("native" if TL_GENERATION >= 4 else "hooked")
    assert refusal_reason(own) is not None


def test_padding_is_refused(per_token):
    padded = torch.ones(1, 5, dtype=torch.bool)
    padded[0, 0] = False
    with pytest.raises(FusedRefusal, match="padding"):
        band_mask(q_length=5, kv_length=5, mask_function=lambda b, h, q, k: k <= q, attention_mask=padded)


@pytest.mark.parametrize("window", [1, 3, 50])
def test_a_causal_band_is_recognised_by_its_width(window):
    mask = band_mask(q_length=50, kv_length=50, mask_function=lambda b, h, q, k: (k <= q) & (k > q - window))
    assert window_of(mask, is_causal=True, n_tokens=50) == (None if window == 50 else window)


@pytest.mark.parametrize(
    "mask_function",
    [
        lambda b, h, q, k: (k <= q) & (k // 8 == q // 8),  # chunks
        lambda b, h, q, k: k >= 0,  # both directions
        lambda b, h, q, k: (k <= q) | (k < 4),  # a prefix that sees itself
        lambda b, h, q, k: (k <= q) & ((k > q - 9) | (k < 2)),  # sink tokens beside a window
    ],
)
def test_every_other_mask_is_refused(mask_function):
    with pytest.raises(FusedRefusal, match="neither causal nor a causal sliding window"):
        band_mask(q_length=50, kv_length=50, mask_function=mask_function)


def test_a_cache_is_refused():
    with pytest.raises(FusedRefusal, match="KV cache"):
        band_mask(q_length=1, kv_length=50, q_offset=49, mask_function=lambda b, h, q, k: k <= q)


def test_a_materialised_mask_is_refused(per_token):
    model = build_hf_model("llama")
    run = FusedSession(StepTiles(STEP_IDS, 5), frozenset(ALL_LAYERS), diagonal_only=True)
    mask = torch.zeros(1, 1, N_TOKENS, N_TOKENS, dtype=torch.float64)
    with installed(model, run), pytest.raises(FusedRefusal, match="builds its own attention mask"):
        model(input_ids=TOKENS[None], attention_mask=mask, use_cache=False)


def test_a_model_is_not_installed_twice(per_token):
    model = build_hf_model("llama")
    before = state_of(model)
    run = FusedSession(StepTiles(STEP_IDS, 5), frozenset(ALL_LAYERS), diagonal_only=True)
    with installed(model, run):
        with pytest.raises(FusedRefusal, match="another run of the same model"):
            fused_backend(model, TOKENS, STEP_IDS, per_token, ALL_LAYERS)
    assert state_of(model) == before


def test_tiny_models_of_the_suite_are_served(per_token):
    for kind in ("llama", "qwen2"):
        assert fused_backend(build_tiny_model(kind), TOKENS, STEP_IDS, per_token, ALL_LAYERS).sum() > 0
