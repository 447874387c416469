"""Whole maps of whole models, against the hooks backend and against attention written out."""

import math

import pytest
import torch
from accelerate import dispatch_model
from saliency_oracles import N_TOKENS, STEP_IDS, TOKENS, pool_by_loops
from tiny_architectures import ATTENTION_VARIETIES, N_LAYERS, build_bridge, build_hf_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from stepflow_tl.errors import GradientError, ObjectiveError
from stepflow_tl.models.attention_interface import installed
from stepflow_tl.saliency.fused import run
from stepflow_tl.saliency.fused.run import fused_backend
from stepflow_tl.saliency.fused.session import FusedSession
from stepflow_tl.saliency.fused.steps import StepTiles
from stepflow_tl.saliency.hooks_backend import hooks_backend
from stepflow_tl.saliency.objectives import Objective, token_log_odds, token_nll

ALL_LAYERS = tuple(range(N_LAYERS))


@pytest.fixture
def objective():
    def make(name, n_tokens=N_TOKENS):
        if name in ("per_token", "log_odds"):
            loss = token_log_odds if name == "log_odds" else token_nll
            return Objective(name, torch.arange(1, n_tokens), per_token=True, token_loss=loss)
        if name == "mean":
            return Objective(name, torch.arange(n_tokens // 2, n_tokens))
        return Objective(name, None, function=lambda logits, tokens: logits[0, -2, 7] - logits[0, -3, 9])

    return make


def close(ours, theirs, tolerance):
    assert theirs.abs().sum() > 0
    torch.testing.assert_close(
        ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()) * 1e-3
    )


@pytest.mark.parametrize("compatibility_mode", [False, True], ids=["raw", "compatibility mode"])
@pytest.mark.parametrize("name", ATTENTION_VARIETIES)
def test_fused_equals_hooks_on_a_bridge(name, compatibility_mode, objective, float64_throughout):
    model = build_bridge(name, compatibility_mode=compatibility_mode)
    for kind in ("per_token", "mean", "function"):
        arguments = (model, TOKENS, STEP_IDS, objective(kind), ALL_LAYERS)
        close(fused_backend(*arguments), hooks_backend(*arguments), 1e-8)


@pytest.mark.parametrize("name", ATTENTION_VARIETIES)
def test_fused_equals_hooks_in_every_score(name, objective, float64_throughout):
    model = build_bridge(name)
    for kind in ("log_odds", "mean", "function"):
        arguments = (model, TOKENS, STEP_IDS, objective(kind), ALL_LAYERS)
        for score in ("saliency", "signed", "cut"):
            ours, theirs = (backend(*arguments, score=score) for backend in (fused_backend, hooks_backend))
            close(ours, theirs, 1e-8)
            assert (score == "saliency") == bool((ours >= 0).all())


@pytest.mark.parametrize("score", ["signed", "cut"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_scores_in_float32_and_in_small_tiles(name, score, objective, tile_size):
    arguments = (TOKENS, STEP_IDS, objective("log_odds"), ALL_LAYERS)
    exact = fused_backend(build_hf_model(name), *arguments, score=score)
    scale = exact.abs().amax((1, 2, 3), keepdim=True)
    for options in ({}, {"checkpoint": True, "block_divisor": 2}):
        found = fused_backend(build_hf_model(name, dtype=torch.float32), *arguments, score=score, **options)
        assert ((found - exact).abs() / scale).max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_fused_equals_hooks_in_float32(name, objective):
    model = build_bridge(name, dtype=torch.float32)
    for kind in ("per_token", "mean"):
        arguments = (model, TOKENS, STEP_IDS, objective(kind), ALL_LAYERS)
        ours, theirs = fused_backend(*arguments), hooks_backend(*arguments)
        assert (ours - theirs).abs().max() / theirs.max() < 1e-4


class Eager:
    """Attention written out, as transformers calls it; keeps every layer's pattern."""

    def __init__(self):
        self.patterns = {}

    def __call__(self, module, query, key, value, mask, scaling, softcap=None, s_aux=None, **_):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        scores = query @ key.mT * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask, -math.inf)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
        pattern = torch.softmax(scores, dim=-1)[..., : query.shape[2]]
        self.patterns[module.layer_idx] = pattern
        return (pattern @ value).transpose(1, 2).contiguous(), None


@pytest.fixture
def eager(monkeypatch):
    """Registers `Eager`; call the fixture with a model to switch it over."""
    attention = Eager()

    def boolean_mask(**kwargs):
        return sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})

    monkeypatch.setitem(AttentionInterface._global_mapping, "written_out", attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "written_out", boolean_mask)

    def switch(model):
        model.set_attn_implementation("written_out")
        return attention

    return switch


