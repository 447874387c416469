"""What the layerwise backend refuses, and that it leaves nothing behind."""

import pytest
import torch
from layerwise_runs import layerwise, mean_nll, one_logit, per_token, token_ids
from tiny_models import TINY_MODEL_KINDS, count_hooks


def as_found(model):
    """What must be the same before and after: hooks at hook points, on blocks, and the blocks' forward."""
    on_blocks = [
        (len(b._forward_hooks), len(b._forward_pre_hooks), "forward" in b.__dict__) for b in model.blocks
    ]
    return count_hooks(model), on_blocks, [parameter.requires_grad for parameter in model.parameters()]


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
@pytest.mark.parametrize(
    "where", ["hook_embed", "blocks.2.attn.hook_pattern", "blocks.3.attn.hook_z", "unembed.hook_in"]
)
def test_nothing_is_left_after_an_exception_inside(tiny_model, kind, where):
    model = tiny_model(kind)
    before = as_found(model)

    def explode(tensor, hook):
        raise RuntimeError("from inside")

    with model.hooks(fwd_hooks=[(model.hook_dict[where].name, explode)]):
        with pytest.raises(RuntimeError, match="from inside"):
            layerwise(model, per_token())
    assert as_found(model) == before


@pytest.mark.parametrize("kind", TINY_MODEL_KINDS)
def test_nothing_is_left_after_an_exception_in_a_second_run_or_a_backward_pass(tiny_model, kind):
    model = tiny_model(kind)
    before = as_found(model)

    def explode(*_):
        raise RuntimeError("from inside")

    def explode_below(tensor, hook):
        tensor.register_hook(explode)

    seen = []

    def explode_the_second_time(tensor, hook):
        seen.append(hook)
        if len(seen) == 2:
            explode()

    for function in (explode_below, explode_the_second_time):
        with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", function)]):
            with pytest.raises(RuntimeError, match="from inside"):
                layerwise(model, per_token())
        assert as_found(model) == before


def test_the_model_works_as_before_afterwards(tiny_model):
    model = tiny_model()
    before = model(token_ids()[None], return_type="logits")
    layerwise(model, per_token())
    layerwise(model, one_logit())
    assert torch.equal(model(token_ids()[None], return_type="logits"), before)


def test_nan_in_a_gradient_is_an_error_that_names_the_layer(tiny_model):
    from stepflow_tl.errors import GradientError

    model = tiny_model()

    def poison(residual, hook):
        residual.register_hook(lambda grad: grad * float("nan"))

    with model.hooks(fwd_hooks=[(model.hook_dict["blocks.1.hook_resid_post"].name, poison)]):
        with pytest.raises(GradientError, match=r"layer 0, head 0 is not finite .*float32"):
            layerwise(model, per_token())
    assert count_hooks(model) == 0


def test_nan_in_a_weight_is_the_same_error(tiny_model):
    from stepflow_tl.errors import GradientError

    model = tiny_model()
    with model.hooks(fwd_hooks=[("blocks.2.attn.hook_v", lambda value, hook: value * float("nan"))]):
        with pytest.raises(GradientError, match="is not finite"):
            layerwise(model, per_token())


@pytest.mark.parametrize("objective", [per_token, mean_nll, one_logit])
@pytest.mark.parametrize(
    ("where", "layers"),
    [("blocks.2.hook_resid_post", r"\[0, 1, 2\]"), ("unembed.hook_in", r"\[0, 1, 2, 3\]")],
)
def test_a_residual_stream_cut_above_is_an_error(tiny_model, where, layers, objective):
    from stepflow_tl.errors import GradientError, ObjectiveError

    model = tiny_model()
    if where.startswith("unembed") and objective is one_logit:
        error, message = ObjectiveError, "does not depend on the logits"
    else:
        error, message = GradientError, f"no gradient reached the pattern of layers {layers}"
    cut = [(model.hook_dict[where].name, lambda residual, hook: residual.detach() + 0)]
    with model.hooks(fwd_hooks=cut):
        with pytest.raises(error, match=message):
            layerwise(model, objective())


def test_a_hook_that_does_something_else_each_time_is_an_error_that_names_the_block(tiny_model):
    from stepflow_tl.errors import ModelError

    model, calls = tiny_model(), []

    def counting(residual, hook):
        calls.append(hook)
        return residual * (1 + len(calls))

    with model.hooks(fwd_hooks=[("blocks.2.attn.hook_v", counting)]):
        with pytest.raises(ModelError, match=r"block 2 gave another output .*backend='hooks'"):
            layerwise(model, per_token())
    assert count_hooks(model) == 0


def test_a_callable_that_is_no_differentiable_scalar_is_an_error(tiny_model):
    from stepflow_tl.errors import ObjectiveError
    from stepflow_tl.saliency.objectives import Objective

    for function in (lambda logits, tokens: logits[0], lambda logits, tokens: logits.detach().sum()):
        with pytest.raises(ObjectiveError):
            layerwise(tiny_model(), Objective("wrong", None, function=function))


def test_a_silent_pattern_hook_is_an_error_that_names_it(tiny_model, monkeypatch):
    from stepflow_tl.errors import ModelError

    model = tiny_model()
    point = model.hook_dict["blocks.3.attn.hook_pattern"]
    monkeypatch.setitem(point.__dict__, "forward", point.forward)
    monkeypatch.setattr(point, "add_hook", lambda function, **_: point.fwd_hooks.append(_NoHandle()))
    with pytest.raises(ModelError, match=r"blocks.3.attn.hook_pattern` never fired.*eager attention"):
        layerwise(model, mean_nll())


class _NoHandle:
    class hook:  # noqa: N801, D106
        remove = staticmethod(lambda: None)


class SharingModel(torch.nn.Module):
    """Two blocks; the second also reads what the first left in a dictionary."""

    class Block(torch.nn.Module):
        def forward(self, hidden_states, shared):
            hidden_states = hidden_states + shared.get("value", 0)
            shared["value"] = 2 * hidden_states
            return hidden_states

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([self.Block(), self.Block()])

    def forward(self, tokens, return_type):
        residual, shared = tokens[..., None].double(), {}
        for block in self.blocks:
            residual = block(residual, shared=shared)
        return residual


def test_blocks_that_share_more_than_the_residual_are_refused():
    from stepflow_tl.errors import ModelError
    from stepflow_tl.models.block_calls import record_blocks

    with pytest.raises(ModelError, match=r"block 1 receives `shared` from an earlier block"):
        record_blocks(SharingModel(), token_ids()[None])


def test_blocks_that_run_twice_or_never_are_refused():
    from stepflow_tl.errors import ModelError
    from stepflow_tl.models.block_calls import record_blocks

    class Looped(SharingModel):
        order = (0, 0, 1)

        def forward(self, tokens, return_type):
            residual = tokens[..., None].double()
            for layer in self.order:
                residual = self.blocks[layer](residual, shared={})
            return residual

    with pytest.raises(ModelError, match=r"blocks ran in the order \[0, 0\]: expected each once"):
        record_blocks(Looped(), token_ids()[None])
    Looped.order = (0,)
    with pytest.raises(ModelError, match=r"blocks \[1\] did not run"):
        record_blocks(Looped(), token_ids()[None])
