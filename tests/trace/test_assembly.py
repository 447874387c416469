"""Building traces: from parts, text and tokens, for every family, and what is refused."""

import pytest
import torch
from trace_material import TEMPLATES, family_tokenizer

from stepflow_tl.errors import FormatError, TraceError
from stepflow_tl.trace import ReasoningTrace, Segment
from stepflow_tl.trace.formats import get_format
from stepflow_tl.trace.splitting import RegexSplitter

FAMILIES = list(TEMPLATES)
THINKING, SUMMARY = "First 🙂.\n\nThen 答案 |b|.", "It is 4.\n\nDone"


def contents(trace):
    return [(step.label, step.text) for step in trace.steps]


@pytest.mark.parametrize("merges", ["bytes", "straddling"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_text_and_tokens_agree_for_every_family(family, merges):
    tokenizer = family_tokenizer(family, merges=merges)
    trace = ReasoningTrace.from_parts(tokenizer, "What is 2+2?", THINKING, SUMMARY)
    assert trace.format == family
    labels = [label for label, _ in contents(trace)]
    assert labels == ["Q", "T1", "T2", "S1", "S2"]
    assert trace.steps[0].text == "What is 2+2?"
    assert "".join(s.text for s in trace.steps_in(Segment.THINKING)).rstrip() == THINKING
    assert "".join(s.text for s in trace.steps_in(Segment.SUMMARY)) == SUMMARY
    from_text = ReasoningTrace.from_text(tokenizer, trace.text)
    assert from_text == trace
    assert ReasoningTrace.from_tokens(tokenizer, trace.tokens) == from_text


@pytest.mark.parametrize("family", FAMILIES)
def test_unfinished_thinking_has_no_end_marker_and_no_summary(family):
    tokenizer = family_tokenizer(family)
    trace = ReasoningTrace.from_parts(tokenizer, "Hi?", "Hm")
    assert trace.text.endswith("Hm")
    assert contents(trace) == [("Q", "Hi?"), ("T1", "Hm")]
    assert ReasoningTrace.from_text(tokenizer, trace.text) == trace


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_thinking_gives_no_thinking_step(family):
    trace = ReasoningTrace.from_parts(family_tokenizer(family), "Hi?", "", "Yo")
    assert contents(trace) == [("Q", "Hi?"), ("S1", "Yo")]


@pytest.mark.parametrize("family", FAMILIES)
def test_markers_within_the_parts_are_never_parsed(family):
    hostile = "a </think> <think> [/THINK] <|im_end|> <｜User｜> <|end|> b"
    trace = ReasoningTrace.from_parts(family_tokenizer(family), hostile, hostile, hostile)
    assert [step.label for step in trace.steps] == ["Q", "T1", "S1"]
    assert [step.text.rstrip("\n") for step in trace.steps] == [hostile] * 3


@pytest.mark.parametrize("merges", ["bytes", "straddling"])
def test_a_boxed_answer_reads_with_its_box_from_parts_text_and_tokens(merges):
    tokenizer, answer = family_tokenizer("chatml", merges=merges), "\\boxed{18}$.\n\nSo 18."
    trace = ReasoningTrace.from_parts(
        tokenizer, "Put it into \\boxed{}.", "9 + 9:\n\nIt is $", answer, format="boxed"
    )
    from_text = ReasoningTrace.from_text(tokenizer, trace.text, format="boxed")
    assert contents(trace) == contents(from_text)
    assert [label for label, _ in contents(trace)] == ["Q", "T1", "T2", "S1", "S2"]
    assert "".join(step.text for step in from_text.steps_in(Segment.SUMMARY)) == answer
    assert ReasoningTrace.from_tokens(tokenizer, trace.tokens, format="boxed") == from_text
    # Nobody who reads token by token knows yet that a box begins: its first tokens count as thinking.
    begins = [found.steps_in(Segment.SUMMARY)[0].token_start for found in (trace, from_text)]
    assert begins[0] < begins[1]


def test_the_start_marker_of_the_prompt_is_not_written_twice():
    for family in ("qwq", "deepseek-r1"):
        assert (
            ReasoningTrace.from_parts(family_tokenizer(family), "Hi", "Hm", "Yo").text.count("<think>") == 1
        )


def test_thinking_that_the_prompt_closes_is_switched_on():
    """Gemma-4 and DeepSeek-V3.1 close thinking in the prompt, unless they are told to think."""
    tokenizer = family_tokenizer("gemma-4")
    thinking = ReasoningTrace.from_parts(tokenizer, "Hi", "Hm", "Yo")
    assert thinking.text.endswith("<|turn>model\n<|channel>thought\nHm\n<channel|>Yo<turn|>")
    silent = ReasoningTrace.from_parts(tokenizer, "Hi", "", "Yo")
    assert silent.text.endswith("<|turn>model\n<|channel>thought\n<channel|>Yo<turn|>")
    assert contents(silent) == [("Q", "Hi"), ("S1", "Yo")]


def test_thinking_that_cannot_be_switched_on_is_refused():
    tokenizer = family_tokenizer.__wrapped__("gemma-4")
    tokenizer.chat_template = tokenizer.chat_template.replace("if not enable_thinking", "if true")
    with pytest.raises(FormatError, match=r"closes thinking in its prompt .*Pass thinking='', or"):
        ReasoningTrace.from_parts(tokenizer, "Hi", "Hm", "Yo")
    assert contents(ReasoningTrace.from_parts(tokenizer, "Hi", "", "Yo")) == [("Q", "Hi"), ("S1", "Yo")]


def test_bos_is_written_once():
    trace = ReasoningTrace.from_parts(family_tokenizer("llama-3"), "Hi", "Hm", "Yo")
    assert trace.text.count("<|begin_of_text|>") == 1
    assert trace.tokens.tolist().count(trace.tokens[0].item()) == 1


def test_a_system_prompt_is_template():
    trace = ReasoningTrace.from_parts(family_tokenizer("gpt-oss"), "Hi", "Hm", "Yo", system="Be brief.")
    assert "Be brief." in trace.pieces[0].text and trace.pieces[0].segment == Segment.TEMPLATE


def test_a_question_that_the_template_strips_is_found():
    trace = ReasoningTrace.from_parts(family_tokenizer("llama-3"), "  Hi there \n", "Hm", "Yo")
    assert trace.steps[0].text == "Hi there"


def test_a_question_whose_text_stands_in_the_template_too_is_found_in_its_own_place():
    trace = ReasoningTrace.from_parts(family_tokenizer("smollm3"), "Use", "Hm", "Yo")
    assert trace.steps[0].text == "Use" and trace.text[: trace.steps[0].char_start].endswith("user\n")


def test_a_template_whose_frame_depends_on_the_question_still_shows_it():
    tokenizer = family_tokenizer.__wrapped__("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>user\n{{ m.content | length }}:{{ m.content }}{% endfor %}"
    )
    assert ReasoningTrace.from_parts(tokenizer, "Hello?", "Hm").steps[0].text == "Hello?"


def test_without_a_template_the_parts_stand_in_plain_text():
    tokenizer = family_tokenizer.__wrapped__(None)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    trace = ReasoningTrace.from_parts(tokenizer, "Hi?", "Hm.\n\nSo", "Yo")
    assert trace.format == "plain" and trace.text == "<s>Hi?\n\nHm.\n\nSo\n\nYo"
    assert contents(trace) == [("Q", "Hi?\n\n"), ("T1", "Hm.\n\n"), ("T2", "So\n\n"), ("S1", "Yo")]
    assert trace.pieces[0].text == "<s>" and trace.step_ids[0] == -1


def test_markers_in_the_vocabulary_do_not_make_up_for_a_missing_template():
    tokenizer = family_tokenizer.__wrapped__("chatml")
    tokenizer.chat_template = None
    assert ReasoningTrace.from_parts(tokenizer, "Hi?", "Hm").format == "plain"
    with pytest.raises(FormatError, match="has no chat template"):
        ReasoningTrace.from_parts(tokenizer, "Hi?", "Hm", format="auto")


def test_plain_text_is_all_thinking_or_question_and_thinking():
    tokenizer = family_tokenizer("chatml")
    text = "Hi?\n\nHm.\n\n</think> So"
    trace = ReasoningTrace.from_text(tokenizer, text, format="plain")
    assert contents(trace) == [("T1", "Hi?\n\n"), ("T2", "Hm.\n\n"), ("T3", "</think> So")]
    trace = ReasoningTrace.from_text(tokenizer, text, format="plain", question="Hi?")
    assert contents(trace) == [("Q", "Hi?\n\n"), ("T1", "Hm.\n\n"), ("T2", "</think> So")]


def test_bos_and_end_of_text_are_template_in_plain_text():
    tokenizer = family_tokenizer("chatml")
    trace = ReasoningTrace.from_text(tokenizer, "<|endoftext|>Hi<|im_end|>", format="plain", question="Hi")
    assert trace.step_ids.tolist()[0] == -1 and trace.steps[0].text == "Hi"
    trace = ReasoningTrace.from_text(tokenizer, "<|endoftext|>Hi<|im_end|>", format="plain")
    assert contents(trace) == [("T1", "Hi")]


def test_several_user_turns_are_numbered_questions():
    text = "".join(
        f"<|im_start|>{r}\n{c}<|im_end|>\n" for r, c in [("user", "A"), ("assistant", "B"), ("user", "C")]
    )
    trace = ReasoningTrace.from_text(family_tokenizer("chatml"), text + "<|im_start|>assistant\n<think>\nD")
    assert contents(trace) == [("Q1", "A"), ("S1", "B"), ("Q2", "C"), ("T1", "D")]


def test_each_segment_has_its_own_splitter():
    trace = ReasoningTrace.from_parts(
        family_tokenizer("chatml"),
        "Why? So",
        "x; y\nz",
        "C. D\nE",
        splitter=RegexSplitter(";"),
        summary_splitter="line",
        question_splitter="sentence",
    )
    assert contents(trace) == [
        ("Q1", "Why? "),
        ("Q2", "So"),
        ("T1", "x; "),
        ("T2", "y\nz\n"),
        ("S1", "C. D\n"),
        ("S2", "E"),
    ]


def test_the_summary_is_split_like_the_thinking_unless_told_otherwise():
    trace = ReasoningTrace.from_parts(family_tokenizer("chatml"), "Q", "a\nb", "c\nd", splitter="line")
    assert [step.label for step in trace.steps] == ["Q", "T1", "T2", "S1", "S2"]


def test_ids_may_be_a_list_a_vector_or_a_batch_of_one():
    tokenizer = family_tokenizer("chatml")
    ids = ReasoningTrace.from_parts(tokenizer, "Hi", "Hm", "Yo").tokens
    traces = [
        ReasoningTrace.from_tokens(tokenizer, form) for form in (ids, ids[None], ids.tolist(), ids.int())
    ]
    assert all(trace == traces[0] for trace in traces)
    ids[0] = 0
    assert traces[0].tokens[0] != 0


def test_a_late_marker_is_remembered_with_the_token_that_settled_it():
    tokenizer = family_tokenizer("chatml", tags="plain")
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\nHm</think>\nYo"
    trace = ReasoningTrace.from_text(tokenizer, text)
    start = text.index("</think>")
    first = trace.token_char_spans[:, 0].tolist().index(start)
    assert trace.segment_ids[first : first + 8].tolist() == [0] * 8
    assert trace.causal.segment_ids[first : first + 8].tolist() == [2] * 7 + [0]
    assert trace.causal.resolved_at[first : first + 8].tolist() == [first + 7] * 8


def test_a_format_may_be_given_as_an_object():
    tokenizer = family_tokenizer("chatml")
    assert ReasoningTrace.from_parts(tokenizer, "Hi", "Hm", format=get_format("qwen3")).format == "qwen3"


TOKENIZER = family_tokenizer("deepseek-r1")
PLAIN = family_tokenizer(None)
USER = "<｜User｜>Hi<｜Assistant｜>"


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ReasoningTrace.from_parts(TOKENIZER, " ", "Hm"), TraceError, "The question is empty"),
        (
            lambda: ReasoningTrace.from_parts(TOKENIZER, "Hi", "", " "),
            TraceError,
            "thinking and summary are both empty",
        ),
        (
            lambda: ReasoningTrace.from_parts(PLAIN, "Hi", "Hm", format="qwen3"),
            FormatError,
            "has no chat template, so a prompt of format 'qwen3' cannot be written",
        ),
        (
            lambda: ReasoningTrace.from_parts(TOKENIZER, "Hi", "Hm", format="r1"),
            FormatError,
            "Unknown reasoning format 'r1'",
        ),
        (
            lambda: ReasoningTrace.from_parts(TOKENIZER, "Hi", "Hm", format=3),
            FormatError,
            "format must be a name",
        ),
        (
            lambda: ReasoningTrace.from_parts(TOKENIZER, "Hi", "Hm", splitter="word"),
            TraceError,
            "Unknown splitter 'word'",
        ),
        (lambda: ReasoningTrace.from_text(TOKENIZER, ""), TraceError, "must be a string that is not empty"),
        (
            lambda: ReasoningTrace.from_text(TOKENIZER, USER + "Hm"),
            FormatError,
            "No thinking marker .* format 'deepseek-r1' demands '<think>' or '</think>' .* format='plain'",
        ),
        (
            lambda: ReasoningTrace.from_text(TOKENIZER, "Hi", question="Hi"),
            TraceError,
            "goes with format='plain' only",
        ),
        (
            lambda: ReasoningTrace.from_text(TOKENIZER, "Hi", format="plain", question="Yo"),
            TraceError,
            "The text must begin with the question 'Yo'; it begins with 'Hi'",
        ),
        (
            lambda: ReasoningTrace.from_text(TOKENIZER, "Hi", format="chatml"),
            FormatError,
            "No question, thinking or answer in the text: format 'chatml' expects turns",
        ),
        (
            lambda: ReasoningTrace.from_text(
                TOKENIZER, "<|im_start|>assistant\nHm</think>So", format="qwen3"
            ),
            FormatError,
            "'</think>' without '<think>' before it",
        ),
        (lambda: ReasoningTrace.from_tokens(TOKENIZER, []), TraceError, "There are no token ids"),
        (
            lambda: ReasoningTrace.from_tokens(TOKENIZER, [5, -1, 99999]),
            TraceError,
            "Token id -1 at position 1 is outside the vocabulary of 262 tokens",
        ),
        (
            lambda: ReasoningTrace.from_tokens(TOKENIZER, [5, 99999]),
            TraceError,
            "Token id 99999 at position 1",
        ),
        (
            lambda: ReasoningTrace.from_tokens(TOKENIZER, torch.ones(2, 3, dtype=torch.int64)),
            TraceError,
            r"integer tensor \[token\] or \[1, token\], got torch.int64 of shape \(2, 3\)",
        ),
        (
            lambda: ReasoningTrace.from_tokens(TOKENIZER, [True]),
            TraceError,
            "must be integers, got True at position 0",
        ),
    ],
)
def test_bad_input_is_refused_with_what_was_wrong_and_what_to_do(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_template_that_refuses_the_messages_is_named():
    tokenizer = family_tokenizer.__wrapped__("chatml")
    tokenizer.chat_template = "{{ raise_exception('no system role') }}<|im_start|>"
    with pytest.raises(
        FormatError, match=r"refused a system and a user message: no system role\. Leave system= out"
    ):
        ReasoningTrace.from_parts(tokenizer, "Hi", "Hm", system="S")


def test_a_template_that_drops_the_question_is_named():
    tokenizer = family_tokenizer.__wrapped__("chatml")
    tokenizer.chat_template = "<|im_start|>assistant\n"
    with pytest.raises(FormatError, match=r"does not contain the question 'Hi' when rendered"):
        ReasoningTrace.from_parts(tokenizer, "Hi", "Hm")
