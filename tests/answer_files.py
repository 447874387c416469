"""Answer files made by hand, as `evaluate` writes them: a journal with one line per answer."""

import json
from pathlib import Path
from typing import Any

from stepflow_tl.trace import ReasoningTrace, Segment

HEADER = {
    "schema": 1,
    "kind": "header",
    "settings": {"model_name": "tiny", "format": "chatml", "splitter": "paragraph", "grader": "exact"},
    "stepflow_tl": "0.1.0",
}


def answer(
    tokenizer: Any,
    question_id: str,
    *,
    right: bool,
    condition: str = "plain",
    sample: int = 0,
    **changes: Any,
) -> dict[str, Any]:
    """One answer's line; right and wrong answers, samples and conditions differ in their text."""
    question = changes.pop("question", f"What is {question_id}+1?")
    thinking = changes.pop("thinking", f"{question_id} and {sample}.\n\n{'So it is' if right else 'Or not'}.")
    trace = ReasoningTrace.from_parts(tokenizer, question, thinking, f"{condition} {right}")
    n_prompt = trace.steps_in(Segment.THINKING)[0].token_start
    return {
        "kind": "answer",
        "id": f"{question_id}/{condition}/{sample}",
        "question_id": question_id,
        "sample": sample,
        "condition": condition,
        "question": question,
        "difficulty": "easy",
        "tokens": trace.tokens.tolist(),
        "n_prompt": n_prompt,
        "thinking": thinking,
        "summary": f"{condition} {right}",
        "right": right,
        "reason": "",
        "new_tokens": len(trace) - n_prompt,
        "finished": True,
        "seconds": 0.5,
        **changes,
    }


def write_answers(path: Path, *lines: Any, header: Any = HEADER) -> Path:
    """Header and lines (dicts, or raw text) as an answer file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in (header, *lines)]
    path.write_text("".join(text + "\n" for text in texts))
    return path
