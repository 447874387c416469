"""`evaluate` over its ledger: every answer once, whatever happens on the way, and the same as undisturbed."""

import errno
import importlib.util
import json
import os
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from dying import die_at, in_a_child, losing_a_replica
from tiny_models import build_tiny_model

from stepflow_tl import StepFlow, evaluate, evaluation
from stepflow_tl.errors import (
    FormatError,
    InputFileError,
    MissingExtraError,
    ModelError,
    ProblemError,
    ResultFileError,
    TraceError,
)
from stepflow_tl.evaluation import AnswerWriter, Decoding, Grader, Prompting, Question, Verdict
from stepflow_tl.runs import answers, engines, read_answers
from stepflow_tl.runs.memory import OutOfMemoryError
from stepflow_tl.trace import ReasoningTrace
from stepflow_tl.trace.splitting import RegexSplitter

CONDITIONS = {"plain": None, "StepFlow": StepFlow(tau_max=0.5, alpha=0.8)}
DECODING = Decoding(max_new_tokens=6, batch_size=3)


def is_even(question, answer):
    """A grader that half of all nonsense passes."""
    return Verdict(answer.tokens[-1] % 2 == 0, "" if answer.tokens[-1] % 2 == 0 else "odd")


def ask(model, questions, out=None, **options):
    given = {"conditions": CONDITIONS, "decoding": DECODING, "grader": is_even, **options}
    return evaluate(model, questions, out, **given)


def lines(folder, name="answers.jsonl"):
    """The entries of a ledger, without the header and without times."""
    _, *entries = map(json.loads, (folder / name).read_text().splitlines())
    return [{**entry, "seconds": None} for entry in entries]


def ids(folder, name="answers.jsonl"):
    return [line["id"] for line in lines(folder, name)]


def by_id(entries):
    return sorted(entries, key=lambda entry: entry["id"])


class Listening:
    """A watcher that remembers, and does something when so many batches are done."""

    def __init__(self, at=None, do=None):
        self.notes, self.steps, self.begun, self.at, self.do = [], [], None, at, do

    def begin(self, total, done, settings, replicas):
        self.begun = total, done, settings.model_name, replicas

    def note(self, message):
        self.notes.append(message)

    def advance(self, n_answers, n_tokens, seconds, tokens_left):
        self.steps.append((n_answers, n_tokens, tokens_left))
        if len(self.steps) == self.at:
            self.do()


def interrupt():
    raise KeyboardInterrupt


@pytest.fixture
def model(tiny_model):
    return tiny_model("qwen2", dtype=torch.float32)


@pytest.fixture
def questions():
    """Seven of different lengths, two difficulties, awkward ids."""
    texts = ["1+1?", "What is 2?", "x " * 8, "é or ü?", "a", "b" * 12, "Is it so?"]
    names = ["a", "b/c", "d e", "é", "../x", "f", "g"]
    return [
        Question(name, text, "3", "even" if i % 2 else "odd", row={"labels": ("A", "B")})
        for i, (name, text) in enumerate(zip(names, texts, strict=True))
    ]


@pytest.fixture
def calm(model, questions, tmp_path):
    """A folder that nobody disturbed."""
    ask(model, questions, tmp_path / "calm")
    return tmp_path / "calm"


def test_the_answers_are_those_of_the_evaluation_in_memory(model, questions, tmp_path):
    expected = evaluation.evaluate(model, questions, conditions=CONDITIONS, decoding=DECODING, grader=is_even)
    in_memory = ask(model, questions)
    on_disk = ask(model, questions, tmp_path / "out")
    read = read_answers(tmp_path / "out")
    for found in (in_memory, on_disk, read):
        assert found.questions == expected.questions and found.decoding == expected.decoding
        for name, result in expected.results.items():
            assert found.results[name].answers == result.answers
            assert found.results[name].verdicts == result.verdicts
            assert found.results[name].flow == result.flow
            assert found.results[name].seconds > 0
    assert read.table() == on_disk.table() == (tmp_path / "out" / "evaluation.txt").read_text()[:-1]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == json.loads(on_disk.to_json())
    scores = expected.results["plain"].scores
    assert 0 < scores.mean() < 1  # the grader told some from others


