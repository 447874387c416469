"""The layerwise backend against the hooks backend, and what it holds in memory."""

import gc
import weakref

import pytest
import torch
from layerwise_runs import (
    N_LAYERS,
    N_TOKENS,
    OBJECTIVES,
    both_backends,
    layerwise,
    mean_nll,
    one_logit,
    per_token,
    step_ids,
    token_ids,
)
from tiny_models import TINY_MODEL_KINDS, build_tiny_tokenizer, count_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformer_lens.model_bridge import TransformerBridge
from transformers import Gemma2Config, Gemma2ForCausalLM

from stepflow_tl.saliency import layerwise as module
from stepflow_tl.saliency.hooks_backend import hooks_backend
from stepflow_tl.saliency.layerwise import CheckpointedBlocks, layerwise_backend

# Both backends run the same operations; only the rows of the tail are summed in another order. The llama
# and qwen2 kinds take softmax and norms in float32, whose rounding that order may move.
TOLERANCE = {"hooked": 1e-12, "native": 1e-12, "llama": 2e-6, "qwen2": 2e-6}


def deviation(found, expected):
    scale = expected.amax((1, 2, 3), keepdim=True)
    assert scale.min() > 1e-6, "every layer must have mass"
    return float(((found - expected).abs() / scale).max())


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equal_to_the_hooks_backend(tiny_model, kind, objective):
    model = tiny_model(kind)
    assert deviation(*both_backends(model, OBJECTIVES[objective]())) < TOLERANCE[kind]
    assert count_hooks(model) == 0


@pytest.mark.parametrize("rows", [1, 4, 13])
def test_the_tail_may_be_cut_into_rows_anywhere(tiny_model, rows, monkeypatch):
    monkeypatch.setattr(module, "_TAIL_ROWS", rows)
    for objective in (per_token(), mean_nll()):
        assert deviation(*both_backends(tiny_model(), objective)) < 1e-12


def test_the_tail_never_makes_more_logits_than_its_rows(tiny_model, monkeypatch):
    widths, tail = [], CheckpointedBlocks.tail

    def watched(*arguments):
        logits = tail(*arguments)
        widths.append(logits.shape[1])
        return logits

    monkeypatch.setattr(module, "_TAIL_ROWS", 5)
    monkeypatch.setattr(CheckpointedBlocks, "tail", watched)
    layerwise(tiny_model(), per_token())
    assert widths == [5, 5, 3]
    widths.clear()
    layerwise(tiny_model(), one_logit())
    assert widths == [N_TOKENS], "a callable may read any logit, so it gets them all"


@pytest.mark.parametrize("layers", [(0,), (3,), (1, 2), (3, 1)])
def test_layer_subsets_come_in_the_order_asked_for(tiny_model, layers):
    model = tiny_model()
    for objective in (per_token(), mean_nll()):
        assert deviation(*both_backends(model, objective, layers)) < 1e-12


def test_no_block_below_the_lowest_layer_runs_a_second_time(tiny_model):
    model, runs = tiny_model(), []
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(N_LAYERS)]
    with model.hooks(fwd_hooks=[(name, lambda pattern, hook: runs.append(hook.name)) for name in names]):
        layerwise(model, per_token(), (2,))
    assert [runs.count(name) for name in names] == [1, 1, 2, 2]


def scaled(tensor, hook):
    return tensor * torch.linspace(0.5, 1.5, tensor.shape[-1], dtype=tensor.dtype)


def written_into(tensor, hook):
    tensor[:, 2] = 0.5 * tensor[:, 3]
    return tensor


