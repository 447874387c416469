"""A wrong reading of step maps, held against problems whose true flow of information is known.

    python docs/scripts/wrong_reading.py [--problems 100] [--seed 0] [--figure docs/wrong_reading.png]

The reading: "the darkest cell of a row is the step that this step needs most, and a dark diagonal says that
the model is locked in". Every solution here is right, and the true sources of every step are known.

1. The testbed model reads right solutions of fresh problems, every line of the question a step of its own.
   In each thinking row of the map (heads averaged, rows as shares): is the darkest cell the step itself? Is
   the darkest earlier cell one that the step takes something from? At chance it is as often as a cell drawn
   at random.
2. Is it the one whose knockout, in all layers, most raises the NLL of the step's own predictions?
3. The same with the saliency of a pair of steps summed instead of averaged over its token pairs.
4. `lock_in` of the shallow band on the same tokens cut into half as many thinking steps, and on shorter and
   longer problems. The cut moves no saliency: sums over blocks of cells are compared, and must agree.

Intervals are BCa over problems, 95 %. One thread, so the table is the same to the last digit.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepflow_tl import ReasoningTrace, Segment, StepSaliency, diagnose, load_testbed_model, step_saliency
from stepflow_tl.causal import step_knockout
from stepflow_tl.diagnosis import row_shares
from stepflow_tl.models.bands import shallow_band
from stepflow_tl.rendering import save_figure
from stepflow_tl.statistics.resampling import bca_interval
from stepflow_tl.testbed import Problem, ProblemSpec, make_problems
from stepflow_tl.testbed.edges import edge_rows, trace_of
from stepflow_tl.trace.splitting import MinimumLength

N_STEPS = 8
SHORT, LONG = 4, 12
#: A written step is 22 characters, blank line included: a step of at least 23 takes two of them.
PAIRS = MinimumLength("paragraph", 23)
POOLINGS = ("mean", "sum")


def main() -> None:
    """Print the tables and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, help="where to draw the first problem's maps (.png, .svg)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_testbed_model()
    rng = np.random.default_rng(options.seed)
    problems = make_problems(ProblemSpec(n_steps=N_STEPS), options.problems, seed=options.seed)
    maps = [step_saliency(model, trace_of(model.tokenizer, problem)) for problem in problems]
    effects = [earlier_effects(model, problem, m.trace) for problem, m in zip(problems, maps, strict=True)]
    print(darkest_table(problems, maps, effects, rng), end="\n\n")
    print(lock_in_table(model, problems, maps, options.seed, rng))
    if options.figure:
        save_figure(figure(problems[0], maps[0]), options.figure, dpi=150)


