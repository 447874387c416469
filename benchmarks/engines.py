"""The same questions through lm-evaluation-harness, Inspect and our own `evaluate`: the same answers?

    python benchmarks/engines.py MODEL QUESTIONS.jsonl [--n 10] [--max-new-tokens 128] [--resume]

1. Greedy answers in float32 to the first N questions, plain and under StepFlow, with the prompt and the
   format of `stepflow-tl evaluate --format boxed`. MODEL is what `load_model` takes.
2. Each engine's answers are compared with those of `evaluate`, character for character; where two differ, the
   place is printed. Scores are our maths grader's, and the seconds are of generation as the engine spends it,
   loading apart.
3. With `--resume`: the harness and Inspect are killed (SIGKILL) in a process of their own when half the
   answers are kept, and resumed by their own means (`--use_cache`; `eval_retry`). It prints how many answers
   were taken over, and whether all are those of the run that was not killed.

Needs both extras: docs/engines.md. Numbers are printed, none is kept.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from stepflow_tl import load_model
from stepflow_tl.evaluation import Decoding, Prompting, read_questions, write_answers
from stepflow_tl.evaluation.generation import answer_of
from stepflow_tl.evaluation.grading import grader_named
from stepflow_tl.stepflow import StepFlow

PROMPT = "{question} Please reason step by step, and put your final answer within \\boxed{}."
CONDITIONS = {"plain": {}, "StepFlow": {"stepflow": True}}
SHARED = {"format": "boxed"}


#: What `eval_retry` reads the task from again.
TASK_FILE = """
import json
from pathlib import Path
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.solver import generate

@task
def local():
    rows = map(json.loads, (Path(__file__).parent / "q.jsonl").read_text().splitlines())
    return Task(dataset=[Sample(input=row["prompt"], id=row["id"]) for row in rows], solver=generate())
"""


def ours(model, questions, asked):
    decoding = Decoding(max_new_tokens=asked.max_new_tokens, batch_size=asked.batch_size)
    for name in CONDITIONS:
        flow = StepFlow() if name == "StepFlow" else None
        texts = [question.text for question in questions]
        prompting = Prompting(format="boxed", prompt=PROMPT)
        found, seconds = write_answers(model, texts, flow, decoding, prompting=prompting)
        decode = model.tokenizer.decode
        yield name, [decode(a.tokens[-a.n_new :], skip_special_tokens=True) for [a] in found], seconds


def task_files(folder, questions):
    """A local task of the harness: prompts as ours, nothing else."""
    rows = [
        {"id": q.id, "prompt": PROMPT.replace("{question}", q.text), "answer": q.answer} for q in questions
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def write_task(folder, asked):
    (folder / "local.yaml").write_text(f"""
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "q.jsonl"}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], max_gen_toks: {asked.max_new_tokens}, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""")


def harness(folder, asked, name, cache=None):
    import lm_eval
    from lm_eval.tasks import TaskManager

    import stepflow_tl.engines.lm_harness  # noqa: F401

    options = dict(pretrained=asked.model, dtype="float32", device="cpu", batch_size=asked.batch_size)
    start = time.perf_counter()
    found = lm_eval.simple_evaluate(
        model="stepflow",
        model_args={**options, **SHARED, **CONDITIONS[name]},
        tasks=["local"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template=True,
        log_samples=True,
        bootstrap_iters=0,
        use_cache=cache,
    )
    samples = sorted(found["samples"]["local"], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples], time.perf_counter() - start


def inspect_task(rows):
    from inspect_ai import Task
    from inspect_ai.dataset import Sample
    from inspect_ai.scorer import match
    from inspect_ai.solver import generate

    dataset = [Sample(input=row["prompt"], target=row["answer"], id=row["id"]) for row in rows]
    return Task(dataset=dataset, solver=generate(), scorer=match(numeric=True), name="local")


def inspect_model(asked, name, model):
    from inspect_ai.model import get_model

    import stepflow_tl.engines.inspect_plugin  # noqa: F401

    options = dict(SHARED, batch_size=asked.batch_size, memoize=False, **CONDITIONS[name])
    given = dict(loaded=model) if model is not None else dict(dtype="float32", device="cpu")
    return get_model(f"stepflow/{asked.model}", **given, **options)


def texts_of(log):
    """Thinking and answer of each sample, in the order of the ids in the log's data set."""
    by_id = {sample.id: sample.output.choices[0].message.content for sample in log.samples}
    texts = []
    for content in (by_id[name] for name in log.eval.dataset.sample_ids):
        parts = [content] if isinstance(content, str) else [content[0].reasoning, content[1].text]
        texts.append(tuple(part for part in parts if part))
    return texts


def inspected(folder, asked, name, model, rows):
    from inspect_ai import eval

    start = time.perf_counter()
    [log] = eval(
        inspect_task(rows),
        model=inspect_model(asked, name, model),
        max_tokens=asked.max_new_tokens,
        log_dir=str(folder / "logs"),
        display="none",
    )
    assert log.status == "success", log.error
    return texts_of(log), time.perf_counter() - start