def test_a_line_says_all_about_its_answer(model, questions, calm):
    header, *_ = map(json.loads, (calm / "answers.jsonl").read_text().splitlines())
    settings = header["settings"]
    assert settings["conditions"] == {"plain": None, "StepFlow": repr(CONDITIONS["StepFlow"])}
    assert settings["decoding"]["max_new_tokens"] == 6 and settings["grader"] == "is_even"
    assert settings["prompt"] == "{question}" and settings["system"] is None and settings["n_questions"] == 7
    (line,) = [each for each in lines(calm) if each["id"] == "b/c/StepFlow/0"]
    assert (line["question_id"], line["condition"], line["sample"], line["number"]) == (
        "b/c",
        "StepFlow",
        0,
        1,
    )
    assert (line["question"], line["expected"], line["difficulty"]) == ("What is 2?", "3", "even")
    assert line["row"] == {"labels": ["A", "B"]}
    assert len(line["tokens"]) == line["n_prompt"] + line["new_tokens"] and line["new_tokens"] == 6
    assert line["finished"] is False and line["right"] is (line["reason"] == "")
    trace = ReasoningTrace.from_tokens(model.tokenizer, line["tokens"])
    summary = "".join(step.text for step in trace.steps if step.segment.name == "SUMMARY")
    assert (line["thinking"] == "", line["summary"]) == (not line["thinking"], summary)
    assert by_id(lines(calm)) != lines(calm), "sorted by length, not by id: the order was not told apart"


def test_batches_are_planned_over_all_rows_whatever_is_there(model, questions, calm, tmp_path, monkeypatch):
    written, write = [], AnswerWriter.write

    def listening(self, rows, flow):
        written.append((flow is None, [(row.question, row.sample) for row in rows]))
        return write(self, rows, flow)

    monkeypatch.setattr(AnswerWriter, "write", listening)
    ask(model, questions, tmp_path / "all")
    whole = list(written)
    assert len(whole) == 6 and [len(rows) for _, rows in whole] == [3, 3, 3, 3, 1, 1]
    assert [plain for plain, _ in whole] == [True, False] * 3  # both conditions, then the next batch
    header, *entries = (calm / "answers.jsonl").read_text().splitlines(keepends=True)
    kept = [entry for place, entry in enumerate(entries) if place not in (1, 9)]
    (calm / "answers.jsonl").write_text("".join([header, *kept]))
    written.clear()
    ask(model, questions, calm)
    assert written == [whole[0], whole[3]]  # whole batches again
    assert len(ids(calm)) == len(set(ids(calm))) == 14
    assert (calm / "answers.jsonl").read_text().startswith("".join([header, *kept]))  # two lines more
    assert by_id(lines(calm)) == by_id(lines(tmp_path / "all"))


def test_a_finished_run_loads_the_model_and_writes_nothing(model, questions, calm, monkeypatch):
    monkeypatch.setattr(AnswerWriter, "write", None)
    before, watcher = (calm / "answers.jsonl").read_bytes(), Listening()
    found = ask(model, questions, calm, watcher=watcher)
    assert (calm / "answers.jsonl").read_bytes() == before and not found.n_missing
    assert watcher.begun == (14, 14, "tiny-qwen2", 1) or watcher.begun[:2] == (14, 14)
    assert watcher.steps == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_kill_at_every_system_call_costs_nothing(model, questions, calm, tmp_path, monkeypatch):
    known, write = {}, AnswerWriter.write

    def remembered(self, rows, flow):
        """A forked process has none of torch's threads."""
        key = (flow is None, tuple(rows))
        if key not in known:
            known[key] = write(self, rows, flow)
        return known[key]

    monkeypatch.setattr(AnswerWriter, "write", remembered)
    ask(model, questions, tmp_path / "first")
    expected = by_id(lines(calm))
    assert by_id(lines(tmp_path / "first")) == expected
    number, kills, sizes = 0, 0, set()
    while True:
        number += 1
        folder = tmp_path / f"killed-{number}"
        code = in_a_child(
            lambda folder=folder: ask(model, questions, folder),
            lambda number=number: die_at(number),
            lambda found: not found.n_missing,
        )
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        ledger = folder / "answers.jsonl"
        if ledger.exists() and ledger.read_bytes().count(b"\n"):
            sizes.add(len(read_answers(folder).questions))  # what is there can be read at any moment
        found = ask(model, questions, folder)
        assert not found.n_missing and by_id(lines(folder)) == expected, f"killed at call {number}"
        assert len(ids(folder)) == len(set(ids(folder)))
        assert {path.name for path in folder.iterdir()} - {"evaluation.txt", "evaluation.json"} == {
            "answers.jsonl"
        }, "a temporary file was left"
    assert kills > 12 and len(sizes) > 3, "the calls that a run makes were not met: nothing was tested"


