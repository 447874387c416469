"""Does StepFlow change what it says it changes? Step maps of gsm8k traces with it, without it, and with its
controls.

    python benchmarks/stepflow_gsm8k.py DATA.jsonl [--traces 100] [--json out.json]

DATA has one record per line with `question`, `thinking` (one step per line) and `summary`. For each trace
the map of `objective="per_token"` is taken on the default model under each condition; `lock_in` is averaged
over the shallow band and `thinking_share` over the deep band. The table has means, and paired differences
to the plain model and to the placebo with 95 % bootstrap intervals (BCa) over traces. Nothing here reads
whether a solution is correct.
"""

import argparse
import contextlib
import json
import sys
import time

import numpy as np
import torch

from stepflow_tl.diagnosis import diagnose
from stepflow_tl.models.bands import deep_band, shallow_band
from stepflow_tl.models.loading import load_default_model
from stepflow_tl.saliency import step_saliency
from stepflow_tl.statistics.resampling import bca_interval
from stepflow_tl.stepflow import StepFlow
from stepflow_tl.trace import ReasoningTrace
from stepflow_tl.trace.splitting import LineSplitter

CONDITIONS = {
    "plain": None,
    "StepFlow": StepFlow(),
    "bridge only": StepFlow(alpha=0),
    "momentum only": StepFlow(tau_max=0),
    "placebo of both": StepFlow(placebo="both"),
    "placebo of the bridge": StepFlow(alpha=0, placebo="bridge"),
    "placebo of momentum": StepFlow(tau_max=0, placebo="momentum"),
    "StepFlow, step granularity": StepFlow(granularity="step"),
}
METRICS = ("lock_in", "thinking_share")
PLACEBO_OF = {
    "StepFlow": "placebo of both",
    "bridge only": "placebo of the bridge",
    "momentum only": "placebo of momentum",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="JSONL file with question, thinking and summary")
    parser.add_argument("--traces", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="which traces, and the bootstrap")
    parser.add_argument("--json", default=None)
    options = parser.parse_args()
    model = load_default_model()
    records = load_records(options.data, options.traces, options.seed)
    traces = [to_trace(model.tokenizer, record) for record in records]
    values = {name: [] for name in CONDITIONS}
    start = time.perf_counter()
    for index, trace in enumerate(traces):
        for name, flow in CONDITIONS.items():
            values[name].append(measure(model, trace, flow))
        spent = time.perf_counter() - start
        print(f"{index + 1}/{len(traces)} traces, {spent:.0f} s", file=sys.stderr)
    table = {name: np.array(rows) for name, rows in values.items()}
    rows = summarise(table, np.random.default_rng(options.seed))
    print_table(rows, len(traces))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                dict(n_traces=len(traces), rows=rows, values={k: v.tolist() for k, v in table.items()}), file
            )


def load_records(path, n_traces, seed):
    with open(path) as file:
        records = [json.loads(line) for line in file if line.strip()]
    # Lock-in is defined from the second thinking step on.
    records = [r for r in records if r["thinking"].strip().count("\n") >= 1 and r["summary"].strip()]
    chosen = np.random.default_rng(seed).permutation(len(records))[:n_traces]
    return [records[i] for i in sorted(chosen)]


def to_trace(tokenizer, record):
    parts = (record["question"], record["thinking"], record["summary"])
    return ReasoningTrace.from_parts(tokenizer, *parts, splitter=LineSplitter())


def measure(model, trace, flow):
    hooks = [] if flow is None else flow.hooks(model, trace, detach_values=True)
    with model.hooks(fwd_hooks=hooks) if hooks else contextlib.nullcontext(), torch.enable_grad():
        diagnosis = diagnose(step_saliency(model, trace, objective="per_token"))
    n_layers = int(model.cfg.n_layers)
    bands = {"lock_in": shallow_band(n_layers), "thinking_share": deep_band(n_layers)}
    return [float(getattr(diagnosis, metric)[list(bands[metric])].nanmean()) for metric in METRICS]


def summarise(table, rng):
    rows = []
    for name, values in table.items():
        row = dict(condition=name, **{metric: float(values[:, i].mean()) for i, metric in enumerate(METRICS)})
        for against in ("plain", PLACEBO_OF.get(name)):
            if against is not None and name != "plain":
                difference = values - table[against]
                low, high = bca_interval([(1, difference)], confidence=0.95, n_bootstrap=10_000, rng=rng)
                means = difference.mean(0)
                label = "plain" if against == "plain" else "placebo"
                for i, metric in enumerate(METRICS):
                    row[f"{metric} - {label}"] = [float(means[i]), float(low[i]), float(high[i])]
        rows.append(row)
    return rows


def print_table(rows, n_traces):
    print(f"{n_traces} traces; mean difference [95 % interval]")
    head = ["condition", *METRICS, *(f"{m} - {against}" for against in ("plain", "placebo") for m in METRICS)]
    cells = [head]
    for row in rows:
        line = [row["condition"], *(f"{row[m]:.4f}" for m in METRICS)]
        for name in head[3:]:
            line.append("{:+.4f} [{:+.4f}, {:+.4f}]".format(*row[name]) if name in row else "")
        cells.append(line)
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
