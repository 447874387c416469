r"""Which format a tokenizer speaks: read from its chat template, else from its vocabulary.

1. Render a one-turn prompt. The template's source and the rendered prompt are the evidence: the source shows
   switches (`enable_thinking`), the rendering shows what the template puts together
   (`<|im_start|>assistant\n<think>`).
2. The first format whose `detected_by` strings all occur there, and whose `not_with` strings do not, is the
   answer; formats registered by the user are tried first.
3. Without a chat template the added tokens are the evidence; where they say nothing, the format is `plain`.
"""

from dataclasses import replace
from typing import Any

from stepflow_tl.errors import FormatError
from stepflow_tl.trace.formats.reasoning_format import ReasoningFormat
from stepflow_tl.trace.formats.table import formats_by_priority, get_format, known_formats


def detect_format(tokenizer: Any) -> ReasoningFormat:
    """The reasoning format of a tokenizer.

    Args:
        tokenizer: A transformers tokenizer.

    Raises:
        FormatError: The chat template belongs to no known format.
    """
    template = chat_template(tokenizer)
    if template is None:
        evidence = "\n".join(str(token) for token in getattr(tokenizer, "get_added_vocab", dict)())
    else:
        evidence = f"{template}\n{_rendered(tokenizer)}"
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
    """The format meant by a name, a `ReasoningFormat`, or "auto" / None (read from the tokenizer).

    The `plain` format takes the tokenizer's BOS, EOS and padding tokens as TEMPLATE; the others name theirs.

    Raises:
        FormatError: Unknown name, wrong kind, or nothing detected.
    """
    if isinstance(format, ReasoningFormat):
        entry = format
    elif format is None or format == "auto":
        entry = detect_format(tokenizer)
    elif isinstance(format, str):
        entry = get_format(format)
    else:
        raise FormatError(f"format must be a name, a ReasoningFormat or 'auto', got {format!r}.")
    if entry.name == "plain" and not entry.fillers:
        special = [getattr(tokenizer, f"{kind}_token", None) for kind in ("bos", "eos", "pad")]
        entry = replace(entry, fillers=tuple(dict.fromkeys(s for s in special if s and s[0].isascii())))
    return entry


def _rendered(tokenizer: Any) -> str:
    try:
        messages = [{"role": "user", "content": "question"}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:  # templates raise whatever they like; the source alone must do then
        return ""
