"""All step knockouts of a trace from one shared prefix, against one full forward pass per pair.

    python benchmarks/knockout.py                               # 24 steps, 1000 tokens, the default model
    python benchmarks/knockout.py --all                         # time every full pass instead of a sample
    python benchmarks/knockout.py --gsm8k DATA.jsonl --traces 50   # agreement of scores, in place of speed

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
Screened cuts are measured by `benchmarks/screening.py`.
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

from stepflow_tl import ReasoningTrace, load_model, step_knockout, step_saliency
from stepflow_tl.causal.agreement import score_maps, summarise_agreement, trace_agreement
from stepflow_tl.trace.splitting import LineSplitter

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
    parser.add_argument("--model", default="smollm2", help="smollm2, or a GGUF file or folder")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = load_model(options.model)
    where = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{model.cfg.model_name}, {where}")
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