@pytest.mark.parametrize("name", ATTENTION_VARIETIES)
def test_per_token_equals_one_backward_pass_a_token(name, objective, eager, tile_size, float64_throughout):
    model = build_hf_model(name)
    ours = fused_backend(model, TOKENS, STEP_IDS, objective("per_token"), ALL_LAYERS)

    attention = eager(model)
    logits = model(input_ids=TOKENS[None], use_cache=False).logits[0]
    rows = [torch.zeros(4, N_TOKENS, N_TOKENS, dtype=torch.float64) for _ in ALL_LAYERS]
    patterns = [attention.patterns[layer] for layer in ALL_LAYERS]
    for t in range(N_TOKENS - 1):
        loss = torch.nn.functional.cross_entropy(logits[t], TOKENS[t + 1])
        grads = torch.autograd.grad(loss, patterns, retain_graph=True)
        for layer in ALL_LAYERS:
            rows[layer][:, t] = (patterns[layer] * grads[layer]).abs().detach()[0, :, t]
    close(ours, torch.stack([pool_by_loops(x, STEP_IDS) for x in rows]), 1e-8)


@pytest.mark.parametrize("name", ATTENTION_VARIETIES)
def test_mean_loss_equals_retained_gradients(name, objective, eager, tile_size, float64_throughout):
    model = build_hf_model(name)
    kinds = ("mean", "function")
    ours = [fused_backend(model, TOKENS, STEP_IDS, objective(kind), ALL_LAYERS) for kind in kinds]
    per_token = fused_backend(model, TOKENS, STEP_IDS, objective("per_token"), ALL_LAYERS)
    assert (per_token / per_token.sum() - ours[0] / ours[0].sum()).abs().max() > 1e-4, (
        "the objectives coincide"
    )

    attention = eager(model)
    logits = model(input_ids=TOKENS[None], use_cache=False).logits
    patterns = [attention.patterns[layer] for layer in ALL_LAYERS]
    for kind, map_ in zip(kinds, ours, strict=True):
        loss = objective(kind).loss(logits, TOKENS[None])
        grads = torch.autograd.grad(loss, patterns, retain_graph=True)
        expected = [(p * g).abs().detach()[0] for p, g in zip(patterns, grads, strict=True)]
        close(map_, torch.stack([pool_by_loops(x, STEP_IDS) for x in expected]), 1e-8)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_model_gradients_equal_sdpa(name, float64_throughout):
    model = build_hf_model(name)
    session = FusedSession(StepTiles(STEP_IDS, 5), frozenset(ALL_LAYERS), diagonal_only=False)

    def gradients():
        loss = model(input_ids=TOKENS[None], labels=TOKENS[None], use_cache=False).loss
        return torch.autograd.grad(loss, list(model.parameters()))

    with installed(model, session):
        ours = gradients()
    for mine, plain in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-8, atol=1e-10)
    assert sum(float(g.abs().sum()) for g in ours) > 0


@pytest.mark.parametrize("kind", ["per_token", "mean", "function"])
def test_checkpointing_changes_nothing(kind, objective):
    for model in (build_hf_model("gemma2"), build_bridge("phi3")):
        plain = fused_backend(model, TOKENS, STEP_IDS, objective(kind), ALL_LAYERS)
        again = fused_backend(model, TOKENS, STEP_IDS, objective(kind), ALL_LAYERS, checkpoint=True)
        torch.testing.assert_close(again, plain, rtol=1e-10, atol=1e-12)


def test_a_layer_subset_is_that_part_of_the_whole_in_the_order_asked_for(objective):
    model = build_hf_model("llama")
    whole = fused_backend(model, TOKENS, STEP_IDS, objective("mean"), ALL_LAYERS)
    for layers in ((2,), (3, 1), (0,)):
        for checkpoint in (False, True):
            part = fused_backend(model, TOKENS, STEP_IDS, objective("mean"), layers, checkpoint=checkpoint)
            torch.testing.assert_close(part, whole[list(layers)], rtol=1e-10, atol=1e-12)


def test_layers_below_the_lowest_one_asked_for_build_no_graph(objective):
    model, needed = build_hf_model("llama"), {}
    for layer, block in enumerate(model.model.layers):
        block.register_forward_hook(
            lambda _m, _i, out, layer=layer: needed.update({layer: out.requires_grad})
        )
    fused_backend(model, TOKENS, STEP_IDS, objective("mean"), (2, 3))
    assert needed == {0: False, 1: False, 2: True, 3: True}


