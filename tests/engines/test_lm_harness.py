import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: make test-engines")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness' own are not ours to judge

import json  # noqa: E402
import os  # noqa: E402
import sqlite3  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from importlib.metadata import version  # noqa: E402

from engine_models import QUESTIONS  # noqa: E402
from tiny_gguf import write_tiny_gguf  # noqa: E402

PLAIN = dict(format="boxed")
FLOW = dict(stepflow=True, format="boxed", splitter="line", tau_max=0.5, alpha=0.5, shallow="0-1", deep="2-3")
CONTROL = dict(FLOW, placebo="both", placebo_seed=3)
N_NEW = 24


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory):
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture
def harness():
    from stepflow_tl.engines import lm_harness

    return lm_harness


@pytest.fixture
def built(harness, folder):
    def build(**options):
        asked = dict(dtype="float32", device="cpu", batch_size=2)
        return harness.StepFlowLM(str(folder), **{**asked, **options})

    return build


@pytest.fixture
def tasks(folder, tmp_path):
    """A folder with the local task."""
    (tmp_path / "local.yaml").write_text(
        f"""
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "q.jsonl"}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], max_gen_toks: {N_NEW}, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
    )
    return tmp_path


@pytest.fixture
def run(harness, folder, tasks):
    """The answers of the harness to the local task, in the order of the questions."""

    def ask(*, whole=False, **arguments):
        import lm_eval
        from lm_eval.tasks import TaskManager

        options = dict(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2)
        found = lm_eval.simple_evaluate(
            model="stepflow",
            model_args={**options, **arguments.pop("options")},
            tasks=["local"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            apply_chat_template=True,
            log_samples=True,
            bootstrap_iters=0,
            **arguments,
        )
        samples = found["samples"]["local"]
        return samples if whole else [sample["resps"][0][0] for sample in samples]

    return ask


def prompts(model):
    turns = [[{"role": "user", "content": text}] for text in QUESTIONS]
    return [model.tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns]


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def test_the_version_is_one_that_the_extra_allows():
    assert version("lm_eval").split(".")[:2] == ["0", "4"]


@pytest.mark.parametrize("options", [PLAIN, FLOW, CONTROL], ids=["plain", "StepFlow", "control"])
def test_batches_through_the_harness_give_the_answers_of_evaluate(run, our_answers, options):
    answers, tokenizer = our_answers(N_NEW, **options)
    expected = [
        tokenizer.decode(answer.tokens[-answer.n_new :], skip_special_tokens=True) for answer in answers
    ]
    assert run(options=options) == expected
    if options is not PLAIN:
        plain, _ = our_answers(N_NEW, **PLAIN)
        assert [a.tokens for a in answers] != [a.tokens for a in plain]  # it does something


def test_the_cache_never_returns_a_plain_answer_for_a_repaired_one(run, tmp_path, monkeypatch, harness):
    cache = dict(use_cache=str(tmp_path / "cache"))
    plain, repaired = run(options=PLAIN), run(options=FLOW)
    assert plain != repaired
    assert run(options=PLAIN, **cache) == plain
    assert run(options=FLOW, **cache) == repaired  # not the plain ones, which are in the same file
    monkeypatch.setattr(harness.StepFlowLM, "_model_generate", None)  # from here on nothing is generated
    assert run(options=FLOW, **cache) == repaired
    assert run(options=PLAIN, **cache) == plain
    with pytest.raises(TypeError, match="not callable"):
        run(options=dict(FLOW, tau_max=0.4), **cache)


def test_a_killed_run_goes_on_from_the_cache(run, tmp_path, monkeypatch, harness):
    whole, calls = run(options=FLOW), []
    generate = harness.StepFlowLM._model_generate

    def dying(self, context, *rest, **kwargs):
        calls.append(len(context))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, context, *rest, **kwargs)

    monkeypatch.setattr(harness.StepFlowLM, "_model_generate", dying)
    with pytest.raises(KeyboardInterrupt):
        run(options=FLOW, use_cache=str(tmp_path / "cache"))
    assert run(options=FLOW, use_cache=str(tmp_path / "cache")) == whole
    assert calls == [2, 2, 2]  # the first batch was not written again


def test_the_samples_that_the_harness_writes_are_read_back(run, tmp_path, folder):
    from lm_eval.loggers import EvaluationTracker

    from stepflow_tl.engines.run_samples import Reading, read_samples

    tracker = EvaluationTracker(output_path=str(tmp_path / "out"))
    tracker.general_config_tracker.model_name_sanitized = "tiny"
    samples = run(options=PLAIN, whole=True)
    tracker.date_id = "2026-11-28T08-27-55.123456"
    tracker.save_results_samples("local", samples)
    found = read_samples(tmp_path / "out", Reading(subject="subject"))
    assert [each.question for each in found] == [f"local/{i}" for i in range(len(QUESTIONS))]
    assert [each.subject for each in found] == ["even", "odd", "even", "odd"]
    assert found[0].parts["text"].startswith("<|im_start|>user\nWhat is 2+3*4?")
    assert found[0].digest and found[0].score == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood"])
def test_nothing_stays_on_the_model_after_an_error_in_the_engine(built, kind, error):
    engine = built(**FLOW)
    model, calls = engine.model, []
    before = model.config._attn_implementation
    second = {"generate_until": {"until": [], "max_gen_toks": 9}, "loglikelihood": "One.\nTwo.\nThree."}
    asked = requests(kind, [(prompt, second[kind]) for prompt in prompts(engine)])
    ids = engine.tok_batch_encode(prompts(engine)[:1])[0]
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)

    def failing(module, inputs, output):
        calls.append(module)
        if len(calls) == 2:
            raise error("out of memory")

    handle = model.lm_head.register_forward_hook(failing)
    with pytest.raises(error, match="out of memory"):
        getattr(engine, kind)(asked)
    handle.remove()
    assert len(calls) == 2
    assert model.config._attn_implementation == before and "forward" not in vars(model)
    assert not model.get_input_embeddings()._forward_pre_hooks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), plain)  # transformers' own


def test_two_processes_share_the_questions_and_give_the_answers_of_one(run, folder, tasks):
    expected = run(options=FLOW)
    words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    words += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    words += ["-m", "stepflow_tl.engines.lm_harness", "run", "--model", "stepflow", "--tasks", "local"]
    words += ["--model_args", f"pretrained={folder}", "dtype=float32"]
    words += [f"{name}={value}" for name, value in FLOW.items()]
    words += ["--batch_size", "1", "--apply_chat_template", "--log_samples", "--use_cache", str(tasks / "c")]
    words += ["--include_path", str(tasks), "--output_path", str(tasks / "out")]
    names = {"ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(tasks / "d"), "OMP_NUM_THREADS": "1"}
    names["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **names}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    [path] = (tasks / "out").rglob("samples_local_*.jsonl")
    rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["doc_id"])
    assert [row["resps"][0][0] for row in rows] == expected
    assert all(answers_kept(tasks / f"c_rank{rank}.db") == len(QUESTIONS) // 2 for rank in range(2))


def answers_kept(path):
    with sqlite3.connect(path) as store:
        return store.execute("select count(*) from unnamed").fetchone()[0]


@pytest.mark.parametrize("options", [PLAIN, FLOW], ids=["plain", "StepFlow"])
def test_layers_that_accelerate_moves_about_give_the_same_answers(built, tmp_path, options):
    """What `parallelize=true` does with GPUs, with a disk in place of the second one."""
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    engine = built(**options)
    spread = built(**options, parallelize=True, device_map=places, offload_folder=str(tmp_path))
    assert any(parameter.is_meta for parameter in spread.model.parameters())  # not here before its turn
    asked = [(prompt, {"until": [], "max_gen_toks": N_NEW}) for prompt in prompts(engine)]
    expected = engine.generate_until(requests("generate_until", asked))
    assert spread.generate_until(requests("generate_until", asked)) == expected


@pytest.mark.parametrize("options", [PLAIN, FLOW], ids=["plain", "StepFlow"])
def test_a_model_whose_linear_layers_a_quantiser_replaced_is_served(built, options):
    """Int8 with a scale for each call, so one row at a time: a scale would be that of the whole batch."""
    from torch.ao.quantization import quantize_dynamic

    from stepflow_tl.engines.options import EngineFlow, EngineOptions
    from stepflow_tl.evaluation import Decoding, Prompting, write_answers

    engine = built(**{**options, "batch_size": 1})
    model = engine._model = quantize_dynamic(engine.model, {torch.nn.Linear}, dtype=torch.qint8)
    assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
    given, _ = EngineOptions.taken_from(options)
    engine.stepflow = EngineFlow(given, model, engine.tokenizer)
    asked = [(prompt, {"until": [], "max_gen_toks": N_NEW}) for prompt in prompts(engine)]
    found = engine.generate_until(requests("generate_until", asked))
    model.tokenizer = engine.tokenizer
    decoding, prompting = Decoding(N_NEW, batch_size=1), Prompting(given.format, given.splitter)
    answers, _ = write_answers(model, QUESTIONS, given.flow, decoding, prompting=prompting)
    written = [answer.tokens[-answer.n_new :] for [answer] in answers]
    assert found == [engine.tok_decode(tokens) for tokens in written]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_one_pass_of_loglikelihood_gives_the_logits_of_decoding(built, batch_size):
    engine, plain = built(**FLOW), built(**PLAIN)
    engine.batch_size_per_gpu = plain.batch_size_per_gpu = batch_size
    answers = ["One.\nTwo.\nSo it is \\boxed{14}.", "Yes.\nNo.\nMaybe \\boxed{7}", "a\nb\nc", "\n\nx\ny"]
    pairs = list(zip(prompts(engine), answers, strict=True))
    scores = [score for score, _ in engine.loglikelihood(requests("loglikelihood", pairs))]

    def decoded(context, continuation):
        start, rest = engine._encode_pair(context, continuation)
        ids, total = torch.tensor([start + rest]), 0.0
        with torch.no_grad(), engine.stepflow.on([[*start, *rest[:-1]]]):
            cache, read = None, ids[:, : len(start)]
            for token in rest:
                out = engine.model(input_ids=read, past_key_values=cache, use_cache=True)
                cache, read = out.past_key_values, torch.tensor([[token]])
                total += float(out.logits[0, -1].log_softmax(-1)[token])
        return total

    assert scores == pytest.approx([decoded(*pair) for pair in pairs], abs=1e-3)
    unrepaired = [score for score, _ in plain.loglikelihood(requests("loglikelihood", pairs))]
    assert all(abs(a - b) > 0.01 for a, b in zip(scores, unrepaired, strict=True))


def test_a_task_that_scores_one_token_after_a_question_is_refused(built):
    from stepflow_tl.errors import ModelError

    engine, plain = built(**FLOW), built(**PLAIN)
    pairs = [(prompt, letter) for prompt in prompts(engine) for letter in "ABC"]
    few = requests("loglikelihood", pairs[:6])  # two questions: too few to judge by
    assert engine.loglikelihood(few) == plain.loglikelihood(few)
    pairs = [(prompt.replace("?", f"{i}?"), "A") for prompt in prompts(engine) for i in range(3)]
    with pytest.raises(ModelError, match="only the first token of an answer is scored"):
        engine.loglikelihood(requests("loglikelihood", pairs))


def test_thinking_is_dropped_at_the_end_token(built):
    engine = built(**FLOW)
    asked = [(p, {"until": [], "max_gen_toks": N_NEW}) for p in prompts(engine)]
    whole = engine.generate_until(requests("generate_until", asked))
    character = next(c for c in whole[0][2:-2] if c.isascii())
    engine.think_end_token = engine.tokenizer.encode(character)[0]
    found = engine.generate_until(requests("generate_until", asked))
    assert found[0] == whole[0].rpartition(character)[2].lstrip() != whole[0]


def test_measuring_a_batch_is_not_taken_for_the_users_texts(built, monkeypatch):
    engine = built(**FLOW)
    engine.max_batch_size, engine._max_length = 16, 40
    assert engine._detect_batch_size() == 16  # sixteen texts without a question: no complaint
    assert not engine._is_measured


@pytest.mark.parametrize("option", ["peft", "tp_plan"])
def test_what_stepflow_cannot_serve_is_refused_before_the_model_is_loaded(harness, option):
    from stepflow_tl.errors import ModelError

    with pytest.raises(ModelError, match=f"StepFlow does not go with {option}"):
        harness.StepFlowLM("nothing there", device="cpu", stepflow=True, **{option: "auto"})


def test_a_gguf_file_is_read_by_this_package_with_its_own_tokenizer(harness, tmp_path):
    from stepflow_tl.models.gguf import GgufCheckpoint

    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    engine = harness.StepFlowLM(str(path), device="cpu", dtype="bfloat16")
    expected = GgufCheckpoint.open(path).model(torch.bfloat16)
    assert engine.model.dtype == torch.bfloat16 and engine.tokenizer.chat_template
    for (name, parameter), (_, other) in zip(
        engine.model.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert torch.equal(parameter, other), name


def test_the_harness_finds_the_class_by_its_name(harness):
    from lm_eval.api.registry import get_model

    assert get_model("stepflow") is harness.StepFlowLM
