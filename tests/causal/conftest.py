"""Traces of one problem, in the tiny tokenizer's tokens: as long as each other step by step, and not."""

import pytest
from tiny_architectures import build_bridge

QUESTION = "Is 7 odd?"
RIGHT = ("7 = 2*3 + 1.\n\nSo yes.\n\nOdd it is.", "Yes, odd.")
WRONG = ("7 = 3*2 + 0.\n\nSo no..\n\nEve it is.", "No., eve.")
LONGER = ("7 = 2*3 and 1 more.\n\nSo yes, surely.\n\nOdd it is.", "Yes, it is odd.")


@pytest.fixture(scope="session")
def make_trace(tiny_tokenizer):
    from stepflow_tl.trace import ReasoningTrace

    def make(thinking, summary, question=QUESTION):
        return ReasoningTrace.from_parts(tiny_tokenizer, question, thinking, summary)

    return make


@pytest.fixture(scope="session")
def tiny_trace(make_trace):
    """Steps of one token and of many."""
    return make_trace(*RIGHT)


@pytest.fixture(scope="session")
def right_trace(make_trace):
    return make_trace(*RIGHT)


@pytest.fixture(scope="session")
def wrong_trace(make_trace):
    """Another answer; every step is as long as in `right_trace`, and none but the question is the same."""
    return make_trace(*WRONG)


@pytest.fixture(scope="session")
def longer_trace(make_trace):
    """The same labels, other lengths."""
    return make_trace(*LONGER)


@pytest.fixture(scope="session")
def bridges():
    """`bridges(name)`: a tiny transformers model of that architecture behind a TransformerBridge."""
    built = {}

    def build(name):
        if name not in built:
            built[name] = build_bridge(name)
        return built[name]

    return build
