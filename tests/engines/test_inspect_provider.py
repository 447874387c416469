import pytest
import torch

pytest.importorskip("inspect_ai", reason="needs Inspect: make test-engines")
pytestmark = pytest.mark.filterwarnings("ignore")  # Inspect's own are not ours to judge

from importlib.metadata import entry_points, version  # noqa: E402

import anyio  # noqa: E402
from engine_models import QUESTIONS, load_tiny_model  # noqa: E402

PLAIN = dict(format="boxed")
FLOW = dict(stepflow=True, format="boxed", splitter="line", tau_max=0.5, alpha=0.5, shallow="0-1", deep="2-3")
CONTROL = dict(FLOW, placebo="both", placebo_seed=3)
N_NEW = 24


@pytest.fixture
def api(folder):
    """A provider of the tiny model, closed afterwards."""
    from inspect_ai.model import get_model

    import stepflow_tl.engines.inspect_plugin  # noqa: F401  # what the entry point does

    made = []

    def make(**options):
        given = dict(dtype="float32", device="cpu", bridge=False, batch_size=3, memoize=False)
        model = get_model(f"stepflow/{folder}", **{**given, **options})
        made.append(model)
        return model

    yield make
    for model in made:
        model.api.close()


def ask_all(model, texts=QUESTIONS, **config):
    from inspect_ai.model import GenerateConfig

    outputs = [None] * len(texts)

    async def ask(index, text):
        outputs[index] = await model.generate(text, config=GenerateConfig(**config))

    async def together():
        async with anyio.create_task_group() as group:
            for index, text in enumerate(texts):
                group.start_soon(ask, index, text)

    anyio.run(together)
    return outputs


def parts(output):
    content = output.choices[0].message.content
    if isinstance(content, str):
        return "", content
    return content[0].reasoning, content[1].text


def test_the_version_is_one_that_the_extra_allows():
    assert version("inspect_ai").split(".")[:2] == ["0", "3"]


def test_inspect_finds_the_provider_by_its_entry_point():
    found = entry_points(group="inspect_ai")
    assert "stepflow_tl.engines.inspect_plugin" in {each.value for each in found}


@pytest.mark.parametrize("bridge", [False, True])
@pytest.mark.parametrize("options", [PLAIN, FLOW, CONTROL], ids=["plain", "StepFlow", "control"])
def test_batches_through_inspect_give_the_answers_of_evaluate(api, our_answers, folder, options, bridge):
    if bridge:
        from stepflow_tl.models.loading import boot_bridge

        plain = load_tiny_model(folder)
        loaded = boot_bridge(plain, plain.tokenizer, "tiny", torch.float32)
        options = dict(options, loaded=loaded)
    found = ask_all(api(**options), max_tokens=N_NEW)
    options.pop("loaded", None)
    answers, tokenizer = our_answers(N_NEW, **options)
    for output, answer in zip(found, answers, strict=True):
        assert output.usage.output_tokens == answer.n_new
        if answer.thinking.strip():
            assert parts(output) == (answer.thinking.strip(), answer.summary.strip())
        assert output.choices[0].stop_reason == ("stop" if answer.finished else "max_tokens")
    assert any(parts(output)[0] for output in found)


def test_epochs_draw_other_samples_and_the_same_seed_draws_them_again(api, our_answers, folder):
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.solver import generate

    from stepflow_tl.evaluation import Decoding, Prompting, write_answers

    def texts(seed):
        task = Task(dataset=[Sample(input=QUESTIONS[0])], solver=generate(), epochs=2)
        settings = dict(temperature=0.7, top_p=0.9, seed=seed, max_tokens=12, display="none")
        [log] = eval(task, model=api(**FLOW), log_dir=str(folder / "logs"), **settings)
        assert log.status == "success", log.error
        samples = sorted(log.samples, key=lambda sample: sample.epoch)
        return [parts(sample.output) for sample in samples]

    first = texts(5)
    assert first == texts(5) and first[0] != first[1] and first != texts(6)
    model = load_tiny_model(folder)
    decoding = Decoding(max_new_tokens=12, temperature=0.7, top_p=0.9, n_samples=2, seed=5)
    from stepflow_tl.engines.options import EngineOptions

    flow = EngineOptions.taken_from(FLOW)[0].flow
    prompting = Prompting(format="boxed", splitter="line")
    [ours], _ = write_answers(model, QUESTIONS[:1], flow, decoding, prompting=prompting)
    assert first == [(answer.thinking.strip(), answer.summary.strip()) for answer in ours]