def test_ctrl_c_gives_the_questions_that_are_whole_and_the_same_call_goes_on(
    model, questions, calm, tmp_path
):
    watcher = Listening(at=3, do=interrupt)
    found = ask(model, questions, tmp_path / "out", watcher=watcher)
    assert found.stopped == "interrupted" and found.n_missing == 4 and len(found.questions) == 3
    assert "4 of 7 questions are not answered yet under every condition, and left out" in found.table()
    assert (tmp_path / "out" / "evaluation.txt").read_text() == found.table() + "\n"
    assert watcher.notes[-1].startswith("interrupted: 9 of 14 answers are written")
    assert [n for n, _, _ in watcher.steps] == [3, 3, 3]
    assert watcher.steps[-1][2] == pytest.approx(5 * 6)  # tokens left: five answers of six tokens
    again = ask(model, questions, tmp_path / "out")
    assert again.stopped == "" and again.n_missing == 0
    assert by_id(lines(tmp_path / "out")) == by_id(lines(calm))
    nothing = ask(model, questions, watcher=Listening(at=1, do=interrupt))
    assert nothing.questions == () and "there is nothing to compare" in nothing.table()
    assert json.loads(nothing.to_json())["n_missing"] == 7


def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(model, questions, calm, tmp_path, monkeypatch):
    out, write, room = tmp_path / "out", os.write, [4000]

    def full(descriptor, data):
        if room[0] < len(data):
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= len(data)
        return write(descriptor, data)

    watcher = Listening()
    monkeypatch.setattr(os, "write", full)
    found = ask(model, questions, out, watcher=watcher)
    monkeypatch.undo()
    assert found.stopped == "disk full" and found.n_missing
    assert "the disk is full" in watcher.notes[0] and "free some space" in watcher.notes[1]
    assert ask(model, questions, out).stopped == ""
    assert by_id(lines(out)) == by_id(lines(calm))


def test_shards_share_a_folder_and_the_last_one_sees_all(model, questions, calm, tmp_path):
    out, missing = tmp_path / "out", []
    for index in range(3):
        found = ask(model, questions, out, shard=f"{index}/3")
        missing.append(found.n_missing)
    assert missing == [4, 2, 0] and found.questions == tuple(questions)
    parts = [ids(out, f"answers-{index}-of-3.jsonl") for index in range(3)]
    assert {name.rsplit("/", 2)[0] for name in parts[1]} == {"b/c", "../x"}  # by question
    assert sorted(sum(parts, [])) == sorted(ids(calm))
    read = read_answers(out)
    assert read.table() == found.table() and read.results.keys() == CONDITIONS.keys()
    with pytest.raises(InputFileError, match="shard 3/3 does not exist"):
        ask(model, questions, out, shard="3/3")
    # A part without a question is done at once.
    assert ask(model, questions[:1], tmp_path / "few", shard="1/2").n_missing == 1


def test_samples_are_lines_of_their_own(model, questions, tmp_path):
    decoding = Decoding(max_new_tokens=4, temperature=1.0, n_samples=3, batch_size=4)
    found = ask(model, questions[:3], tmp_path, decoding=decoding)
    assert [name for name in sorted(ids(tmp_path)) if name.startswith("a/plain")] == [
        "a/plain/0",
        "a/plain/1",
        "a/plain/2",
    ]
    assert all(len(set(samples)) > 1 for samples in found.results["plain"].answers)


