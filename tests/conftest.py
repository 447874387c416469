"""Fixtures shared by the whole suite."""

import json
import os

# Before torch, transformers and TransformerLens are imported: no network, one thread a worker.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

# The jaxtyping plugin instruments stepflow_tl once the conftests are there, and refuses to start where it is
# imported before. So no conftest, nor a helper that one loads, imports it at the top: its fixtures do.
import pytest
import signature_checks  # noqa: F401  before the package: its functions are decorated as they are imported
from float64 import float64_everywhere
from hypothesis import HealthCheck, settings
from tiny_models import (
    TINY_MODEL_KINDS,
    TL_GENERATION,
    build_tiny_model,
    build_tiny_tokenizer,
    count_hooks,
)

# Machines differ in speed and hypothesis must not fail for that. Laws ask for their number of examples
# themselves.
settings.register_profile(
    "stepflow", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile("stepflow")


@pytest.fixture(scope="session")
def tl_generation() -> int:
    """3 or 4: the major version of the installed TransformerLens."""
    return TL_GENERATION


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """Byte-level, with a ChatML template; `<think>` and `</think>` are one token each, not special."""
    return build_tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer: Any) -> Callable[..., Any]:
    """Factory: `tiny_model(kind=None, **options)`, see `tiny_models.build_tiny_model`.

    Equal arguments return the same model, so a test must leave it as it found it (`hooks_untouched` checks
    that).
    """
    built: dict[tuple, Any] = {}

    def build(kind: str | None = None, **options: Any) -> Any:
        key = (kind or TINY_MODEL_KINDS[0], *sorted(options.items(), key=lambda item: item[0]))
        if key not in built:
            built[key] = build_tiny_model(kind, **{"tokenizer": tiny_tokenizer, **options})
        return built[key]

    return build


@pytest.fixture(params=TINY_MODEL_KINDS)
def each_tiny_model(request: pytest.FixtureRequest, tiny_model: Callable[..., Any]) -> Any:
    """Every kind of tiny model that the installed TransformerLens can build, one after the other."""
    return tiny_model(request.param)


def record(trace_id: Any = "a", **fields: Any) -> dict[str, Any]:
    """A record of the input, some 120 tokens of the tiny tokenizer."""
    parts = {
        "question": "What is 2+3*4?",
        "thinking": "3*4 is 12.\n\n2+12 is 14.\n\nSo 14.",
        "summary": "It is 14.",
    }
    return {"id": trace_id, **parts, **fields}


@pytest.fixture
def make_record() -> Callable[..., dict[str, Any]]:
    return record


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """Write records (dicts) and raw lines (str, bytes) as one file."""

    def write(*lines: Any, name: str = "traces.jsonl") -> Path:
        path = tmp_path / name
        encoded = [
            line
            if isinstance(line, bytes)
            else (line if isinstance(line, str) else json.dumps(line)).encode()
            for line in lines
        ]
        path.write_bytes(b"".join(line + b"\n" for line in encoded))
        return path

    return write


@pytest.fixture(scope="session")
def default_model() -> Any:
    """SmolLM2-135M-Instruct as TransformerBridge, float32, loaded once a worker. Skips without the wheel."""
    from stepflow_tl.errors import MissingExtraError
    from stepflow_tl.models.loading import load_default_model

    try:
        return load_default_model()
    except MissingExtraError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def hooks_untouched() -> Callable[[Any], AbstractContextManager[None]]:
    """`with hooks_untouched(model): ...` demands that the block leaves hooks as they were, raise or not."""

    @contextmanager
    def watch(model: Any) -> Iterator[None]:
        hooks_before, names_before = count_hooks(model), set(model.hook_dict)
        try:
            yield
        finally:
            assert count_hooks(model) == hooks_before, "hooks were left on the model"
            assert set(model.hook_dict) == names_before, "hook points appeared or disappeared"

    return watch


@pytest.fixture
def float64_throughout() -> Iterator[None]:
    """`float64_everywhere` for the time of a test."""
    with float64_everywhere():
        yield


@pytest.fixture(scope="session")
def tiny_trace(tiny_tokenizer):
    """A small trace with every kind of segment, in the tiny tokenizer's tokens."""
    from stepflow_tl.trace import ReasoningTrace

    return ReasoningTrace.from_parts(
        tiny_tokenizer, "Is 7 odd?", "7 = 2*3 + 1.\n\nSo yes.\n\nOdd it is.", "Yes, odd."
    )
