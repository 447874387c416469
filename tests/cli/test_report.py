"""`stepflow-tl report`: from a result file to its page."""

import pytest
from made_maps import make_saliency


@pytest.fixture
def result(tmp_path):
    return make_saliency(3, 1).save(tmp_path / "q1.safetensors")


def test_the_page_lies_beside_the_result_and_is_named(run_cli, result, tmp_path):
    found = run_cli("report", result)
    assert (found.code, found.err) == (0, "")
    assert found.out == f"{tmp_path / 'q1.report.html'}\n"
    assert (tmp_path / "q1.report.html").read_text("utf-8").startswith("<!DOCTYPE html>")


def test_out_and_pooling_are_obeyed(run_cli, result, tmp_path):
    out = tmp_path / "page.html"
    assert run_cli("report", result, "--out", out, "--pooling", "sum").code == 0
    assert "summed saliency, nats" in out.read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["absent.safetensors"], "no result file at absent.safetensors"),
        ([], "the following arguments are required: RESULT.safetensors"),
        (["RESULT", "--out", "RESULT"], "expected a name that ends in .html"),
        (["RESULT", "--pooling", "max"], "invalid choice: 'max'"),
    ],
)
def test_errors_end_with_2_and_leave_the_result_alone(arguments, said, run_cli, result):
    before = result.read_bytes()
    found = run_cli("report", *[result if argument == "RESULT" else argument for argument in arguments])
    assert found.code == 2 and said in found.err
    assert result.read_bytes() == before
