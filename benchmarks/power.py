"""How well are planted failures found? Power against dose and number of traces, for one model.

    python benchmarks/power.py [--model testbed | testbed-12 | smollm2 | MODEL.gguf] [--answers answers.jsonl]
        [--pool 60] [--doses 0.25 0.5 1 2 4 8] [--n 10 20 50 200] [--draws 400] [--out out/power]

1. The pool: traces with right thinking. Of the testbed, its own problems; of other models the right answers
   of an answers file that `stepflow-tl evaluate` wrote (`--condition`), cut into steps anew.
2. Each trace is mapped and diagnosed once plain, and once for each failure (`plant_lock_in`, `plant_decay`)
   and dose; the NLL of its thinking and of its summary are measured beside. That is what costs: one line per
   map in `OUT/maps.jsonl`, and a run that finds a line there does not map again.
3. A draw takes n plain and n planted traces: different ones, or the same ones as pairs. Where the pool holds
   fewer than are needed it draws with replacement, so that the pool is the population; the traces of the two
   groups are then drawn independently of each other.
4. A draw is tested as `compare` tests its headline: p-values by permuted labels (or flipped signs), six of
   them, corrected by Holm. A failure is *found* if its own number, `lock_in shallow` or
   `thinking_share deep`, has moved in the failure's direction with p at most `--level`. *any* counts any of
   the six, either way: at dose 0, the false alarms. Pairs at dose 0 are equal: nothing can be found in them.
5. The same draws with their labels shuffled: what is found then is chance.
6. Size: the mean change of the failure's number and of the NLLs over the pool, paired, BCa intervals.

Writes `power.txt`, `power.json` and `power.png` to `--out`.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from stepflow_tl import ReasoningTrace, diagnose, step_saliency
from stepflow_tl.cli.arguments import TESTBEDS
from stepflow_tl.cli.device import load
from stepflow_tl.diagnosis import Diagnosis
from stepflow_tl.models.passes import whole_pass
from stepflow_tl.rendering import save_figure
from stepflow_tl.rendering.sheet import TEXT_SIZE, Margins, Sheet, matplotlib_part, style_plot
from stepflow_tl.statistics.effects import Resampling, column_effects, corrected
from stepflow_tl.statistics.resampling import bca_interval
from stepflow_tl.stepflow import plant_decay, plant_lock_in
from stepflow_tl.testbed import ProblemSpec, make_problems
from stepflow_tl.testbed.edges import trace_of
from stepflow_tl.testbed.model import FORMS
from stepflow_tl.trace import Segment

PLANTS = {"lock_in": plant_lock_in, "decay": plant_decay}
OWN = {"lock_in": ("lock_in shallow", 1), "decay": ("thinking_share deep", -1)}
SEGMENTS = {"thinking": Segment.THINKING, "summary": Segment.SUMMARY}
COLOURS = ("#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7")  # Okabe and Ito's


def main(arguments=None) -> str:
    """The tables, printed and returned; `arguments` as on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_source(parser)
    parser.add_argument("--doses", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 4, 8])
    parser.add_argument("--n", type=int, nargs="+", default=[10, 20, 50, 200])
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--level", type=float, default=0.05)
    parser.add_argument("--out", type=Path, default=Path("out/power"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    model, traces = model_and_traces(options)
    maps = mapped(model, traces, options)
    found = {
        failure: {
            "size": sizes(maps, failure, options),
            **{kind: curves(maps, failure, kind == "pairs", options) for kind in ("two groups", "pairs")},
        }
        for failure in PLANTS
    }
    lengths = [len(trace) for trace in traces.values()]
    head = (
        f"{options.model}: {len(traces)} traces of {min(lengths)} to {max(lengths)} tokens "
        f"(median {np.median(lengths):.0f}), {options.draws} draws, level {options.level}, "
        f"seed {options.seed}"
    )
    text = "\n\n".join([head, *(table(failure, found[failure], options) for failure in PLANTS)])
    (options.out / "power.txt").write_text(text + "\n", encoding="utf-8")
    settings = {name: str(value) for name, value in vars(options).items()}
    (options.out / "power.json").write_text(json.dumps(dict(options=settings, found=found), indent=1))
    save_figure(figure(found, head, options), options.out / "power.png")
    print(text)
    return text


def add_source(parser):
    """What model, and which traces."""
    parser.add_argument("--model", default="testbed", help="testbed, testbed-12, or as for analyze")
    parser.add_argument("--answers", type=Path, help="answers.jsonl of `stepflow-tl evaluate`")
    parser.add_argument("--condition", default="plain", help="whose answers")
    parser.add_argument("--splitter", default="paragraph")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 12, 16, 20], help="of testbed problems")
    parser.add_argument("--pool", type=int, default=60)
    parser.add_argument("--max-tokens", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)


