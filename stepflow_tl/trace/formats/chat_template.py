r"""What a tokenizer's chat template says: which format it speaks, and how a trace's parts become one text.

Detection:

1. Render a one-turn prompt. The template's source and the rendered prompt are the evidence: the source shows
   switches (`enable_thinking`), the rendering shows what the template puts together
   (`<|im_start|>assistant\n<think>`).
2. The first format whose `detected_by` strings all occur there, and whose `not_with` strings do not, is the
   answer; formats registered by the user are tried first.
3. Without a chat template the added tokens are the evidence; where they say nothing, the format is `plain`.

Writing:

1. Render the chat template for the user's turn with the generation prompt, once with the question and once
   with a sentinel in its place. What the renderings share before and after is the frame; what stands between
   is the question as the template wrote it (some strip it).
2. If the prompt ends with a thinking-start marker, thinking follows at once; otherwise `thinking_open` comes
   first. Some templates close thinking in the prompt unless they are told otherwise (DeepSeek-V3.1, Gemma-4):
   then the prompt is rendered again with thinking switched on, if there is any, and left as it is if not.
3. Thinking; and, where there is a summary, `thinking_close`, summary and `turn_close`.

The white space with which `thinking_close` begins counts as thinking, as it would to a scanner: white space
belongs to the step before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from stepflow_tl.errors import FormatError
from stepflow_tl.trace.formats.reasoning_format import ReasoningFormat
from stepflow_tl.trace.formats.table import formats_by_priority, get_format, known_formats, read_format
from stepflow_tl.trace.steps import WHITE_SPACE, Segment

# Templates have no common name for the switch; one that does not know it ignores it.
_THINKING_ON = {"enable_thinking": True, "thinking": True}
_SENTINEL = "stepflowQuestionSlot"


def detect_format(tokenizer: Any) -> ReasoningFormat:
    """The reasoning format of a tokenizer, read from its chat template or its vocabulary.

    Args:
        tokenizer: The model's.

    Raises:
        FormatError: The chat template belongs to no known format.
    """
    template = chat_template(tokenizer)
    if template is None:
        evidence = "\n".join(str(token) for token in getattr(tokenizer, "get_added_vocab", dict)())
    else:
        try:
            rendered = _render(tokenizer, "question", None)
        except FormatError:  # the source alone must do then
            rendered = ""
        evidence = f"{template}\n{rendered}"
    for entry in formats_by_priority():
        wanted = entry.detected_by
        if wanted and all(s in evidence for s in wanted) and not any(s in evidence for s in entry.not_with):
            return entry
    if template is None:
        return get_format("plain")
    raise FormatError(
        f"The chat template of {type(tokenizer).__name__} matches no known reasoning format "
        f"({', '.join(known_formats())}). Pass format='plain' for text without markers, or describe the "
        "template with stepflow_tl.trace.formats.register_format."
    )


def chat_template(tokenizer: Any) -> str | None:
    """Source of the tokenizer's default chat template; None where it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()), None)
    return template or None


def resolve_format(tokenizer: Any, format: Any) -> ReasoningFormat:
    """The format that a name stands for, or that a tokenizer's chat template has.

    The `plain` format takes the tokenizer's BOS, EOS and padding tokens as TEMPLATE; the others name theirs.

    Args:
        tokenizer: The model's.
        format: A `ReasoningFormat`; one of `known_formats`; a name that ends in ".json", the file of a format
            of the user's own (`read_format`); or "auto" or None, to read it from the tokenizer.

    Raises:
        FormatError: Unknown name, wrong kind, or nothing detected.
    """
    if isinstance(format, ReasoningFormat):
        entry = format
    elif format is None or format == "auto":
        entry = detect_format(tokenizer)
    elif isinstance(format, str):
        entry = read_format(format) if format.endswith(".json") else get_format(format)
    else:
        raise FormatError(f"format must be a name, a ReasoningFormat or 'auto', got {format!r}.")
    if entry.name == "plain" and not entry.fillers:
        special = [getattr(tokenizer, f"{kind}_token", None) for kind in ("bos", "eos", "pad")]
        entry = replace(entry, fillers=tuple(dict.fromkeys(s for s in special if s and s[0].isascii())))
    return entry


