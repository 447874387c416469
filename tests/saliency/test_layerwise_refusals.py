"""What the layerwise backend refuses, and that it leaves nothing behind."""

import pytest
import torch
from layerwise_runs import layerwise, mean_nll, one_logit, per_token, token_ids
from tiny_models import TINY_MODEL_KINDS, count_hooks

from stepflow_tl.errors import GradientError, ModelError, ObjectiveError
from stepflow_tl.saliency.layerwise import CheckpointedBlocks
from stepflow_tl.saliency.objectives import Objective


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
    model = tiny_model()

    def poison(residual, hook):
        residual.register_hook(lambda grad: grad * float("nan"))

    with model.hooks(fwd_hooks=[(model.hook_dict["blocks.1.hook_resid_post"].name, poison)]):
        with pytest.raises(GradientError, match=r"layer 0, head 0 is not finite .*float32"):
            layerwise(model, per_token())
    assert count_hooks(model) == 0


def test_nan_in_a_weight_is_the_same_error(tiny_model):
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
    model, calls = tiny_model(), []

    def counting(residual, hook):
        calls.append(hook)
        return residual * (1 + len(calls))

    with model.hooks(fwd_hooks=[("blocks.2.attn.hook_v", counting)]):
        with pytest.raises(ModelError, match=r"block 2 gave another output .*backend='hooks'"):
            layerwise(model, per_token())
    assert count_hooks(model) == 0


def test_a_callable_that_is_no_differentiable_scalar_is_an_error(tiny_model):
    for function in (lambda logits, tokens: logits[0], lambda logits, tokens: logits.detach().sum()):
        with pytest.raises(ObjectiveError):
            layerwise(tiny_model(), Objective("wrong", None, function=function))


def test_a_silent_pattern_hook_is_an_error_that_names_it(tiny_model, monkeypatch):
    model = tiny_model()
    point = model.hook_dict["blocks.3.attn.hook_pattern"]
    monkeypatch.setitem(point.__dict__, "forward", point.forward)
    monkeypatch.setattr(point, "add_hook", lambda function, **_: point.fwd_hooks.append(_NoHandle()))
    with pytest.raises(
        ModelError, match=r"pattern hooks never fired .blocks.3.attn.hook_pattern.*eager attention"
    ):
        layerwise(model, mean_nll())


class _NoHandle:
    class hook:  # noqa: N801, D106
        remove = staticmethod(lambda: None)


def test_a_hook_that_saves_other_tensors_each_time_is_an_error(tiny_model):
    model, calls = tiny_model(), []

    def detached_the_second_time(value, hook):
        calls.append(hook)
        return value if len(calls) == 1 else value.detach()

    with model.hooks(fwd_hooks=[("blocks.2.attn.hook_v", detached_the_second_time)]):
        with pytest.raises(ModelError, match=r"other tensors .* second time: .*backend='hooks'"):
            layerwise(model, mean_nll())
    assert count_hooks(model) == 0


class SharingModel(torch.nn.Module):
    """Two blocks; the second also reads what the first left in a dictionary."""

    class Block(torch.nn.Module):
        def forward(self, hidden_states, shared):
            hidden_states = hidden_states * hidden_states + shared.get("value", 0)
            shared["value"] = 2 * hidden_states
            return hidden_states

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([self.Block(), self.Block()])
        self.embedding = torch.linspace(0.5, 1.5, 14, dtype=torch.float64)[None, :, None].requires_grad_(True)

    def forward(self, tokens, return_type):
        residual, shared = self.embedding, {}
        for block in self.blocks:
            residual = block(residual, shared=shared)
        return residual


def run_blocks(model):
    """The final residual of the checkpointed blocks, and its gradient by the embedding."""
    final = CheckpointedBlocks(list(model.blocks)).run(model, token_ids()[None])
    return final, torch.autograd.grad(final.sum(), model.embedding)[0]


def test_blocks_that_overwrite_what_they_share_are_refused():
    with pytest.raises(ModelError, match=r"block 1 gave another output .* blocks share and overwrite"):
        run_blocks(SharingModel())


def test_blocks_that_read_what_an_earlier_block_computed_are_exact():
    """A later layer reads the keys and values of an earlier one: gradients take both paths."""

    class Reader(torch.nn.Module):
        def forward(self, hidden_states, shared):
            return hidden_states * hidden_states + shared["value"]

    class Model(SharingModel):
        def forward(self, tokens, return_type):
            residual = self.blocks[0](self.embedding, shared={"value": 1})
            return self.blocks[1](residual, shared={"value": residual * residual})

    model = Model()
    model.blocks = torch.nn.ModuleList([Reader(), Reader()])
    final, gradient = run_blocks(model)
    plain = model(token_ids()[None], return_type="logits")
    assert torch.equal(final, plain)
    assert torch.equal(gradient, torch.autograd.grad(plain.sum(), model.embedding)[0])


def test_blocks_that_run_twice_or_never_are_refused():
    class Looped(SharingModel):
        order = (0, 0, 1)

        def forward(self, tokens, return_type):
            residual = self.embedding
            for layer in self.order:
                residual = self.blocks[layer](residual, shared={})
            return residual

    with pytest.raises(ModelError, match=r"blocks ran in the order \[0, 0\]: expected each once"):
        run_blocks(Looped())
    Looped.order = (0,)
    with pytest.raises(ModelError, match=r"blocks \[1\] did not run"):
        run_blocks(Looped())