def model_and_traces(options):
    """The model, and the traces of the pool by their ids."""
    torch.set_num_threads(1)
    model, traces = load(options.model, "cpu", "float32", None), {}
    if options.model in TESTBEDS:
        for index in range(options.pool):
            (problem,) = problems_of(options, [options.steps[index % len(options.steps)]], 1, index)
            traces[f"problem {index}"] = trace_of(model.tokenizer, problem)
        return model, traces
    if options.answers is None:
        sys.exit("--answers is needed for every model but the testbed's: right answers to read")
    with options.answers.open() as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        if row.get("condition") == options.condition and row["right"] and row["finished"]:
            parts = (row["question"], row["thinking"], row["summary"])
            trace = ReasoningTrace.from_parts(model.tokenizer, *parts, splitter=options.splitter)
            n_steps = {name: sum(s.segment == part for s in trace.steps) for name, part in SEGMENTS.items()}
            if len(trace) <= options.max_tokens and n_steps["thinking"] > 1 and n_steps["summary"]:
                traces[row["id"]] = trace
    return model, dict(list(traces.items())[: options.pool])


def problems_of(options, steps, n, seed):
    """`n` problems of each number of steps, in the form that the testbed model of `options` solves."""
    specs = [ProblemSpec(n_steps=n_steps, **FORMS[TESTBEDS[options.model]]) for n_steps in steps]
    return [p for spec in specs for p in make_problems(spec, n, seed=1000 * options.seed + seed)]


def losses(model, trace, hooks=()):
    """Mean NLL of the tokens of the thinking and of the summary, in nats per token."""
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        logits = whole_pass(model, trace.tokens)[:-1].float()
    nll = torch.nn.functional.cross_entropy(logits, trace.tokens[1:], reduction="none").double()
    return {name: float(nll[trace.segment_ids[1:] == part].mean()) for name, part in SEGMENTS.items()}


def kept_rows(path):
    """What an earlier run measured, a row a line; a line that a kill cut off is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def mapped(model, traces, options):
    """By failure and dose: headline numbers `[trace, 6]` and NLLs `[trace, 2]`; from disk where it can."""
    path = options.out / "maps.jsonl"
    held = {(row["trace"], row["tokens"], row["failure"], row["dose"]): row for row in kept_rows(path)}
    wanted = [(name, dose) for name in PLANTS for dose in options.doses]
    wanted = [("", 0.0), *wanted]
    found = {}
    with path.open("a") as file:
        for index, (name, trace) in enumerate(traces.items()):
            for failure, dose in wanted:
                key = (name, len(trace), failure, dose)
                if key not in held:
                    hooks = PLANTS[failure](dose).hooks(model, trace) if failure else []
                    diagnosis = diagnose(step_saliency(model, trace, fwd_hooks=hooks))
                    row = dict(zip(("trace", "tokens", "failure", "dose"), key, strict=True))
                    row |= dict(diagnosis=diagnosis.to_json(), nll=losses(model, trace, hooks))
                    held[key] = row
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                row = held[key]
                headline = Diagnosis.from_json(row["diagnosis"]).headline
                found.setdefault((failure, dose), []).append({**headline, **row["nll"]})
            print(f"\r{index + 1}/{len(traces)} traces mapped", end="", file=sys.stderr)
    print(file=sys.stderr)
    for failure in PLANTS:
        found[failure, 0.0] = found["", 0.0]
    names = [name for name in found["", 0.0][0] if name not in SEGMENTS]
    return {
        key: dict(
            names=names,
            headline=np.array([[row[name] for name in names] for row in rows]),
            nll=np.array([[row[name] for name in SEGMENTS] for row in rows]),
        )
        for key, rows in found.items()
    }


def sizes(maps, failure, options):
    """By dose: mean change of the failure's number and of each NLL, with its interval."""
    plain, found = maps["", 0.0], {}
    own = plain["names"].index(OWN[failure][0])
    for dose in options.doses:
        planted = maps[failure, dose]
        change = np.column_stack(
            [(planted["headline"] - plain["headline"])[:, own], planted["nll"] - plain["nll"]]
        )
        rng = np.random.default_rng(options.seed)
        ends = bca_interval([(1, change)], confidence=0.95, n_bootstrap=4000, rng=rng)
        columns = zip(change.mean(0), *ends, strict=True)
        names = (OWN[failure][0], *SEGMENTS)
        found[dose] = {name: list(map(float, each)) for name, each in zip(names, columns, strict=True)}
    return found


