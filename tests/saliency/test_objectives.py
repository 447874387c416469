"""Objectives: what each name means in tokens, and the errors of those that mean nothing."""

import pytest
import torch

from stepflow_tl.errors import ObjectiveError
from stepflow_tl.saliency import LogitDifference
from stepflow_tl.saliency.objectives import resolve_objective
from stepflow_tl.trace import ReasoningTrace, Segment


def resolve(objective, trace):
    return resolve_objective(objective, trace)


def test_segment_objectives_take_exactly_the_tokens_of_their_segments(tiny_trace):
    segments = tiny_trace.segment_ids
    thinking, summary = segments == Segment.THINKING, segments == Segment.SUMMARY
    assert thinking.any() and summary.any()
    assert resolve("response", tiny_trace).targets.tolist() == (thinking | summary).nonzero()[:, 0].tolist()
    assert resolve("thinking", tiny_trace).targets.tolist() == thinking.nonzero()[:, 0].tolist()
    assert resolve("summary", tiny_trace).targets.tolist() == summary.nonzero()[:, 0].tolist()


def test_per_token_takes_every_next_token_whatever_it_is(tiny_trace):
    objective = resolve("per_token", tiny_trace)
    assert objective.per_token
    assert objective.targets.tolist() == list(range(1, len(tiny_trace)))


def test_a_step_its_label_and_its_span_are_the_same_objective(tiny_trace):
    step = tiny_trace.steps[2]
    by_step, by_label = resolve(step, tiny_trace), resolve(step.label, tiny_trace)
    by_span = resolve((step.token_start, step.token_end), tiny_trace)
    expected = list(range(step.token_start, step.token_end))
    assert by_step.targets.tolist() == by_label.targets.tolist() == by_span.targets.tolist() == expected


def test_the_loss_is_the_mean_nll_in_nats(tiny_trace):
    tokens = tiny_trace.tokens[None]
    logits = torch.randn(
        1, len(tiny_trace), 264, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    step = tiny_trace.steps[1]
    probabilities = torch.softmax(logits[0], -1)
    expected = [-probabilities[u - 1, tokens[0, u]].log() for u in range(step.token_start, step.token_end)]
    found = resolve(step, tiny_trace).loss(logits, tokens)
    assert torch.allclose(found, torch.stack(expected).mean(), rtol=1e-12)


def test_log_odds_are_those_of_the_next_token_and_stay_finite_where_the_model_is_sure(tiny_trace):
    objective = resolve("log_odds", tiny_trace)
    assert objective.per_token and objective.name == "log_odds"
    assert objective.targets.tolist() == list(range(1, len(tiny_trace)))
    logits = torch.randn(
        1, len(tiny_trace), 264, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    tokens = tiny_trace.tokens[None]
    p = torch.softmax(logits[0, :-1], -1).gather(-1, tokens[0, 1:, None])
    expected = -torch.log(p / (1 - p)).sum()
    found = objective.loss(logits, tokens)
    assert torch.allclose(found, expected, rtol=1e-12)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, expected)]
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-12) and gradients[0].abs().max() > 0.1

    sure = torch.zeros(1, len(tiny_trace), 264).requires_grad_()  # float32: p is 1, the NLL's gradient 0
    shifted = sure + 200 * torch.nn.functional.one_hot(tokens.roll(-1), 264)
    objective.loss(shifted, tokens).backward()
    own = sure.grad[0, :-1].gather(-1, tokens[0, 1:, None])
    assert torch.equal(own, -torch.ones_like(own))
    assert torch.allclose(sure.grad[0, :-1].sum(-1), torch.zeros(len(tiny_trace) - 1), atol=1e-5)


def test_half_precision_logits_are_measured_in_float32(tiny_trace):
    logits = torch.randn(1, len(tiny_trace), 264, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = resolve("response", tiny_trace).loss(logits, tiny_trace.tokens[None])
    assert found.dtype == torch.float32


def test_a_logit_difference_reads_one_position(tiny_trace):
    logits = torch.randn(1, len(tiny_trace), 264, requires_grad=True)
    objective = resolve(LogitDifference(position=5, token=7, other_token=9), tiny_trace)
    assert objective.name == "logit_difference(5: 7 - 9)"
    assert objective.loss(logits, tiny_trace.tokens[None]) == logits[0, 5, 7] - logits[0, 5, 9]


def test_a_callable_gets_logits_and_tokens_and_keeps_its_name(tiny_trace):
    def last_logit(logits, tokens):
        return logits[0, -1, tokens[0, -1]]

    logits = torch.randn(1, len(tiny_trace), 264, requires_grad=True)
    objective = resolve(last_logit, tiny_trace)
    assert "last_logit" in objective.name
    assert objective.loss(logits, tiny_trace.tokens[None]) == logits[0, -1, tiny_trace.tokens[-1]]


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("loss", r"unknown objective 'loss': expected 'per_token', 'log_odds', 'response'.*T1"),
        ("T99", r"unknown objective 'T99'.*\(Q, T1"),
        (7, r"objective 7 is a int: expected a name"),
        ((3, 3), r"token span \[3, 3\) is empty"),
        ((0, 10_000), r"leaves the trace's \[0, "),
        ((0, 1), r"covers only the first token, which nothing predicts"),
        ((0.5, 2), r"expected \(start, end\), two integers"),
    ],
)
def test_an_objective_that_means_nothing_is_named(tiny_trace, objective, message):
    with pytest.raises(ObjectiveError, match=message):
        resolve(objective, tiny_trace)


def test_a_response_objective_without_response_says_what_is_there(tiny_tokenizer):
    unfinished = ReasoningTrace.from_parts(tiny_tokenizer, "Is 7 odd?", "Let me see.")
    with pytest.raises(
        ObjectiveError, match=r"'summary' touches no token: the trace has no summary token.*thinking"
    ):
        resolve("summary", unfinished)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda logits, tokens: logits, "returned a tensor of shape"),
        (lambda logits, tokens: 1.0, "returned float: expected a scalar tensor"),
        (lambda logits, tokens: logits.detach().sum(), "does not depend on the logits"),
    ],
)
def test_a_callable_must_return_a_differentiable_scalar(tiny_trace, function, message):
    logits = torch.randn(1, len(tiny_trace), 264, requires_grad=True)
    with pytest.raises(ObjectiveError, match=message):
        resolve(function, tiny_trace).loss(logits, tiny_trace.tokens[None])


def test_a_step_of_another_trace_is_refused(tiny_trace, tiny_tokenizer):
    other = ReasoningTrace.from_parts(tiny_tokenizer, "Is 9 odd, or not?", "Yes it is, I think.")
    with pytest.raises(ObjectiveError, match="'T1' is not a step of this trace"):
        resolve(other.steps[1], tiny_trace)
