"""How much of a planted failure does each half of StepFlow undo, and does its control?

    python benchmarks/repair.py [--model testbed | testbed-12 | smollm2 | MODEL.gguf]
        [--answers answers.jsonl] [--pool 60] [--doses 2 4 8] [--tau 0.15 0.3] [--alpha 0.06 0.12]
        [--problems 0] [--out out/repair]

1. Traces as in `power.py`: right ones. The NLL of thinking and of summary, in nats per token: of the plain
   model, of the planted one (`plant_lock_in`, `plant_decay`), and of the planted one under each repair:
   bridge, momentum and StepFlow, the halves at each strength, and their controls (`placebo`) at the first.
2. *Share undone* = (planted - repaired) / (planted - plain), means over traces, percentile bootstrap over
   traces (10 000). It is left out where the damage's own interval holds 0.
3. *Below its control*: NLL under the control minus under the repair, paired, BCa interval.
4. Crossed: every repair meets both failures, and no failure at all (dose 0), where a repair that lowers
   the NLL does something else than repair.
5. Which rows are acted on: the share of (query, head) rows that the bridge raised, and momentum's injections
   per token of thinking and summary.
6. With `--problems`, the testbed answers so many new ones under each condition: accuracy, paired by problem.
   "plain" is the planted model without a repair there.

Measurements are kept in `OUT/losses.jsonl`, one line each, and not taken again. Writes `repair.txt`,
`repair.json`.
"""

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from power import PLANTS, SEGMENTS, add_source, kept_rows, losses, model_and_traces, problems_of

from stepflow_tl.evaluation import Decoding, evaluate, questions_of
from stepflow_tl.models.bands import deep_band
from stepflow_tl.models.passes import replaced_forward
from stepflow_tl.statistics.resampling import bca_interval
from stepflow_tl.stepflow import StepFlow

REPAIRS = ("bridge", "momentum", "StepFlow")