def test_words_around_the_question_reach_the_model(model, questions, tmp_path):
    prompting = Prompting(format="plain", system="Be brief.", prompt="Q: {question} {not a field}\nThink.")
    ask(model, questions[:2], tmp_path, prompting=prompting, conditions={"plain": None})
    for line, question in zip(by_id(lines(tmp_path)), questions, strict=False):
        text = model.tokenizer.decode(line["tokens"][: line["n_prompt"]])
        assert "system\nBe brief." in text and f"Q: {question.text} {{not a field}}\nThink." in text
        assert line["question"] == question.text
    with pytest.raises(ValueError, match=r"expected a text with \{question\} in it"):
        Prompting(prompt="Think.")
    with pytest.raises(FormatError, match="unheard-of"):
        ask(model, questions, prompting=Prompting(format="unheard-of"))


def test_the_splitter_says_where_momentum_is_injected(model, questions):
    conditions = {"flow": StepFlow(tau_max=0.0, alpha=50.0)}
    options = {"conditions": conditions, "decoding": Decoding(max_new_tokens=24)}
    whole, letters = (
        ask(model, questions, prompting=Prompting("plain", splitter), **options)
        for splitter in ("whole", RegexSplitter("[A-Za-z]"))
    )
    assert whole.results["flow"].answers != letters.results["flow"].answers
    with pytest.raises(TraceError, match="Unknown splitter 'chapter'"):
        ask(model, questions, prompting=Prompting(splitter="chapter"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"grader": lambda question, answer: True}, "grader"),
        ({"decoding": replace(DECODING, seed=1)}, "decoding"),
        ({"conditions": {"plain": None}}, "conditions"),
        ({"prompting": Prompting(system="Be brief.")}, "system"),
        ({"prompting": Prompting(splitter="line")}, "splitter"),
        ({"questions": 6}, "questions_sha256"),
    ],
)
def test_other_settings_are_refused_or_begin_anew(model, questions, calm, change, named):
    asked = questions[: change.pop("questions", 7)]
    before = (calm / "answers.jsonl").read_bytes()
    with pytest.raises(ResultFileError, match=f"holds another evaluation, with {named} .*--overwrite"):
        ask(model, asked, calm, **change)
    assert (calm / "answers.jsonl").read_bytes() == before
    with pytest.raises(ResultFileError, match=f"answers.jsonl: a header with {named} .*folder of its own"):
        ask(model, asked, calm, shard="0/2", **change)  # another ledger of the same folder
    (calm / "answers-0-of-2.jsonl").unlink()
    found = ask(model, asked, calm, overwrite=True, **change)
    assert not found.n_missing and len(found.questions) == len(asked)


