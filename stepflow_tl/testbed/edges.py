"""How well does a step map find the steps that a step really needs?

1. Every thinking step of a testbed trace is a row: its candidates are the premises in the question and the
   earlier steps, its truth is which of them it takes something from.
2. A map's scores rank a row's candidates. AUROC is the probability that a needed one ranks above one that is
   not, ties counted half; 0.5 is chance, whatever the number of either. Average precision and the top-1 hit
   are the usual ones; their chance level is the part of candidates that are needed.
3. Rows without one of either kind say nothing and are left out. A trace's figure is the mean of its rows.

A step's value is written at its end, and the shipped model reads it from there into the first tokens of the
*next* step, where later steps look it up: cutting step i from the step after its source costs 9 nats, cutting
it from the source itself next to nothing (`benchmarks/edges_by_layer.py` has the figures). So there are two
truths about earlier steps: which one the text needs (`"steps"`), and where the model keeps what it wrote
(`"carried"`: the step after). A score of the model's flow can only be held against the second.

The trace must be cut with `question_splitter="line"`, so that every premise is a step of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from stepflow_tl.errors import ProblemError
from stepflow_tl.testbed.problems import Problem
from stepflow_tl.trace import ReasoningTrace
from stepflow_tl.trace.steps import Segment

Sources = Literal["premises", "steps", "both", "carried"]


@dataclass(frozen=True)
class EdgeRow:
    """One thinking step: which trace steps it could need, and which of them it does.

    Attributes:
        query: Index of the step in the trace.
        candidates: Indices of possible sources in the trace.
        needed: For each candidate, whether the step takes something from it.
    """

    query: int
    candidates: tuple[int, ...]
    needed: Bool[np.ndarray, " candidate"]


def trace_of(tokenizer: object, problem: Problem) -> ReasoningTrace:
    """The problem with its right thinking and answer, every premise a step of its own."""
    return ReasoningTrace.from_parts(
        tokenizer, problem.question, problem.thinking, problem.answer, question_splitter="line"
    )


def edge_rows(problem: Problem, trace: ReasoningTrace, sources: Sources = "both") -> list[EdgeRow]:
    """The rows of a trace that have candidates of either kind.

    Args:
        problem: The problem.
        trace: Its trace; thinking must be right up to the last step that is there.
        sources: Which candidates count: the premises, the earlier steps, both; or the earlier steps where
            the one after a needed step is the needed one, and the needed step itself is left out.

    Raises:
        ProblemError: If the trace's question is not cut into the problem's premises.
    """
    question = [step.index for step in trace.steps if step.segment == Segment.QUESTION]
    thinking = [step.index for step in trace.steps if step.segment == Segment.THINKING]
    if len(question) != len(problem.premises) + 1:  # and the line that says what to find
        raise ProblemError(
            f"the trace's question has {len(question)} steps, the problem {len(problem.premises)} premises "
            "and one line that asks: build the trace with question_splitter='line'"
        )
    rows = []
    for i, query in enumerate(thinking[: len(problem.derivations)]):
        premises = [(question[p], (i, p) in problem.premise_edges) for p in range(len(problem.premises))]
        steps = [(thinking[j], (i, j) in problem.step_edges) for j in range(i)]
        carried = [
            (thinking[j], (i, j - 1) in problem.step_edges)
            for j in range(i)
            if (i, j - 1) in problem.step_edges or (i, j) not in problem.step_edges
        ]
        pairs = {"premises": premises, "steps": steps, "both": premises + steps, "carried": carried}[sources]
        needed = np.array([is_needed for _, is_needed in pairs], dtype=bool)
        if needed.any() and not needed.all():
            rows.append(EdgeRow(query, tuple(index for index, _ in pairs), needed))
    return rows


def shuffled(rows: list[EdgeRow], rng: np.random.Generator) -> list[EdgeRow]:
    """The same rows with as many needed candidates, chosen at random: any score is at chance on them."""
    return [EdgeRow(row.query, row.candidates, rng.permutation(row.needed)) for row in rows]


def score_rows(
    rows: list[EdgeRow], step_map: Float[np.ndarray, "query_step key_step"]
) -> Float[np.ndarray, 3]:
    """Mean AUROC, average precision and top-1 hit of a map over the rows of one trace."""
    found = [_row_scores(step_map[row.query, list(row.candidates)], row.needed) for row in rows]
    return np.mean(np.array(found), axis=0)


def _row_scores(
    scores: Float[np.ndarray, " candidate"], needed: Bool[np.ndarray, " candidate"]
) -> tuple[float, float, float]:
    above = scores[needed][:, None] - scores[~needed][None, :]
    auroc = ((above > 0) + 0.5 * (above == 0)).mean()
    # Precision at the rank of each needed candidate; tied candidates share the last rank.
    precisions = [needed[scores >= score].mean() for score in scores[needed]]
    return float(auroc), float(np.mean(precisions)), float(needed[scores == scores.max()].mean())
