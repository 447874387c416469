"""Scores of the edges of one trace, and how well a score finds edges that are known.

Every score is a map `[query_step, key_step]`, larger where the key step is said to matter more, in two forms:

- `ranked`: what a reader would compare. Of the paper's score, attention and value-weighted attention the mean
  over token pairs and heads, rows normalised below the diagonal in each layer, then averaged over layers. Of
  the cut score and of knockout, which are in nats, the sum; of the cut score also its size, `|cut|`. Rows are
  divided by the sum of their sizes, so that the rows of a trace can be compared.
- `summed`: over tokens, heads and layers, for holding a score in nats against knockout.

How well a score finds the needed candidates of a row, chance 0.5 for the first three, ties counted half:

1. AUROC against every candidate that is not needed.
2. `near`: against the one, or the two, of the same row nearest in distance. A score that knows only the order
   still gains where sources sit at the end of the row, for instance right before the query.
3. `equally far`: against those of other rows of the trace at exactly the same distance, so that no function
   of the distance is above chance; one figure per trace.
4. top-1: whether the highest candidate is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from stepflow_tl.causal import StepKnockout, step_knockout
from stepflow_tl.causal.cut import EdgeCut, cut_mask
from stepflow_tl.models.facts import model_facts
from stepflow_tl.models.passes import attached, frozen, model_device, whole_pass
from stepflow_tl.saliency import StepSaliency, step_saliency
from stepflow_tl.saliency.baselines import baseline_maps
from stepflow_tl.saliency.objectives import token_nll
from stepflow_tl.testbed.edges import EdgeRow, score_rows
from stepflow_tl.trace import ReasoningTrace, Segment

ROW_METRICS = ("AUROC", "near", "top-1")
SIGNED = ("cut", "cut, log-odds", "knockout")
MATTERS = 0.5  # nats; a cut that costs less is taken for no use of the edge

StepMap = Float[np.ndarray, "query_step key_step"]


@dataclass(frozen=True)
class Scores:
    """All scores of one trace by name, knockout apart.

    Attributes:
        ranked: Maps to rank by.
        summed: Maps in the score's own unit.
        results: The step maps behind the scores that are one.
    """

    ranked: dict[str, StepMap]
    summed: dict[str, StepMap]
    results: dict[str, StepSaliency]


def scores_of(model: Any, trace: ReasoningTrace) -> Scores:
    """Every score that is a map of its own; two passes of attention with gradients, four of saliency."""
    baselines = baseline_maps(model, trace)
    results = {
        "Step-Saliency": step_saliency(model, trace),
        "log-odds": step_saliency(model, trace, objective="log_odds"),
        "cut": step_saliency(model, trace, score="cut"),
        "cut, log-odds": step_saliency(model, trace, score="cut", objective="log_odds"),
    }
    sums = {"attention": baselines["attention"], "value-weighted": baselines["value_weighted"]}
    sums |= {name: result.sums for name, result in results.items()}
    n_steps = len(trace.steps)
    steps = np.arange(n_steps)
    nearness = 1.0 / (1 + np.abs(steps[:, None] - steps))
    lengths = torch.outer(trace.step_lengths, trace.step_lengths)
    ranked, summed = {"nearness": np.tril(nearness, -1)}, {}
    for name, values in sums.items():
        summed[name] = values.double().sum((0, 1)).tril(-1).numpy()
        per_layer = (values.double() / lengths).mean(1).tril(-1).numpy()
        ranked[name] = in_rows(summed[name]) if name in SIGNED else in_rows(per_layer).mean(0)
    for name in ("cut", "cut, log-odds"):
        ranked[f"|{name}|"], summed[f"|{name}|"] = np.abs(ranked[name]), np.abs(summed[name])
    return Scores(ranked, summed, results)


def in_rows(
    values: Float[np.ndarray, "*layer query_step key_step"],
) -> Float[np.ndarray, "*layer query_step key_step"]:
    """Rows divided by the sum of their sizes; a row without any stays 0."""
    return values / np.maximum(np.abs(values).sum(-1, keepdims=True), 1e-300)


def cuts_of(model: Any, trace: ReasoningTrace, *, screen_above: int) -> StepKnockout:
    """Knockout of every thinking and summary step from all earlier ones; screened in a longer trace."""
    if len(trace.steps) > screen_above:
        return step_knockout(model, trace, pairs="screened")
    readers = [step.index for step in trace.steps if step.segment in (Segment.THINKING, Segment.SUMMARY)]
    rows = [index for index in readers if trace.steps[index].token_start < len(trace) - 1]
    return step_knockout(model, trace, pairs=[(query, key) for query in rows for key in range(query)])


def headroom(model: Any, trace: ReasoningTrace) -> Float[np.ndarray, " step"]:
    """How unsure the model was of each step: mean NLL, in nats, of the predictions that a cut can change."""
    tokens = trace.tokens.to(model_device(model))
    with frozen(model), torch.no_grad():
        nll = token_nll(whole_pass(model, tokens)[:-1], tokens[1:]).double().cpu().numpy()
    spans = [(step.token_start, min(step.token_end, len(nll))) for step in trace.steps]
    return np.array([nll[a:b].mean() if a < b else np.nan for a, b in spans])


def influence(weights: StepMap, *, ends: int = 0) -> StepMap:
    """Influence of each step on each other through all chains of steps.

    Rows of the strict lower triangle are normalised to W (negative values count as none). The influence of j
    on i is the sum over all chains i > k > ... > j of the products of W along them: `(I - W)^-1 - I`, one
    triangular solve. It is the probability that a walk from i which moves by W comes by j. Cost: O(n^3).

    Args:
        weights: A step map.
        ends: Steps before this index end a walk: the lines of the question do not come from one another.
    """
    from scipy.linalg import solve_triangular

    walk = in_rows(np.tril(np.maximum(weights, 0), -1))
    walk[:ends] = 0
    eye = np.eye(len(walk))
    return solve_triangular(eye - walk, eye, lower=True, unit_diagonal=True) - eye


def effects_of_removal(
    model: Any, trace: ReasoningTrace, steps: tuple[int, ...]
) -> Float[np.ndarray, " step"]:
    """Rise of the summary's NLL, in nats, when no later token may read a step: a pass for each."""
    facts, tokens = model_facts(model), trace.tokens.to(model_device(model))
    first = next(step.token_start for step in trace.steps if step.segment == Segment.SUMMARY)
    rows = slice(first, len(trace) - 1)
    cut = EdgeCut(model, tuple(range(facts.n_layers)))
    found = []
    with frozen(model), torch.no_grad(), attached(model, last=cut.hooks):
        for step in (None, *steps):
            spans = [] if step is None else [trace.steps[step].token_span]
            after = (spans[0][1] if spans else 0, len(trace))
            cut.mask = cut_mask(after, [spans], len(trace), len(trace)).to(tokens.device)
            logits = whole_pass(model, tokens)
            cut.check_fired()
            found.append(float(token_nll(logits[rows], tokens[first + 1 :]).double().sum()))
    return np.array(found[1:]) - found[0]


