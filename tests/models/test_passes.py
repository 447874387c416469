"""Running a model and leaving it as it was; passes from a shared prefix."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import TINY_MODEL_KINDS

from stepflow_tl.models.facts import wrapped_model
from stepflow_tl.models.passes import attached, frozen, model_device, replaced_forward, whole_pass
from stepflow_tl.models.prefix_cache import PrefixCacheRefusal, fill_prefix

TOKENS = torch.arange(3, 25)


class Refusal(Exception):
    """Raised inside a context, to see what is left behind."""


def test_hooks_go_before_and_after_those_that_are_there(each_tiny_model, hooks_untouched):
    model, order = each_tiny_model, []

    def say(what):
        return lambda tensor, hook: order.append(what)

    name = "blocks.1.attn.hook_pattern"
    with hooks_untouched(model), model.hooks(fwd_hooks=[(name, say("there"))]):
        with attached(model, first=[(name, say("first"))], last=[(name, say("last"))]):
            whole_pass(model, TOKENS)
            assert order == ["first", "there", "last"]
        order.clear()
        whole_pass(model, TOKENS)
        assert order == ["there"], "exactly the hooks that were added are removed"


def test_hooks_are_removed_when_something_fails(each_tiny_model, hooks_untouched):
    model, name = each_tiny_model, "blocks.0.attn.hook_pattern"
    with hooks_untouched(model), pytest.raises(Refusal), attached(model, last=[(name, lambda *_: None)]):
        raise Refusal
    with hooks_untouched(model), pytest.raises(KeyError, match="no_such_point"):
        with attached(model, first=[(name, lambda *_: None), ("no_such_point", lambda *_: None)]):
            pytest.fail("a hook point that does not exist was passed over")


def test_frozen_restores_training_mode_and_gradients():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(), torch.nn.Linear(2, 2))
    model[2].eval()
    model[0].bias.requires_grad_(False)
    with pytest.raises(Refusal), frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise Refusal
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]


def test_frozen_reaches_what_a_bridge_wraps(each_tiny_model):
    model = each_tiny_model.train()
    try:
        parts = [*model.modules(), *wrapped_model(model).modules()]
        before = [module.training for module in parts]
        with frozen(model):
            assert not any(module.training for module in parts)
        assert any(before) and [module.training for module in parts] == before
    finally:
        model.eval()


def test_a_replaced_forward_is_put_back_even_over_another_replacement():
    module = torch.nn.Identity()
    with replaced_forward(module, lambda x: "outer"):
        with pytest.raises(Refusal), replaced_forward(module, lambda x: "inner"):
            assert module(1) == "inner"
            raise Refusal
        assert module(1) == "outer"
    assert module(1) == 1 and "forward" not in module.__dict__


def test_the_device_is_that_of_the_weights_or_of_the_configuration(tiny_model):
    assert model_device(tiny_model()) == torch.device("cpu")
    empty = SimpleNamespace(parameters=lambda: iter(()), cfg=SimpleNamespace(device="meta"))
    assert model_device(empty) == torch.device("meta")


@pytest.mark.parametrize("kind", [kind for kind in TINY_MODEL_KINDS if kind != "native"])
def test_a_pass_from_the_shared_prefix_gives_the_logits_of_the_whole_pass(kind, tiny_model):
    model = tiny_model(kind)
    with torch.no_grad():
        prefix, logits = fill_prefix(model, TOKENS)
        torch.testing.assert_close(logits, whole_pass(model, TOKENS), atol=1e-5, rtol=0)
        for start, end, n_rows in ((9, 14, 3), (2, 22, 2), (9, 14, 1)):
            rows = prefix.run(start, end, n_rows)
            assert rows.shape[:2] == (n_rows, end - start)
            torch.testing.assert_close(rows, logits[start:end].expand_as(rows), atol=1e-5, rtol=0)


@pytest.mark.skipif("native" not in TINY_MODEL_KINDS, reason="needs TransformerLens 4")
def test_a_model_without_a_key_value_cache_says_so(tiny_model):
    with pytest.raises(
        PrefixCacheRefusal, match="method='cached' cannot serve this run: .* Use method='full'"
    ):
        fill_prefix(tiny_model("native"), TOKENS)
