"""The options of `stepflow-tl evaluate` and of the answers in a study, each declared once.

Declared like the options of a run (`runs.options`); what they mean is `cli.evaluate.arguments_of`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stepflow_tl.runs.options import ENGINES, OptionSet, Shard, option, positive


@dataclass(frozen=True)
class AnswerOptions(OptionSet):
    """Which questions are asked how, under which conditions.

    Attributes:
        conditions: which conditions, by name (all)
        grader: maths needs math-verify; choice: options and labels; code: runs the answer against its test;
            steps is for the testbed: every step must be right (exact)
        allow_code_execution: let --grader code execute what the model writes, in a sandbox
        format: reasoning format (auto: read from the model's chat template)
        splitter: how thinking and summary are cut into steps while StepFlow is on (paragraph)
        system: system prompt (what the chat template says without one)
        prompt: the user's turn, with {question} where the question goes ({question})
        max_new_tokens: most tokens of thinking and answer (1024)
        temperature: 0 for greedy decoding (0)
        top_p: draw from the likeliest tokens that sum to this share (1)
        samples: answers per question, sampled (1)
        batch_size: most answers written at once (16)
        batch_tokens: most tokens in a batch, as if every answer took all its tokens (65536)
        limit: ask the first N questions; testbed: make N (400)
        seed: of problems, sampling and resampling (0)
        overwrite: begin anew where the folder holds answers of other settings
        shard: take part I of N of the questions, I from 0; N runs may share the folder
        engine: this process (local), or the replicas of a Ray cluster, which is started here if there is none
        replicas: models at once, for ray (one per GPU, or one)
    """

    conditions: Sequence[str] | None = option(None, nargs="+", metavar="NAME")
    grader: str = option("exact", choices=("exact", "maths", "steps", "choice", "code"))
    allow_code_execution: bool = option(False)
    format: str = option("auto")
    splitter: str = option("paragraph", choices=("paragraph", "line", "sentence", "whole"))
    system: str | None = option(None, metavar="TEXT")
    prompt: str = option("{question}", metavar="TEXT")
    max_new_tokens: int = option(1024, type=positive, metavar="N")
    temperature: float = option(0.0, type=float)
    top_p: float = option(1.0, type=float)
    samples: int = option(1, type=positive, metavar="N")
    batch_size: int = option(16, type=positive, metavar="N")
    batch_tokens: int = option(1 << 16, type=positive, metavar="N")
    limit: int | None = option(None, type=positive, metavar="N")
    seed: int = option(0, type=int)
    overwrite: bool = option(False)
    shard: str | Shard | None = option(None, metavar="I/N")
    engine: str = option("local", choices=ENGINES)
    replicas: int | None = option(None, type=positive, metavar="N")


@dataclass(frozen=True)
class StudyOptions(OptionSet):
    """How much of a study's answers is mapped and shown.

    Attributes:
        maps: right and wrong plain answers to map, at most N of each (100)
        pages: questions gained or lost to show, with a map of both answers (20)
    """

    maps: int = option(100, type=positive, metavar="N")
    pages: int = option(20, type=positive, metavar="N")