def test_the_log_that_inspect_writes_is_read_back(api, folder, tmp_path):
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate

    from stepflow_tl.engines.run_samples import Reading, read_samples
    from stepflow_tl.errors import InputFileError

    samples = [
        Sample(input=q, target="", id=i, metadata={"subject": f"s{i % 2}"}) for i, q in enumerate(QUESTIONS)
    ]
    task = Task(dataset=samples, solver=generate(), scorer=includes(), name="local")
    eval(task, model=api(**PLAIN), log_dir=str(tmp_path), max_tokens=6, display="none")
    found = read_samples(tmp_path, Reading(subject="subject"))
    assert [each.question for each in found] == [f"local/{i}" for i in range(len(QUESTIONS))]
    assert [each.subject for each in found] == ["s0", "s1", "s0", "s1"]
    assert all(each.score == 1 for each in found)  # every text includes the empty one
    assert found[0].parts["question"] == QUESTIONS[0] and found[0].parts["thinking"]
    with pytest.raises(InputFileError, match="has no score 'other': expected includes"):
        read_samples(tmp_path, Reading(metric="other"))
    (tmp_path / "broken.eval").write_bytes(b"nothing")
    with pytest.raises(InputFileError, match="broken.eval cannot be read as a log of Inspect"):
        read_samples(tmp_path / "broken.eval")


def test_a_run_that_broke_goes_on_where_it_was_by_eval_retry(folder, tmp_path, monkeypatch):
    from inspect_ai import eval, eval_retry

    import stepflow_tl.engines.inspect_plugin  # noqa: F401
    from stepflow_tl.engines.gathering import Gatherer
    from stepflow_tl.engines.run_samples import read_samples
    from stepflow_tl.errors import InputFileError

    samples = ", ".join(f"Sample(input={text!r}, id={i})" for i, text in enumerate(QUESTIONS))
    (tmp_path / "local_task.py").write_text(
        "from inspect_ai import Task, task\nfrom inspect_ai.dataset import Sample\n"
        "from inspect_ai.scorer import includes\nfrom inspect_ai.solver import generate\n\n"
        f"@task\ndef local():\n    return Task([{samples}], solver=generate(), scorer=includes())\n"
    )
    monkeypatch.chdir(tmp_path)  # Inspect takes the name of a task's file as relative
    options = dict(FLOW, dtype="float32", device="cpu", bridge=False, batch_size=2)
    asked = dict(model=f"stepflow/{folder}", model_args=options, max_tokens=6, max_samples=2, log_buffer=1)
    [whole] = eval("local_task.py", log_dir="whole", display="none", **asked)
    assert whole.status == "success", whole.error
    written, write = [], Gatherer._write

    def dying(self, settings, batch):
        written.append(len(batch))
        if len(written) == 2:
            raise RuntimeError("out of memory")
        return write(self, settings, batch)

    monkeypatch.setattr(Gatherer, "_write", dying)
    [broken] = eval("local_task.py", log_dir="logs", display="none", **asked)
    assert broken.status == "error" and "out of memory" in broken.error.message
    [retried] = eval_retry(broken, log_dir="logs", display="none")
    assert retried.status == "success", retried.error
    assert sum(written) == 6 and retried.eval.model_args["tau_max"] == FLOW["tau_max"]  # two not again
    found = {sample.id: parts(sample.output) for sample in retried.samples}
    assert found == {sample.id: parts(sample.output) for sample in whole.samples}
    with pytest.raises(InputFileError, match="both hold epoch 1 of local/0, as a log and its retry do"):
        read_samples(tmp_path / "logs")