def darkest_table(
    problems: list[Problem], maps: list[StepSaliency], effects: list[np.ndarray], rng: np.random.Generator
) -> str:
    """Where the darkest cells are, by layers and pooling."""
    n_layers = maps[0].n_layers
    places = {str(layer): [layer] for layer in range(n_layers)} | {"all": list(range(n_layers))}
    columns = (
        "the step itself is darkest",
        "darkest earlier step is needed (mean)",
        "the same (sum)",
        "mean and sum name different steps",
        "cutting the darkest earlier step hurts most (mean)",
    )
    lines = [f"| layers | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    chance, cut_finds, cut_needed, cut_other = [], [], [], []
    for name, layers in places.items():
        found: list[list[float]] = []
        for problem, saliency, effect in zip(problems, maps, effects, strict=True):
            by_mean, by_sum = (shares(saliency, pooling, layers) for pooling in POOLINGS)
            rows = needed_rows(problem, saliency.trace)
            first, second = darkest_earlier(by_mean, rows), darkest_earlier(by_sum, rows)
            hurts_most = darkest_earlier(effect, rows)
            answers = [
                (by_mean[i, : i + 1].argmax() == i, first[i] in needed, second[i] in needed)
                + (first[i] != second[i], first[i] == hurts_most[i])
                for i, needed in rows.items()
            ]
            found.append(np.mean(answers, axis=0).tolist())
            if name == "all":
                chance.append(np.mean([len(needed) / i for i, needed in rows.items()]))
                cut_finds.append(np.mean([hurts_most[i] in needed for i, needed in rows.items()]))
                cut_needed.append(np.mean([effect[i, j] for i, needed in rows.items() for j in needed]))
                others = [(i, j) for i, needed in rows.items() for j in range(i) if j not in needed]
                cut_other.append(np.mean([effect[pair] for pair in others]))
        cells = " | ".join(with_interval(values, rng) for values in zip(*found, strict=True))
        lines.append(f"| {name} | {cells} |")
    n_rows = sum(len(needed_rows(problem, m.trace)) for problem, m in zip(problems, maps, strict=True))
    return "\n".join(
        [
            *lines,
            "",
            f"{len(problems)} problems, {n_rows} rows. "
            f"Of all earlier steps, {np.mean(chance):.3f} are needed.",
            f"The step whose knockout hurts most is needed in {with_interval(cut_finds, rng)} of the rows.",
            f"NLL change by cutting a needed step {with_interval(cut_needed, rng)} nats,",
            f"another earlier step {with_interval(cut_other, rng)} nats.",
        ]
    )


def earlier_effects(model: Any, problem: Problem, trace: ReasoningTrace) -> np.ndarray:
    """Knockout effects of every thinking step on every earlier step, in nats."""
    pairs = [(i, j) for i in needed_rows(problem, trace) for j in range(i)]
    return step_knockout(model, trace, pairs=pairs).effects.numpy()


def lock_in_table(
    model: Any, problems: list[Problem], maps: list[StepSaliency], seed: int, rng: np.random.Generator
) -> str:
    """`lock_in` of the shallow band for other cuts and other lengths; all solutions are right."""
    joined = [step_saliency(model, cut_in_pairs(model.tokenizer, problem)) for problem in problems]
    for saliency, other in zip(maps, joined, strict=True):
        check_same_flow(saliency, other)
    groups = {f"of {N_STEPS} steps": maps, f"the same {N_STEPS} steps, cut in pairs": joined}
    for n_steps in (SHORT, LONG):
        others = make_problems(ProblemSpec(n_steps=n_steps), len(problems), seed=seed)
        groups[f"of {n_steps} steps"] = [
            step_saliency(model, trace_of(model.tokenizer, problem)) for problem in others
        ]
    lines = [
        "| right solutions | thinking steps | tokens per step | lock_in, shallow (mean) | the same (sum) |",
        "|---|---:|---:|---|---|",
    ]
    found: dict[str, list[np.ndarray]] = {}
    for name, group in groups.items():
        lengths = [step.n_tokens for step in group[0].trace.steps_in(Segment.THINKING)]
        found[name] = [np.array([shallow_lock_in(s, pooling) for s in group]) for pooling in POOLINGS]
        cells = " | ".join(with_interval(values, rng) for values in found[name])
        lines.append(f"| {name} | {len(lengths)} | {lengths[0]} | {cells} |")
    plain, pairs = list(found.values())[:2]
    by_mean, by_sum = (with_interval(b - a, rng, signed=True) for a, b in zip(plain, pairs, strict=True))
    return "\n".join(
        [*lines, "", f"Pairs minus single steps, paired by problem: {by_mean} (mean), {by_sum} (sum)."]
    )


def needed_rows(problem: Problem, trace: ReasoningTrace) -> dict[int, set[int]]:
    """For each thinking step, by index in the trace: the steps that it takes something from."""
    rows = edge_rows(problem, trace)
    return {
        row.query: {j for j, needed in zip(row.candidates, row.needed, strict=True) if needed} for row in rows
    }


def shares(saliency: StepSaliency, pooling: Any, layers: list[int]) -> np.ndarray:
    """Row shares, averaged over layers."""
    return row_shares(saliency, pooling)[layers].mean(0).numpy()


def darkest_earlier(step_map: np.ndarray, rows: dict[int, set[int]]) -> dict[int, int]:
    """For each row, the earlier step with the largest share."""
    return {i: int(step_map[i, :i].argmax()) for i in rows}


def cut_in_pairs(tokenizer: Any, problem: Problem) -> ReasoningTrace:
    """The right solution with two written steps to a thinking step."""
    parts = (problem.question, problem.thinking, problem.answer)
    return ReasoningTrace.from_parts(
        tokenizer, *parts, splitter=PAIRS, summary_splitter="paragraph", question_splitter="line"
    )


def check_same_flow(fine: StepSaliency, coarse: StepSaliency) -> None:
    """The coarse cells must hold what the fine cells within them hold.

    Raises:
        ValueError: If they do not.
    """
    starts = torch.tensor([step.token_start for step in coarse.trace.steps])
    home = torch.searchsorted(starts, torch.tensor([s.token_start for s in fine.trace.steps]), right=True) - 1
    join = torch.nn.functional.one_hot(home, len(starts)).to(fine.sums.dtype)
    joined = torch.einsum("lhij,ia,jb->lhab", fine.sums, join, join)
    if len(starts) >= len(home) or not torch.allclose(joined, coarse.sums, rtol=1e-3, atol=1e-6):
        raise ValueError("the cut changed the saliency itself, which it must not")


def shallow_lock_in(saliency: StepSaliency, pooling: Any) -> float:
    """Mean of `lock_in` over the shallow band."""
    by_layer = diagnose(saliency, pooling=pooling).lock_in
    return float(by_layer[list(shallow_band(saliency.n_layers))].mean())


def with_interval(values: Any, rng: np.random.Generator, *, signed: bool = False) -> str:
    """Mean and 95 % BCa interval over problems."""
    column = np.asarray(values, dtype=float)[:, None]
    low, high = bca_interval([(1, column)], confidence=0.95, n_bootstrap=4000, rng=rng)
    form = "{:+.3f} [{:+.3f}, {:+.3f}]" if signed else "{:.3f} [{:.3f}, {:.3f}]"
    return form.format(column.mean(), low[0], high[0])


def figure(problem: Problem, saliency: StepSaliency) -> Any:
    """One problem's thinking rows: what is needed, and the darkest earlier cell."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    n_layers = saliency.n_layers
    panels = {
        "layer 0, mean": ("mean", [0]),
        "layer 3, mean": ("mean", [3]),
        f"layer {n_layers - 1}, mean": ("mean", [n_layers - 1]),
        "all layers, mean": ("mean", list(range(n_layers))),
        "all layers, sum": ("sum", list(range(n_layers))),
    }
    rows = needed_rows(problem, saliency.trace)
    first, last = min(rows), max(rows) + 1
    labels = saliency.labels
    drawing = Figure((10.0, 2.15), facecolor="white")
    axes = drawing.subplots(1, len(panels), sharey=True)
    for axis, (title, (pooling, layers)) in zip(axes, panels.items(), strict=True):
        step_map = shares(saliency, pooling, layers)[first:last, :last]
        above = np.arange(last)[None, :] > np.arange(first, last)[:, None]
        axis.imshow(np.ma.masked_where(above, step_map), cmap="magma_r", vmin=0, aspect="auto")
        for i, needed in rows.items():
            for j in needed:
                axis.add_patch(Rectangle((j - 0.5, i - first - 0.5), 1, 1, fill=False, ec="#009E73", lw=1.4))
        for i, j in darkest_earlier(shares(saliency, pooling, layers), rows).items():
            axis.plot(j, i - first, "x", color="#0072B2", ms=5, mew=1.6)
        axis.set_title(title, fontsize=8)
        axis.set_xticks(range(0, last, 2), labels[0:last:2], fontsize=6)
        axis.set_yticks(range(last - first), labels[first:last], fontsize=6)
        axis.axvline(first - 0.5, color="grey", lw=0.6)
    drawing.subplots_adjust(left=0.035, right=0.995, top=0.87, bottom=0.1, wspace=0.06)
    return drawing


if __name__ == "__main__":
    main()
