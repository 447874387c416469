"""Traces of which the edges are known: what each step needs, by the text.

| task | traces | a step's sources |
|---|---|---|
| testbed | right solutions, read by the testbed's own model | definitions, earlier steps |
| chains | proofs of `chains.py` | rules and facts in the question, earlier steps |
| parc | solutions with annotated premises (PARC, Mukherjee et al. 2025) | earlier steps |

`rows` holds the candidates of each step by kind of source; `onto_summary` has the thinking steps as
candidates of the summary, needed where it hangs on them through any number of steps. In parc the last step
is the summary.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from chains import make_proofs

from stepflow_tl.models.loading import load_default_model, load_model
from stepflow_tl.testbed import ProblemSpec, load_testbed_model, make_problems
from stepflow_tl.testbed.edges import EdgeRow, edge_rows, trace_of
from stepflow_tl.trace import ReasoningTrace, Segment

PARC = Path("/work/shared/data/parc_premises.jsonl")
TASKS = ("testbed", "chains", "parc")
Edges = Iterable[tuple[int, int]]


@dataclass(frozen=True)
class Reading:
    """A trace with its true edges.

    Attributes:
        trace: What the model reads.
        rows: By kind of source ("premises", "steps", "carried"): steps with candidates of either kind.
        onto_summary: The summary's row over all thinking steps; None where all or none of them lead to it.
    """

    trace: ReasoningTrace
    rows: dict[str, list[EdgeRow]]
    onto_summary: EdgeRow | None


def task_model(task: str, path: str | None) -> Any:
    """The model that reads a task's traces: at `path`, or the testbed's, or the default one."""
    if path is not None:
        return load_model(path)
    return load_testbed_model() if task == "testbed" else load_default_model()


def readings(
    task: str,
    tokenizer: Any,
    n: int,
    *,
    seed: int,
    steps: list[int],
    parc: Path = PARC,
    max_tokens: int = 1000,
) -> list[Reading]:
    """`n` traces of a task; for testbed and chains, lengths `steps` in turn."""
    if task == "parc":
        return _parc(tokenizer, n, seed, parc, max_tokens)
    n_each = -(-n // len(steps))
    if task == "testbed":
        pools = [make_problems(ProblemSpec(n_steps=length), n_each, seed=1000 * seed + 2) for length in steps]
    else:
        pools = [make_proofs(n_each, seed=seed, n_steps=length) for length in steps]
    read = _testbed if task == "testbed" else _chain
    return [read(tokenizer, pools[i % len(steps)][i // len(steps)]) for i in range(n)]


def edge_row(edges: Edges, query: int, candidates: Iterable[int]) -> EdgeRow | None:
    """The row of a query step; None without candidates of either kind."""
    keys = tuple(key for key in candidates if key < query)
    needed = np.array([(query, key) in set(edges) for key in keys], dtype=bool)
    return EdgeRow(query, keys, needed) if needed.any() and not needed.all() else None


def reached(edges: Edges, start: int) -> frozenset[int]:
    """Steps that `start` hangs on, directly or through others."""
    edges, found, frontier = set(edges), set(), {start}
    while frontier:
        frontier = {key for query, key in edges if query in frontier} - found
        found |= frontier
    return frozenset(found)


def _read(trace: ReasoningTrace, edges: set[tuple[int, int]], kinds: dict[str, list[int]]) -> Reading:
    """Rows of every thinking and summary step, by kind of candidate."""
    queries = [step.index for step in trace.steps if step.segment in (Segment.THINKING, Segment.SUMMARY)]
    rows = {
        kind: [row for query in queries if (row := edge_row(edges, query, keys)) is not None]
        for kind, keys in kinds.items()
    }
    last = queries[-1]
    chains = {(last, key) for key in reached(edges, last)}
    return Reading(trace, rows, edge_row(chains, last, kinds["steps"]))


def _testbed(tokenizer: Any, problem: Any) -> Reading:
    trace = trace_of(tokenizer, problem)
    thinking = _steps(trace, Segment.THINKING)
    edges = {(thinking[i], thinking[j]) for i, j in problem.step_edges} | {(thinking[-1] + 1, thinking[-1])}
    found = _read(trace, edges, {"steps": thinking})
    kinds = ("premises", "steps", "carried")
    return Reading(trace, {kind: edge_rows(problem, trace, kind) for kind in kinds}, found.onto_summary)


def _chain(tokenizer: Any, proof: Any) -> Reading:
    trace = ReasoningTrace.from_parts(
        tokenizer, proof.question, proof.thinking, proof.answer, question_splitter="line"
    )
    question, thinking = _steps(trace, Segment.QUESTION), _steps(trace, Segment.THINKING)
    _check(len(question), len(proof.lines) + 1)
    _check(len(thinking), len(proof.steps))
    edges = {(thinking[i], thinking[j]) for i, j in proof.step_edges} | {(thinking[-1] + 1, thinking[-1])}
    edges |= {(thinking[i], question[p]) for i, p in proof.line_edges}
    return _read(trace, edges, {"premises": question[:-1], "steps": thinking})


def _parc(tokenizer: Any, n: int, seed: int, path: Path, max_tokens: int) -> list[Reading]:
    if not path.exists():
        raise SystemExit(
            f"{path} is not there: pass the PARC file with --data (a step list and edges per line)"
        )
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    records = [record for record in records if 5 <= len(record["steps"]) <= 16]
    random.Random(seed).shuffle(records)
    found = []
    for record in records:
        texts = [re.sub(r"\n\s*\n", "\n", text.strip()) for text in record["steps"]]
        trace = ReasoningTrace.from_parts(tokenizer, record["question"], "\n\n".join(texts[:-1]), texts[-1])
        if len(trace) > max_tokens:
            continue
        _check(len(trace.steps), len(texts) + 1)
        edges = {(query, key) for query, key in record["edges"]}  # the question is step 0 there and here
        found.append(_read(trace, edges, {"steps": list(range(1, len(texts)))}))
        if len(found) == n:
            break
    return found


def _steps(trace: ReasoningTrace, segment: Segment) -> list[int]:
    return [step.index for step in trace.steps if step.segment == segment]


def _check(found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"a trace was cut into {found} steps, its edges name {expected}")
