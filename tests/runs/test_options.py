"""The options of a run: each declared once, with its help, for the function and the command line."""

import argparse
from dataclasses import fields

import pytest

from stepflow_tl.cli.arguments import add_options, options_of
from stepflow_tl.errors import InputFileError
from stepflow_tl.runs import RunOptions, Shard, SummaryOptions
from stepflow_tl.runs.options import parse_numbers, parse_objective, positive


def parsed(kind, *arguments):
    parser = argparse.ArgumentParser()
    add_options(parser, kind)
    return options_of(parser.parse_args(arguments), kind)


@pytest.mark.parametrize("kind", [RunOptions, SummaryOptions])
def test_every_option_has_its_help_and_no_help_is_without_an_option(kind):
    assert set(kind.helps()) == {each.name for each in fields(kind)}
    assert all(text and "\n" not in text for text in kind.helps().values())


@pytest.mark.parametrize("kind", [RunOptions, SummaryOptions])
def test_the_command_line_has_the_defaults_of_the_function(kind):
    assert parsed(kind) == kind()


def test_the_command_line_reads_every_kind_of_option():
    found = parsed(
        RunOptions,
        "--layers",
        "0-2,7",
        "--group-by",
        "ok",
        "--retry-failed",
        "--limit",
        "3",
        "--shard",
        "1/4",
    )
    assert found == RunOptions(layers=[0, 1, 2, 7], group_by="ok", retry_failed=True, limit=3, shard="1/4")
    assert found.part == Shard(1, 4) == RunOptions(shard=Shard(1, 4)).part and RunOptions().part == Shard()


def test_causal_is_a_flag_or_names_which_pairs_are_cut():
    assert parsed(RunOptions).causal is None and RunOptions(causal=False).causal is None
    assert parsed(RunOptions, "--causal").causal == "all" == RunOptions(causal=True).causal
    assert parsed(RunOptions, "--causal", "screened").causal == "screened"
    with pytest.raises(ValueError, match="causal is 'some': expected True or 'all' for"):
        RunOptions(causal="some")


def test_an_option_for_python_alone_is_not_on_the_command_line(capsys):
    with pytest.raises(SystemExit):
        parsed(SummaryOptions, "--n-bootstrap", "3")
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["2/2", "-1/2", "1", "a/b", "0/0", "1/2/3", ""])
def test_a_shard_that_does_not_exist_is_refused(text):
    with pytest.raises(InputFileError, match="0/n|0/8 for the first"):
        Shard.parse(text)


def test_a_shard_reads_as_it_is_written():
    assert str(Shard.parse("2/8")) == "2/8"
    assert (Shard.parse("2/8").suffix, Shard().suffix) == ("-2-of-8", "")


@pytest.mark.parametrize(
    ("parse", "text", "said"),
    [
        (positive, "0", "'0' is not a whole number from 1 on"),
        (positive, "+3", "is not a whole number"),
        (parse_numbers, "0-", "expected numbers and ranges such as 0-6,23-29"),
        (parse_numbers, "6-2", "'6-2' runs backwards: write 2-6"),
        (parse_numbers, "1,0-3", "names a number twice"),
        (parse_objective, "loss", "is none of per_token"),
    ],
)
def test_a_text_that_cannot_be_read_says_what_is_expected(parse, text, said):
    with pytest.raises(ValueError, match=said):
        parse(text)


@pytest.mark.parametrize(
    ("kind", "wrong", "said"),
    [
        (RunOptions, {"engine": "spark"}, "unknown engine 'spark': expected 'local' or 'ray'"),
        (SummaryOptions, {"confidence": 1.0}, "expected a level between 0 and 1"),
    ],
)
def test_a_value_that_cannot_be_is_refused(kind, wrong, said):
    with pytest.raises(ValueError, match=said):
        kind.of("f", wrong)
