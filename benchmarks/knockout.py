"""All step knockouts of a trace from one shared prefix, against one full forward pass per pair.

    python benchmarks/knockout.py                               # 24 steps, 1000 tokens, the default model
    python benchmarks/knockout.py --all                         # time every full pass instead of a sample
    python benchmarks/knockout.py --gsm8k DATA.jsonl --traces 50   # agreement of scores, in place of speed
    python benchmarks/knockout.py --screened [--model testbed] [--top-alone 8 4] [--tolerances 0.25 0.05]
    python benchmarks/knockout.py --screened --model FILE.gguf --gsm8k DATA.jsonl
    python benchmarks/knockout.py --screened --cost [--fit 12 25 50 100]     # cost only, 40 tokens a step

1. Speed. A made-up trace of the length and number of steps asked for (cost does not depend on the words).
   Both methods run once to warm up, then in turn, `--repeats` times; a time is the median over its turns, the
   ratio the median of turn-wise ratios. The full method runs `--sample` pairs drawn at random, and its time
   for all is extrapolated by the number of passes, pairs and one without a cut, which all have the same
   length. Effects of the sample must agree between the methods.
2. Cost against the number of steps, at the same number of tokens: times of the cached method fitted by a + b
   n. With n steps of T / n tokens the rows of all batches together hold T (n + 1) / 2 tokens.
3. Agreement. Of each trace of DATA (one record per line, `question`, `thinking` with one step per line,
   `summary`): Step-Saliency per token, raw attention, knockout by `--measure` and nearness, all layers, heads
   averaged; means over traces with 95 % BCa intervals. Nothing here reads whether a solution is correct.
4. Screened. All pairs of each trace are cut, then screened with each `top` and tolerance. Reported by number
   of steps: of pairs with an effect of 0.5 nats or more, the part that was cut alone, with the 95 %
   percentile interval of a bootstrap over traces; rows x tokens of all passes, ranking included, against
   those of all pairs; and of pairs left to groups, the part whose own effect is beyond the tolerance.
   `testbed` reads right solutions of fresh problems, every premise a step; other models the traces of DATA,
   by sentences. `--cost` screens made-up traces of 40 tokens a step and fits rows x tokens by a power of the
   number of steps; those of all pairs are counted, not run, as `tokens_run` confirms on the traces above.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from stepflow_tl import ReasoningTrace, load_model, load_testbed_model, step_knockout, step_saliency
from stepflow_tl.causal.agreement import score_maps, summarise_agreement, trace_agreement
from stepflow_tl.testbed import ProblemSpec, make_problems
from stepflow_tl.testbed.edges import trace_of
from stepflow_tl.trace.splitting import LineSplitter, SentenceSplitter

WORDS = (
    "so take the sum of both and add 7 to it then halve what is left which gives 12 for the next one".split()
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--sample", type=int, default=12, help="pairs of the full method that are timed")
    parser.add_argument("--all", action="store_true", help="time the full method on all pairs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fit", type=int, nargs="*", default=[6, 12, 24, 48], help="numbers of steps")
    parser.add_argument("--gsm8k", metavar="FILE", help="agreement on the traces of this file instead")
    parser.add_argument("--traces", type=int, default=50)
    parser.add_argument(
        "--top", type=int, default=1, help="length of the lists compared; traces are short, so chance is high"
    )
    parser.add_argument("--measure", choices=("nll", "kl"), default="nll")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the sample, of which traces, of the bootstrap"
    )
    parser.add_argument("--model", default="smollm2", help="smollm2, testbed, or a GGUF file or folder")
    parser.add_argument("--screened", action="store_true", help="screened against all pairs instead")
    parser.add_argument("--top-alone", type=int, nargs="+", default=[8, 4, 2], help="`top` of screening")
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.25])
    parser.add_argument("--lengths", type=int, nargs="+", default=[6, 10, 14], help="of testbed problems")
    parser.add_argument("--distractors", type=int, default=0, help="of testbed problems")
    parser.add_argument("--cost", action="store_true", help="with --screened: cost on made-up traces")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = load_testbed_model() if options.model == "testbed" else load_model(options.model)
    where = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{model.cfg.model_name}, {where}")
    if options.screened:
        found = screening_cost(model, options) if options.cost else screening(model, options)
    else:
        found = agreement(model, options) if options.gsm8k else speed(model, options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


# --- speed -------------------------------------------------------------------------------------------------


def speed(model, options):
    trace = made_up_trace(model.tokenizer, options.steps, options.tokens)
    n_steps = len(trace.steps)
    n_pairs = n_steps * (n_steps - 1) // 2
    pairs = [(i, j) for i in range(n_steps) for j in range(i)]
    size = n_pairs if options.all else min(options.sample, n_pairs)
    chosen = np.random.default_rng(options.seed).permutation(n_pairs)[:size]
    sample = [pairs[index] for index in sorted(chosen)]
    print(f"{trace}: {n_pairs} pairs")
    _, found = timed(lambda: step_knockout(model, trace, method="cached"))
    timed(lambda: step_knockout(model, trace, pairs=sample[:1], method="full"))
    cached, full = [], []
    for _ in range(options.repeats):
        cached.append(timed(lambda: step_knockout(model, trace, method="cached"))[0])
        seconds, exact = timed(lambda: step_knockout(model, trace, pairs=sample, method="full"))
        full.append(seconds * (n_pairs + 1) / (size + 1))
    off = float((found.effects - exact.effects)[exact.measured].abs().max())
    largest = float(exact.effects.abs().max())
    ratios = [f / c for f, c in zip(full, cached, strict=True)]
    ratio = statistics.median(ratios)
    how = "all timed" if size == n_pairs else f"extrapolated from {size} pairs"
    print(f"full pass per pair    {statistics.median(full):9.1f} s   ({how})")
    print(f"shared prefix         {statistics.median(cached):9.1f} s")
    print(f"ratio                 {ratio:9.1f} x   (turns: {', '.join(f'{r:.1f}' for r in ratios)})")
    print(f"largest deviation {off:.1e} nats on the sample, whose largest effect is {largest:.2g} nats")
    result = dict(
        steps=n_steps, tokens=len(trace), pairs=n_pairs, sample=size, full=full, cached=cached, ratio=ratio
    )
    return {
        **result,
        "deviation": off,
        "fit": cost_of_steps(model, options) if len(options.fit) > 2 else None,
    }


def cost_of_steps(model, options):
    times = []
    for n_steps in options.fit:
        trace = made_up_trace(model.tokenizer, n_steps, options.tokens)
        runs = [
            timed(lambda trace=trace: step_knockout(model, trace, method="cached"))[0]
            for _ in range(options.repeats)
        ]
        times.append(statistics.median(runs))
        print(f"{n_steps:4} steps {times[-1]:8.1f} s", flush=True)
    n, t = np.array(options.fit, dtype=float), np.array(times)
    slope, start = np.polyfit(n, t, 1)
    left = 1 - ((t - start - slope * n) ** 2).sum() / ((t - t.mean()) ** 2).sum()
    print(f"seconds = {start:.2f} + {slope:.3f} * steps (R^2 {left:.3f}) at {options.tokens} tokens")
    return dict(steps=options.fit, seconds=times, start=float(start), slope=float(slope), r2=float(left))


def timed(work):
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def made_up_trace(tokenizer, n_steps, n_tokens):
    """A question, thinking lines and a summary line, all of about the same length, exactly so many tokens."""
    words = [5] * n_steps

    def build():
        lines = [
            " ".join(WORDS[(7 * i + j) % len(WORDS)] for j in range(n)) + "." for i, n in enumerate(words)
        ]
        question, *thinking, summary = lines
        return ReasoningTrace.from_parts(
            tokenizer, question, "\n".join(thinking), summary, splitter=LineSplitter()
        )

    while len(trace := build()) < n_tokens:
        short = n_tokens - len(trace)
        for i in range(n_steps) if short >= 2 * n_steps else [words.index(min(words))]:
            words[i] += 1
    if len(trace) != n_tokens or len(trace.steps) != n_steps:
        print(f"note: the trace has {len(trace)} tokens and {len(trace.steps)} steps", file=sys.stderr)
    return trace


# --- agreement ---------------------------------------------------------------------------------------------


def agreement(model, options):
    found, start = [], time.perf_counter()
    records = load_records(options.gsm8k, options.traces, options.seed)
    for index, record in enumerate(records):
        parts = (record["question"], record["thinking"], record["summary"])
        trace = ReasoningTrace.from_parts(model.tokenizer, *parts, splitter=LineSplitter())
        knockout = step_knockout(model, trace, measure=options.measure)
        maps = score_maps(model, step_saliency(model, trace), knockout)
        found.append(trace_agreement(maps, knockout.measured.numpy(), k=options.top))
        print(f"{index + 1}/{len(records)} traces, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    summary = summarise_agreement(found, seed=options.seed)
    print(summary)
    return {"measure": options.measure, "seed": options.seed, **summary.to_json()}


# --- screened ----------------------------------------------------------------------------------------------


LARGE = 0.5  # nats
BATCH_TOKENS = 32_768  # the default of `step_knockout`


def screening(model, options):
    traces = screened_traces(model, options)
    settings = [(top, tolerance) for top in options.top_alone for tolerance in options.tolerances]
    rows = []
    for index, trace in enumerate(traces):
        whole = step_knockout(model, trace, measure=options.measure)
        ranking = step_saliency(model, trace)
        assert whole.tokens_run == all_pairs_tokens(trace)
        for top, tolerance in settings:
            found = step_knockout(
                model,
                trace,
                pairs="screened",
                measure=options.measure,
                top=top,
                tolerance=tolerance,
                ranking=ranking,
            )
            large = whole.effects.abs() >= LARGE
            in_groups = found.bounds.isfinite()
            own, joint = whole.effects[in_groups].abs(), found.bounds[in_groups].abs()
            row = {
                "trace": index,
                "steps": len(trace.steps),
                "tokens": len(trace),
                "top": top,
                "tolerance": tolerance,
                "large": int(large.sum()),
                "found": int((large & found.measured).sum()),
                "grouped": int(in_groups.sum()),
                "beyond tolerance": int((own > tolerance).sum()),
                "beyond group": int((own > joint + 1e-4).sum()),
                "largest grouped": float(own.max()) if len(own) else 0.0,
                "run": found.tokens_run + 3 * len(trace),  # the ranking was computed once for all settings
                "run of all": whole.tokens_run,
                "redundant": len(found.redundant),
            }
            rows.append(row)
        print(f"{index + 1}/{len(traces)} traces", file=sys.stderr)
    print(f"{len(traces)} traces, seed {options.seed}, {options.measure}; large: {LARGE} nats or more")
    header = ("steps", "top", "tolerance", "large pairs found", "of", "rows x tokens", "grouped", "beyond")
    print("{:>9}{:>5}{:>10}{:>25}{:>7}{:>14}{:>9}{:>18}".format(*header))
    bins = sorted({(0, 10**6), *((size, size + 9) for size in {row["steps"] // 10 * 10 for row in rows})})
    for top, tolerance in settings:
        for low, high in bins:
            chosen = [
                row
                for row in rows
                if (row["top"], row["tolerance"]) == (top, tolerance) and low <= row["steps"] <= high
            ]
            part, ends = part_found(chosen, options.seed)
            grouped = sum(row["grouped"] for row in chosen)
            beyond = sum(row["beyond tolerance"] for row in chosen)
            ratio = sum(row["run of all"] for row in chosen) / sum(row["run"] for row in chosen)
            steps = "all" if high == 10**6 else f"{low}-{high}"
            print(
                f"{steps:>9}{top:>5}{tolerance:>10g}{part:>9.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"
                f"{sum(row['large'] for row in chosen):>7}{ratio:>11.2f} x{grouped:>10}"
                f"{beyond:>7} = {beyond / max(grouped, 1):.2%}"
            )
    return rows


def part_found(rows, seed):
    """Part of the large pairs that was cut alone, and its interval; traces are what was sampled."""
    counts = np.array([[row["found"], row["large"]] for row in rows], dtype=float)
    drawn = np.random.default_rng(seed).integers(len(counts), size=(10_000, len(counts)))
    sums = counts[drawn].sum(1)
    parts = sums[sums[:, 1] > 0]
    if not len(parts):
        return float("nan"), (float("nan"), float("nan"))
    ends = np.quantile(parts[:, 0] / parts[:, 1], [0.025, 0.975])
    return counts[:, 0].sum() / counts[:, 1].sum(), ends


def screened_traces(model, options):
    if options.model == "testbed":
        per_length = -(-options.traces // len(options.lengths))
        problems = [
            problem
            for n_steps in options.lengths
            for problem in make_problems(
                ProblemSpec(n_steps=n_steps, n_distractors=options.distractors), per_length, seed=options.seed
            )
        ]
        return [trace_of(model.tokenizer, problem) for problem in problems]
    if not options.gsm8k:
        sys.exit("--screened with this model reads the traces of --gsm8k FILE")
    by_sentence = {"splitter": SentenceSplitter(), "question_splitter": SentenceSplitter()}
    return [
        ReasoningTrace.from_parts(
            model.tokenizer, record["question"], record["thinking"], record["summary"], **by_sentence
        )
        for record in load_records(options.gsm8k, options.traces, options.seed)
    ]


def screening_cost(model, options):
    found = []
    for n_steps in options.fit:
        trace = made_up_trace(model.tokenizer, n_steps, 40 * n_steps)
        of_all = all_pairs_tokens(trace)
        for top in options.top_alone:
            for tolerance in options.tolerances:
                seconds, cut = timed(
                    lambda trace=trace, top=top, tolerance=tolerance: step_knockout(
                        model, trace, pairs="screened", measure=options.measure, top=top, tolerance=tolerance
                    )
                )
                row = dict(steps=n_steps, tokens=len(trace), top=top, tolerance=tolerance, seconds=seconds)
                found.append({**row, "run": cut.tokens_run, "run of all": of_all})
                print(
                    f"{n_steps:4} steps {len(trace):5} tokens, top {top}, tolerance {tolerance:g}: "
                    f"{cut.tokens_run:8} of {of_all:8} rows x tokens, {of_all / cut.tokens_run:5.2f} x "
                    f"fewer, {seconds:6.1f} s",
                    flush=True,
                )
    for top in options.top_alone:
        for tolerance in options.tolerances:
            rows = [row for row in found if (row["top"], row["tolerance"]) == (top, tolerance)]
            n = np.log([row["steps"] for row in rows])
            powers = [
                np.polyfit(n, np.log([row[name] for row in rows]), 1)[0] for name in ("run", "run of all")
            ]
            print(f"top {top}, tolerance {tolerance:g}: steps ^ {powers[0]:.2f}, all pairs ^ {powers[1]:.2f}")
    return found


def all_pairs_tokens(trace):
    """Rows x tokens of all pairs from a shared prefix; see `causal.knockout_passes`."""
    total = 2 * len(trace)
    for step in trace.steps[1:]:
        if step.token_start < len(trace) - 1:
            batches = -(-step.index // max(1, BATCH_TOKENS // step.token_end - 1))
            total += (step.index + batches) * step.n_tokens
    return total


# --- traces ------------------------------------------------------------------------------------------------


def load_records(path, n_traces, seed):
    with open(path) as file:
        records = [json.loads(line) for line in file if line.strip()]
    # With fewer than two thinking lines there is next to nothing to rank.
    records = [r for r in records if r["thinking"].strip().count("\n") >= 1 and r["summary"].strip()]
    chosen = np.random.default_rng(seed).permutation(len(records))[:n_traces]
    return [records[i] for i in sorted(chosen)]


if __name__ == "__main__":
    main()
