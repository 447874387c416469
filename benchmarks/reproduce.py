"""The whole study on the testbed: generate, grade, map, diagnose, repair, grade again, score the maps.

    python benchmarks/reproduce.py [--out out/reproduce] [--problems 2000] [--seed 0]

Parts, each on problems of its own (another seed):

1. Accuracy of the plain model, of the bridge, momentum and StepFlow, and of their controls, by difficulty;
   greedy, paired by problem.
2. What went wrong first in the plain model's wrong traces, and which of these errors StepFlow repairs.
3. A search over strengths and bands: chosen on validation problems, reported on test problems, both others
   than those of part 1.
4. Lock-in and decay of right against wrong traces, matched one to one by number of steps and of tokens.
5. Bands chosen from half of these pairs; their effect, and the quarters', on the other half.
6. How well each score finds the true edges (`faithfulness.py`), and the same with shuffled edges.

Writes `report.md`, its pictures and `study.json`. Nothing is tuned on what is reported.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import faithfulness
import numpy as np
import torch

from stepflow_tl import ReasoningTrace, compare, diagnose, step_saliency
from stepflow_tl.bands import deep_band, shallow_band
from stepflow_tl.diagnostics import choose_bands
from stepflow_tl.evaluation import Decoding, evaluate, grid, questions_of, search
from stepflow_tl.rendering import comparison_figure, save_figure, step_map_figure
from stepflow_tl.testbed import ProblemSpec, grade, load_testbed_model, make_problems
from stepflow_tl.testbed.grading import ERROR_KINDS, FLOW_ERRORS

STEPS = (12, 16, 18, 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/reproduce"))
    parser.add_argument("--problems", type=int, default=2000, help="test problems of part 1")
    parser.add_argument("--searched", type=int, default=800, help="problems of part 3, half for choosing")
    parser.add_argument("--pairs", type=int, default=200, help="most matched pairs of part 4")
    parser.add_argument("--edges", type=int, default=120, help="test problems of part 6")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    model = load_testbed_model()
    found = accuracy(model, options)
    errors = first_errors(found)
    pairs = matched_pairs(model, found, options)
    parts = [
        "# The testbed study",
        f"`python benchmarks/reproduce.py --problems {options.problems} --seed {options.seed}`, steps "
        f"{options.steps}. `right` is the part of right answers; intervals are 95 %, paired by problem.",
        "## Does StepFlow answer better?",
        fenced(found.table()),
        "## What went wrong first",
        error_table(errors),
        repaired_table(found),
        "## Strengths and bands, chosen on other problems",
        *search_part(model, options),
        "## Shallow Lock-in and Deep Decay: right against wrong traces",
        *diagnosis_part(pairs, options.out),
        "## Bands",
        *bands_part(pairs, int(model.cfg.n_layers), options.seed),
        "## Which scores find the true edges",
        *edges_part(options),
        *map_part(model, options),
    ]
    minutes = (time.perf_counter() - start) / 60
    parts.append(
        f"Took {minutes:.1f} minutes on {torch.get_num_threads()} CPU threads, torch {torch.__version__}."
    )
    (options.out / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    data = {"evaluation": json.loads(found.to_json()), "errors": errors, "n_pairs": len(pairs)}
    (options.out / "study.json").write_text(json.dumps(data), encoding="utf-8")
    print(f"written: {options.out}/report.md, {options.out}/study.json ({minutes:.1f} minutes)")


def problems_of(options, n, seed):
    """`n` problems, as many of each number of steps."""
    specs = [ProblemSpec(n_steps=n_steps) for n_steps in options.steps]
    return [p for spec in specs for p in make_problems(spec, n // len(specs), seed=seed + options.seed)]


def greedy(options):
    return Decoding(max_new_tokens=max(options.steps) * 12 + 24, batch_size=250)


def accuracy(model, options):
    questions = questions_of(problems_of(options, options.problems, 10_000))
    return evaluate(model, questions, decoding=greedy(options), seed=options.seed, progress=_say)


def search_part(model, options):
    n_layers = int(model.cfg.n_layers)
    halves = tuple(range(n_layers // 2)), tuple(range(n_layers // 2, n_layers))
    candidates = grid(tau_max=[0.05, 0.15, 0.5], alpha=[0.02, 0.06, 0.2])
    candidates += grid(tau_max=[0.05, 0.15], alpha=[0.02, 0.06], shallow=[halves[0]], deep=[halves[1]])
    found = search(
        model,
        questions_of(problems_of(options, options.searched, 20_000)),
        candidates,
        validation_part=0.5,
        decoding=greedy(options),
        seed=options.seed,
        progress=_say,
    )
    lines = ["| candidate | right, validation |", "|---|---:|"]
    lines += [f"| {brief(flow)} | {score:.3f} |" for flow, score in found.validation]
    return [
        "\n".join(lines),
        f"Chosen: {brief(found.chosen)}. On the test problems, which no candidate has seen:",
        fenced(found.test.table()),
    ]


def first_errors(found):
    """Counts of first errors by condition and difficulty."""
    counts = {}
    for name, result in found.results.items():
        for question, (answer,) in zip(found.questions, result.answers, strict=True):
            verdict = grade(question.problem, answer.thinking, answer.summary)
            counts.setdefault(name, {}).setdefault(question.difficulty, Counter())[str(verdict.error)] += 1
    return {name: {level: dict(c) for level, c in levels.items()} for name, levels in counts.items()}


def error_table(errors):
    lines = ["Plain model, part of all problems; the first two are failures of information flow.", ""]
    lines += [
        "| difficulty | " + " | ".join(ERROR_KINDS) + " | none |",
        "|---|" + "---:|" * (len(ERROR_KINDS) + 1),
    ]
    for level, counts in errors["plain"].items():
        total = sum(counts.values())
        cells = [f"{counts.get(kind, 0) / total:.3f}" for kind in (*ERROR_KINDS, "None")]
        lines.append(f"| {level} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def repaired_table(found):
    """Of the problems whose first plain error was of a kind: the part that each condition answers right."""
    kinds = [
        grade(q.problem, a.thinking, a.summary).error
        for q, (a,) in zip(found.questions, found.results["plain"].answers, strict=True)
    ]
    names = list(found.results)
    lines = [
        "Part of right answers, by what went wrong first in the plain model (`flow`: the first two).",
        "",
    ]
    lines += ["| first error | n | " + " | ".join(names) + " |", "|---|---:|" + "---:|" * len(names)]
    for title, wanted in (
        ("none", {None}),
        ("flow", set(FLOW_ERRORS)),
        ("other", {"copy", "arithmetic", "form", "answer"}),
    ):
        chosen = [i for i, kind in enumerate(kinds) if kind in wanted]
        cells = [f"{found.results[n].scores[chosen].mean():.3f}" if chosen else "-" for n in names]
        lines.append(f"| {title} | {len(chosen)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def matched_pairs(model, found, options):
    """Diagnoses of a right and a wrong trace of equal numbers of steps and tokens: (right, wrong)."""
    groups = {}
    for question, (answer,), (is_right,) in zip(
        found.questions, found.results["plain"].answers, found.results["plain"].right, strict=True
    ):
        if answer.finished:
            key = (question.difficulty, len(answer.tokens))
            groups.setdefault(key, {True: [], False: []})[is_right].append(answer.tokens)
    rng, chosen = random.Random(options.seed), []
    for sides in groups.values():
        for side in sides.values():
            rng.shuffle(side)
        chosen += list(zip(sides[True], sides[False], strict=False))
    rng.shuffle(chosen)
    pairs = []
    for index, tokens in enumerate(chosen[: options.pairs]):
        traces = [ReasoningTrace.from_tokens(model.tokenizer, list(side)) for side in tokens]
        pairs.append(tuple(diagnose(step_saliency(model, trace)) for trace in traces))
        print(f"\rmaps: {index + 1}/{min(len(chosen), options.pairs)} pairs", end="", file=sys.stderr)
    print(file=sys.stderr)
    return pairs


def brief(flow):
    bands = "quarters" if flow.shallow is None else "halves"
    return f"tau_max {flow.tau_max:g}, alpha {flow.alpha:g}, bands {bands}"


def diagnosis_part(pairs, out):
    if len(pairs) < 10:
        return [f"Only {len(pairs)} matched pairs: too few to compare."]
    right, wrong = ([pair[side] for pair in pairs] for side in (0, 1))
    ids = list(range(len(pairs)))
    comparison = compare(right, wrong, names=("right", "wrong"), pair_by=(ids, ids))
    save_figure(comparison_figure(comparison), out / "right_and_wrong.png", dpi=150)
    return [
        f"{len(pairs)} pairs, matched by number of steps and of tokens; maps of what the plain model wrote.",
        fenced(str(comparison)),
        "![Lock-in and thinking share over depth, right and wrong traces](right_and_wrong.png)",
    ]


def bands_part(pairs, n_layers, seed):
    if len(pairs) < 20:
        return [f"Only {len(pairs)} matched pairs: too few to split."]
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    train, test = ([pairs[i] for i in half] for half in (order[::2], order[1::2]))
    choice = choose_bands(*([pair[side] for pair in train] for side in (0, 1)))
    lines = ["| | layers | effect, training pairs | effect, test pairs |", "|---|---|---:|---:|"]
    quarters = tuple(shallow_band(n_layers)), tuple(deep_band(n_layers))
    for metric, sign, chosen, quarter in (
        ("lock_in", 1, choice.shallow, quarters[0]),
        ("thinking_share", -1, choice.deep, quarters[1]),
    ):
        for title, layers in (("chosen", chosen), ("quarter", quarter)):
            effects = [sign * _effect(half, metric, layers) for half in (train, test)]
            lines.append(f"| {metric}, {title} | {layers} | {effects[0]:+.3f} | {effects[1]:+.3f} |")
    return [
        f"Chosen on {len(train)} pairs, held against the quarters on {len(test)} others. An effect is how "
        "much more a wrong trace locks in (lock_in) or loses the thinking (thinking_share), in standard "
        "deviations; below zero it is the other way round.",
        "\n".join(lines),
    ]


def _effect(pairs, metric, layers):
    right, wrong = (
        np.array([float(getattr(pair[side], metric)[list(layers)].mean()) for pair in pairs])
        for side in (0, 1)
    )
    return (wrong.mean() - right.mean()) / np.sqrt((wrong.var(ddof=1) + right.var(ddof=1)) / 2)


def edges_part(options):
    parts = []
    for shuffle in (False, True):
        rows = faithfulness.study(
            SimpleNamespace(problems=options.edges, steps=[6, 10, 14], seed=options.seed, shuffle=shuffle)
        )
        kept = (
            [row for row in rows if row["sources"] == "both" and row["layers"] in ("all",)]
            if shuffle
            else rows
        )
        parts.append("With shuffled edges, all layers:" if shuffle else "With the true edges:")
        parts.append(fenced(faithfulness.table(kept)))
    return parts


def map_part(model, options):
    """The map of one solution, to look at."""
    (problem,) = make_problems(ProblemSpec(n_steps=10), 1, seed=options.seed)
    saliency = step_saliency(model, faithfulness.trace_of(model.tokenizer, problem))
    save_figure(step_map_figure(saliency), options.out / "map.png", dpi=150)
    needs = ", ".join(f"T{i + 1} needs T{j + 1}" for i, j in sorted(problem.step_edges))
    return ["## One map", f"Ten steps; {needs}.", "![Step maps of one solution, all layers](map.png)"]


def fenced(text):
    return f"```\n{text}\n```"


def _say(line):
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
