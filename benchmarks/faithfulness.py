"""Does a map find the edges that the text needs, and does it say what a cut will do?

    python benchmarks/faithfulness.py --task testbed|chains|parc [--n 10] [--model x.gguf] [--json out.json]

1. Traces whose edges are known (`edge_tasks.py`), read by one model; every score of `edge_scores.py`, and
   knockout.
2. Edges as judge: does a score rank what the text needs above what it does not, of the same row, of the same
   row and near it, equally far? Edges say what the text needs, not what the model uses.
3. Knockout as judge: the same with the pairs that cost 0.5 nats or more when cut; and the correlation of each
   score, summed over layers, with the effects of all cuts of a trace, and how often the sign is right.
4. Headroom: both again by terciles of how unsure the model was of the step that reads.
5. Chains of steps: the row of the summary, direct and through all chains (`influence`), against the thinking
   steps that the answer hangs on, and against the effect of removing a step for all later tokens.
6. Spot check (`causal.spot_check`): what a dozen cuts say of a map, and whether that foretells how well the
   map does by knockout on the steps that were not checked.
7. Controls: shuffled edges, where every score must be at chance; weights randomised layer by layer from the
   top: a map that stays as it was is not about the model.

Figures are means over traces of each trace's mean, with 95 % BCa intervals over traces: rows of one trace are
not independent. How the layers differ on the testbed is `edges_by_layer.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from edge_scores import (
    MATTERS,
    ROW_METRICS,
    SIGNED,
    cuts_of,
    effects_of_removal,
    equally_far,
    headroom,
    in_rows,
    influence,
    judged_rows,
    randomised,
    row_metrics,
    scores_of,
)
from edge_tasks import PARC, TASKS, Reading, readings, task_model

from stepflow_tl.causal import StepKnockout, spot_check
from stepflow_tl.causal.agreement import spearman, trace_agreement
from stepflow_tl.results.tables import text_table
from stepflow_tl.saliency import StepSaliency
from stepflow_tl.statistics.resampling import bca_interval
from stepflow_tl.testbed.edges import EdgeRow, shuffled
from stepflow_tl.trace import Segment

CORRELATIONS = ("Spearman", "Pearson", "sign")
TERCILES = ("sure", "middle", "unsure")
DEPTHS = (0.25, 0.5, 0.75, 1.0)


class Found(NamedTuple):
    """One figure of a trace: by what it was judged, of which score, how unsure the model was of the row."""

    trace: int
    truth: str
    score: str
    metric: str
    value: float
    headroom: float = float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="testbed")
    parser.add_argument("--n", type=int, default=10, help="traces")
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 10, 14], help="lengths (testbed, chains)")
    parser.add_argument("--model", help="a GGUF file, a folder or a name; the task's own by default")
    parser.add_argument("--data", type=Path, default=PARC, help="the PARC file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--screen-above", type=int, default=60, help="steps from which knockout is screened")
    parser.add_argument("--randomised", type=int, default=3, help="traces for the control of the weights")
    parser.add_argument("--max-tokens", type=int, default=1000, help="length of a trace (parc)")
    parser.add_argument("--no-removal", action="store_true", help="no pass per step for the summary")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no trace after these")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    started, torch_threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # one order of summation: the same table to the last digit
    try:
        model = task_model(options.task, options.model)
        traces = readings(
            options.task,
            model.tokenizer,
            options.n,
            seed=options.seed,
            steps=options.steps,
            parc=options.data,
            max_tokens=options.max_tokens,
        )
        found = []
        for index, reading in enumerate(traces):
            if index and time.perf_counter() - started > 60 * options.minutes:
                traces = traces[:index]
                break
            found += measure(model, reading, index, options)
        for index, reading in enumerate(traces[: options.randomised]):
            found += against_random_weights(model, reading, index, options.seed)
    finally:
        torch.set_num_threads(torch_threads)
    name = getattr(model.cfg, "model_name", "a model")
    print(f"{options.task}: {len(traces)} traces read by {name}, seed {options.seed}", end="")
    print(f", {time.perf_counter() - started:.0f} s\n")
    results = tables(found, np.random.default_rng(options.seed))
    print("\n\n".join(as_text(title, rows) for title, rows in results.items()))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def measure(model: Any, reading: Reading, index: int, options: argparse.Namespace) -> list[Found]:
    """Every figure of one trace but those under random weights."""
    trace = reading.trace
    print(f"trace {index + 1}: {len(trace.steps)} steps, {len(trace)} tokens", file=sys.stderr, flush=True)
    scores, knockout = scores_of(model, trace), cuts_of(model, trace, screen_above=options.screen_above)
    effects = knockout.effects.numpy()
    maps = scores.ranked | {"knockout": in_rows(np.tril(effects, -1))}
    rng = np.random.default_rng([options.seed, index])
    truths = {f"edges, {kind}": rows for kind, rows in reading.rows.items()}
    truths |= {f"shuffled, {kind}": shuffled(rows, rng) for kind, rows in reading.rows.items()}
    truths["knockout"] = judged_rows(knockout)
    unsure = headroom(model, trace)
    found = [
        Found(index, truth, name, metric, value, unsure[row.query])
        for truth, rows in truths.items()
        for row in rows
        for name, step_map in maps.items()
        for metric, value in zip(ROW_METRICS, row_metrics(row, step_map), strict=True)
    ]
    found += [
        Found(index, truth, name, "equally far", equally_far(rows, step_map))
        for truth, rows in truths.items()
        for name, step_map in maps.items()
    ]
    measured = np.tril(knockout.measured.numpy(), -1)
    for name, summed in {**scores.summed, "nearness": scores.ranked["nearness"]}.items():
        values = correlations(summed[measured], effects[measured], signed=name in SIGNED)
        found += [Found(index, "effects", name, *pair) for pair in zip(CORRELATIONS, values, strict=True)]
    for name, result in scores.results.items():
        found += spot_checked(model, result, knockout, index, name, maps[name])
    return found + chains_of_steps(None if options.no_removal else model, reading, index, maps)


def spot_checked(
    model: Any, saliency: StepSaliency, knockout: StepKnockout, index: int, name: str, step_map: np.ndarray
) -> list[Found]:
    """What the spot check says, and the map's AUROC by knockout on the rows that it did not look at."""
    is_complete = bool(knockout.measured.any()) and not knockout.groups
    check = spot_check(saliency, knockout if is_complete else model)
    looked_at = {step.query for step in check.steps}
    rows = [row for row in judged_rows(knockout) if saliency.labels[row.query] not in looked_at]
    others = [row_metrics(row, step_map)[0] for row in rows]
    counts = {"used": check.n_used, "controls used": check.n_controls_used, "ahead": check.n_ahead}
    values = {what: count / len(check.steps) for what, count in counts.items()}
    values["AUROC, other steps"] = float(np.mean(others)) if others else float("nan")
    return [Found(index, "spot check", name, what, value) for what, value in values.items()]


