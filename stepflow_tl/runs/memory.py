"""A trace that does not fit into memory is tried again with less, before it is given up.

1. As the backend chooses for itself.
2. `fused` with checkpointing: one residual a layer instead of a layer's activations.
3. The same in blocks a quarter of the usual size: less scratch memory.
4. A model that `fused` refuses has no rungs 2 and 3; there it is `layerwise`, one layer's patterns at a time.

What ran is in the result's provenance. Rungs round differently: a result is the same bit for bit only where
the same rung served it. The kernel's own killer ends a process without asking, and nothing here can help
then; a resumed run, or a Ray driver, meets that trace again.

Between traces, glibc keeps what was freed in heaps that traces of other lengths cannot quite reuse: resident
memory crept up by some 20 MiB per 100 traces, with no tensor alive. `return_freed_memory` hands it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from stepflow_tl.errors import FusedRefusal, StepflowError

Result = TypeVar("Result")

_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory")


class OutOfMemoryError(StepflowError):
    """A trace or an answer that did not fit in any of the ways that were tried."""


@dataclass(frozen=True)
class Rung:
    """One way to run, with less memory than the one before.

    Attributes:
        name: In words, for messages.
        options: Arguments of the function that is run.
    """

    name: str
    options: dict[str, Any]


PLAIN = Rung("as usual", {})
FUSED_RUNGS = (
    Rung("with checkpointing", {"backend": "fused", "checkpoint": True}),
    Rung(
        "with checkpointing in smaller blocks", {"backend": "fused", "checkpoint": True, "block_divisor": 4}
    ),
)
LAYERWISE = Rung("layer by layer", {"backend": "layerwise"})
KNOCKOUT_RUNGS = (
    Rung("in smaller batches", {"batch_tokens": 1024}),
    Rung("one cut at a time", {"batch_tokens": 1}),
)


def saliency_rungs() -> list[Rung]:
    """Ways to run `step_saliency`, most memory first."""
    return [PLAIN, *FUSED_RUNGS]


def knockout_rungs() -> list[Rung]:
    """Ways to run `step_knockout`, most memory first."""
    return [PLAIN, *KNOCKOUT_RUNGS]


def with_less_and_less(
    compute: Callable[..., Result], rungs: list[Rung], note: Callable[[str], None]
) -> Result:
    """What `compute` returns on the first rung that fits.

    Args:
        compute: Takes the options of a rung.
        rungs: Ways to run, most memory first.
        note: Told which rung served, where it was not the first.

    Raises:
        OutOfMemoryError: If none fits.
    """
    left = list(rungs)
    said = ""
    while left:
        rung = left.pop(0)
        try:
            result = compute(**rung.options)
        except FusedRefusal:
            if rung.options.get("backend") != "fused":
                raise
            left = [LAYERWISE]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).strip().partition("\n")[0]
        else:
            if rung is not rungs[0]:
                note(f"not enough memory to run it as usual; done {rung.name}")
            return result
        let_go()
    raise OutOfMemoryError(f"not enough memory for this trace{f' ({said})' if said else ''}")


def let_go() -> None:
    """Free what a failed attempt held, once its exception is gone, and with it the frames it held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def return_freed_memory() -> None:
    """Give memory that was freed back to the operating system, where its C library is one that keeps it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has no such function
            ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, or torch on a CPU or GPU, ran out of memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _MESSAGES)
    )