def test_a_folder_in_use_is_refused(model, questions, calm):
    def second():
        with pytest.raises(ResultFileError, match="is in use.*--shard"):
            ask(model, questions, calm)

    (calm / "answers.jsonl").write_text((calm / "answers.jsonl").read_text().partition("\n")[0] + "\n")
    watcher = Listening(at=1, do=second)
    ask(model, questions, calm, watcher=watcher)
    assert len(watcher.steps) == 6


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: {**line, "new_tokens": line["new_tokens"] + 1},
        lambda line: {**line, "right": 1},
        lambda line: {**line, "tokens": [1.5]},
        lambda line: {**line, "sample": -1},
        lambda line: {**line, "condition": "other"},
        lambda line: {**line, "row": {"labels": 3}},
        lambda line: {**line, "row": []},
        lambda line: {**line, "seconds": "1"},
        lambda line: {name: value for name, value in line.items() if name != "expected"},
    ],
)
def test_a_damaged_line_costs_its_answer_which_is_written_again(model, questions, calm, damage):
    path, expected = calm / "answers.jsonl", by_id(lines(calm))
    texts = path.read_text().splitlines()
    texts[3] = json.dumps(damage(json.loads(texts[3])))
    path.write_text("\n".join(texts) + "\n")
    assert read_answers(calm).n_missing == 1
    watcher = Listening()
    assert not ask(model, questions, calm, watcher=watcher).n_missing
    assert "ignored a line that is damaged" in watcher.notes[0]
    assert by_id(lines(calm)[:2] + lines(calm)[3:]) == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"conditions": {"a": "print('harm')"}}, "expected the repr of a StepFlow"),
        ({"conditions": {"a": "StepFlow(tau_max=__import__('os'))"}}, "cannot be read"),
        ({"conditions": {"a": "StepFlow(" + "(" * 10_000}}, "expected the repr of a StepFlow"),
        ({"conditions": {"a": "StepFlow(9)"}}, "expected the repr of a StepFlow"),
        ({"conditions": {"a": "StepFlow(magic=1)"}}, "magic"),
        ({"conditions": {"a": 3}}, "a is a int, expected a string"),
        ({"conditions": []}, "must be objects"),
        ({"decoding": {"max_new_tokens": 0}}, "max_new_tokens is 0"),
        ({"decoding": {"beams": 4}}, "beams"),
        ({"n_questions": -1}, "expected a count"),
        ({"grader": 3}, "expected a string"),
    ],
)
def test_a_header_is_not_believed(calm, settings, said):
    path = calm / "answers.jsonl"
    header, *rest = path.read_text().splitlines()
    data = json.loads(header)
    data["settings"] |= settings
    path.write_text("\n".join([json.dumps(data), *rest]) + "\n")
    with pytest.raises(ResultFileError, match="the settings of its header cannot be read") as refused:
        read_answers(calm)
    assert said in str(refused.value)


def test_a_folder_without_answers_is_named(tmp_path):
    with pytest.raises(ResultFileError, match="holds no ledger of answers"):
        read_answers(tmp_path)


def test_answers_are_counted_anew_from_the_ledger_alone(calm):
    found = read_answers(calm)
    again = found.regraded(lambda question, answer: question.field("labels")[0] == "A" and question.id == "a")
    assert again.accuracy("plain") == pytest.approx(1 / 7) != found.accuracy("plain")


