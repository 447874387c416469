"""The table of formats: the built-in ones, one per model family, and those that a user registers.

What a family's text looks like was read off its own chat template; `benchmarks/chat_templates.py` holds the
entries against the templates and tokenizers that package registries carry. Detection tries the built-in
formats in the order in which they stand here, a specific one before a general one: "chatml" would take what
is "qwen3", and "mistral" what is "magistral".
"""

import json
from pathlib import Path

from stepflow_tl.errors import FormatError
from stepflow_tl.trace.formats.reasoning_format import ReasoningFormat
from stepflow_tl.trace.steps import Segment

_TAGS = {"thinking_starts": ("<think>",), "thinking_ends": ("</think>",), "thinking_open": "<think>\n",
         "thinking_close": "\n</think>\n\n"}  # fmt: skip
_CHATML = {"user_turns": ("<|im_start|>user\n",), "assistant_turns": ("<|im_start|>assistant\n",),
           "other_turns": ("<|im_start|>",), "turn_ends": ("<|im_end|>",), "fillers": ("<|endoftext|>",),
           "turn_close": "<|im_end|>"}  # fmt: skip

BUILT_IN = (
    ReasoningFormat(
        name="deepseek-r1",  # and its Qwen and Llama distills, which carry the same template
        user_turns=("<｜User｜>",),
        assistant_turns=("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"),
        other_turns=("<｜tool▁outputs▁begin｜>",),
        turn_ends=("<｜end▁of▁sentence｜>",),
        fillers=("<｜begin▁of▁sentence｜>",),
        opens_as=Segment.THINKING,
        thinking_required=True,
        turn_close="<｜end▁of▁sentence｜>",
        detected_by=("<｜Assistant｜>",),
        **_TAGS,
    ),
    ReasoningFormat(
        name="gpt-oss",
        user_turns=("<|start|>user",),
        assistant_turns=("<|start|>assistant",),
        other_turns=("<|start|>",),
        turn_ends=("<|end|>", "<|return|>", "<|call|>"),
        # Commentary (preambles and tool calls) is the model's own work on the way to the answer.
        thinking_starts=("<|channel|>analysis", "<|channel|>commentary"),
        answer_starts=("<|channel|>final",),
        content_start="<|message|>",
        fillers=("<|endoftext|>", "<|startoftext|>"),
        thinking_required=True,
        thinking_open="<|channel|>analysis<|message|>",
        thinking_close="<|end|><|start|>assistant<|channel|>final<|message|>",
        answer_open="<|channel|>final<|message|>",
        turn_close="<|return|>",
        marks_empty_thinking=False,
        detected_by=("<|channel|>", "<|message|>"),
    ),
    ReasoningFormat(
        name="phi-4-reasoning",
        user_turns=("<|im_start|>user<|im_sep|>",),
        assistant_turns=("<|im_start|>assistant<|im_sep|>",),
        other_turns=("<|im_start|>",),
        turn_ends=("<|im_end|>",),
        fillers=("<|endoftext|>",),
        thinking_required=True,
        turn_close="<|im_end|>",
        detected_by=("<|im_sep|>",),
        **_TAGS,
    ),
    ReasoningFormat(
        name="magistral",
        user_turns=("[INST]",),
        assistant_turns=("[/INST]", "[/TOOL_RESULTS]"),
        other_turns=("[SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
        turn_ends=("[/SYSTEM_PROMPT]", "[/AVAILABLE_TOOLS]", "</s>"),
        thinking_starts=("[THINK]", "<think>"),  # the first Magistral wrote <think>
        thinking_ends=("[/THINK]", "</think>"),
        fillers=("<s>",),
        thinking_required=True,
        thinking_open="[THINK]",
        thinking_close="[/THINK]",
        turn_close="</s>",
        detected_by=("[SYSTEM_PROMPT]", "[INST]"),
    ),
    ReasoningFormat(
        name="glm-4.5",
        user_turns=("<|user|>",),
        assistant_turns=("<|assistant|>",),
        other_turns=("<|system|>", "<|observation|>"),
        thinking_starts=("<think>",),
        thinking_ends=("</think>",),
        fillers=("[gMASK]", "<sop>", "<|endoftext|>", "/nothink"),  # a switch that is typed into the question
        thinking_required=True,
        thinking_open="\n<think>",
        thinking_close="</think>\n",
        detected_by=("[gMASK]", "<|assistant|>"),
    ),
    ReasoningFormat(
        name="smollm3", detected_by=("<|im_start|>", "/no_think", "Reasoning Mode"), **_CHATML, **_TAGS
    ),
    ReasoningFormat(
        name="qwen3", detected_by=("<|im_start|>", "<think>", "enable_thinking"), **_CHATML, **_TAGS
    ),
    ReasoningFormat(
        name="qwq",  # also the thinking-only Qwen3 models: the template opens <think> itself
        opens_as=Segment.THINKING,
        thinking_required=True,
        detected_by=("<|im_start|>assistant\n<think>",),
        not_with=("enable_thinking",),
        **_CHATML,
        **_TAGS,
    ),
    ReasoningFormat(
        name="chatml", marks_empty_thinking=False, detected_by=("<|im_start|>",), **_CHATML, **_TAGS
    ),  # any ChatML model, with or without thinking of its own
    ReasoningFormat(
        name="llama-3",
        user_turns=("<|start_header_id|>user<|end_header_id|>",),
        assistant_turns=("<|start_header_id|>assistant<|end_header_id|>",),
        other_turns=("<|start_header_id|>",),
        turn_ends=("<|eot_id|>", "<|eom_id|>"),
        fillers=("<|begin_of_text|>", "<|end_of_text|>"),
        turn_close="<|eot_id|>",
        marks_empty_thinking=False,
        detected_by=("<|start_header_id|>",),
        **_TAGS,
    ),
    ReasoningFormat(
        name="granite",  # 3.x with thinking=True; 4.x without thinking
        user_turns=("<|start_of_role|>user<|end_of_role|>",),
        assistant_turns=("<|start_of_role|>assistant<|end_of_role|>",),
        other_turns=("<|start_of_role|>",),
        turn_ends=("<|end_of_text|>",),
        fillers=("<response>", "</response>"),
        thinking_starts=("<think>",),
        thinking_ends=("</think>",),
        thinking_open="<think>",
        thinking_close="</think>\n<response>",
        turn_close="</response><|end_of_text|>",
        marks_empty_thinking=False,
        detected_by=("<|start_of_role|>",),
    ),
    ReasoningFormat(
        name="seed-oss",
        user_turns=("<seed:bos>user\n",),
        assistant_turns=("<seed:bos>assistant\n",),
        other_turns=("<seed:bos>",),
        turn_ends=("<seed:eos>",),
        thinking_starts=("<seed:think>",),
        thinking_ends=("</seed:think>",),
        thinking_open="<seed:think>",
        thinking_close="</seed:think>\n",
        turn_close="<seed:eos>",
        marks_empty_thinking=False,
        detected_by=("<seed:bos>", "<seed:think>"),
    ),
    ReasoningFormat(
        name="command-a",
        user_turns=("<|USER_TOKEN|>",),
        assistant_turns=("<|CHATBOT_TOKEN|>",),
        other_turns=("<|SYSTEM_TOKEN|>",),
        turn_ends=("<|END_OF_TURN_TOKEN|>",),
        thinking_starts=("<|START_THINKING|>",),
        thinking_ends=("<|END_THINKING|>",),
        fillers=(
            "<BOS_TOKEN>",
            "<|START_OF_TURN_TOKEN|>",
            "<|START_TEXT|>",
            "<|END_TEXT|>",
            "<|START_RESPONSE|>",
            "<|END_RESPONSE|>",
        ),
        thinking_open="<|START_THINKING|>",
        thinking_close="<|END_THINKING|><|START_TEXT|>",
        turn_close="<|END_TEXT|><|END_OF_TURN_TOKEN|>",
        detected_by=("<|CHATBOT_TOKEN|>", "<|START_THINKING|>"),
    ),
    ReasoningFormat(
        name="minimax-m2",
        user_turns=("]~b]user\n",),
        assistant_turns=("]~b]ai\n",),
        other_turns=("]~b]",),
        turn_ends=("[e~[",),
        fillers=("]~!b[",),
        thinking_starts=("<think>", "<mm:think>"),
        thinking_ends=("</think>", "</mm:think>"),
        thinking_open="<think>\n",
        thinking_close="\n</think>\n\n",
        turn_close="[e~[",
        marks_empty_thinking=False,
        detected_by=("]~b]ai",),
    ),
    ReasoningFormat(
        name="gemma-4",
        user_turns=("<|turn>user\n",),
        assistant_turns=("<|turn>model\n",),
        other_turns=("<|turn>",),
        turn_ends=("<turn|>",),
        fillers=("<bos>", "<eos>"),
        thinking_starts=("<|channel>thought\n",),
        thinking_ends=("<channel|>",),
        thinking_open="<|channel>thought\n",
        thinking_close="\n<channel|>",
        turn_close="<turn|>",
        marks_empty_thinking=False,
        detected_by=("<|turn>", "<channel|>"),
    ),
    ReasoningFormat(
        name="kimi-k2",
        user_turns=("<|im_user|>user<|im_middle|>",),
        assistant_turns=("<|im_assistant|>assistant<|im_middle|>",),
        other_turns=("<|im_system|>", "<|im_user|>", "<|im_assistant|>"),
        turn_ends=("<|im_end|>",),
        thinking_starts=("<think>",),
        thinking_ends=("</think>",),
        thinking_open="<think>",
        thinking_close="</think>",
        turn_close="<|im_end|>",
        marks_empty_thinking=False,
        detected_by=("<|im_user|>", "<|im_middle|>"),
    ),
    ReasoningFormat(
        name="gemma",  # without thinking of its own
        user_turns=("<start_of_turn>user\n",),
        assistant_turns=("<start_of_turn>model\n",),
        other_turns=("<start_of_turn>",),
        turn_ends=("<end_of_turn>",),
        fillers=("<bos>", "<eos>"),
        turn_close="<end_of_turn>",
        marks_empty_thinking=False,
        detected_by=("<start_of_turn>",),
        **_TAGS,
    ),
    ReasoningFormat(
        name="mistral",  # before Magistral, without thinking of its own
        user_turns=("[INST]",),
        assistant_turns=("[/INST]", "[/TOOL_RESULTS]"),
        other_turns=("[AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
        turn_ends=("[/AVAILABLE_TOOLS]", "</s>"),
        fillers=("<s>",),
        turn_close="</s>",
        marks_empty_thinking=False,
        detected_by=("[INST]",),
        **_TAGS,
    ),
    ReasoningFormat(
        name="phi-3",  # and Phi-4-mini-reasoning
        user_turns=("<|user|>",),
        assistant_turns=("<|assistant|>",),
        other_turns=("<|system|>", "<|tool|>"),
        turn_ends=("<|end|>",),
        fillers=("<|endoftext|>",),
        turn_close="<|end|>",
        marks_empty_thinking=False,
        detected_by=("<|user|>", "<|assistant|>", "<|end|>"),
        not_with=("[BEGIN FINAL RESPONSE]",),  # Apriel, which thinks in plain words
        **_TAGS,
    ),
    ReasoningFormat(
        name="boxed",  # a ChatML model without markers of its own, told to put its answer into \boxed{}
        opens_as=Segment.THINKING,
        answer_begins_with=("\\boxed{",),
        marks_empty_thinking=False,
        **_CHATML,
    ),  # this one and the next are asked for by name: no template tells what the user's prompt will say
    ReasoningFormat(
        name="fenced",  # the same, told to think first and then to write one block of code
        opens_as=Segment.THINKING,
        answer_begins_with=("```",),
        marks_empty_thinking=False,
        **_CHATML,
    ),
    ReasoningFormat(
        name="plain", opens_as=Segment.THINKING, thinking_close="\n\n", marks_empty_thinking=False
    ),
)

_TABLE: dict[str, ReasoningFormat] = {entry.name: entry for entry in BUILT_IN}


def known_formats() -> tuple[str, ...]:
    """Names of all formats, built-in ones first, in the order they were registered."""
    return tuple(_TABLE)


def get_format(name: str) -> ReasoningFormat:
    """The format of that name.

    Args:
        name: One of `known_formats`.

    Raises:
        FormatError: No format has that name.
    """
    if name not in _TABLE:
        raise FormatError(
            f"Unknown reasoning format {name!r}; known formats are {', '.join(_TABLE)}. "
            "Pass one of them, or add your own with stepflow_tl.trace.formats.register_format."
        )
    return _TABLE[name]


def read_format(path: str | Path) -> ReasoningFormat:
    """A user's own format, from a file with one JSON object; it is not added to the table.

    Args:
        path: The file: the fields of `ReasoningFormat.from_json`, with a name that is not taken; and
            `based_on`, the name of a known format that the other fields come from (none by default).

    Raises:
        FormatError: The file cannot be read, a field is wrong, or the name is taken.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FormatError(f"The reasoning format {path} cannot be read: {reason}.") from error
    if not isinstance(data, dict):
        raise FormatError(f"{path} holds no JSON object: expected the fields of a reasoning format.")
    base = data.pop("based_on", None)
    try:
        entry = ReasoningFormat.from_json(data, None if base is None else get_format(str(base)))
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    if entry.name in _TABLE:
        raise FormatError(f"{path}: the name {entry.name!r} is taken by a known format; choose another.")
    return entry


def register_format(entry: ReasoningFormat) -> ReasoningFormat:
    """Add a format to the table; detection tries formats added here before the built-in ones.

    Args:
        entry: The format, with a name of its own.

    Raises:
        FormatError: The name is taken.
    """
    if entry.name in _TABLE:
        raise FormatError(
            f"Reasoning format {entry.name!r} exists already; choose another name. Known: "
            f"{', '.join(_TABLE)}."
        )
    _TABLE[entry.name] = entry
    return entry


def formats_by_priority() -> tuple[ReasoningFormat, ...]:
    """All formats in the order detection tries them: the user's latest first, then the built-in ones."""
    added = list(_TABLE.values())[len(BUILT_IN) :]
    return (*reversed(added), *BUILT_IN)
