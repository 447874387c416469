r"""The real model's answers to maths, science and code: plain, StepFlow, and StepFlow's control.

    python benchmarks/real_tasks.py MODEL.gguf OUT [--data ../shared/data] [--limit 100] [--tasks maths code]

1. Each task is one call of `stepflow-tl evaluate`, greedy, bfloat16, 32 rows a batch; its line is printed, so
   that it can be given by hand. Prompt and format say where thinking ends: at `\boxed{`, or at the code.
2. A task's answers lie in OUT/TASK. Stopped, the same command goes on; finished, it only prints the tables:
   accuracy with intervals, paired differences to plain, unfinished answers, tokens a second.

Code is executed in the sandbox of `--grader code`.
"""

import argparse
import shlex
import sys
from pathlib import Path

from stepflow_tl.cli.main import main as command_line

CONDITIONS = ("plain", "StepFlow", "StepFlow control")
TASKS: dict[str, tuple[str, ...]] = {
    "maths": (
        *(
            "gsm8k_questions.jsonl",
            "--grader",
            "maths",
            "--format",
            "boxed",
            "--max-new-tokens",
            "400",
            "--prompt",
        ),
        r"{question} Please reason step by step, and put your final answer within \boxed{}.",
    ),
    "science": (
        *("arc_challenge_questions.jsonl", "--grader", "choice", "--format", "boxed"),
        *("--max-new-tokens", "320", "--prompt"),
        r"{question} Please reason step by step, and put the letter of the right option within \boxed{}.",
    ),
    "code": (
        *("humaneval_questions.jsonl", "--grader", "code", "--allow-code-execution", "--format", "fenced"),
        *("--max-new-tokens", "512", "--prompt"),
        "{question}\n\nFirst explain briefly, step by step, how this function has to work. "
        "Then write the whole function, with its imports, in one block of Python code.",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    options = parser.parse_args()
    for task in options.tasks:
        questions, *arguments = TASKS[task]
        line = ["evaluate", str(options.data / questions), "--model", options.model, *arguments]
        line += ["--dtype", "bfloat16", "--batch-size", "32", "--limit", str(options.limit)]
        line += ["--conditions", *CONDITIONS, "--out", str(options.out / task)]
        print("stepflow-tl", shlex.join(line), flush=True)
        if status := command_line(line):
            sys.exit(status)


if __name__ == "__main__":
    main()
