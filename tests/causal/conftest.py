"""A small trace, in the tiny tokenizer's tokens, with steps of one token and of many."""

import pytest


@pytest.fixture(scope="session")
def tiny_trace(tiny_tokenizer):
    from stepflow_tl.trace import ReasoningTrace

    return ReasoningTrace.from_parts(
        tiny_tokenizer, "Is 7 odd?", "7 = 2*3 + 1.\n\nSo yes.\n\nOdd it is.", "Yes, odd."
    )


@pytest.fixture(scope="session")
def bridges():
    """`bridges(name)`: a tiny transformers model of that architecture behind a TransformerBridge."""
    from saliency.fused.architectures import build_bridge

    built = {}

    def build(name):
        if name not in built:
            built[name] = build_bridge(name)
        return built[name]

    return build
