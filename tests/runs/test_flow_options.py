"""StepFlow's options as the commands have them: defaults, names and refusals are StepFlow's own."""

import argparse
from dataclasses import fields

import pytest

from stepflow_tl.cli.arguments import add_options, options_of
from stepflow_tl.errors import InputFileError
from stepflow_tl.runs import FlowOptions
from stepflow_tl.stepflow import StepFlow


def parsed(*arguments, **options):
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=7)  # the command's own
    add_options(parser, FlowOptions, **options)
    return options_of(parser.parse_args(arguments), FlowOptions, **options)


def test_every_argument_of_stepflow_is_an_option_with_its_help_and_its_default():
    names = [each.name for each in fields(StepFlow)]
    assert sorted(each.name for each in fields(FlowOptions)) == sorted(names)
    assert set(FlowOptions.helps()) == set(names)
    assert FlowOptions().flow() == StepFlow() == parsed().flow()


def test_the_command_line_reads_every_kind_of_option():
    words = "--tau-max 0.2 --alpha 0 --shallow 0-2 --deep 5,7 --granularity step --window 4 --heads 0,2-3"
    words += " --max-bridge-share 0.5 --boundaries all --placebo both --placebo-seed 3"
    assert parsed(*words.split()).flow() == StepFlow(
        tau_max=0.2,
        alpha=0,
        shallow=(0, 1, 2),
        deep=(5, 7),
        granularity="step",
        window=4,
        heads=(0, 2, 3),
        max_bridge_share=0.5,
        boundaries="all",
        placebo="both",
        seed=3,
    )


def test_a_command_may_decide_some_options_for_itself(capsys):
    mine = ("placebo", "seed")
    assert parsed("--seed", "3", without=mine) == FlowOptions()
    with pytest.raises(SystemExit):
        parsed("--placebo", "both", without=mine)
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tau_max": 1.5}, "tau_max is 1.5: expected 0 <= tau_max < 1"),
        ({"granularity": "word"}, "granularity is 'word': expected one of 'segment', 'step'"),
        ({"window": 0}, "window is 0: expected at least 1 token"),
    ],
)
def test_a_value_without_a_meaning_is_refused_in_the_words_of_stepflow(given, said):
    with pytest.raises(InputFileError, match=f"StepFlow cannot be made from these options: {said}"):
        FlowOptions(**given).flow()
