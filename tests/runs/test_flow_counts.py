"""What a repair did on finished traces: the sum of single passes, counted once, resumed after a kill."""

import pytest

from stepflow_tl import ReasoningTrace, StepFlow, load_testbed_model, step_saliency
from stepflow_tl.errors import ResultFileError
from stepflow_tl.models.passes import whole_pass
from stepflow_tl.runs.flow_counts import flow_counts
from stepflow_tl.testbed import ProblemSpec, make_problems
from stepflow_tl.testbed.vocabulary import prompt_of

SETTINGS = {"model_name": "stepflow-testbed", "dtype": "torch.float32"}


@pytest.fixture(scope="module")
def model():
    return load_testbed_model()


@pytest.fixture(scope="module")
def maps(model, tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("maps"), {}
    for i, problem in enumerate(make_problems(ProblemSpec(n_steps=3), 3, seed=0)):
        text = f"{prompt_of(problem, model.tokenizer)}{problem.thinking}\n</think>\n\n{problem.answer}"
        trace = ReasoningTrace.from_text(model.tokenizer, text, splitter="line")
        found[f"q{i}"] = step_saliency(model, trace, layers=[0]).save(folder / f"q{i}.safetensors")
    return found


def refused():
    raise AssertionError("the model was loaded though every trace has its counts")


def test_the_counts_are_those_of_one_pass_over_each_trace(model, maps, tmp_path):
    flow = StepFlow(tau_max=0.9, alpha=0.5)
    found = flow_counts(lambda: model, flow, maps, tmp_path / "flow.jsonl", SETTINGS)
    rows = injections = 0
    for problem in make_problems(ProblemSpec(n_steps=3), 3, seed=0):
        text = f"{prompt_of(problem, model.tokenizer)}{problem.thinking}\n</think>\n\n{problem.answer}"
        trace = ReasoningTrace.from_text(model.tokenizer, text, splitter="line")
        hooks = flow.hooks(model, trace)
        with model.hooks(fwd_hooks=hooks):
            whole_pass(model, trace.tokens)
        rows += hooks.report().adjusted
        injections += hooks.report().injections
    assert (found.adjusted, found.injections) == (rows, injections) and rows > 0 and injections > 0
    assert [layer["layer"] for layer in found.to_json()] == [0, 5]
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_traces_counted_before_are_not_read_again(model, maps, tmp_path):
    journal, flow = tmp_path / "flow.jsonl", StepFlow()
    first = {name: maps[name] for name in ("q0", "q1")}
    flow_counts(lambda: model, flow, first, journal, SETTINGS)
    half = journal.read_bytes()
    journal.write_bytes(half[: half.rindex(b"\n", 0, -1) + 40])  # killed while it wrote the second
    again = flow_counts(lambda: model, flow, maps, journal, SETTINGS)
    whole = flow_counts(lambda: model, flow, maps, tmp_path / "other.jsonl", SETTINGS)
    assert again == whole
    assert journal.read_bytes() == (tmp_path / "other.jsonl").read_bytes()
    assert flow_counts(refused, flow, maps, journal, SETTINGS) == whole


def test_counts_of_another_repair_are_refused(model, maps, tmp_path):
    flow_counts(lambda: model, StepFlow(), {}, tmp_path / "flow.jsonl", SETTINGS)
    with pytest.raises(ResultFileError, match="holds another repair, with stepflow StepFlow"):
        flow_counts(refused, StepFlow(alpha=0.1), maps, tmp_path / "flow.jsonl", SETTINGS)