def test_half_a_character_is_escaped_and_in_an_id_refused(model, questions, tmp_path):
    odd = replace(questions[0], text="a \ud800 b", answer="\udfff", row={"labels": ("\ud800",)})

    def grader(question, answer):
        return Verdict(False, "said \ud800")

    asked = [replace(odd, text="a b"), *questions[1:]]
    ask(model, asked, tmp_path, grader=grader)
    (line,) = [each for each in lines(tmp_path) if each["id"] == "a/plain/0"]
    assert (line["expected"], line["reason"]) == ("\\udfff", "said \\ud800")
    assert line["row"] == {"labels": ["\\ud800"]}
    assert not read_answers(tmp_path).n_missing
    with pytest.raises(ProblemError, match="half a character"):
        ask(model, [replace(odd, id="\ud800")], tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"questions": []}, ValueError, "no questions"),
        ({"conditions": {}}, ValueError, "no conditions"),
        ({"conditions": {"a/b": None}}, ValueError, "without '/'"),
        ({"conditions": {"a\n": None}}, ValueError, "printable name"),
        ({"conditions": {"": None}}, ValueError, "printable name"),
        ({"engine": "slurm"}, ValueError, "unknown engine 'slurm'"),
        ({"grader": "magic"}, ValueError, "no grader 'magic'"),
        ({"questions": [Question("a", "1", "1"), Question("a", "2", "2")]}, ProblemError, "ids must differ"),
        ({"questions": [Question("a", "1", "1", row={"n": 3})]}, ProblemError, "its field 'n' is 3"),
        ({"questions": "nowhere.jsonl"}, InputFileError, "cannot read nowhere.jsonl"),
        ({"conditions": {"f": StepFlow(shallow=[99])}}, ModelError, "99"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_written(
    model, questions, tmp_path, change, error, said
):
    given = {"questions": questions, **change}
    with pytest.raises(error, match=said):
        ask(model, out=tmp_path / "out", **given)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_folder_that_cannot_be_made_is_named(model, questions, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputFileError, match="cannot be made"):
        ask(model, questions, tmp_path / "file" / "out")


def test_a_file_of_questions_is_read_by_its_grader(model, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "2?", "choices": ["1", "2"], "labels": ["A", "B"], "answer": "B"}\n')
    found = ask(model, path, tmp_path / "out", grader="choice", conditions={"plain": None})
    assert found.questions[0].answer == "B" and "A. 1" in found.questions[0].text
    assert read_answers(tmp_path / "out").regraded("choice").table() == found.table()
    always = Grader("yes", {"question": "text"}, lambda question, answer: True)
    assert ask(model, path, grader=always, conditions={"plain": None}).accuracy("plain") == 1


def test_a_batch_too_large_for_memory_is_halved_and_said_so(model, questions, calm, tmp_path, monkeypatch):
    write = AnswerWriter.write

    def small(self, rows, flow, most=2):
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return write(self, rows, flow)

    monkeypatch.setattr(AnswerWriter, "write", small)
    watcher = Listening()
    ask(model, questions, tmp_path / "out", watcher=watcher)
    assert watcher.notes == ["not enough memory for a batch of 3 answers: it is written in halves"] * 4
    assert by_id(lines(tmp_path / "out")) == by_id(lines(calm))
    monkeypatch.setattr(AnswerWriter, "write", lambda self, rows, flow: small(self, rows, flow, most=0))
    with pytest.raises(OutOfMemoryError, match="one answer alone.*--max-new-tokens"):
        ask(model, questions)


def test_a_batch_of_which_workers_die_is_given_up_and_the_rest_is_done(
    model, questions, calm, tmp_path, monkeypatch
):
    class Dying(engines.LocalEngine):
        """Its worker dies of the second batch under the plain model, as a replica of Ray's would."""

        def __init__(self, make, given_up):
            super().__init__(make)
            self._given_up = given_up

        def results(self, tasks):
            for task in tasks:
                is_deadly = (task.condition, task.batch) == ("plain", 1)
                yield task, self._given_up(task) if is_deadly else self._worker.take(task)

    with monkeypatch.context() as patch:
        patch.setattr(answers, "open_engine", lambda make, *, given_up, **_: Dying(make, given_up))
        watcher = Listening()
        found = ask(model, questions, tmp_path / "out", watcher=watcher)
    assert found.stopped == "worker died" and found.n_missing == 3
    assert watcher.notes[0].startswith("batch 2 under 'plain' is given up: its worker died 3 times")
    assert not ask(model, questions, tmp_path / "out").n_missing
    assert by_id(lines(tmp_path / "out")) == by_id(lines(calm))


def test_without_ray_the_command_is_named(model, questions, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install .stepflow-tl\[ray\]"):
        ask(lambda: model, questions, engine="ray")


def load_tiny():
    """The tiny model, as a function that another process can call."""
    torch.set_num_threads(1)
    return build_tiny_model("qwen2", dtype=torch.float32)


@pytest.mark.filterwarnings("ignore")  # ray's own
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='needs the extra "ray"')
def test_two_replicas_of_which_one_is_killed_write_the_same_answers(questions, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    ask(load_tiny, questions, tmp_path / "local", grader="exact")
    killed = []
    monkeypatch.setattr(engines, "RayEngine", losing_a_replica(engines.RayEngine, killed))
    try:
        found = ask(load_tiny, questions, tmp_path / "ray", grader="exact", engine="ray", replicas=2)
    finally:
        ray.shutdown()
    assert killed and not found.n_missing
    assert by_id(lines(tmp_path / "ray")) == by_id(lines(tmp_path / "local"))


def test_numbers_of_numpy_in_a_condition_are_plain_numbers():
    flow = StepFlow(alpha=np.float64(0.1))
    assert flow == StepFlow(alpha=0.1) and repr(flow) == repr(StepFlow(alpha=0.1))