def curves(maps, failure, paired, options):
    """By n and dose: shares of the draws in which something is found, true labels and shuffled ones."""
    names = maps["", 0.0]["names"]
    own, direction = names.index(OWN[failure][0]), OWN[failure][1]
    found = {}
    for n in options.n:
        by_dose = found.setdefault(n, {})
        for dose in (0.0, *options.doses):
            rng = np.random.default_rng([options.seed, n, int(1000 * dose), int(paired)])
            counts = dict.fromkeys(("found", "any", "shuffled: found", "shuffled: any"), 0)
            for draw in range(options.draws):
                groups = drawn(maps["", 0.0], maps[failure, dose], n, paired, rng)
                for prefix, (x, y) in (("", groups), ("shuffled: ", shuffled(*groups, paired, rng))):
                    tested = Resampling(0.95, n_bootstrap=1, n_permutations=499, seed=draw)
                    effect = column_effects(y, x, paired=paired, resampling=tested)
                    below = corrected(effect["p_value"], "holm") <= options.level
                    counts[prefix + "any"] += bool(below.any())
                    counts[prefix + "found"] += bool(below[own] and effect["difference"][own] * direction > 0)
            by_dose[dose] = {name: count / options.draws for name, count in counts.items()}
        print(f"{failure}, {'pairs' if paired else 'two groups'}, n = {n}", file=sys.stderr)
        powers = [by_dose[dose]["found"] for dose in (0.0, *options.doses)]
        by_dose["dose found in 80 %"] = crossing([0.0, *options.doses], powers, 0.8)
    return found


def drawn(plain, planted, n, paired, rng):
    pool = len(plain["headline"])
    size = n if paired else 2 * n
    chosen = rng.permutation(pool)[:size] if size <= pool else rng.integers(pool, size=size)
    return plain["headline"][chosen[:n]], planted["headline"][chosen[:n] if paired else chosen[n:]]


def shuffled(x, y, paired, rng):
    if paired:
        swap = rng.random((len(x), 1)) < 0.5
        return np.where(swap, y, x), np.where(swap, x, y)
    both = rng.permutation(np.concatenate([x, y]))
    return both[: len(x)], both[len(x) :]


def crossing(doses, powers, wanted):
    """The dose from which on the power is at least `wanted`, between doses on a line; None without one."""
    after = next((i for i in range(len(doses)) if min(powers[i:]) >= wanted), None)
    if not after:
        return None if after is None else doses[0]
    (d0, d1), (p0, p1) = doses[after - 1 : after + 1], powers[after - 1 : after + 1]
    return d0 + (d1 - d0) * (wanted - p0) / (p1 - p0)


def table(failure, found, options):
    lines = [
        f"{failure}: change of {OWN[failure][0]}, and of the NLL in nats per token, over the pool [95 %]"
    ]
    for dose, change in found["size"].items():
        cells = "".join(
            "   {} {:+.4f} [{:+.4f}, {:+.4f}]".format(name, *each) for name, each in change.items()
        )
        lines.append(f"  dose {dose:<5g}{cells}")
    for kind in ("two groups", "pairs"):
        lines += [
            f"{failure}, {kind}: found (any of six) in % of draws; in brackets with shuffled labels",
            f"  {'dose':>6}" + "".join(f"{f'n = {n}':>28}" for n in options.n),
        ]
        for dose in (0.0, *options.doses):
            cells = (
                "{:5.1f} ({:5.1f}) [{:4.1f} ({:4.1f})]".format(*(100 * x for x in by_dose[dose].values()))
                for by_dose in found[kind].values()
            )
            lines.append(f"  {dose:>6g}" + "".join(f"{cell:>28}" for cell in cells))
        ends = [by_dose["dose found in 80 %"] for by_dose in found[kind].values()]
        first = min(options.doses)  # nothing was measured between it and 0
        shown = ("never" if d is None else f"{d:.2f}" if d > first else f"<= {first:g}" for d in ends)
        lines.append("  80 %: " + "".join(f"{each:>28}" for each in shown))
    return "\n".join(lines)


def figure(found, head, options):
    """Shares found against the dose: a panel for each failure, a colour for each n."""
    sheet = Sheet(
        6.75,
        1.9,
        Margins(left=0.5, right=0.15, bottom=0.42, top=0.2, first=0.12, text=0.1),
        "Planted failures found by compare",
        f"{head}. Solid: two groups; dashed: pairs; dotted: two groups with shuffled labels.",
        legend_rows=1,
    )
    line, doses = matplotlib_part("lines").Line2D, [0.0, *options.doses]
    for place, (failure, of) in enumerate(found.items()):
        axes = sheet.panel(3.2 * place, 0.12, 2.75, 1.78)
        style_plot(axes, "y", "0.9")
        for n, colour in zip(options.n, COLOURS, strict=False):
            for kind, name, style in (
                ("two groups", "found", "-"),
                ("pairs", "found", "--"),
                ("two groups", "shuffled: found", ":"),
            ):
                shares = [of[kind][n][dose][name] for dose in doses]
                axes.plot(
                    range(len(doses)), shares, style, color=colour, linewidth=1, marker="o", markersize=2
                )
        axes.set_xticks(range(len(doses)), labels=[f"{dose:g}" for dose in doses])
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel(f"dose of {failure}, nats", fontsize=TEXT_SIZE)
        axes.set_ylabel("share of draws" if not place else "", fontsize=TEXT_SIZE)
    handles = [
        line([], [], color=colour, label=f"n = {n}") for n, colour in zip(options.n, COLOURS, strict=False)
    ]
    sheet.legend(handles, columns=len(handles), gap=0.08)
    return sheet.figure


if __name__ == "__main__":
    main()
