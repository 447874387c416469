"""`stepflow-tl evaluate`: right answers with and without StepFlow, its halves and their controls."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from stepflow_tl.cli.console import say
from stepflow_tl.cli.device import present_device
from stepflow_tl.errors import InputFileError
from stepflow_tl.evaluation import (
    Decoding,
    Question,
    evaluate,
    questions_of,
    read_questions,
    standard_conditions,
)
from stepflow_tl.models import loading as models
from stepflow_tl.results.files import write_atomically
from stepflow_tl.stepflow import StepFlow
from stepflow_tl.testbed import ProblemSpec, load_testbed_model, make_problems

TESTBED = "testbed"
TESTBED_STEPS = (12, 16, 18, 20)


@dataclass(frozen=True)
class EvaluateOptions:
    """What the command line asks for; see `stepflow-tl evaluate --help`."""

    questions: str
    model: str | None
    out: Path | None
    conditions: tuple[str, ...] | None
    tau_max: float
    alpha: float
    grader: str
    allow_code_execution: bool
    max_new_tokens: int
    temperature: float
    samples: int
    batch_size: int
    batch_tokens: int
    limit: int | None
    seed: int
    dtype: str
    device: str


def run_evaluate(options: EvaluateOptions) -> int:
    """Evaluate, print the tables, write the figures.

    Raises:
        StepflowError: If the questions, the model or the output cannot be used.
    """
    try:
        flows = standard_conditions(StepFlow(tau_max=options.tau_max, alpha=options.alpha))
        decoding = Decoding(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            n_samples=options.samples,
            batch_size=options.batch_size,
            batch_tokens=options.batch_tokens,
            seed=options.seed,
        )
    except ValueError as error:
        raise InputFileError(f"these options do not go together: {error}") from error
    unknown = [name for name in options.conditions or () if name not in flows]
    if unknown:
        raise InputFileError(f"--conditions: {', '.join(unknown)}; known are {', '.join(flows)}")
    chosen = {name: flows[name] for name in options.conditions or flows}
    if options.grader == "steps" and options.questions != TESTBED:
        raise InputFileError(
            f"--grader steps: the right steps are known for '{TESTBED}' alone, not for {options.questions}; "
            "expected --grader exact or maths"
        )
    if options.grader in ("choice", "code") and options.questions == TESTBED:
        raise InputFileError(
            f"--grader {options.grader}: '{TESTBED}' has no such questions; give a file of them"
        )
    questions = _questions(options)
    if options.out is not None and not options.out.parent.is_dir():
        raise InputFileError(f"--out {options.out}: there is no folder {options.out.parent}")
    found = evaluate(
        _model(options),
        questions,
        conditions=chosen,
        decoding=decoding,
        grader=options.grader,
        allow_code_execution=options.allow_code_execution,
        seed=options.seed,
        progress=say,
    )
    print(found.table())
    if options.out is not None:
        write_atomically(options.out, (found.to_json() + "\n").encode())
        print(f"\nwritten: {options.out}")
    return 0


def _questions(options: EvaluateOptions) -> list[Question]:
    if options.questions != TESTBED:
        return read_questions(options.questions, options.grader)[: options.limit]
    total = options.limit or 400
    counts = [total // len(TESTBED_STEPS)] * len(TESTBED_STEPS)
    counts[0] += total - sum(counts)
    return questions_of(
        problem
        for n_steps, n in zip(TESTBED_STEPS, counts, strict=True)
        for problem in make_problems(ProblemSpec(n_steps=n_steps), n, seed=options.seed)
    )


def _model(options: EvaluateOptions) -> object:
    dtype, device = getattr(torch, options.dtype), present_device(options.device)
    if options.model is not None and (Path(options.model) / "checksums.json").is_file():
        return load_testbed_model(device, dtype, folder=options.model)
    if options.model is None and options.questions == TESTBED or options.model == TESTBED:
        return load_testbed_model(device, dtype)
    return models.load_model(options.model or models.DEFAULT_MODEL, device=device, dtype=dtype)