@pytest.mark.parametrize("name", ["granite", "gemma2", "llama"])
def test_the_unembedding_chunk_size_changes_nothing(name, objective, monkeypatch):
    model, kinds = build_hf_model(name), ("mean", "log_odds")
    whole = [run.fused_backend(model, TOKENS, STEP_IDS, objective(kind), ALL_LAYERS) for kind in kinds]
    monkeypatch.setattr(run, "LOGITS_PER_CHUNK", 1)
    chunked = [run.fused_backend(model, TOKENS, STEP_IDS, objective(kind), ALL_LAYERS) for kind in kinds]
    torch.testing.assert_close(chunked, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("step_ids", [[0], [0, 0], [-1, 0], [0, -1], [0, 1, 2, 3]])
def test_traces_of_one_to_four_tokens(step_ids, objective):
    model, n = build_hf_model("llama"), len(step_ids)
    last_logit = Objective("last", None, function=lambda logits, tokens: logits[0, -1, 5])
    for chosen in [last_logit] + ([objective("per_token", n)] if n > 1 else []):
        map_ = fused_backend(model, TOKENS[:n], torch.tensor(step_ids), chosen, ALL_LAYERS)
        assert map_.shape == (4, 4, max(step_ids) + 1, max(step_ids) + 2) and map_.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_pooled_in_float32(dtype, objective):
    half = build_hf_model("llama", dtype=dtype)
    exact = build_hf_model("llama", dtype=dtype).to(torch.float32)
    ours = fused_backend(half, TOKENS, STEP_IDS, objective("per_token"), ALL_LAYERS)
    theirs = fused_backend(exact, TOKENS, STEP_IDS, objective("per_token"), ALL_LAYERS)
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().sum() / theirs.sum() < 0.1


def test_a_callable_that_ignores_the_logits_is_refused(objective):
    constant = Objective("constant", None, function=lambda logits, tokens: torch.zeros(()))
    with pytest.raises(ObjectiveError, match="does not depend on the logits"):
        fused_backend(build_hf_model("llama"), TOKENS, STEP_IDS, constant, ALL_LAYERS)


def test_nan_weights_are_named_by_layer_and_head(objective):
    model = build_hf_model("llama")
    model.model.layers[2].self_attn.v_proj.weight.data[0] = float("nan")
    with pytest.raises(GradientError, match="layer 0, head 0 is not finite"):
        fused_backend(model, TOKENS, STEP_IDS, objective("per_token"), ALL_LAYERS)


def test_a_residual_cut_by_a_hook_is_named(objective):
    model = build_bridge("llama")
    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_pre", lambda residual, hook: residual.detach())]):
        with pytest.raises(GradientError, match=r"layers \[0, 1\]"):
            fused_backend(model, TOKENS, STEP_IDS, objective("per_token"), ALL_LAYERS)


def test_a_hook_at_the_unembedding_sees_every_position_once(objective, float64_throughout):
    model, shapes = build_bridge("llama"), []

    def dampen(residual, hook):
        shapes.append(tuple(residual.shape))
        return residual * torch.linspace(0.2, 2, N_TOKENS)[None, :, None]

    arguments = (model, TOKENS, STEP_IDS, objective("mean"), ALL_LAYERS)
    plain = fused_backend(*arguments)
    with model.hooks(fwd_hooks=[("unembed.hook_in", dampen)]):
        ours = fused_backend(*arguments)
        assert shapes == [(1, N_TOKENS, 32)]
        close(ours, hooks_backend(*arguments), 1e-8)
    assert (ours - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["per_token", "mean", "function"])
def test_a_model_spread_over_devices_and_disk_gives_the_same_map(kind, objective, tmp_path):
    """What `device_map` does: blocks and embeddings are brought in one by one, and taken away again."""
    model = build_hf_model("llama")
    expected = fused_backend(model, TOKENS, STEP_IDS, objective(kind), ALL_LAYERS)
    places = {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in ALL_LAYERS}
    places |= {
        "model.embed_tokens": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    }
    dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert {p.device.type for p in model.parameters()} == {"cpu", "meta"}
    for checkpoint in (False, True):
        found = fused_backend(model, TOKENS, STEP_IDS, objective(kind), ALL_LAYERS, checkpoint=checkpoint)
        close(found, expected, 1e-12)
    assert {p.device.type for p in model.parameters()} == {"cpu", "meta"}
