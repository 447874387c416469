"""Signatures are checked while the tests run: without that, every other test would pass with wrong shapes."""

import gc
import weakref
from collections.abc import Callable

import pytest
import signature_checks
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from stepflow_tl.models.gguf import _split_halves_from_pairs
from stepflow_tl.statistics.power import half_width

checked = signature_checks.jaxtyped(typechecker=signature_checks.checked)


def adder(shift: Tensor) -> Callable:
    """A function made at each call, as hooks are."""

    @checked
    def add(x: Float[Tensor, "row column"], again: "Callable | None" = None) -> Float[Tensor, "column row"]:
        return x.T + shift if again is None else again(x) + shift

    return add


def test_shapes_in_the_package_are_checked():
    with pytest.raises(TypeCheckError, match="weight"):
        _split_halves_from_pairs(torch.zeros(2, 2, 2), n_heads=1)


def test_signatures_without_shapes_are_checked():
    assert half_width(100, 1) > 0  # to beartype an int is a float here
    with pytest.raises(TypeCheckError, match="half_width"):
        half_width("100", 0.2)


def test_a_function_made_in_a_call_is_decorated_once_and_checked_each_time():
    one, ten = adder(torch.tensor(1.0)), adder(torch.tensor(10.0))
    x = torch.zeros(2, 3)
    assert torch.equal(one(x), torch.full((3, 2), 1.0)) and torch.equal(ten(x), torch.full((3, 2), 10.0))
    assert torch.equal(one(x, again=lambda x: ten(x, again=one)), torch.full((3, 2), 12.0))
    for add in (one, ten, adder(torch.tensor(0.0))):
        with pytest.raises(TypeCheckError, match="x"):
            add(torch.zeros(2))
        with pytest.raises(TypeCheckError, match="return value"):
            add(x, again=lambda x: x)
    assert torch.equal(ten(x), torch.full((3, 2), 10.0))  # after errors too
    code = one.__wrapped__.__code__
    assert code is ten.__wrapped__.__code__ and code in signature_checks._of_code


def test_the_first_function_of_a_code_does_not_outlive_its_call():
    shift = torch.zeros(())
    gone = weakref.ref(shift)

    def make():
        @checked
        def add(x: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
            return x + shift

        return add

    assert make()(torch.ones(2)).tolist() == [1, 1]
    del shift, make
    gc.collect()
    assert gone() is None
