"""What screened cuts find and what they cost, against all pairs.

    python benchmarks/screening.py --traces testbed --steps 14 26 --distractors 26 --n 8 --seed 1
    python benchmarks/screening.py --traces chains --steps 8 38 --targets 12
    python benchmarks/screening.py --traces joined --problems 6 --answers answers.jsonl --targets 12
    python benchmarks/screening.py --cost 12 25 50 100       # cost alone, 40 tokens a step

1. Traces. `testbed`: right solutions of fresh problems, every premise a step. `chains`: proofs of
   `chains.py`, every line a step. `joined`: so many answers that a model wrote to questions of gsm8k, in one
   trace: all questions by sentences, then all answers by paragraphs. `answers`: each of them alone.
2. Of each trace `--targets` query steps drawn at random (all by default) are cut from every earlier step:
   the truth. The search of `causal.screening` then runs on the same steps for every setting of ranking, `top`
   and tolerance; a set of steps that was cut before is not cut again, so a setting costs what is new in it.
3. Found: of the pairs with an effect of 0.5 nats or more, the part that was cut alone, with the 95 %
   percentile interval of a bootstrap over traces.
4. Rows x tokens of all pairs by those screened. Passes over the whole trace count in proportion to the tokens
   of the steps drawn: two for the cache, and three for a ranking; "map at hand" leaves these three out. Rows
   that check the cache, eight at most, are left out. `best`: the same of a search that cuts the large
   pairs alone and nothing else, without ranking or groups: no search that measures each found pair by a row
   of its own costs less.
5. Beyond: of the pairs left to a group, those whose own effect is beyond its size.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from chains import make_proofs
from knockout import made_up_trace

from stepflow_tl import ReasoningTrace, load_model, load_testbed_model, step_knockout, step_saliency
from stepflow_tl.causal.cut import CutEffect, EdgeCut, Effect, KeySet
from stepflow_tl.causal.knockout_passes import CachedPasses, Reading
from stepflow_tl.causal.screening import promise, promise_order, screen
from stepflow_tl.models.passes import attached, frozen
from stepflow_tl.testbed import ProblemSpec, make_problems
from stepflow_tl.testbed.edges import trace_of

LARGE = 0.5  # nats
BATCH_TOKENS = 32_768  # the default of `step_knockout`
RANKINGS = {"cut": {"score": "cut"}, "saliency": {}, "log-odds": {"objective": "log_odds"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", choices=("testbed", "chains", "joined", "answers"), default="testbed")
    parser.add_argument("--model", help="a GGUF file or a name; the testbed's, or the default one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--n", type=int, default=4, help="traces of each length")
    parser.add_argument("--steps", type=int, nargs="+", default=[14], help="testbed, chains")
    parser.add_argument("--distractors", type=int, nargs="+", default=[0], help="of each length")
    parser.add_argument("--problems", type=int, default=6, help="joined")
    parser.add_argument("--answers", type=Path, help="answers.jsonl of `stepflow-tl evaluate`")
    parser.add_argument("--targets", type=int, help="query steps drawn of each trace")
    parser.add_argument("--rankings", nargs="+", choices=RANKINGS, default=["cut", "saliency"])
    parser.add_argument("--top", type=int, nargs="+", default=[2, 3, 4, 6, 8])
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--seed", type=int, default=0, help="of the traces, the steps drawn, the bootstrap")
    parser.add_argument("--cost", type=int, nargs="+", metavar="STEPS", help="cost alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = options.model or ("testbed" if options.traces == "testbed" and not options.cost else "smollm2")
    is_testbed = name == "testbed"
    model = load_testbed_model() if is_testbed else load_model(name, dtype=getattr(torch, options.dtype))
    if options.cost:
        found = cost(model, options.cost)
    else:
        found = frontier(model, options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


# --- found, and at what price ------------------------------------------------------------------------------


@dataclass
class Trial:
    """One trace, the steps drawn of it, and every cut that was made."""

    trace: ReasoningTrace
    readings: list[Reading]
    passes: CachedPasses
    promised: dict[str, Any]
    known: dict[tuple[int, KeySet], CutEffect] = field(default_factory=dict)

    def cuts(self, reading: Reading, sets: list[KeySet]) -> list[CutEffect]:
        """What these cuts did, made now or before."""
        names = [(reading.query.index, tuple(sorted(keys))) for keys in sets]
        new = list(dict.fromkeys(each for each in names if each not in self.known))
        if new:
            found = self.passes.cuts(reading, [keys for _, keys in new])
            self.known.update(zip(new, found, strict=True))
        return [self.known[each] for each in names]


def frontier(model: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of counts for each trace and setting; the table is printed."""
    rows, traces = [], some_traces(model.tokenizer, options)
    settings = [
        (name, top, t) for name in options.rankings for top in options.top for t in options.tolerances
    ]
    for index, trace in enumerate(traces):
        trial = prepared(model, trace, options, index)
        with frozen(model), torch.no_grad(), attached(model, last=trial.passes.hooks):
            for setting in settings:
                rows.append({"trace": index, **counted(trial, *setting)})
        done = f"{index + 1}/{len(traces)} traces: {len(trace.steps)} steps, {len(trace)} tokens"
        print(done, file=sys.stderr, flush=True)
    print(f"{len(traces)} traces ({options.traces}), {model.cfg.model_name}, seed {options.seed}")
    lengths = sorted({row["steps"] // 10 * 10 for row in rows})
    for low in lengths:
        chosen = [row for row in rows if row["steps"] // 10 * 10 == low]
        table(chosen, settings, f"{low} to {low + 9} steps", options.seed)
    return rows


def prepared(model: Any, trace: ReasoningTrace, options: argparse.Namespace, index: int) -> Trial:
    """Rankings, the shared prefix, and which steps are drawn."""
    promised = {name: promise(step_saliency(model, trace, **RANKINGS[name])) for name in options.rankings}
    steps = [step for step in trace.steps[1:] if step.token_start < len(trace) - 1]
    if options.targets:
        rng = np.random.default_rng([options.seed, index])
        drawn = rng.permutation(len(steps))[: options.targets]
        steps = [steps[place] for place in sorted(drawn)]
    readings = [
        Reading(
            step,
            tuple(range(step.index)),
            (),
            torch.arange(step.token_start, min(step.token_end, len(trace) - 1)),
        )
        for step in steps
    ]
    cut = EdgeCut(model, tuple(range(model.cfg.n_layers)))
    with frozen(model), torch.no_grad():
        passes = CachedPasses(model, trace, cut, Effect("nll"), BATCH_TOKENS, sparing=True)
    return Trial(trace, readings, passes, promised)


def counted(trial: Trial, ranking: str, top: int, tolerance: float) -> dict[str, Any]:
    """What one setting found in one trace, and its rows x tokens."""
    counts = dict.fromkeys(("large", "found", "pairs", "grouped", "beyond", "run", "best", "all", "cut"), 0)
    whole = 0  # tokens of the steps drawn: what one pass over the trace counts for
    for reading in trial.readings:
        query, n_tokens = reading.query.index, reading.query.n_tokens
        truth = [cut.effect for cut in trial.cuts(reading, [(key,) for key in reading.keys])]
        order = promise_order(trial.promised[ranking], query, reading.keys)
        found = screen(
            query, order, lambda sets, r=reading: trial.cuts(r, list(sets)), top=top, tolerance=tolerance
        )
        large = {key for key in reading.keys if abs(truth[key]) >= LARGE}
        bounding = [group for group in found.groups if group.role == "bound"]
        beyond = [abs(truth[key]) > group.size + 1e-4 for group in bounding for key in group.keys]
        counts["large"] += len(large)
        counts["found"] += len(large & set(found.alone))
        counts["cut"] += len(found.alone)
        counts["pairs"] += query
        counts["grouped"] += len(beyond)
        counts["beyond"] += sum(beyond)
        counts["run"] += n_tokens * (len(found.alone) + len(found.groups))
        counts["best"] += n_tokens * len(large)
        counts["all"] += n_tokens * (query + 1)
        whole += n_tokens
    for name in ("run", "best", "all"):
        counts[name] += 2 * whole
    names = {"ranking": ranking, "top": top, "tolerance": tolerance, "steps": len(trial.trace.steps)}
    return {**names, "tokens": len(trial.trace), "queries": len(trial.readings), "pass": whole, **counts}


def table(rows: list[dict[str, Any]], settings: list[tuple[str, int, float]], title: str, seed: int) -> None:
    """The frontier of one length."""
    first = [row for row in rows if (row["ranking"], row["top"], row["tolerance"]) == settings[0]]
    total = {name: sum(row[name] for row in first) for name in ("large", "pairs", "all", "best", "queries")}
    tokens = sorted(row["tokens"] for row in first)
    print(
        f"\n{title}, {len(first)} traces of {tokens[0]} to {tokens[-1]} tokens, {total['queries']} rows: "
        f"{total['large']} of {total['pairs']} pairs ({total['large'] / total['pairs']:.3f}) large, "
        f"{total['large'] / total['queries']:.1f} per step; best {total['all'] / total['best']:.2f} x"
    )
    header = ("ranking", "top", "tolerance", "found", "", "cut per step", "fewer", "map at hand", "beyond")
    print("{:>9}{:>5}{:>11}{:>8}{:>17}{:>14}{:>8}{:>13}{:>9}".format(*header))
    for ranking, top, tolerance in settings:
        chosen = [
            row for row in rows if (row["ranking"], row["top"], row["tolerance"]) == (ranking, top, tolerance)
        ]
        sums = {name: sum(row[name] for row in chosen) for name in chosen[0] if name not in ("ranking",)}
        part, (low, high) = part_found(chosen, seed)
        print(
            f"{ranking:>9}{top:>5}{tolerance:>11g}{part:>8.3f}{f'[{low:.3f}, {high:.3f}]':>17}"
            f"{sums['cut'] / sums['queries']:>14.2f}{sums['all'] / (sums['run'] + 3 * sums['pass']):>6.2f} x"
            f"{sums['all'] / sums['run']:>11.2f} x{sums['beyond'] / max(sums['grouped'], 1):>9.2%}"
        )


def part_found(rows: list[dict[str, Any]], seed: int) -> tuple[float, tuple[float, float]]:
    """Part of the large pairs that was cut alone, and its interval; traces are what was sampled."""
    counts = np.array([[row["found"], row["large"]] for row in rows], dtype=float)
    drawn = np.random.default_rng(seed).integers(len(counts), size=(10_000, len(counts)))
    sums = counts[drawn].sum(1)
    sums = sums[sums[:, 1] > 0]
    if not len(sums):
        return float("nan"), (float("nan"), float("nan"))
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return float(counts[:, 0].sum() / counts[:, 1].sum()), (float(low), float(high))


# --- cost --------------------------------------------------------------------------------------------------


def cost(model: Any, sizes: list[int]) -> list[dict[str, Any]]:
    """Rows x tokens of whole runs with the defaults, as `tokens_run` counts them, fitted by a power."""
    found = []
    for n_steps in sizes:
        trace = made_up_trace(model.tokenizer, n_steps, 40 * n_steps)
        run = step_knockout(model, trace, pairs="screened")
        row = {"steps": n_steps, "run": run.tokens_run, "all": all_pairs_tokens(trace)}
        found.append(row | {"cut": int(run.measured.sum())})
        ratio = row["all"] / row["run"]
        print(f"{n_steps:4} steps: {row['run']:8} of {row['all']:8} rows x tokens, {ratio:5.2f} x fewer, "
              f"{found[-1]['cut']} pairs cut", flush=True)  # fmt: skip
    logs = {name: np.log([row[name] for row in found]) for name in ("steps", "run", "all")}
    powers = [np.polyfit(logs["steps"], logs[name], 1)[0] for name in ("run", "all")]
    print(f"screened: steps ^ {powers[0]:.2f}, all pairs: steps ^ {powers[1]:.2f}")
    return found


def all_pairs_tokens(trace: ReasoningTrace) -> int:
    """Rows x tokens of all pairs from a shared prefix; see `causal.knockout_passes`."""
    total = 2 * len(trace)
    for step in trace.steps[1:]:
        if step.token_start < len(trace) - 1:
            batches = -(-step.index // max(1, BATCH_TOKENS // step.token_end - 1))
            total += (step.index + batches) * step.n_tokens
    return total


# --- traces ------------------------------------------------------------------------------------------------


def some_traces(tokenizer: Any, options: argparse.Namespace) -> list[ReasoningTrace]:
    """The traces asked for."""
    if options.traces in ("joined", "answers"):
        return written_traces(tokenizer, options)
    found = []
    extra = options.distractors * len(options.steps) if len(options.distractors) == 1 else options.distractors
    for n_steps, n_distractors in zip(options.steps, extra, strict=True):
        if options.traces == "testbed":
            spec = ProblemSpec(n_steps=n_steps, n_distractors=n_distractors)
            problems = make_problems(spec, options.n, seed=options.seed)
            found += [trace_of(tokenizer, problem) for problem in problems]
            continue
        proofs = make_proofs(
            options.n, seed=options.seed, n_steps=n_steps, n_distractors=max(6, n_steps // 2)
        )
        parts = [(proof.question, proof.thinking, proof.answer) for proof in proofs]
        found += [ReasoningTrace.from_parts(tokenizer, *part, question_splitter="line") for part in parts]
    return found


def written_traces(tokenizer: Any, options: argparse.Namespace) -> list[ReasoningTrace]:
    """Answers that a model wrote, several in one trace or each alone."""
    if options.answers is None:
        sys.exit("--traces joined and answers read --answers FILE")
    rows = [json.loads(line) for line in options.answers.read_text("utf-8").splitlines()]
    rows = [row for row in rows if row.get("condition") == "plain" and row["finished"]]
    order = np.random.default_rng(options.seed).permutation(len(rows))
    size = options.problems if options.traces == "joined" else 1
    found = []
    for start in range(0, options.n * size, size):
        chosen = [rows[place] for place in order[start : start + size]]
        heads = [f"Problem {place + 1}" for place in range(size)] if size > 1 else [""]
        questions = [
            f"{head}: {row['question'].strip()}" if head else row["question"]
            for head, row in zip(heads, chosen, strict=True)
        ]
        thinking = [row["thinking"] + row["summary"] * (size > 1) for row in chosen]
        texts = [re.sub(r"\s*\n\s*\n\s*", "\n\n", text.strip()) for text in thinking]
        body = "\n\n".join(
            f"{head}.\n\n{text}" if head else text for head, text in zip(heads, texts, strict=True)
        )
        end = "These are all answers." if size > 1 else chosen[0]["summary"]
        found.append(
            ReasoningTrace.from_parts(
                tokenizer, "\n".join(questions), body, end, question_splitter="sentence"
            )
        )
    return found


if __name__ == "__main__":
    main()
