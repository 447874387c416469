"""One layout of heads for every attention, and layers that have no pattern."""

import pytest
import torch
from architectures.architecture import N_HEADS
from tiny_architectures import build_bridge
from tiny_models import TL_GENERATION

from stepflow_tl.errors import ModelError
from stepflow_tl.models.hook_names import by_heads, component_hook, resolve_hooks

pytestmark = pytest.mark.skipif(TL_GENERATION < 4, reason="a TransformerBridge needs TransformerLens 4")
TOKENS = torch.arange(5, 16)[None]
QK_DIM, V_DIM = 10, 8  # of the tiny latent attention: 6 unrotated and 4 rotated; values


@pytest.fixture(scope="module")
def latent():
    return build_bridge("deepseek_v3")


def seen_by_heads(model, edit=lambda tensor: None):
    """Shapes at query, key, value and z of layer 1, and the logits with `edit` at each."""
    hooks, shapes = resolve_hooks(model, [1]).layers[0], {}

    def look(tensor, hook):
        shapes[hook.name] = tuple(tensor.shape)
        return edit(tensor)

    names = [hooks.query, hooks.key, hooks.value, hooks.z]
    with model.hooks(fwd_hooks=[(name, by_heads(model, name, look)) for name in names]):
        logits = model(TOKENS, return_type="logits")
    return [shapes[name] for name in names], logits


def test_latent_attention_reaches_a_hook_by_position_and_head(latent):
    shapes, logits = seen_by_heads(latent)
    assert shapes == [(1, 11, N_HEADS, width) for width in (QK_DIM, QK_DIM, V_DIM, V_DIM)]
    torch.testing.assert_close(logits, latent(TOKENS, return_type="logits"), rtol=0, atol=0)
    _, unmoved = seen_by_heads(latent, edit=lambda tensor: tensor.clone())
    torch.testing.assert_close(unmoved, logits, rtol=0, atol=0)


def test_an_edit_of_one_head_of_latent_attention_is_that_head_s(latent):
    """z of the edited head must be A v of that head alone: the pattern of the others does not matter."""
    hooks, z = resolve_hooks(latent, [1]).layers[0], {}

    def double_head_2(value, hook):
        value = value.clone()
        value[:, :, 2] *= 2
        return value

    def keep(name):
        return lambda tensor, hook: z.update({name: tensor.clone()})

    for name, edit in (
        ("plain", []),
        ("edited", [(hooks.value, by_heads(latent, hooks.value, double_head_2))]),
    ):
        with latent.hooks(fwd_hooks=[*edit, (hooks.z, by_heads(latent, hooks.z, keep(name)))]):
            latent(TOKENS, return_type="logits")
    ratio = z["edited"] / z["plain"]
    expected = torch.ones(N_HEADS, dtype=torch.float64)
    expected[2] = 2
    torch.testing.assert_close(ratio, expected[None, None, :, None].expand_as(ratio))


def test_ordinary_attention_is_left_as_it_is():
    model = build_bridge("llama")
    hooks = resolve_hooks(model, [1]).layers[0]

    def function(tensor, hook):
        return None

    assert all(by_heads(model, name, function) is function for name in (hooks.query, hooks.value, hooks.z))


@pytest.mark.parametrize("component", ["k", "v"])
def test_keys_and_values_of_latent_attention_cannot_be_exchanged_by_position(latent, component):
    with pytest.raises(ModelError, match=r"comes as \[batch, head, pos, d_head\].*Choose 'resid_pre'"):
        component_hook(latent, component, 1)
    assert component_hook(latent, "z", 1) == "blocks.1.attn.o.hook_in"


def test_only_the_layers_asked_for_need_a_pattern():
    model = build_bridge("qwen3_next")
    assert [hooks.layer for hooks in resolve_hooks(model, [3, 1]).layers] == [3, 1]
    for layers in (None, [1, 2]):
        with pytest.raises(ModelError, match=r"it mixes positions with `linear_attn`.*Layers 1, 3 have one"):
            resolve_hooks(model, layers)