EDITS = {
    "pattern and scores": [
        ("blocks.1.attn.hook_pattern", scaled),
        ("blocks.2.attn.hook_attn_scores", scaled),
    ],
    "residual": [("blocks.1.hook_resid_pre", scaled), ("blocks.2.hook_resid_post", scaled)],
    "residual in place": [
        ("blocks.1.hook_resid_pre", written_into),
        ("blocks.3.hook_resid_pre", written_into),
    ],
    "last residual": [("blocks.3.hook_resid_post", scaled)],
    "embedding": [("hook_embed", scaled)],
    "final norm": [("unembed.hook_in", scaled)],
    "query, key, value, z": [
        (f"blocks.1.attn.{name}", scaled) for name in ("hook_q", "hook_k", "hook_v", "hook_z")
    ],
    "gradient": [
        ("blocks.2.hook_resid_post", lambda t, hook: t.register_hook(lambda g: 3 * g) and None),
        ("blocks.1.attn.hook_z", lambda t, hook: t.register_hook(lambda g: 2 * g) and None),
    ],
}


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
@pytest.mark.parametrize("edit", EDITS)
def test_equal_under_hooks_attached_outside(tiny_model, kind, edit):
    model = tiny_model(kind)
    plain = layerwise(model, per_token())
    edits = [(model.hook_dict[name].name, function) for name, function in EDITS[edit]]
    if kind == "native":
        edits = [pair for pair in edits if "attn_scores" not in pair[0]]  # fires after the fact there
    for objective in (per_token(), mean_nll()):
        with model.hooks(fwd_hooks=edits):
            found, expected = both_backends(model, objective)
        assert deviation(found, expected) < TOLERANCE[kind]
        assert not torch.allclose(found, plain, rtol=1e-3), "the edit must change the map"
    assert count_hooks(model) == 0


def test_equal_where_blocks_get_different_masks_and_logits_are_capped():
    """Gemma-2: sliding and full attention in turn, soft-caps on scores and on logits, scaled embeddings."""
    config = Gemma2Config(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=5,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf_model = Gemma2ForCausalLM(config).double().eval()
        for parameter in hf_model.parameters():
            parameter.data.normal_(std=0.3)
    model = TransformerBridge.boot_transformers(
        "tiny-gemma2", hf_model=hf_model, tokenizer=build_tiny_tokenizer(), device="cpu", dtype=torch.float64
    )
    for objective in OBJECTIVES.values():
        assert deviation(*both_backends(model, objective())) < 2e-6


def test_a_constant_pattern_still_has_saliency(tiny_model):
    model = tiny_model()
    with model.hooks(fwd_hooks=[("blocks.2.attn.hook_pattern", lambda pattern, hook: pattern.detach())]):
        assert deviation(*both_backends(model, mean_nll())) < 1e-12


class PatternMeter(TorchDispatchMode):
    """Counts, for every moment of a run, the layers of which a `[.., head, T, T]` tensor is in memory."""

    def __init__(self, model):
        super().__init__()
        self.layer, self.live, self.most = 0, {}, 0
        self.n_heads = model.cfg.n_heads
        names = [model.hook_dict[f"blocks.{layer}.hook_resid_pre"].name for layer in range(N_LAYERS)]
        self.hooks = [(name, self._enter) for name in names]

    def _enter(self, residual, hook):
        self.layer = int(hook.name.split(".")[1])

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-3:] == (self.n_heads, N_TOKENS, N_TOKENS):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = self.layer
                    weakref.finalize(storage, self.live.pop, storage._cdata)
        self.most = max(self.most, len(set(self.live.values())))
        return result


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_patterns_of_one_layer_live_at_a_time_and_of_all_layers_in_the_hooks_backend(
    tiny_model, kind, objective
):
    model, most = tiny_model(kind), {}
    for backend in (layerwise_backend, hooks_backend):
        meter = PatternMeter(model)
        with model.hooks(fwd_hooks=meter.hooks), meter:
            backend(model, token_ids(), step_ids(), OBJECTIVES[objective](), tuple(range(N_LAYERS)))
        most[backend.__name__] = meter.most
        assert not meter.live, "nothing may outlive the run"
    assert most == {"layerwise_backend": 1, "hooks_backend": N_LAYERS}


def test_no_tensor_outlives_a_run_of_which_half_the_graph_was_never_walked(tiny_model):
    """Checkpoints below the lowest layer are let go with everything they hold."""
    model, inputs = tiny_model(), []
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: inputs.append(weakref.ref(x)))]):
        layerwise(model, per_token(), (3,))
    gc.collect()
    assert len(inputs) == 1 and inputs[0]() is None
