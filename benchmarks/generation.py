"""Answers from batches whose rows leave when they have ended, against transformers' `generate`.

    python benchmarks/generation.py                                  # 64 testbed questions, 32 rows
    python benchmarks/generation.py --model DIR --questions Q.jsonl --limit 100 --dtype bfloat16 --stepflow

1. Both write greedy answers to the same questions in the same batches, taking turns at every batch,
   `--repeats` times after a warm-up of eight tokens; the order changes from batch to batch. A time is the sum
   over batches, the ratio the median over repeats.
2. `generate` keeps every row until the last of its batch has ended. Tokens per second count what belongs to
   the answers, not what is written after an end.
3. Answers are compared token by token: they may differ only where rounding, which depends on the batch,
   decides between two tokens. How many differ is reported; with `--other-rows N`, also how many differ when
   `rows leave` writes them once more in batches of N.
"""

import argparse
import json
import os
import statistics
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from stepflow_tl import StepFlow
from stepflow_tl.evaluation import Decoding, Prompting, questions_of, read_questions
from stepflow_tl.evaluation.decoding import end_tokens
from stepflow_tl.evaluation.generation import AnswerWriter
from stepflow_tl.models.loading import load_model
from stepflow_tl.models.passes import model_device
from stepflow_tl.testbed import ProblemSpec, load_testbed_model, make_problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="as for stepflow-tl evaluate; the testbed's by default")
    parser.add_argument("--questions", type=Path, help="JSON lines; testbed questions by default")
    parser.add_argument("--grader", default="exact", help="says which fields the questions have")
    parser.add_argument("--format", default="auto")
    parser.add_argument("--prompt", default="{question}")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32, help="of a batch")
    parser.add_argument("--other-rows", type=int, help="write once more in batches of so many, and compare")
    parser.add_argument("--max-new-tokens", type=int, default=320)
    parser.add_argument("--stepflow", action="store_true", help="under the paper's StepFlow")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    if options.model is None:
        model = load_testbed_model(options.device, dtype)
    else:
        model = load_model(options.model, device=options.device, dtype=dtype)
    decoding = Decoding(max_new_tokens=options.max_new_tokens, batch_size=options.rows, batch_tokens=1 << 62)
    prompting = Prompting(format=options.format, prompt=options.prompt)
    texts = [question.text for question in _questions(options)]
    writer = AnswerWriter(model, texts, decoding, prompting)
    flow = StepFlow() if options.stepflow else None

    def rows_leave(batch) -> list[list[int]]:
        answers, _ = writer.write(batch, flow)
        return [list(answer.tokens[len(row.prompt) :]) for row, answer in zip(batch, answers, strict=True)]

    def generate(batch) -> list[list[int]]:
        on = nullcontext() if flow is None else flow.generating(model, model.tokenizer, format=writer.format)
        with on, torch.no_grad():
            return _generate(model, batch, decoding)

    ways = {"rows leave": rows_leave, "generate": generate}
    times: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[list[int]]] = {}
    few = replace(decoding, max_new_tokens=8)
    AnswerWriter(model, texts, few, prompting).write(writer.batches[0], flow)
    with torch.no_grad():
        _generate(model, writer.batches[0], few)
    for _ in range(options.repeats):
        answers = {name: [] for name in ways}
        spent = dict.fromkeys(ways, 0.0)
        for turn, batch in enumerate(writer.batches):
            for name in list(ways)[:: 1 if turn % 2 else -1]:
                start = time.perf_counter()
                answers[name] += ways[name](batch)
                spent[name] += time.perf_counter() - start
        for name, seconds in spent.items():
            times[name].append(seconds)
    n_tokens = sum(map(len, answers["rows leave"]))
    ratios = [old / new for new, old in zip(times["rows leave"], times["generate"], strict=True)]
    found = {
        "answers": len(texts),
        "tokens": n_tokens,
        "longest": max(map(len, answers["rows leave"])),
        "tokens_per_second": {name: n_tokens / statistics.median(spent) for name, spent in times.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "answers_that_differ": sum(a != b for a, b in zip(*answers.values(), strict=True)),
        "device": str(model_device(model)),
    }
    if options.other_rows is not None:
        # Batches are planned by length: answers are matched by their question's place.
        places = [row.question for batch in writer.batches for row in batch]
        before = dict(zip(places, answers["rows leave"], strict=True))
        writer = AnswerWriter(model, texts, replace(decoding, batch_size=options.other_rows), prompting)
        differ = 0
        for batch in writer.batches:
            after = rows_leave(batch)
            differ += sum(before[row.question] != new for row, new in zip(batch, after, strict=True))
        found["answers_that_differ_in_other_batches"] = differ
    print(json.dumps(found, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))


def _questions(options):
    if options.questions is not None:
        return read_questions(options.questions, options.grader)[: options.limit]
    lengths = [2 + 2 * (i % 8) for i in range(options.limit)]  # answers of very different lengths
    return questions_of(make_problems(ProblemSpec(n_steps=n), 1, seed=i)[0] for i, n in enumerate(lengths))


def _generate(model, batch, decoding):
    """The same batch through transformers' own decoding."""
    longest, device, ends = max(len(row.prompt) for row in batch), model_device(model), end_tokens(model)
    pad = model.tokenizer.pad_token_id if model.tokenizer.pad_token_id is not None else min(ends)
    padded = [[pad] * (longest - len(row.prompt)) + list(row.prompt) for row in batch]
    mask = [[0] * (longest - len(row.prompt)) + [1] * len(row.prompt) for row in batch]
    out = model.original_model.generate(
        torch.tensor(padded, device=device),
        attention_mask=torch.tensor(mask, device=device),
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
    )
    written = []
    for row in out[:, longest:].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        written.append(row[: end + 1])
    return written


if __name__ == "__main__":
    main()