def compared(name, found, expected, squeeze=lambda text: text):
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        one, other = squeeze(one), squeeze(other)
        if one != other:
            place = next(
                (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
                min(len(one), len(other)),
            )
            print(f"  {name}: question {number} differs at character {place}: {one[place : place + 20]!r}"
                  f" against {other[place : place + 20]!r}")  # fmt: skip
    return sum(squeeze(one) == squeeze(other) for one, other in zip(found, expected, strict=True))


def scored(model, questions, texts):
    grade, tokenizer = grader_named("maths").grade, model.tokenizer
    from stepflow_tl.evaluation.decoding import end_tokens
    from stepflow_tl.trace.formats.chat_template import question_prompt, resolve_format

    entry = resolve_format(tokenizer, "boxed")
    right = 0
    for question, text in zip(questions, texts, strict=True):
        prompt = tokenizer(question_prompt(tokenizer, entry, question.text), add_special_tokens=False)
        new = tokenizer(text, add_special_tokens=False)["input_ids"]
        right += bool(
            grade(question, answer_of(tokenizer, entry, prompt["input_ids"], new, end_tokens(model)))
        )
    return right


def resumed(folder, asked, rows):
    """Kill each engine half-way in a process of its own, and resume it there."""
    import sqlite3

    def child(what):
        command = [
            sys.executable,
            __file__,
            asked.model,
            asked.questions,
            "--child",
            what,
            "--folder",
            str(folder),
        ]
        command += ["--n", str(asked.n), "--max-new-tokens", str(asked.max_new_tokens), "--batch-size", "2"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def kept_by_harness():
        try:
            with sqlite3.connect(f"file:{folder}/cache_rank0.db?mode=ro", uri=True) as store:
                return store.execute("select count(*) from unnamed").fetchone()[0]
        except sqlite3.Error:
            return 0

    def kept_by_inspect():
        from inspect_ai.log import list_eval_logs, read_eval_log_sample_summaries

        try:
            logs = list_eval_logs(str(folder / "killed"))
            return len(read_eval_log_sample_summaries(logs[0])) if logs else 0
        except Exception:  # half written
            return 0

    for what, kept in (("harness", kept_by_harness), ("inspect", kept_by_inspect)):
        process = child(what)
        while kept() < asked.n // 2 and process.poll() is None:
            time.sleep(0.5)
        killed = process.poll() is None
        if killed:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        n_kept = kept()
        out, _ = child(f"{what}-again").communicate()
        print(f"{what}: killed {killed} with {n_kept} of {asked.n} answers kept; resumed: {out.strip()}")


def be_child(asked, questions):
    folder, what = Path(asked.folder), asked.child
    task_files(folder, questions)
    write_task(folder, asked)
    if what.startswith("harness"):
        import stepflow_tl.engines.lm_harness as lm_harness

        written, generate = [], lm_harness.StepFlowLM._model_generate

        def counting(self, context, *rest, **kwargs):
            written.extend([0] * len(context))
            return generate(self, context, *rest, **kwargs)

        lm_harness.StepFlowLM._model_generate = counting
        found, _ = harness(folder, asked, "StepFlow", cache=str(folder / "cache"))
        whole = json.loads((folder / "harness.json").read_text())
        same = compared("resumed", found, whole)
        print(f"{len(written)} written anew, {same} of {len(found)} as without a kill")
        return
    from inspect_ai import eval, eval_retry
    from inspect_ai.log import list_eval_logs

    import stepflow_tl.engines.inspect_plugin  # noqa: F401
    from stepflow_tl.engines.gathering import Gatherer

    settings = dict(log_dir=str(folder / "killed"), display="none")
    if Path(asked.model).exists():
        asked.model = str(Path(asked.model).absolute())
    os.chdir(folder)  # Inspect takes a task's file by a relative name
    if what == "inspect":
        (folder / "local_task.py").write_text(TASK_FILE)
        options = dict(SHARED, batch_size=asked.batch_size, device="cpu", **CONDITIONS["StepFlow"])
        limits = dict(max_tokens=asked.max_new_tokens, max_samples=asked.batch_size, log_buffer=1)
        model = f"stepflow/{asked.model}"
        eval("local_task.py", model=model, model_args=options, **limits, **settings)
        return
    written, submit = [], Gatherer.submit

    def counting_requests(self, request):
        written.append(request)
        return submit(self, request)

    Gatherer.submit = counting_requests
    [log] = eval_retry(list_eval_logs(str(folder / "killed"))[0], **settings)
    whole = [tuple(text) for text in json.loads((folder / "inspect.json").read_text())]
    same = sum(a == b for a, b in zip(texts_of(log), whole, strict=True))
    print(f"{len(written)} written anew, {same} of {len(whole)} as without a kill")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("questions")
    parser.add_argument("--n", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    questions = read_questions(asked.questions, "maths")[: asked.n]
    if asked.child:
        be_child(asked, questions)
        return
    torch.manual_seed(0)
    model = load_model(asked.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = task_files(folder, questions)
        write_task(folder, asked)
        print(
            f"{len(questions)} questions, {asked.max_new_tokens} new tokens, float32, greedy, {asked.model}"
        )
        for condition, expected, seconds in ours(model, questions, asked):
            print(
                f"{condition}: evaluate {scored(model, questions, expected)} right, {seconds:.0f} s",
                flush=True,
            )
            texts, seconds = harness(folder, asked, condition)
            same = compared("lm-eval", texts, expected)
            print(f"{condition}: lm-eval {scored(model, questions, texts)} right, {same} answers the same, "
                  f"{seconds:.0f} s with loading", flush=True)  # fmt: skip
            (folder / "harness.json").write_text(json.dumps(texts))
            parts, seconds = inspected(folder, asked, condition, model, rows)
            joined = ["".join(part) for part in parts]
            same = compared("Inspect", joined, expected, squeeze=lambda text: "".join(text.split()))
            print(f"{condition}: Inspect {scored(model, questions, joined)} right, {same} answers the same "
                  f"(white space apart), {seconds:.0f} s", flush=True)  # fmt: skip
            (folder / "inspect.json").write_text(json.dumps(parts))
        if asked.resume:
            del model
            resumed(folder, asked, rows)


if __name__ == "__main__":
    main()