def correlations(score: np.ndarray, effect: np.ndarray, *, signed: bool) -> tuple[float, float, float]:
    """Spearman, Pearson, and how often the sign is right, of pairs that cost or gain a hundredth of a nat."""
    clear = np.abs(effect) >= 0.01
    sign = (
        float((np.sign(score) == np.sign(effect))[clear].mean()) if signed and clear.any() else float("nan")
    )
    return spearman(score, effect), float(np.corrcoef(score, effect)[0, 1]), sign


def chains_of_steps(
    model: Any | None, reading: Reading, index: int, maps: dict[str, np.ndarray]
) -> list[Found]:
    """The summary's sources, direct and through chains: by edges and, given the model, by removal."""
    row = reading.onto_summary
    if row is None:
        return []
    keys = np.array(row.candidates)
    removal = None if model is None else effects_of_removal(model, reading.trace, row.candidates)
    ends = sum(step.segment == Segment.QUESTION for step in reading.trace.steps)
    found = []
    for name, step_map in maps.items():
        for way, values in (("direct", step_map), ("chains", influence(step_map, ends=ends))):
            truth = f"onto summary, {way}"
            found.append(Found(index, truth, name, "AUROC, edges", row_metrics(row, values)[0]))
            if removal is not None:
                agreed = spearman(values[row.query, keys], removal)
                found.append(Found(index, truth, name, "Spearman, removal", agreed))
    if removal is None:
        return found
    removed = np.zeros_like(next(iter(maps.values())))
    removed[row.query, keys] = removal
    auroc = row_metrics(row, removed)[0]
    return [*found, Found(index, "onto summary, direct", "removal itself", "AUROC, edges", auroc)]