def render_parts(
    tokenizer: Any, entry: ReasoningFormat, question: str, thinking: str, summary: str, system: str | None
) -> tuple[str, list[tuple[int, Segment]]]:
    """The whole text, and the (end, segment) spans that tile it; parts as in `ReasoningTrace.from_parts`.

    Raises:
        FormatError: The chat template refuses the messages, drops the question, or is missing where the
            format has markers.
    """
    before, asked, after = _prompt(tokenizer, entry, question, system)
    is_closed = _ends_with(after, entry.thinking_ends)
    if is_closed and thinking:
        before, asked, after = _prompt(tokenizer, entry, question, system, **_THINKING_ON)
        if _ends_with(after, entry.thinking_ends):
            raise FormatError(
                f"The chat template closes thinking in its prompt (it ends with {after[-30:]!r}), with "
                "enable_thinking=True and thinking=True as well. Pass thinking='', or the transcript to "
                "ReasoningTrace.from_text."
            )
        is_closed = False
    parts = [(before, Segment.TEMPLATE), (asked, Segment.QUESTION), (after, Segment.TEMPLATE)]
    is_open = _ends_with(after, entry.thinking_starts)
    if is_closed:
        pass  # the prompt has said that there is no thinking
    elif thinking or is_open or entry.marks_empty_thinking:
        close = entry.thinking_close if summary else ""
        space = close[: len(close) - len(close.lstrip(WHITE_SPACE))]
        parts += [
            ("" if is_open else entry.thinking_open, Segment.TEMPLATE),
            (thinking + space, Segment.THINKING),
            (close[len(space) :], Segment.TEMPLATE),
        ]
    else:
        parts.append((entry.answer_open, Segment.TEMPLATE))
    if summary:
        parts += [(summary, Segment.SUMMARY), (entry.turn_close, Segment.TEMPLATE)]
    ends = accumulate(len(part) for part, _ in parts)
    spans = [(end, segment) for end, (_, segment) in zip(ends, parts, strict=True)]
    return "".join(part for part, _ in parts), spans


def question_prompt(tokenizer: Any, entry: ReasoningFormat, question: str, system: str | None = None) -> str:
    """The prompt that asks a model to think about a question: the chat template, up to where it may begin.

    Thinking is switched on where the template closes it unless told otherwise, as in `render_parts`; a
    template that closes it all the same is taken as it is.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        entry: The reasoning format.
        question: The user's text.
        system: System prompt, or None.

    Raises:
        FormatError: The chat template refuses the messages.
    """
    return conversation_prompt(tokenizer, entry, _messages(question, system))


def conversation_prompt(tokenizer: Any, entry: ReasoningFormat, messages: Sequence[Mapping[str, str]]) -> str:
    """The prompt that lets a model answer the last of several messages; as `question_prompt` for the first.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        entry: The reasoning format.
        messages: Each with `role` and `content`.

    Raises:
        FormatError: The chat template refuses the messages.
    """
    rendered = _render_messages(tokenizer, messages)
    if _ends_with(rendered, entry.thinking_ends):
        return _render_messages(tokenizer, messages, **_THINKING_ON)
    return rendered


def _ends_with(text: str, markers: tuple[str, ...]) -> bool:
    """White space apart, in the text and at the end of a marker."""
    return text.rstrip(WHITE_SPACE).endswith(tuple(m.rstrip(WHITE_SPACE) for m in markers))


def _prompt(
    tokenizer: Any, entry: ReasoningFormat, question: str, system: str | None, **switches: bool
) -> tuple[str, str, str]:
    """The prompt before the question, the question as it stands there, and the prompt after it."""
    if entry.name == "plain" or chat_template(tokenizer) is None:
        if entry.user_turns:
            raise FormatError(
                f"The tokenizer has no chat template, so a prompt of format {entry.name!r} cannot be "
                "written. Set tokenizer.chat_template, pass format='plain', or give the whole transcript to "
                "from_text."
            )
        bos = getattr(tokenizer, "bos_token", None) or ""
        return bos + (f"{system}\n\n" if system else ""), question + "\n\n", ""
    rendered = _render(tokenizer, question, system, **switches)
    frame = _render(tokenizer, _SENTINEL, system, **switches)
    slot = frame.find(_SENTINEL)
    if slot >= 0:
        before, after = frame[:slot], frame[slot + len(_SENTINEL) :]
        is_framed = rendered.startswith(before) and rendered.endswith(after)
        if is_framed and len(rendered) > len(before) + len(after):
            return before, rendered[len(before) : len(rendered) - len(after)], after
    for wanted in (question, question.strip()):  # a template whose frame depends on the question
        slot = rendered.rfind(wanted)
        if slot >= 0:
            return rendered[:slot], wanted, rendered[slot + len(wanted) :]
    raise FormatError(
        f"The chat template does not contain the question {question[:40]!r} when rendered, so its place is "
        "unknown. Write the transcript yourself and pass it to ReasoningTrace.from_text."
    )


def _render(tokenizer: Any, question: str, system: str | None, **switches: bool) -> str:
    return _render_messages(tokenizer, _messages(question, system), **switches)


def _messages(question: str, system: str | None) -> list[dict[str, str]]:
    asked = [{"role": "user", "content": question}]
    return asked if system is None else [{"role": "system", "content": system}, *asked]


def _render_messages(tokenizer: Any, messages: Sequence[Mapping[str, str]], **switches: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **switches
        )
    except Exception as error:  # a Jinja template may raise anything
        roles = " and a ".join(message["role"] for message in messages)
        raise FormatError(
            f"The chat template refused a {roles} message: {error}. Leave system= out, or pass the "
            "transcript to ReasoningTrace.from_text."
        ) from error