def test_a_stop_sequence_ends_the_answer_and_is_left_out(api):
    model = api(**PLAIN)
    [whole] = ask_all(model, QUESTIONS[:1], max_tokens=N_NEW)
    text = parts(whole)[0]
    stop = next(text[i : i + 2] for i in range(3, len(text) - 2) if text[i : i + 2].isascii())
    [cut] = ask_all(model, QUESTIONS[:1], max_tokens=N_NEW, stop_seqs=[stop])
    assert parts(cut)[0] == text.partition(stop)[0].strip()
    assert cut.choices[0].stop_reason == "stop"
    assert cut.usage.output_tokens < whole.usage.output_tokens


def test_logprobs_are_those_of_the_written_tokens(api, folder):
    [output] = ask_all(api(**PLAIN), QUESTIONS[:1], max_tokens=6, logprobs=True, top_logprobs=2)
    model = load_tiny_model(folder)
    entries = output.choices[0].logprobs.content
    turns = [{"role": "user", "content": QUESTIONS[0]}]
    text = model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for entry in entries:
            shares = model(ids).logits[0, -1].log_softmax(-1)
            best = int(shares.argmax())
            assert entry.logprob == pytest.approx(float(shares[best]), abs=1e-4)
            assert [top.logprob for top in entry.top_logprobs] == pytest.approx(
                shares.topk(2).values.tolist(), abs=1e-4
            )
            ids = torch.cat([ids, torch.tensor([[best]])], dim=1)
    assert len(entries) == output.usage.output_tokens


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dict(top_k=5), "does not serve top_k"),
        (dict(prompt_logprobs=1, frequency_penalty=0.5), "frequency_penalty, prompt_logprobs"),
        (dict(num_choices=2), "num_choices without a temperature"),
    ],
)
def test_what_is_not_served_is_refused_by_name(api, config, words):
    from inspect_ai.model import GenerateConfig

    model = api(**PLAIN)
    with pytest.raises(Exception, match=words):
        anyio.run(lambda: model.api.generate([], [], "none", GenerateConfig(**config)))


def test_an_error_reaches_whoever_asked_and_nothing_stays_on_the_model(api):
    model = api(**FLOW)
    inner = model.api.model
    before = inner.config._attn_implementation

    def failing(module, inputs, output):
        raise RuntimeError("out of memory")

    handle = inner.lm_head.register_forward_hook(failing)
    with pytest.raises(Exception) as caught:
        ask_all(model, QUESTIONS[:1], max_tokens=4)
    handle.remove()
    assert "out of memory" in repr(caught.value.exceptions if hasattr(caught.value, "exceptions") else caught)
    assert inner.config._attn_implementation == before and "forward" not in vars(inner)
    assert not inner.get_input_embeddings()._forward_pre_hooks
    assert ask_all(model, QUESTIONS[:1], max_tokens=4)[0].usage.output_tokens == 4  # the thread lives on


def test_the_cache_of_inspect_tells_stepflow_from_the_plain_model(api, monkeypatch, tmp_path):
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path))
    asked = dict(max_tokens=N_NEW, cache=True)
    plain, repaired = (ask_all(api(**options), QUESTIONS[:1], **asked) for options in (PLAIN, FLOW))
    assert parts(plain[0]) != parts(repaired[0])
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) == 2  # one each: the cache is in use, and its keys differ
    again = ask_all(api(**FLOW), QUESTIONS[:1], **asked)
    assert parts(again[0]) == parts(repaired[0])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == kept


def test_of_former_answers_the_reasoning_is_left_out_and_images_are_refused():
    from inspect_ai.model import (
        ChatMessageAssistant,
        ChatMessageUser,
        ContentImage,
        ContentReasoning,
        ContentText,
    )

    from stepflow_tl.engines.inspect_provider import _messages
    from stepflow_tl.errors import ModelError

    answer = ChatMessageAssistant(content=[ContentReasoning(reasoning="hm"), ContentText(text="14")])
    assert _messages([ChatMessageUser(content="?"), answer]) == [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "14"},
    ]
    with pytest.raises(ModelError, match="reads text alone, and a message holds image"):
        _messages([ChatMessageUser(content=[ContentImage(image="data:image/png;base64,AA==")])])


def test_unknown_arguments_are_refused():
    from stepflow_tl.engines.inspect_provider import StepFlowAPI
    from stepflow_tl.errors import ModelError

    with pytest.raises(ModelError, match="unknown model arguments tau.*device_map"):
        StepFlowAPI("smollm2", tau=0.2)
