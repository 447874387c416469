"""The ladder: less memory each time, then the truth."""

import os
import sys
import weakref
from pathlib import Path

import pytest
import torch

from stepflow_tl.errors import FusedRefusal
from stepflow_tl.runs.memory import (
    LAYERWISE,
    OutOfMemoryError,
    is_out_of_memory,
    knockout_rungs,
    return_freed_memory,
    saliency_rungs,
    with_less_and_less,
)
from stepflow_tl.saliency import step_saliency
from stepflow_tl.trace import ReasoningTrace

GPU = RuntimeError("CUDA out of memory. Tried to allocate 20 GiB\nmore")


def climbing(*raised):
    """A function that raises these in turn, then returns; and the options it was called with."""
    errors, calls = list(raised), []

    def compute(**options):
        calls.append(options)
        if errors:
            raise errors.pop(0)
        return "map"

    return compute, calls


@pytest.mark.parametrize("n_failures", [0, 1, 2])
def test_each_failure_costs_one_rung(n_failures):
    compute, calls = climbing(*[GPU, MemoryError()][:n_failures])
    notes = []
    assert with_less_and_less(compute, saliency_rungs(), notes.append) == "map"
    assert calls == [rung.options for rung in saliency_rungs()[: n_failures + 1]]
    assert bool(notes) == bool(n_failures)
    if notes:
        assert f"done {saliency_rungs()[n_failures].name}" in notes[0]


def test_below_the_last_rung_there_is_only_the_reason():
    compute, calls = climbing(*[GPU] * 9)
    with pytest.raises(OutOfMemoryError, match="this trace .CUDA out of memory. Tried to allocate 20 GiB."):
        with_less_and_less(compute, saliency_rungs(), print)
    assert len(calls) == 3


def test_a_model_that_fused_refuses_goes_layer_by_layer():
    compute, calls = climbing(GPU, FusedRefusal("it is a teapot"))
    assert with_less_and_less(compute, saliency_rungs(), lambda note: None) == "map"
    assert calls[-1] == LAYERWISE.options and len(calls) == 3


def test_any_other_error_comes_out_at_once():
    compute, calls = climbing(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        with_less_and_less(compute, saliency_rungs(), print)
    assert len(calls) == 1


def test_a_knockout_is_cut_into_smaller_batches():
    compute, calls = climbing(GPU, GPU)
    with_less_and_less(compute, knockout_rungs(), lambda note: None)
    assert calls == [{}, {"batch_tokens": 1024}, {"batch_tokens": 1}]


def test_what_failed_is_let_go_before_the_next_try():
    held = []

    def compute(**options):
        big = torch.zeros(10)
        assert not any(ref() is not None for ref in held)
        held.append(weakref.ref(big))
        raise GPU.with_traceback(None) if len(held) > 9 else RuntimeError("out of memory")

    with pytest.raises(OutOfMemoryError):
        with_less_and_less(compute, saliency_rungs(), print)
    assert len(held) == 3


def test_memory_errors_of_python_and_torch_are_told_from_others():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(GPU)
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("no kernel")) and not is_out_of_memory(
        ValueError("out of memory")
    )


def test_the_rungs_are_arguments_that_step_saliency_takes(tiny_model, make_record):
    """On a model that fused serves, every rung gives the same map, and its provenance says which it was."""
    model = tiny_model("llama")
    fields = make_record()
    trace = ReasoningTrace.from_parts(
        model.tokenizer, fields["question"], fields["thinking"], fields["summary"]
    )
    maps = [step_saliency(model, trace, **rung.options) for rung in (*saliency_rungs(), LAYERWISE)]
    for found in maps[1:]:
        torch.testing.assert_close(found.sums, maps[0].sums, rtol=1e-4, atol=1e-7)
    assert maps[0].sums.any()
    assert [found.provenance.notes.get("memory") for found in maps[:3]] == [
        None,
        "checkpoint=True, block_divisor=1",
        "checkpoint=True, block_divisor=4",
    ]
    assert maps[3].provenance.backend == "layerwise"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_goes_back():
    """Many small blocks, freed: glibc keeps them, until it is asked."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    return_freed_memory()
    before = resident()
    blocks = [bytearray(60_000) for _ in range(2000)]
    pin = blocks.pop()  # at the end of the heap: what lies before it is kept
    del blocks
    kept = resident() - before
    assert kept > 60e6
    return_freed_memory()
    assert resident() - before < kept / 4
    assert len(pin) == 60_000
