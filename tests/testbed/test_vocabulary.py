"""The testbed's tokenizer and its template."""

import pytest

from stepflow_tl import ReasoningTrace, Segment
from stepflow_tl.testbed import ProblemSpec, make_problems
from stepflow_tl.testbed.vocabulary import build_tokenizer, prompt_of
from stepflow_tl.trace.formats.chat_template import detect_format


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize("n_steps", [1, 7, 26])
def test_text_comes_back_and_every_symbol_is_one_token(tokenizer, n_steps):
    for problem in make_problems(ProblemSpec(n_steps=n_steps, n_distractors=2), 20, seed=0):
        text = prompt_of(problem, tokenizer) + f"{problem.thinking}\n</think>\n\n{problem.answer}"
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(tokens) == text
        assert tokenizer.unk_token_id not in tokens
        # begin, user; 6 a definition, "find x"; 3 to open; 12 a step; end, blank, answer
        assert len(tokens) == 2 + 6 * (n_steps + 2) + 2 + 3 + 12 * n_steps + 3


def test_traces_are_cut_into_premises_and_steps(tokenizer):
    assert detect_format(tokenizer).name == "deepseek-r1"
    (problem,) = make_problems(ProblemSpec(n_steps=5), 1, seed=0)
    trace = ReasoningTrace.from_parts(
        tokenizer, problem.question, problem.thinking, problem.answer, question_splitter="line"
    )
    texts = {
        segment: [step.text.strip() for step in trace.steps if step.segment == segment]
        for segment in (Segment.QUESTION, Segment.THINKING, Segment.SUMMARY)
    }
    assert texts[Segment.QUESTION] == problem.question.splitlines()
    assert texts[Segment.THINKING] == [derivation.text for derivation in problem.derivations]
    assert texts[Segment.SUMMARY] == [problem.answer]
