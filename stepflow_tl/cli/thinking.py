"""Let a model that does not think by itself think: budget forcing.

1. The prompt is the model's chat template, with the format's thinking marker opened behind it.
2. Greedy decoding with the KV cache, up to a budget of tokens. The thinking ends where the model writes
   the end marker, ends its turn, or has spent the budget; in the last two cases the marker is written for
   it.
3. Greedy decoding goes on from there: the answer, up to a budget of its own.

The result is token ids throughout: nothing is decoded and tokenised again. Source: "s1: Simple test-time
scaling", arXiv 2501.19393. Theirs can also lengthen the thinking ("Wait"); a small model only repeats itself
then, so this one does not.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from stepflow_tl.errors import ModelError
from stepflow_tl.models.passes import model_device
from stepflow_tl.trace.assembly import resolve_format
from stepflow_tl.trace.formats.prompt import question_prompt
from stepflow_tl.trace.formats.reasoning_format import ReasoningFormat

Ended = Literal["by its end marker", "with its turn", "by the budget"]


@dataclass(frozen=True)
class Generated:
    """A transcript that a model wrote.

    Attributes:
        tokens: Prompt, thinking and answer.
        n_thinking: Thinking tokens the model wrote itself.
        n_answer: Answer tokens, the end of the turn included.
        ended: How the thinking ended.
    """

    tokens: tuple[int, ...]
    n_thinking: int
    n_answer: int
    ended: Ended


def generate_with_thinking(
    model: Any, question: str, *, answer_start: str = "", thinking_budget: int = 200, answer_budget: int = 60
) -> Generated:
    """Greedy thinking and answer to one question.

    Args:
        model: A TransformerLens model with a tokenizer.
        question: The user's text.
        answer_start: What the answer begins with, written for the model: s1 writes "Final Answer:".
        thinking_budget: Most thinking tokens.
        answer_budget: Most answer tokens.

    Raises:
        ModelError: If the tokenizer has no chat template.
        FormatError: If its template belongs to no known format.
    """
    tokenizer = model.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "the model's tokenizer has no chat template, so there is no turn in which it could think: "
            "take an instruction-tuned model"
        )
    form = resolve_format(tokenizer, "auto")
    prompt = _encode(tokenizer, _prompt(tokenizer, form, question))
    thinking, ended = _cut(tokenizer, _continue(model, prompt, thinking_budget), form)
    forced = _encode(tokenizer, ("" if ended == "by its end marker" else form.thinking_close) + answer_start)
    answer = _continue(model, prompt + thinking + forced, answer_budget)
    return Generated((*prompt, *thinking, *forced, *answer), len(thinking), len(answer), ended)


def _prompt(tokenizer: Any, form: ReasoningFormat, question: str) -> str:
    prompt = question_prompt(tokenizer, form, question)
    is_open = any(prompt.rstrip().endswith(marker) for marker in form.thinking_starts)
    return prompt if is_open else prompt + form.thinking_open


def _cut(tokenizer: Any, written: list[int], form: ReasoningFormat) -> tuple[list[int], Ended]:
    """What of the written tokens is thinking, its end marker included, and how it ended."""
    has_turn_end = tokenizer.eos_token_id in written
    thinking = written[: written.index(tokenizer.eos_token_id)] if has_turn_end else written
    for end in range(1, len(thinking) + 1):
        text = tokenizer.decode(thinking[:end])
        if any(marker in text for marker in form.thinking_ends):
            return thinking[:end], "by its end marker"
    return thinking, "with its turn" if has_turn_end else "by the budget"


def _continue(model: Any, tokens: list[int], budget: int) -> list[int]:
    device = model_device(model)
    out = model.generate(
        torch.tensor([tokens], device=device),
        max_new_tokens=budget,
        do_sample=False,
        use_past_kv_cache=True,
        return_type="tokens",
        verbose=False,
    )
    return out[0, len(tokens) :].tolist()


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