def main(arguments=None) -> str:
    """The tables, printed and returned; `arguments` as on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_source(parser)
    parser.add_argument("--doses", type=float, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tau", type=float, nargs="+", default=[0.15, 0.05, 0.3])
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.06, 0.03, 0.12])
    parser.add_argument("--repairs", nargs="+", default=REPAIRS, choices=REPAIRS)
    parser.add_argument("--failures", nargs="+", default=list(PLANTS), choices=list(PLANTS))
    parser.add_argument("--problems", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/repair"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    model, traces = model_and_traces(options)
    flows = repairs(options)
    found = measured(model, traces, flows, options)
    rows = [
        row
        for failure, dose in cases(options)
        for row in summarise(found, failure, dose, flows, np.random.default_rng(options.seed))
    ]
    lengths = [len(trace) for trace in traces.values()]
    head = (
        f"{options.model}: {len(traces)} right traces of {min(lengths)} to {max(lengths)} tokens "
        f"(median {np.median(lengths):.0f}), seed {options.seed}; [95 %]"
    )
    parts = [head, table(rows)]
    answers = accuracy(model, options) if options.problems else {}
    parts += [evaluation.table() for evaluation in answers.values()]
    (options.out / "repair.txt").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    data = dict(options={name: str(value) for name, value in vars(options).items()}, rows=rows)
    data["accuracy"] = {name: json.loads(evaluation.to_json()) for name, evaluation in answers.items()}
    (options.out / "repair.json").write_text(json.dumps(data, indent=1))
    print("\n\n".join(parts))
    return "\n\n".join(parts)


def cases(options):
    return [("", 0.0), *((failure, dose) for failure in options.failures for dose in options.doses)]


def repairs(options):
    """By name: the repairs at every strength, and the controls at the first."""
    tau, alpha = options.tau[0], options.alpha[0]
    flows = {f"bridge {each:g}": StepFlow(tau_max=each, alpha=0.0) for each in options.tau}
    flows |= {f"momentum {each:g}": StepFlow(tau_max=0.0, alpha=each) for each in options.alpha}
    flows["StepFlow"] = StepFlow(tau_max=tau, alpha=alpha)
    shared = dict(seed=options.seed)
    flows["bridge control"] = StepFlow(tau_max=tau, alpha=0.0, placebo="bridge", **shared)
    flows["momentum control"] = StepFlow(tau_max=0.0, alpha=alpha, placebo="momentum", **shared)
    flows["StepFlow control"] = StepFlow(tau_max=tau, alpha=alpha, placebo="both", **shared)
    return {name: flow for name, flow in flows.items() if name.split()[0] in options.repairs}


def planted(failure, dose, flow=None):
    return PLANTS[failure or "lock_in"](dose, flow=flow)


def measured(model, traces, flows, options):
    """By failure, dose and repair ("" for none): NLLs `[trace, 2]`, and what was acted on `[trace, 2]`."""
    path, found = options.out / "losses.jsonl", {}
    held = {tuple(row["key"]): row for row in kept_rows(path)}
    flows = {"": None, **flows}
    wanted = [(*case, repair, flow) for case in cases(options) for repair, flow in flows.items()]
    keys = {
        name: [(name, len(trace), *each[:3], repr(each[3])) for each in wanted]
        for name, trace in traces.items()
    }
    with path.open("a") as file:
        for index, (name, trace) in enumerate(traces.items()):
            below = {}  # what enters the deep band under each repair, which no decay changes
            for key, (failure, dose, _, flow) in zip(keys[name], wanted, strict=True):
                if key not in held:
                    held[key] = dict(key=key) | measure(model, trace, failure, dose, flow, below)
                    file.write(json.dumps(held[key]) + "\n")
                    file.flush()
            print(f"\r{index + 1}/{len(traces)} traces", end="", file=sys.stderr)
    print(file=sys.stderr)
    for own in keys.values():
        for key, (failure, dose, repair, _) in zip(own, wanted, strict=True):
            row = held[key]
            values = [row["nll"][segment] for segment in SEGMENTS] + row["acted"]
            found.setdefault((failure, dose, repair), []).append(values)
    return {key: np.array(values) for key, values in found.items()}


def measure(model, trace, failure, dose, flow, below):
    """NLLs of one trace, and the shares of rows raised and of tokens injected."""
    n_layers = model.cfg.n_layers
    first, point = deep_band(n_layers).start, f"blocks.{deep_band(n_layers).start}.hook_resid_pre"
    hooks = planted(failure, dose, flow).hooks(model, trace)
    with ExitStack() as stack:
        if failure == "decay" and flow in below:
            for block in model.blocks[:first]:  # the same output as under this repair without the plant
                stack.enter_context(replaced_forward(block, lambda hidden, *_, **__: below[flow][0]))
        kept = []
        keep = [] if failure else [(point, lambda hidden, hook: kept.append(hidden))]
        nll = losses(model, trace, [*keep, *hooks])
    counts = hooks.report().to_json()
    raised = sum(row["adjusted"] for row in counts) / max(1, sum(row["rows"] for row in counts))
    if kept:
        below[flow] = kept[0], raised
    elif failure == "decay" and flow in below:
        raised = below[flow][1]
    n_written = sum(int((trace.segment_ids == part).sum()) for part in SEGMENTS.values())
    return dict(nll=nll, acted=[raised, max((row["injections"] for row in counts), default=0) / n_written])


def summarise(found, failure, dose, flows, rng):
    """One row per repair of one failure at one dose."""
    plain, broken = (found[key][:, :2] for key in (("", 0.0, ""), (failure, dose, "")))
    damage = interval(broken - plain, rng)
    rows = [dict(failure=failure, dose=dose, repair="", damage=damage)]
    for repair in flows:
        mended = found[failure, dose, repair]
        kind = repair.split()[0]
        row = dict(failure=failure, dose=dose, repair=repair, acted=mended[:, 2:].mean(0).tolist())
        row["gain"] = interval(broken - mended[:, :2], rng)
        row["share"] = [
            None if low <= 0 <= high else share_undone(plain, broken, mended, i, rng)
            for i, (_, low, high) in enumerate(damage)
        ]
        if "control" not in repair:
            control = found[failure, dose, f"{kind} control"][:, :2]
            row["below control"] = interval(control - mended[:, :2], rng)
        rows.append(row)
    return rows


def interval(changes, rng):
    """Mean and interval of each column."""
    if not changes.any():
        return [[0.0, 0.0, 0.0] for _ in range(changes.shape[1])]
    ends = bca_interval([(1, changes)], confidence=0.95, n_bootstrap=4000, rng=rng)
    return [list(map(float, each)) for each in zip(changes.mean(0), *ends, strict=True)]


def share_undone(plain, broken, mended, column, rng):
    parts = np.column_stack([broken - mended[:, :2], broken - plain])[:, [column, column + 2]]
    n = len(parts)
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=10_000) / n @ parts
    shares = drawn[:, 0] / drawn[:, 1]
    return [float(parts[:, 0].mean() / parts[:, 1].mean()), *map(float, np.quantile(shares, (0.025, 0.975)))]


def table(rows):
    lines, names = [], tuple(SEGMENTS)
    for row in rows:
        if not row["repair"]:
            cells = (
                "{} {:+.4f} [{:+.4f}, {:+.4f}]".format(name, *each)
                for name, each in zip(names, row["damage"], strict=True)
            )
            title = f"{row['failure']}, dose {row['dose']:g}" if row["failure"] else "nothing planted"
            lines += ["", f"{title}: damage in nats per token: {', '.join(cells)}"]
            header = ("thinking", "summary", "thinking", "summary")
            lines.append(
                f"{'':18}{'share undone (nats at dose 0)':>52}{'nats below its control':>52}{'acted':>14}"
            )
            lines.append(f"{'':18}" + "".join(f"{name:>26}" for name in header) + f"{'rows, tokens':>14}")
            continue
        gains = row["share"] if row["failure"] else row["gain"]
        cells = [*gains, *row.get("below control", [None, None])]
        shown = ("-" if cell is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*cell) for cell in cells)
        acted = "{:.2f}, {:.3f}".format(*row["acted"])
        lines.append(f"{row['repair']:18}" + "".join(f"{cell:>26}" for cell in shown) + f"{acted:>14}")
    return "\n".join(lines[1:])


def accuracy(model, options):
    """By failure and dose: the testbed's answers; "plain" is the planted model without a repair."""
    problems = problems_of(options, options.steps, options.problems // len(options.steps), 10_000)
    longest = max(len(model.tokenizer(p.thinking + p.answer).input_ids) for p in problems)
    standard = {
        "bridge": StepFlow(alpha=0.0),
        "momentum": StepFlow(tau_max=0.0),
        "StepFlow": StepFlow(),
        "StepFlow control": StepFlow(placebo="both", seed=options.seed),
    }
    found = {}
    for failure, dose in cases(options):
        conditions = {
            name: planted(failure, dose, flow) for name, flow in {"plain": None, **standard}.items()
        }
        decoding = Decoding(max_new_tokens=longest + 24, batch_size=125)
        name = f"{failure} {dose:g}" if failure else "nothing planted"
        found[name] = evaluate(
            model, questions_of(problems), conditions=conditions, decoding=decoding, seed=options.seed
        )
        print(name, found[name].table(), sep="\n", file=sys.stderr)
    return found


if __name__ == "__main__":
    main()
