"""Findings of a study made by hand: answers by rule, maps of random numbers, no model."""

from collections.abc import Callable, Sequence
from typing import Any

from diagnostic_maps import random_saliency

from stepflow_tl import StepFlow, compare
from stepflow_tl.evaluation import Answer, Decoding, Evaluation, Question, Verdict
from stepflow_tl.evaluation.evaluation import ConditionResult
from stepflow_tl.rendering.study_conclusions import ChangedQuestion, Contrast, ShownAnswer, StudyFindings
from stepflow_tl.stepflow.report import FlowReport, LayerReport

PLAIN, REPAIR, CONTROL = "plain", "StepFlow", "StepFlow control"


def an_answer(question: int, text: str, *, sample: int = 0, finished: bool = True) -> Any:
    tokens = (1, 2, 3 + question, 4 + sample)
    return Answer(tokens, f"{text}: first this.\n\nThen that.", f"{question}", 40 + question, finished)


def make_evaluation(
    n: int, right: dict[str, Callable[[int], bool | Sequence[bool]]], *, texts: Sequence[str] = ()
) -> Any:
    """Questions 0..n-1; `right[condition](question)` says whether its answer, or each sample, is right."""

    questions = tuple(
        Question(
            f"q{i}", texts[i % len(texts)] if texts else f"What is {i}?", str(i), "even odd".split()[i % 2]
        )
        for i in range(n)
    )
    results, n_samples = {}, 1
    for name, rule in right.items():
        rights = [[found] if isinstance(found := rule(i), bool) else list(found) for i in range(n)]
        n_samples = len(rights[0])
        results[name] = ConditionResult(
            None if name == PLAIN else StepFlow(placebo="both" if name == CONTROL else None),
            tuple(
                tuple(an_answer(i, f"{name} of q{i}", sample=s) for s in range(n_samples)) for i in range(n)
            ),
            tuple(tuple(Verdict(ok, "" if ok else "another number") for ok in row) for row in rights),
            seconds=10.0,
        )
    decoding = Decoding(n_samples=n_samples, temperature=0.0 if n_samples == 1 else 1.0)
    return Evaluation(questions, decoding, results)


def make_comparison(
    names: tuple[str, str] = ("right", "wrong"), *, lock_in: float = 0.6, **options: Any
) -> Any:
    """Two groups of eight maps; the other group locks in more by `lock_in`."""

    groups = [
        [random_saliency("QTTTTSS", seed + 100 * other, diagonal=lock_in * other) for seed in range(8)]
        for other in (0, 1)
    ]
    return compare(*groups, names=names, n_bootstrap=200, n_permutations=999, **options)


def make_findings(evaluation: Any, *, texts: Sequence[str] = (), **changes: Any) -> Any:
    flow = FlowReport(shallow=(0,), deep=(3,))
    flow.layers = {
        0: LayerReport(0, rows=400, adjusted=100, capped=3, total_shift=5.0),
        3: LayerReport(3, injections=12, total_norm=6.0),
    }
    plain, repaired = (evaluation.results[name] for name in (PLAIN, REPAIR))
    changed = []
    for i, question in enumerate(evaluation.questions):
        if plain.right[i] != repaired.right[i]:
            first, other = (
                ShownAnswer(name, result.answers[i][0], result.verdicts[i][0], f"pages/q{i}-{name}.html")
                for name, result in ((PLAIN, plain), (REPAIR, repaired))
            )
            changed.append(ChangedQuestion(question, bool(other.verdict), (first, other)))
    for i, text in enumerate(texts[: len(changed)]):
        answer = Answer((1, 2), text, text, 2, False)
        first, other = changed[i].answers
        changed[i] = ChangedQuestion(
            changed[i].question, changed[i].gained, (ShownAnswer(PLAIN, answer, first.verdict), other)
        )
    pairs = ([f"p{i}" for i in range(8)],) * 2
    found = dict(
        title="A study of tiny",
        evaluation=evaluation,
        repair=REPAIR,
        contrasts=(
            Contrast("all traces", make_comparison()),
            Contrast("matched on length", make_comparison(lock_in=0.0, pair_by=pairs), ("8 pairs",)),
            Contrast("within questions", None, ("no question has both",)),
        ),
        repaired=Contrast("with and without", make_comparison((REPAIR, PLAIN), pair_by=pairs)),
        flow=flow,
        n_flow_traces=16,
        n_layers=4,
        changed=tuple(changed),
        n_changed=len(changed),
        run=(("model", "tiny"), ("questions", str(len(evaluation.questions)))),
        exclusions=("2 plain answers were cut off by the token limit",),
    )
    return StudyFindings(**{**found, **changes})
