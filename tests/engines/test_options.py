import pytest
from engine_models import load_tiny_model

from stepflow_tl.engines import options as engine_options
from stepflow_tl.engines.options import EngineFlow, EngineOptions
from stepflow_tl.errors import InputFileError, ModelError, TraceError
from stepflow_tl.stepflow import StepFlow


@pytest.mark.parametrize(
    ("shallow", "deep", "heads"),
    [("0-6", "21-27", "0-3,8"), ([*range(7)], (21, 22, 23, 24, 25, 26, 27), [0, 1, 2, 3, 8])],
)
def test_texts_and_lists_give_the_same_flow(shallow, deep, heads):
    given = dict(stepflow="True", tau_max="0.2", shallow=shallow, deep=deep, heads=heads, placebo="both")
    options, rest = EngineOptions.taken_from({**given, "placebo_seed": "3", "dtype": "float32", "seed": 9})
    assert options.flow == StepFlow(
        tau_max=0.2,
        shallow=tuple(range(7)),
        deep=tuple(range(21, 28)),
        heads=(0, 1, 2, 3, 8),
        placebo="both",
        seed=3,
    )
    assert rest == {"dtype": "float32", "seed": 9}  # the engine's own, its seed included


def test_a_number_that_the_engine_has_read_already_is_a_layer():
    options, _ = EngineOptions.taken_from(dict(stepflow=True, shallow=5, window=4, placebo="none", alpha=0))
    assert options.flow == StepFlow(shallow=(5,), window=4, alpha=0)


def test_without_stepflow_nothing_is_on_and_format_and_splitter_are_kept():
    options, rest = EngineOptions.taken_from(dict(format="boxed", splitter="line", stepflow="false"))
    assert options == EngineOptions(None, "boxed", "line") and rest == {}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tau_max": 0.2}, "tau_max: these are StepFlow's; add stepflow=true"),
        ({"stepflow": "maybe"}, "stepflow is 'maybe': expected true or false"),
        ({"stepflow": True, "shallow": "6-0"}, "shallow is '6-0' .*runs backwards"),
        ({"stepflow": True, "tau_max": "much"}, "tau_max is 'much' .*expected a number"),
        ({"stepflow": True, "placebo": "all"}, "placebo is 'all': expected one of"),
    ],
)
def test_what_has_no_meaning_is_refused(given, words):
    with pytest.raises(InputFileError, match=words):
        EngineOptions.taken_from(given)


def test_an_unknown_splitter_is_refused():
    with pytest.raises(TraceError, match="chapter"):
        EngineOptions.taken_from({"splitter": "chapter"})


def test_the_key_names_flow_format_and_splitter_and_is_empty_for_nothing(folder):
    model = load_tiny_model(folder)
    given = [
        {},
        dict(stepflow=True),
        dict(stepflow=True, tau_max=0.2),
        dict(stepflow=True, format="boxed"),
        dict(stepflow=True, splitter="line"),
    ]
    keys = [EngineFlow(EngineOptions.taken_from(each)[0], model, model.tokenizer).key for each in given]
    assert keys[0] == "" and len(set(keys)) == len(keys)
    again = EngineFlow(EngineOptions.taken_from(given[1])[0], model, model.tokenizer).key
    assert again == keys[1]


def test_a_flow_that_finds_nothing_to_act_on_says_so(folder, monkeypatch):
    monkeypatch.setattr(engine_options, "PATIENCE", 2)
    model = load_tiny_model(folder)
    flow = EngineFlow(EngineOptions(StepFlow(), "boxed"), model, model.tokenizer)
    tokens = model.tokenizer("no question", return_tensors="pt")["input_ids"]
    before = model.config._attn_implementation
    with flow.on([tokens[0].tolist()]):
        model(tokens)
    with flow.on([tokens[0].tolist()], counts=False):
        model(tokens)
    with pytest.raises(ModelError, match="nothing to act on in 2 texts.*'boxed'"):
        with flow.on([tokens[0].tolist()]):
            model(tokens)
    assert model.config._attn_implementation == before and "forward" not in vars(model)


def test_a_layer_that_the_model_lacks_is_refused_before_anything_runs(folder):
    model = load_tiny_model(folder)
    with pytest.raises(ModelError, match=r"layers=\[9\]"):
        EngineFlow(EngineOptions(StepFlow(shallow=(9,))), model, model.tokenizer)
