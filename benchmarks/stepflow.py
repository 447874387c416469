"""What StepFlow costs on the default model: cached decoding and prefill, against the same without it.

    python benchmarks/stepflow.py [--repeats 7] [--decode 256] [--prefill 2048] [--json out.json]

Runs alternate (plain, StepFlow, plain, ...) so that a machine that slows down slows both; the table has the
median of each and the median of the paired ratios. The prompt leaves the thinking open, so the bridge acts on
every generated token. Prefill includes cutting the tokens into steps.
"""

import argparse
import contextlib
import json
import statistics
import time

import torch

from stepflow_tl.models.loading import load_default_model
from stepflow_tl.stepflow import StepFlow

PROMPT = (
    "<|im_start|>user\nA shop sells pens at 3 dollars and books at 12 dollars. Ann buys 7 pens and 2 books "
    "and pays with a 100 dollar note. How much change does she get? Explain step by step.<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n"
)
STEP = "First we look at the numbers again, {i} of them, and add what we know so far.\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--decode", type=int, default=256)
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--json", default=None)
    options = parser.parse_args()
    model, flow = load_default_model(), StepFlow()
    prompt = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    text = PROMPT + "".join(STEP.format(i=i) for i in range(options.prefill))
    long_prompt = model.tokenizer(text, return_tensors="pt")["input_ids"][:, : options.prefill]

    def decode() -> None:
        settings = dict(do_sample=False, stop_at_eos=False, verbose=False)
        model.generate(prompt, max_new_tokens=options.decode, **settings)

    def prefill() -> None:
        with torch.no_grad():
            model(long_prompt, return_type="logits")

    rows = [
        measure(f"decode {options.decode} tokens", decode, model, flow, options.repeats, goal=1.05),
        measure(f"prefill {options.prefill} tokens", prefill, model, flow, options.repeats, goal=1.10),
    ]
    columns = ("plain_s", "stepflow_s", "ratio", "goal", "adjusted", "injections")
    print(f"{'':24}" + "".join(f"{name:>12}" for name in columns))
    for row in rows:
        cells = (
            f"{row[name]:>12.3f}" if isinstance(row[name], float) else f"{row[name]:>12}" for name in columns
        )
        print(f"{row['task']:24}" + "".join(cells))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                dict(rows=rows, threads=torch.get_num_threads(), torch=torch.__version__), file, indent=1
            )


def measure(task, run, model, flow, repeats, goal):
    """Medians of alternating runs; the first pair only warms up."""
    seconds = {"plain": [], "stepflow": []}
    for repeat in range(repeats + 1):
        for name in seconds:
            context = flow.generating(model) if name == "stepflow" else contextlib.nullcontext()
            start = time.perf_counter()
            with context as following:
                run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
            if following is not None:
                report = following.report()
    ratios = [b / a for a, b in zip(seconds["plain"], seconds["stepflow"], strict=True)]
    return dict(
        task=task,
        plain_s=statistics.median(seconds["plain"]),
        stepflow_s=statistics.median(seconds["stepflow"]),
        ratio=statistics.median(ratios),
        goal=goal,
        adjusted=report.adjusted,
        injections=report.injections,
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