def against_random_weights(model: Any, reading: Reading, index: int, seed: int) -> list[Found]:
    """Agreement, in rows, of each map with itself under random top layers; its AUROC when all are random."""
    trace, n_layers = reading.trace, model.cfg.n_layers
    own = scores_of(model, trace).ranked
    readers = np.array([step.segment != Segment.QUESTION for step in trace.steps])
    measured = np.tril(np.ones((len(trace.steps),) * 2, dtype=bool), -1) & readers[:, None]
    found = []
    for depth in DEPTHS:
        n_random = round(depth * n_layers)
        print(f"trace {index + 1}: {n_random} layers random", file=sys.stderr, flush=True)
        with randomised(model, list(range(n_layers - n_random, n_layers)), seed):
            maps = scores_of(model, trace).ranked
        for name, step_map in maps.items():
            agreed = trace_agreement({"own": own[name], "random": step_map}, measured)
            value = agreed.values["own", "random"]["row_spearman"]
            found.append(Found(index, "random weights", name, f"{depth:.0%} of layers", value))
            rows: list[EdgeRow] = reading.rows["steps"] if depth == 1 else []
            found += [
                Found(index, "random weights", name, "AUROC, steps", row_metrics(row, step_map)[0])
                for row in rows
            ]
    return found


def tables(found: list[Found], rng: np.random.Generator) -> dict[str, list[dict[str, Any]]]:
    """Rows of each table: a score, and for each column its mean, both ends of the interval and the traces."""
    by_title: dict[str, list[Found]] = {}
    for figure in found:
        by_title.setdefault(figure.truth, []).append(figure)
    for truth in [truth for truth in by_title if truth.startswith(("edges", "knockout"))]:
        own = [figure for figure in by_title[truth] if figure.metric == "AUROC"]
        ends = np.quantile([figure.headroom for figure in own], [1 / 3, 2 / 3])
        by_title[f"{truth}, by headroom (AUROC)"] = [
            figure._replace(metric=TERCILES[int((figure.headroom > ends).sum())]) for figure in own
        ]
    found_tables = {title: _table(own, rng) for title, own in by_title.items()}
    for row in found_tables["spot check"]:
        row["Spearman, ahead ~ other steps"] = _foretells(by_title["spot check"], row["score"])
    return found_tables


def _foretells(found: list[Found], score: str) -> list[float]:
    """Rank correlation over traces of the check with the map's success on other steps."""
    values = {
        name: {f.trace: f.value for f in found if (f.score, f.metric) == (score, name)}
        for name in ("ahead", "AUROC, other steps")
    }
    pairs = [(a, values["AUROC, other steps"][trace]) for trace, a in values["ahead"].items()]
    pairs = np.array([pair for pair in pairs if not np.isnan(pair[1])]).reshape(-1, 2)
    value = spearman(pairs[:, 0], pairs[:, 1]) if len(pairs) > 2 else float("nan")
    return [value, float("nan"), float("nan"), len(pairs)]


def _table(found: list[Found], rng: np.random.Generator) -> list[dict[str, Any]]:
    columns = [name for name in TERCILES if any(figure.metric == name for figure in found)]
    columns = columns or list(dict.fromkeys(figure.metric for figure in found))
    rows = []
    for score in dict.fromkeys(figure.score for figure in found):
        row: dict[str, Any] = {"score": score}
        for column in columns:
            row[column] = _interval([f for f in found if f.score == score and f.metric == column], rng)
        rows.append(row)
    return rows


def _interval(found: list[Found], rng: np.random.Generator) -> list[float]:
    """Mean over traces of each trace's mean, its interval, and the number of traces that have a value."""
    by_trace: dict[int, list[float]] = {}
    for figure in found:
        if not np.isnan(figure.value):
            by_trace.setdefault(figure.trace, []).append(figure.value)
    if not by_trace:
        return [float("nan")] * 3 + [0]
    means = np.array([[np.mean(values)] for values in by_trace.values()])
    if len(means) < 2:
        return [float(means.mean()), float("nan"), float("nan"), len(means)]
    low, high = bca_interval([(1, means)], confidence=0.95, n_bootstrap=4000, rng=rng)
    return [float(means.mean()), float(low[0]), float(high[0]), len(means)]


def as_text(title: str, rows: list[dict[str, Any]]) -> str:
    """A table; a column says how many traces it rests on."""
    columns = [name for name in rows[0] if name != "score"]
    counts = {name: max(row[name][3] for row in rows) for name in columns}
    header = ["score", *(f"{name}, n={counts[name]}" for name in columns)]
    cells = [
        [row["score"], *("{:.3f} [{:.3f}, {:.3f}]".format(*row[name][:3]) for name in columns)]
        for row in rows
    ]
    if title == "knockout":
        title = f"knockout (pairs that cost {MATTERS} nats or more)"
    return text_table(f"Judge: {title}", header, cells)


if __name__ == "__main__":
    main()