def row_metrics(row: EdgeRow, step_map: StepMap) -> list[float]:
    """AUROC, near and top-1 of one row."""
    auroc, _, top = score_rows([row], step_map)
    keys = np.array(row.candidates)
    values = step_map[row.query, keys]
    idle = np.flatnonzero(~row.needed)
    near = []
    for place in np.flatnonzero(row.needed):
        gaps = np.abs(keys[idle] - keys[place])
        near.append(_above(values[place], values[idle[gaps == gaps.min()]]))
    return [float(auroc), float(np.mean(near)), float(top)]


def equally_far(rows: list[EdgeRow], step_map: StepMap) -> float:
    """AUROC of needed candidates against those of other rows at the same distance; NaN without any."""
    hits, total = far_comparisons(rows, step_map)
    return hits / total if total else float("nan")


def far_comparisons(rows: list[EdgeRow], step_map: StepMap) -> tuple[float, float]:
    """Comparisons of a needed candidate with one of another row at its distance: those won, and all.

    A row with few candidates has large shares and a large part of them needed. So a comparison counts by how
    seldom its truth comes about in its rows: one over the part needed here times the part not needed there.
    With needed candidates drawn at random in each row, every two cells then meet as often either way.
    """
    cells = [
        (row.query - key, row.query, float(step_map[row.query, key]), bool(needed), float(row.needed.mean()))
        for row in rows
        for key, needed in zip(row.candidates, row.needed, strict=True)
    ]
    hits = total = 0.0
    for distance, query, value, needed, part in cells:
        for other_distance, other_query, other, other_needed, other_part in cells:
            if needed and not other_needed and distance == other_distance and query != other_query:
                weight = 1 / (part * (1 - other_part))
                hits += weight * ((value > other) + 0.5 * (value == other))
                total += weight
    return hits, total


def _above(value: float, others: Float[np.ndarray, " other"]) -> float:
    return float(((value > others) + 0.5 * (value == others)).mean())


def judged_rows(knockout: StepKnockout, threshold: float = MATTERS) -> list[EdgeRow]:
    """Rows whose truth is knockout: a candidate is needed if cutting it costs `threshold` nats or more.

    What a screened knockout did not cut alone counts as not needed; it comes after a round without effects.
    """
    rows = []
    known = knockout.measured.any(-1)
    for query in known.nonzero()[:, 0].tolist():
        needed = (knockout.effects[query, :query] >= threshold).numpy()
        if needed.any() and not needed.all():
            rows.append(EdgeRow(query, tuple(range(query)), needed))
    return rows


@contextmanager
def randomised(model: Any, layers: list[int], seed: int = 0) -> Iterator[None]:
    """The model with the entries of every weight of these layers in random order; as it was on exit."""
    parameters = {id(p): p for layer in layers for p in model.blocks[layer].parameters()}
    kept = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for parameter in parameters.values():
                order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))
        yield
    finally:
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(kept[key])
