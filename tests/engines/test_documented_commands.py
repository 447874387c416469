"""Every command on the two pages about engines is one that the engine's own parser takes."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("docs/engines.md", "docs/paper_table.md")
FLOWS = ("stepflow=false", "stepflow=true", "stepflow=true placebo=both")
SHELL = {r"\$\(\(.*?\)\)+": "1", r"\$\w+": "0", r"\{\d(,\d)*\}": "0"}


def commands(start):
    """The commands of the pages that start so, as words; a shell's variable is 0."""
    found = []
    for page in PAGES:
        for line in re.sub(r"\\\n\s*", "", (ROOT / page).read_text("utf-8")).splitlines():
            words = re.sub(r"^(\w+=\S+ )+", "", line.strip())
            if not (line.startswith("    ") and re.match(start, words)):
                continue
            for flow in FLOWS if "${FLOW[$1]}" in words else [""]:
                each = words.replace("${FLOW[$1]}", flow)
                for pattern, value in SHELL.items():
                    each = re.sub(pattern, value, each)
                found.append(shlex.split(each, comments=True))
    return found


def test_those_of_this_package():
    from stepflow_tl.cli.main import _parser

    found = commands("stepflow-tl")
    assert {words[1] for words in found} >= {"evaluate", "compare-runs", "power"}
    for words in found:
        assert _parser().parse_args(words[1:]).run


def test_those_of_the_harness():
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: make test-engines")
    from accelerate.commands.launch import launch_command_parser
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.tasks import TaskManager

    from stepflow_tl.engines.options import EngineOptions

    found = commands("accelerate launch|python -m stepflow_tl.engines.lm_harness")
    assert len(found) >= 4
    known = set(TaskManager().all_tasks)
    for words in found:
        if words[0] == "accelerate":
            launched = launch_command_parser().parse_args(words[2:])
            assert launched.training_script == "stepflow_tl.engines.lm_harness"
            words = launched.training_script_args
        else:
            words = words[3:]
        asked = EvaluatorConfig.from_cli(HarnessCLI()._parser.parse_args(words))
        options, rest = EngineOptions.taken_from(asked.model_args)
        assert asked.model == "stepflow" and asked.apply_chat_template
        assert (options.flow is None) == (asked.model_args["stepflow"] is False)
        # The command line hands these to the class beside model_args, and Python refuses an argument twice.
        assert set(rest) <= {"pretrained", "dtype", "parallelize"}
        assert set(asked.tasks) <= known


def test_those_of_inspect():
    pytest.importorskip("inspect_ai", reason="needs Inspect: make test-engines")
    from inspect_ai._cli.main import inspect
    from inspect_ai._cli.util import parse_cli_args

    from stepflow_tl.engines.options import EngineOptions

    found = commands("inspect eval")
    assert {words[1] for words in found} == {"eval", "eval-retry"}
    for words in found:
        with inspect.commands[words[1]].make_context(words[1], words[2:]) as context:
            model, given = context.params.get("model"), context.params.get("m") or ()
        if words[1] == "eval":
            options, rest = EngineOptions.taken_from(parse_cli_args(given))
            assert model.startswith("stepflow/") and set(rest) <= {"dtype", "batch_size"} and options.flow
