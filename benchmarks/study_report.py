"""The tables and paragraphs of `reproduce.py`'s report; every function returns paragraphs of Markdown."""

import random
from collections import Counter

import edges_by_layer
import numpy as np

from stepflow_tl import compare
from stepflow_tl.diagnosis import choose_bands
from stepflow_tl.models.bands import deep_band, shallow_band
from stepflow_tl.rendering import comparison_figure, save_figure
from stepflow_tl.statistics.paired import paired_difference
from stepflow_tl.testbed import grade
from stepflow_tl.testbed.grading import ERROR_KINDS, FLOW_ERRORS


def head(options):
    return [
        "# The testbed study",
        f"`python benchmarks/reproduce.py --model {options.model} --problems {options.problems} "
        f"--seed {options.seed}`, steps {options.steps}. Intervals are 95 %, paired by problem.",
    ]


def accuracy(found, strict, sampled):
    return [
        "## Does StepFlow answer better?",
        "By the answer alone:",
        fenced(found.table()),
        "Every thinking step and the answer must be right:",
        fenced(strict.table()),
        f"Sampled at temperature 1, {sampled.decoding.n_samples} answers per problem, by the answer alone:",
        fenced(sampled.table()),
    ]


def first_errors(found):
    """Counts of first errors by condition and difficulty."""
    counts = {}
    for name, result in found.results.items():
        for question, (answer,) in zip(found.questions, result.answers, strict=True):
            verdict = grade(question.problem, answer.thinking, answer.summary)
            counts.setdefault(name, {}).setdefault(question.difficulty, Counter())[str(verdict.error)] += 1
    return {name: {level: dict(c) for level, c in levels.items()} for name, levels in counts.items()}


def errors(found):
    rows = []
    for level, counts in first_errors(found)["plain"].items():
        total = sum(counts.values())
        rows.append([level, *(f"{counts.get(kind, 0) / total:.3f}" for kind in (*ERROR_KINDS, "None"))])
    return [
        "## What goes wrong first",
        "Plain model, part of all problems. `definition` (of the wrong variable) and `earlier step` (a value "
        "that is not the one found there) are failures of information flow between steps. A wrong step need "
        "not spoil the answer: the last variable does not depend on all of them.",
        markdown(["difficulty", *ERROR_KINDS, "none"], rows),
        *_repaired(found),
    ]


def _repaired(found):
    kinds = [
        grade(q.problem, a.thinking, a.summary).error
        for q, (a,) in zip(found.questions, found.results["plain"].answers, strict=True)
    ]
    names, rows = list(found.results), []
    for title, wanted in (
        ("none", {None}),
        ("flow", set(FLOW_ERRORS)),
        ("other", {"copy", "arithmetic", "form", "answer"}),
    ):
        chosen = [i for i, kind in enumerate(kinds) if kind in wanted]
        cells = [f"{found.results[n].scores[chosen].mean():.3f}" if chosen else "-" for n in names]
        rows.append([title, str(len(chosen)), *cells])
    chosen = [i for i, kind in enumerate(kinds) if kind in FLOW_ERRORS]
    paragraphs = [
        "Part of right answers, by what went wrong first in the plain model (`flow`: the first two kinds):",
        markdown(["first error", "n", *names], rows),
    ]
    for against in ("plain", "StepFlow control"):
        scores = [found.results[name].scores[chosen] for name in ("StepFlow", against)]
        d = paired_difference(*scores, binary=True, seed=found.seed)
        paragraphs.append(
            f"Where the flow failed first, StepFlow minus {against}: {d}"
            + (f", p = {d.p_value:.3f}." if d.differs else ".")
        )
    return paragraphs


def searched(found):
    rows = [[brief(flow), f"{score:.3f}"] for flow, score in found.validation]
    return [
        "## Strengths and bands, chosen on other problems",
        markdown(["candidate", "right, validation"], rows),
        f"Chosen: {brief(found.chosen)}. On the test problems, which no candidate has seen:",
        fenced(found.test.table()),
    ]


def brief(flow):
    bands = "quarters" if flow.shallow is None else "halves"
    return f"tau_max {flow.tau_max:g}, alpha {flow.alpha:g}, bands {bands}"


def diagnosis(pairs, out):
    title = "## Shallow Lock-in and Deep Decay: right against wrong traces"
    if len(pairs) < 10:
        return [title, f"Only {len(pairs)} matched pairs: too few to compare."]
    right, wrong = ([pair[side] for pair in pairs] for side in (0, 1))
    ids = list(range(len(pairs)))
    comparison = compare(right, wrong, names=("right", "wrong"), pair_by=(ids, ids))
    save_figure(comparison_figure(comparison), out / "right_and_wrong.png", dpi=150)
    return [
        title,
        f"{len(pairs)} pairs, matched by number of steps and of tokens; maps of what the plain model wrote.",
        fenced(str(comparison)),
        "![Lock-in and thinking share over depth, right and wrong traces](right_and_wrong.png)",
    ]


def bands(pairs, n_layers, seed):
    if len(pairs) < 20:
        return ["## Bands", f"Only {len(pairs)} matched pairs: too few to split."]
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    train, test = ([pairs[i] for i in half] for half in (order[::2], order[1::2]))
    choice = choose_bands(*([pair[side] for pair in train] for side in (0, 1)))
    quarters = tuple(shallow_band(n_layers)), tuple(deep_band(n_layers))
    rows = []
    for metric, sign, chosen, quarter in (
        ("lock_in", 1, choice.shallow, quarters[0]),
        ("thinking_share", -1, choice.deep, quarters[1]),
    ):
        for title, layers in (("chosen", chosen), ("quarter", quarter)):
            effects = [f"{sign * _effect(half, metric, layers):+.3f}" for half in (train, test)]
            rows.append([f"{metric}, {title}", ", ".join(map(str, layers)), *effects])
    return [
        "## Bands",
        f"Chosen on {len(train)} pairs, held against the quarters on {len(test)} others. An effect is how "
        "much more a wrong trace locks in (lock_in) or loses the thinking (thinking_share), in standard "
        "deviations; below zero it is the other way round.",
        markdown(["", "layers", "effect, training pairs", "effect, test pairs"], rows),
    ]


def _effect(pairs, metric, layers):
    right, wrong = (
        np.array([float(getattr(pair[side], metric)[list(layers)].mean()) for pair in pairs])
        for side in (0, 1)
    )
    return (wrong.mean() - right.mean()) / np.sqrt((wrong.var(ddof=1) + right.var(ddof=1)) / 2)


def edges(rows):
    true, random_edges = rows
    chance = [row for row in random_edges if row["sources"] == "both" and row["layers"] == "all"]
    return [
        "## Which scores find the true edges",
        fenced(edges_by_layer.table(true)),
        "With shuffled edges every score must be at chance:",
        fenced(edges_by_layer.table(chance)),
    ]


def positive_controls(tables):
    return [
        "## Positive controls",
        "Failures that were planted: are they found, is the band found, and does StepFlow undo them?",
        *map(fenced, tables),
    ]


def one_map(problem):
    needs = ", ".join(f"T{i + 1} needs T{j + 1}" for i, j in sorted(problem.step_edges))
    return [
        "## One map",
        f"Steps that need others: {needs}.",
        "![Step maps of one solution, all layers](map.png)",
    ]


def markdown(header, rows):
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def fenced(text):
    return f"```\n{text}\n```"
