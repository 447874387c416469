"""Questions that ask for a Python function, graded by running it against a test (HumanEval's fields).

1. The code is found in what was written: the last fenced block that defines the function; else the blocks, or
   the whole text, as the body that goes on where the prompt ends; else the lines that parse as Python around
   the definition, without the prose.
2. The prompt is executed first, so its imports and helper functions count, then the code.
3. Both run in a sandbox against the question's `check` (`sandbox`), and only where that was allowed.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings

from stepflow_tl.errors import SandboxError
from stepflow_tl.evaluation.generation import Answer
from stepflow_tl.evaluation.grading import Grader, Question, Row, Verdict, register_grader
from stepflow_tl.evaluation.sandbox import Limits, check_sandbox, run_test
from stepflow_tl.results.tables import printable

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_RESULTS = (ast.Return, ast.Yield, ast.YieldFrom)


def code(
    question: Question, answer: Answer, *, allow_code_execution: bool = False, limits: Limits | None = None
) -> Verdict:
    """Whether the function that the summary holds passes the question's test.

    Args:
        question: Read with the fields `prompt`, `entry_point` and `test`.
        answer: What was written.
        allow_code_execution: Must be True: this executes what a model wrote, in a sandbox.
        limits: What the code may use.

    Raises:
        SandboxError: If it is not allowed, or the sandbox cannot be built.
        ProblemError: If the question has no test.
    """
    if not allow_code_execution:
        raise SandboxError(
            "this executes code that a model wrote: pass allow_code_execution=True to allow it"
        )
    prompt, entry_point, test = (question.field(name) for name in ("prompt", "entry_point", "test"))
    sources = find_code(answer.summary, prompt, entry_point)
    if sources is None:
        return Verdict(False, f"defines no function {entry_point}")
    outcome = run_test(sources, prompt=_whole(prompt), test=test, entry_point=entry_point, limits=limits)
    return Verdict(outcome.right, printable(outcome.reason))  # may quote what the code said


def find_code(text: str, prompt: str, entry_point: str) -> list[str] | None:
    """The code of an answer, as texts to execute in turn; None if it does not define the function.

    Args:
        text: What was written: prose with fenced blocks, a bare function, or only its body.
        prompt: Imports and the function's head, as it was asked.
        entry_point: The function's name.
    """
    blocks = _FENCE.findall(text)
    for block in map(textwrap.dedent, reversed(blocks)):
        if _defines(block, entry_point):
            return [_whole(prompt), block]
    for body in reversed(blocks) if blocks else [text]:
        # As it is; all of it moved in; its first line moved in, where the prompt ended with its indent.
        for piece in (body, textwrap.indent(textwrap.dedent(body), "    "), "    " + body.lstrip()):
            whole = f"{prompt.rstrip()}\n{piece.strip(chr(10))}\n"
            if _goes_on(whole, entry_point):
                return [whole]
    found = _among_prose(text, entry_point)
    return None if found is None else [_whole(prompt), found]


def _among_prose(text: str, entry_point: str) -> str | None:
    """The longest run of lines that parses and defines the function."""
    lines = text.splitlines()
    heads = [
        i for i, line in enumerate(lines) if re.match(rf"(async\s+)?def\s+{re.escape(entry_point)}\b", line)
    ]
    for head in reversed(heads):
        starts = [i for i in range(head + 1) if re.match(r"(from|import|def|class|@)\b|@", lines[i])] or [
            head
        ]
        for start in (starts[0], head):
            end = len(lines)
            while end > head:
                piece = "\n".join(lines[start:end])
                tree = _parsed(piece)
                if isinstance(tree, ast.Module):
                    if _defines(piece, entry_point):
                        return piece
                    break
                end = min(end - 1, start + tree - 1)
    return None


def _defines(source: str, name: str) -> bool:
    tree = _parsed(source)
    return isinstance(tree, ast.Module) and any(
        isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name for node in tree.body
    )


def _goes_on(source: str, name: str) -> bool:
    """Whether the source ends with the function, and it returns something itself."""
    tree = _parsed(source)
    function = tree.body[-1] if isinstance(tree, ast.Module) and tree.body else None
    if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) or function.name != name:
        return False
    inner = [node for node in ast.walk(function) if isinstance(node, _SCOPES) and node is not function]
    of_others = {id(node) for scope in inner for node in ast.walk(scope)}
    return any(isinstance(node, _RESULTS) and id(node) not in of_others for node in ast.walk(function))


def _whole(prompt: str) -> str:
    """The prompt as Python that can be executed: a head without a docstring gets a body."""
    return prompt if isinstance(_parsed(prompt), ast.Module) else f"{prompt.rstrip()}\n    pass\n"


def _parsed(source: str) -> ast.Module | int:
    """The syntax tree, or the number of the line in which it stops being Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a model writes "\\d" without r, which is a warning
            return ast.parse(source)
    except SyntaxError as error:
        return error.lineno or 1
    except (ValueError, MemoryError, RecursionError):  # a zero character, or too deep
        return 1


def _ask(row: Row) -> str:
    return (
        "Complete this Python function. Write the whole function, with the imports it needs, in one code "
        "block.\n\n"
        f"```python\n{row['prompt'].strip(chr(10))}\n```"
    )


def _problems(row: Row) -> list[str]:
    name, found = row["entry_point"], []
    if not name.isidentifier():
        found.append(f"`entry_point` is {name!r}, which cannot name a function")
    elif not _defines(_whole(row["prompt"]), name):
        found.append(f"`prompt` does not define the function {name!r} that `entry_point` names")
    if not _defines(row["test"], "check"):
        found.append("`test` does not define check(candidate)")
    return found


register_grader(
    Grader(
        "code",
        {"prompt": "text", "entry_point": "text", "test": "text"},
        code,
        ask=_ask,
        problems=_problems,
        ready=check_sandbox,
        runs_code=True,
    )
)
