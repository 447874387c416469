"""The marker scanner against a regular expression that reads the finished text."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_material import chat_texts, texts

from stepflow_tl.errors import TraceError
from stepflow_tl.trace.formats import FormatScanner, SpanScanner, get_format
from stepflow_tl.trace.steps import Segment

T, Q, H, S = Segment


def scan(name: str, text: str) -> str:
    """One letter a character: `.` template, `q`, `t`, `s`."""
    scanner = FormatScanner(get_format(name))
    released = [item for char in text for item in scanner.feed(char)] + scanner.finish()
    assert "".join(item.char for item in released) == text
    return "".join(".qts"[item.segment] for item in released)


def expand(*parts: tuple[str, str]) -> tuple[str, str]:
    """(text, letters) from (text, letter) parts."""
    return "".join(text for text, _ in parts), "".join(letter * len(text) for text, letter in parts)


CASES = {
    "r1 with the start marker in the prompt": (
        "deepseek-r1",
        [
            ("<｜begin▁of▁sentence｜>Be <think>good</think>.<｜User｜>", "."),
            ("Hi <think>?", "q"),
            ("<｜Assistant｜><think>", "."),
            ("\nHm", "t"),
            ("</think>", "."),
            ("\n\nSo </think> it", "s"),
            ("<｜end▁of▁sentence｜>", "."),
        ],
    ),
    "r1 with no start marker at all": (
        "deepseek-r1",
        [
            ("<｜User｜>", "."),
            ("Hi", "q"),
            ("<｜Assistant｜>", "."),
            ("Hm", "t"),
            ("</think>", "."),
            ("So", "s"),
        ],
    ),
    "v3.1 that closes thinking at once": (
        "deepseek-r1",
        [("<｜User｜>", "."), ("Hi", "q"), ("<｜Assistant｜></think>", "."), ("So", "s")],
    ),
    "tool results are template, and the turn goes on after them": (
        "deepseek-r1",
        [
            ("<｜Assistant｜>", "."),
            ("Hm", "t"),
            ("<｜tool▁outputs▁begin｜>42<｜tool▁outputs▁end｜>", "."),
            ("Ok", "t"),
        ],
    ),
    "qwen3": (
        "qwen3",
        [
            ("<|im_start|>system\nUse <think>.<|im_end|>\n<|im_start|>user\n", "."),
            ("Hi", "q"),
            ("<|im_end|>\n<|im_start|>assistant\n<think>", "."),
            ("\nHm <think> m\n", "t"),
            ("</think>", "."),
            ("\n\nSo <think> it", "s"),
            ("<|im_end|>", "."),
        ],
    ),
    "qwen3 without thinking": (
        "qwen3",
        [
            ("<|im_start|>user\n", "."),
            ("Hi", "q"),
            ("<|im_end|>\n<|im_start|>assistant\n<think>", "."),
            ("\n\n", "t"),
            ("</think>", "."),
            ("\n\nSo", "s"),
        ],
    ),
    "an empty thought before the real one": (
        "qwen3",
        [
            ("<|im_start|>assistant\n<think>", "."),
            ("\n\n", "t"),
            ("</think>", "."),
            ("\n\n", "s"),
            ("<think>", "."),
            ("Hm", "t"),
        ],
    ),
    "thinking after some words": (
        "chatml",
        [
            ("<|im_start|>assistant\n", "."),
            ("Let me think. ", "s"),
            ("<think>", "."),
            ("Hm", "t"),
            ("</think>", "."),
            ("So", "s"),
        ],
    ),
    "several turns": (
        "chatml",
        [
            ("<|im_start|>user\n", "."),
            ("Hi", "q"),
            ("<|im_end|>\n<|im_start|>assistant\n", "."),
            ("Yo", "s"),
            ("<|im_end|>\n<|im_start|>user\n", "."),
            ("More", "q"),
            ("<|im_end|>\n<|im_start|>tool\n1<|im_end|>", "."),
        ],
    ),
    "a box is the beginning of the answer, once, and in the assistant's turn alone": (
        "boxed",
        [
            ("<|im_start|>system\nUse \\boxed{}.<|im_end|>\n<|im_start|>user\n", "."),
            ("Put it into \\boxed{}.", "q"),
            ("<|im_end|>\n<|im_start|>assistant\n", "."),
            ("So \\frac{1}{2}, \\boxe{} and $", "t"),
            ("\\boxed{18}$, not \\boxed{19}.", "s"),
            ("<|im_end|>\n<|im_start|>user\n", "."),
            ("More?", "q"),
            ("<|im_end|>\n<|im_start|>assistant\n", "."),
            ("No", "t"),
            ("\\boxed{", "s"),
        ],
    ),
    "an answer that begins with its box, and one without": (
        "boxed",
        [
            ("<|im_start|>assistant\n", "."),
            ("\\boxed{18}", "s"),
            ("<|im_end|>\n<|im_start|>assistant\n", "."),
            ("Hm \\boxed", "t"),
        ],
    ),
    "unfinished thinking": (
        "qwq",
        [
            ("<|im_start|>user\n", "."),
            ("Hi", "q"),
            ("<|im_end|>\n<|im_start|>assistant\n<think>", "."),
            ("\nHm </thi", "t"),
        ],
    ),
    "a bare response": (
        "qwen3",
        [("<|endoftext|> <think>", "."), ("Hm", "t"), ("</think>", "."), ("So", "s")],
    ),
    "gpt-oss": (
        "gpt-oss",
        [
            (
                "<|start|>system<|message|>Use <think>.<|end|><|start|>developer<|message|>D<|end|>",
                ".",
            ),
            ("<|start|>user<|message|>", "."),
            ("Hi", "q"),
            ("<|end|><|start|>assistant<|channel|>analysis<|message|>", "."),
            ("Hm", "t"),
            (
                "<|end|><|start|>assistant<|channel|>commentary to=functions.x <|constrain|>json<|message|>",
                ".",
            ),
            ("{}", "t"),
            ("<|call|><|start|>functions.x to=assistant<|channel|>commentary<|message|>42<|end|>", "."),
            ("<|start|>assistant<|channel|>final<|message|>", "."),
            ("So", "s"),
            ("<|return|>", "."),
        ],
    ),
    "gpt-oss answering at once": (
        "gpt-oss",
        [
            ("<|start|>user<|message|>", "."),
            ("Hi", "q"),
            ("<|end|><|start|>assistant<|channel|>final<|message|>", "."),
            ("So", "s"),
        ],
    ),
    "phi-4-reasoning": (
        "phi-4-reasoning",
        [
            (
                "<|im_start|>system<|im_sep|>Use <think> {} </think> {}.<|im_end|><|im_start|>user<|im_sep|>",
                ".",
            ),
            ("Hi", "q"),
            ("<|im_end|><|im_start|>assistant<|im_sep|><think>", "."),
            ("Hm", "t"),
            ("</think>", "."),
            ("So", "s"),
            ("<|im_end|>", "."),
        ],
    ),
    "magistral": (
        "magistral",
        [
            ("<s>[SYSTEM_PROMPT]Use [THINK]x[/THINK]y.[/SYSTEM_PROMPT][INST]", "."),
            ("Hi", "q"),
            ("[/INST][THINK]", "."),
            ("Hm", "t"),
            ("[/THINK]", "."),
            ("So", "s"),
            ("</s>", "."),
        ],
    ),
    "the first magistral": (
        "magistral",
        [
            ("<s>[INST]", "."),
            ("Hi", "q"),
            ("[/INST]<think>", "."),
            ("\nHm\n", "t"),
            ("</think>", "."),
            ("So", "s"),
        ],
    ),
    "smollm3": (
        "smollm3",
        [
            (
                "<|im_start|>system\nReasoning Mode: /think <think> a </think><|im_end|>\n<|im_start|>user\n",
                ".",
            ),
            ("Hi", "q"),
            ("<|im_end|>\n<|im_start|>assistant\n<think>", "."),
            ("\nHm\n", "t"),
            ("</think>", "."),
            ("\nSo", "s"),
        ],
    ),
    "glm-4.5": (
        "glm-4.5",
        [
            ("[gMASK]<sop><|system|>\nS<|user|>", "."),
            ("\nHi", "q"),
            ("<|assistant|>", "."),
            ("\n", "s"),
            ("<think>", "."),
            ("Hm", "t"),
            ("</think>", "."),
            ("\nSo", "s"),
            ("<|observation|>\n42", "."),
            ("<|assistant|>", "."),
            ("End", "s"),
        ],
    ),
    "llama-3": (
        "llama-3",
        [
            ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>", "."),
            ("<|start_header_id|>user<|end_header_id|>", "."),
            ("\n\nHi", "q"),
            ("<|eot_id|><|start_header_id|>assistant<|end_header_id|>", "."),
            ("\n\n", "s"),
            ("<think>", "."),
            ("Hm", "t"),
        ],
    ),
    "plain": ("plain", [("<think>\nAll of it", "t")]),
}


@pytest.mark.parametrize("case", CASES)
def test_transcripts_of_every_family(case):
    name, parts = CASES[case]
    text, letters = expand(*parts)
    assert scan(name, text) == letters


def oracle(text: str) -> str:
    """ChatML read by regular expressions from the finished text, for contents without `<`."""
    letters = ["."] * len(text)
    for turn in re.finditer(r"<\|im_start\|>(user|assistant)\n(<think>[^<]*(?:</think>[^<]*)?|[^<]*)", text):
        role, body, at = turn[1], turn[2], turn.start(2)
        spans = (
            [(r"[^<]*", "q")]
            if role == "user"
            else [(r"(?<=<think>)[^<]*", "t"), (r"(?<=</think>)[^<]*|^[^<]*", "s")]
        )
        for pattern, letter in spans:
            for m in re.finditer(pattern, body):
                letters[at + m.start() : at + m.end()] = letter * len(m[0])
    return "".join(letters)


contents = texts().map(lambda text: text.replace("<", "("))
turns = st.one_of(
    st.tuples(st.sampled_from(["user", "system", "assistant", "tool"]), contents),
    st.tuples(st.just("assistant"), contents.map(lambda t: f"<think>{t}")),
    st.tuples(
        st.just("assistant"), st.tuples(contents, contents).map(lambda p: f"<think>{p[0]}</think>{p[1]}")
    ),
)


@settings(max_examples=1000, deadline=None)
@given(turns=st.lists(turns, max_size=3))
def test_the_scanner_equals_a_regular_expression_on_well_formed_transcripts(turns):
    text = "".join(f"<|im_start|>{role}\n{body}<|im_end|>\n" for role, body in turns)
    assert scan("chatml", text) == oracle(text)


@settings(max_examples=1000, deadline=None)
@given(
    text=chat_texts() | texts(markers=True),
    name=st.sampled_from(["chatml", "qwq", "phi-4-reasoning"]),
    data=st.data(),
)
def test_every_character_is_released_once_in_order_and_never_changed_by_what_follows(text, name, data):
    scanner, released = FormatScanner(get_format(name)), []
    longest = max(map(len, scanner.entry.markers))
    cut = data.draw(st.integers(0, len(text)))
    for position, char in enumerate(text):
        if position == cut:
            fork = scanner.clone()
            for other in "<|im_start|>user\n<think>":
                fork.feed(other)
        released += scanner.feed(char)
        assert len(released) + len(scanner.held) == position + 1
        assert len(scanner.held) < longest
        assert text.startswith("".join(item.char for item in released) + scanner.held)
    assert "".join(item.char for item in released + scanner.finish()) == text
    assert scanner.held == ""


def test_the_longer_of_two_markers_wins_and_a_disproved_longer_one_leaves_the_shorter():
    assert scan("chatml", "<|im_start|>user\nHi") == "." * 17 + "qq"
    assert scan("chatml", "<|im_start|>userx Hi") == "." * 20
    assert scan("chatml", "<|im_start|><|im_start|>user\nHi") == "." * 29 + "qq"


def test_a_false_start_of_a_marker_may_hold_the_true_one():
    assert scan("qwq", "<|im_start|>assistant\nx<</think>y") == "." * 22 + "tt" + "." * 8 + "s"


def test_stray_ends_and_missing_markers_are_remembered():
    scanner = FormatScanner(get_format("chatml"))
    for char in "<|im_start|>assistant\nHm</think>So":
        scanner.feed(char)
    assert scanner.stray_thinking_end
    scanner = FormatScanner(get_format("deepseek-r1"))
    for char in "<｜Assistant｜>Hm":
        scanner.feed(char)
    assert not scanner.saw_thinking_marker and not scanner.stray_thinking_end


def test_known_spans_are_never_searched_for_markers():
    scanner = SpanScanner([(2, Segment.QUESTION), (2, Segment.TEMPLATE), (4, Segment.SUMMARY)])
    released = [item for char in "<t>hi" for item in scanner.feed(char)]
    assert [item.segment for item in released] == [Q, Q, S, S, T]
    assert scanner.held == "" and scanner.finish() == []


def test_span_ends_must_not_decrease():
    with pytest.raises(TraceError, match="must not decrease"):
        SpanScanner([(3, Segment.QUESTION), (2, Segment.THINKING)])
