"""Every parser and loader as a fuzz target: bytes in; an error of the package's own, or a result that holds.

A target says which valid inputs to start from and what to do with an input. It raises `Refused` where the
package refuses the input with one of its own errors; it returns where the input was taken, after checking
what must hold of any input that is taken. Anything else that comes out is a fault.

`tests/fuzz` runs them on few inputs, `benchmarks/fuzz.py` on many, `benchmarks/fuzz_atheris.py` follows the
coverage of some.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import io
import json
import random
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from unittest import mock

import torch
from run_folders import failed, make_run, result
from tiny_gguf import write_tiny_gguf
from tiny_models import build_tiny_tokenizer

from stepflow_tl import ReasoningTrace, StepKnockout, StepSaliency, diagnose, summarize
from stepflow_tl.causal.alignment import StepMatch
from stepflow_tl.causal.knockout_result import CutGroup
from stepflow_tl.causal.patching_result import StepPatching
from stepflow_tl.cli import main as cli
from stepflow_tl.diagnosis import Diagnosis
from stepflow_tl.errors import StepflowError
from stepflow_tl.evaluation.questions import read_questions
from stepflow_tl.models.gguf import GgufCheckpoint
from stepflow_tl.results.result import read_head
from stepflow_tl.runs.manifest import read_manifests
from stepflow_tl.runs.outcomes import inside
from stepflow_tl.runs.plan import FileNames
from stepflow_tl.runs.records import Record, read_records
from stepflow_tl.testbed.model import check_files
from stepflow_tl.trace.formats.scanner import FormatScanner
from stepflow_tl.trace.formats.table import get_format, known_formats
from stepflow_tl.trace.splitting import MinimumLength
from stepflow_tl.trace.splitting.splitters import resolve_splitter
from stepflow_tl.trace.splitting.tracker import TokenTracker
from stepflow_tl.trace.steps import WHITE_SPACE

MODEL_TEXT = (
    "<|im_start|>user\nWhat is 2+3*4?<|im_end|>\n<|im_start|>assistant\n<think>\n3*4 is 12. That is "
    "3.14 times\n\n$2^{10}. 5$ or `a. b`.\n```py\nx. Y\n```\n1. One\n</think>\n\nIt is 14. 答案。🙂<|im_end|>"
)
CHANNEL_TEXT = (
    "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>analysis<|message|>So. Then\n\nB<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Yes.<|return|>"
)
INST_TEXT = "<s>[SYSTEM_PROMPT]s[/SYSTEM_PROMPT][INST]Hi[/INST][THINK]A.\n\nB.[/THINK]C.</s>"


class Refused(Exception):
    """The package refused the input with an error of its own."""


@dataclass(frozen=True)
class Target:
    """A parser or loader.

    Attributes:
        name: What it is called in tables.
        run: Takes one input; see the module.
        seeds: Makes valid inputs, all of which must be taken.
        is_python: Whether it is pure Python throughout, so that following its coverage makes sense.
    """

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    is_python: bool = False


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Turns the package's own errors into `Refused`."""
    try:
        yield
    except StepflowError as error:
        assert str(error), "an error without a message"
        raise Refused(str(error)) from error


@functools.cache
def scratch() -> Path:
    """A folder for files, in memory where the machine has such a place; it is removed at the end."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="stepflow-fuzz-", dir=shared if shared.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def tokenizer() -> Any:
    return build_tiny_tokenizer()


def text_of(data: bytes) -> str:
    """Any string, lone surrogates included: they are what `json.loads` makes of "\\ud800"."""
    return data.decode("utf-8", "replace" if len(data) % 4 else "surrogateescape")


def _file(data: bytes, name: str) -> Path:
    path = scratch() / name
    path.write_bytes(data)
    return path


# Text


def run_scanner(data: bytes) -> None:
    names = known_formats()
    text = text_of(data[1:])
    scanner = FormatScanner(get_format(names[data[0] % len(names)] if data else "plain"))
    released = [r for char in text for r in scanner.feed(char)] + scanner.finish()
    assert "".join(r.char for r in released) == text
    runs = [r.run for r in released]
    assert runs == sorted(runs)


def run_splitters(data: bytes) -> None:
    text = text_of(data[1:])
    for name in ("paragraph", "line", "sentence", "whole"):
        splitter = resolve_splitter(name)
        if data and data[0] % 2:
            splitter = MinimumLength(splitter, 1 + data[0] // 8)
        pieces = splitter.split(text)
        assert "".join(pieces) == text
        assert all(piece and piece[0] not in WHITE_SPACE for piece in pieces[1:])


def run_streaming(data: bytes) -> None:
    """The streaming tracker over pieces of any cut gives the trace's own labels."""
    text, format_name = text_of(data[1:]), _format_name(data)
    with own_errors():
        trace = ReasoningTrace.from_text(tokenizer(), text, format=format_name, splitter="sentence")
    tracker = TokenTracker(tokenizer(), format_name, "sentence")
    labels = [tracker.push(token) for token in trace.tokens.tolist()]
    tracker.finish()
    assert [label.step for label in labels] == trace.causal.step_ids.tolist()
    assert [int(label.segment) for label in labels] == trace.causal.segment_ids.tolist()


def run_from_text(data: bytes) -> None:
    with own_errors():
        trace = ReasoningTrace.from_text(tokenizer(), text_of(data[1:]), format=_format_name(data))
    assert "".join(piece.text for piece in trace.pieces) == trace.text
    assert ReasoningTrace.from_json(json.loads(json.dumps(trace.to_json()))) == trace


def run_from_parts(data: bytes) -> None:
    parts = (text_of(data).split("\x1e") + ["", "", ""])[:3]
    with own_errors():
        trace = ReasoningTrace.from_parts(tokenizer(), *parts)
    assert trace.steps


def run_from_tokens(data: bytes) -> None:
    ids = [int.from_bytes(data[i : i + 2], "little", signed=True) for i in range(0, len(data), 2)]
    with own_errors():
        trace = ReasoningTrace.from_tokens(tokenizer(), ids, format="plain")
    assert trace.tokens.tolist() == ids


def _format_name(data: bytes) -> str:
    names = [*known_formats(), "auto"]
    return names[data[0] % len(names)] if data else "plain"


def text_seeds() -> list[bytes]:
    names = known_formats()
    chosen = [
        ("chatml", MODEL_TEXT),
        ("qwen3", MODEL_TEXT),
        ("qwq", MODEL_TEXT),
        ("plain", MODEL_TEXT),
        ("gpt-oss", CHANNEL_TEXT),
        ("magistral", INST_TEXT),
        ("deepseek-r1", "<｜User｜>Q<｜Assistant｜><think>\nA.\n\nB.\n</think>\n\nC<｜end▁of▁sentence｜>"),
    ]
    return [bytes([names.index(name)]) + text.encode() for name, text in chosen]


def parts_seeds() -> list[bytes]:
    return [b"What is 2+2?\x1eIt is 4.\n\nSo 4.\x1e4", "Q\x1eÄ。 🙂\r\n\r\nB".encode()]


def token_seeds() -> list[bytes]:
    ids = tokenizer().encode("So. 🙂 And\n\nthen.", add_special_tokens=False)
    return [b"".join(struct.pack("<h", i) for i in ids)]


# JSON documents and lines


def run_trace_json(data: bytes) -> None:
    document = _json(data)
    with own_errors():
        trace = ReasoningTrace.from_json(document)
    assert ReasoningTrace.from_json(trace.to_json()) == trace
    trace.table()


def run_diagnosis_json(data: bytes) -> None:
    document = _json(data)
    with own_errors():
        diagnosis = Diagnosis.from_json(document)
    str(diagnosis)
    json.dumps(diagnosis.to_json())


def run_records(data: bytes) -> None:
    path = _file(data, "records.jsonl")
    taken = refused = 0
    with own_errors():
        for record in read_records(path, group_by="is_correct", pair_by="problem_id"):
            if isinstance(record, Record):
                taken += 1
                (record.id + record.question + record.thinking + record.summary).encode()
            else:
                refused += 1
                assert record.reason
    if refused and not taken:
        raise Refused


def run_questions(data: bytes) -> None:
    with own_errors():
        questions = read_questions(_file(data, "questions.jsonl"))
    for question in questions:
        (question.id + question.text + question.answer + question.difficulty).encode()
    assert len({question.id for question in questions}) == len(questions) > 0


def run_manifest(data: bytes) -> None:
    folder = scratch() / "manifests"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.jsonl").write_bytes(data)
    with own_errors():
        found = read_manifests(folder).entries
    assert len({entry.id for entry in found}) == len(found)


def run_folder(data: bytes) -> None:
    """A whole run folder with this manifest, summarised into a table."""
    folder = _folder_with_results()
    (folder / "manifest.jsonl").write_bytes(data)
    with own_errors():
        aggregate = summarize(folder, out=scratch() / "layers.parquet", n_bootstrap=5, n_permutations=5)
    json.dumps(aggregate.to_json(), allow_nan=False)
    str(aggregate).encode()


def run_file_names(data: bytes) -> None:
    names = FileNames()
    ids = text_of(data).split("\n")
    stems = {name: names.stem(name) for name in ids}
    assert len({stem.casefold() for stem in stems.values()}) == len(stems)
    for stem in stems.values():
        name = f"{stem}.safetensors"
        assert PurePosixPath(name).name == PureWindowsPath(name).name == name and name.isascii()
        assert len(name) < 130 and not PureWindowsPath(name).is_reserved()
        inside(scratch(), name)  # what analyze writes, summarize reads


def run_arguments(data: bytes) -> None:
    arguments = [part.replace("\0", "") for part in text_of(data).split("\n")]
    with (
        _without_commands() as ran,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        code = cli.main(arguments)
    assert code in (0, 2)
    if not ran:
        raise Refused


@contextlib.contextmanager
def _without_commands() -> Iterator[list[Any]]:
    """The command line with commands that do nothing but take their arguments."""
    from stepflow_tl.cli import analyze, evaluate, main, report, study, summarize

    ran: list[Any] = []
    with contextlib.ExitStack() as patches:
        for module in (analyze, evaluate, main, report, study, summarize):
            for name in [name for name in vars(module) if name == "_run" or name.startswith("_run_")]:
                take = patches.enter_context(mock.patch.object(module, name))
                take.side_effect = lambda arguments: ran.append(arguments) or 0
        yield ran


def _json(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise Refused("no JSON") from error


def trace_json_seeds() -> list[bytes]:
    trace = ReasoningTrace.from_text(tokenizer(), MODEL_TEXT)
    return [json.dumps(trace.to_json()).encode()]


def diagnosis_seeds() -> list[bytes]:
    return [json.dumps(diagnose(result(0)).to_json()).encode()]


def record_seeds() -> list[bytes]:
    record = {"id": "q1", "question": "2+2*3?", "thinking": "2*3 = 6.\n\n8.", "summary": "8"}
    return [
        b"\n".join(
            json.dumps({**record, **more}).encode() for more in ({}, {"is_correct": True, "problem_id": 7})
        ),
        json.dumps({"text": MODEL_TEXT, "is_correct": False}, ensure_ascii=False).encode() + b"\r\n\n",
    ]


def question_seeds() -> list[bytes]:
    return [
        b'{"question": "2+2?", "answer": 4, "id": "a", "difficulty": 1}\n{"question": "Q", "answer": "x"}\n'
    ]


@functools.cache
def _folder_with_results() -> Path:
    folder = scratch() / "run"
    folder.mkdir()
    make_run(folder, 4)
    return folder


def manifest_seeds() -> list[bytes]:
    with_failure = (_seed_manifest() + json.dumps(failed("x")) + "\n").encode()
    return [_seed_manifest().encode(), with_failure]


@functools.cache
def _seed_manifest() -> str:
    return (_folder_with_results() / "manifest.jsonl").read_text()


def name_seeds() -> list[bytes]:
    return [b"a\nA\nq1.x", b"../x\n..\nCON\ncon.txt\nnul\nC:\\x\n.hidden", "ä\nÅ\nÅ".encode()]


def argument_seeds() -> list[bytes]:
    lines = [
        "analyze t.jsonl --out o --layers 0-6,9 --objective S1 --group-by x --pair-by y --limit 3",
        "analyze t.jsonl --out o --unpaired --group-by x --causal --figures --dtype bfloat16 --splitter line",
        "evaluate testbed --conditions plain bridge --tau-max 0.1 --samples 2 --temperature 1 --seed 3",
        "summarize o --group-by x --labels t.jsonl --verify --out f.parquet",
        "report r.safetensors --pooling sum",
        "demo --thinking-budget 3",
    ]
    return [line.replace(" ", "\n").encode() for line in lines]


# Result files


def run_saliency_file(data: bytes) -> None:
    path = _file(data, "map.safetensors")
    with own_errors():
        saliency = StepSaliency.load(path)
    assert read_head(path, StepSaliency).layers == saliency.layers
    assert StepSaliency.load(saliency.save(scratch() / "again")).trace == saliency.trace
    with own_errors():
        diagnosis = diagnose(saliency)
    str(diagnosis)


def run_knockout_file(data: bytes) -> None:
    with own_errors():
        knockout = StepKnockout.load(_file(data, "knockout.safetensors"))
    StepKnockout.load(knockout.save(scratch() / "again"))
    knockout.table()


def run_patching_file(data: bytes) -> None:
    with own_errors():
        patching = StepPatching.load(_file(data, "patching.safetensors"))
    StepPatching.load(patching.save(scratch() / "again"))
    repr(patching)


def saliency_seeds() -> list[bytes]:
    return [result(0).save(scratch() / "seed").read_bytes()]


def knockout_seeds() -> list[bytes]:
    saliency = result(0)
    measured = torch.ones(7, 7, dtype=torch.bool).tril(-1)
    knockout = StepKnockout(
        effects=torch.rand(7, 7) * measured,
        measured=measured,
        trace=saliency.trace,
        layers=(0, 1),
        n_layers=4,
        heads=(1,),
        measure="nll",
        onto=None,
        provenance=saliency.provenance,
    )
    measured = measured.clone()
    measured[6, :2] = False
    groups = (CutGroup(6, (0, 1), 0.1, "bound"), CutGroup(5, (1, 3), 2.0, "joint"))
    screened = replace(knockout, effects=knockout.effects * measured, measured=measured, groups=groups)
    return [each.save(scratch() / "seed").read_bytes() for each in (knockout, screened)]


def patching_seeds() -> list[bytes]:
    saliency = result(0)
    patching = StepPatching(
        effects=torch.rand(2, 7, dtype=torch.float64),
        method="patching",
        component="z",
        alignment="mean",
        matches=tuple(StepMatch(step, step) for step in saliency.trace.steps),
        layers=(0, 3),
        n_layers=4,
        receiving_step=None,
        corrupted_value=1.0,
        clean_value=0.5,
        provenance=saliency.provenance,
    )
    return [patching.save(scratch() / "seed").read_bytes()]


# Models


def run_gguf(data: bytes) -> None:
    with own_errors():
        checkpoint = GgufCheckpoint.open(_file(data, "model.gguf"))
        checkpoint.check_shapes(checkpoint.config())
        for _ in checkpoint.weights(torch.float32):
            pass
        checkpoint.tokenizer()


@functools.cache
def _gguf() -> bytes:
    return write_tiny_gguf(scratch() / "seed.gguf").read_bytes()


def gguf_seeds() -> list[bytes]:
    return [_gguf()]


_TESTBED_FILES = ("model.safetensors", "config.json", "tokenizer.json", "card.md")


def run_checksums(data: bytes) -> None:
    folder = scratch() / "testbed"
    folder.mkdir(exist_ok=True)
    for name in _TESTBED_FILES:
        (folder / name).write_text("card")
    (folder / "checksums.json").write_bytes(data)
    with own_errors():
        check_files(folder)


def checksum_seeds() -> list[bytes]:
    return [json.dumps(dict.fromkeys(_TESTBED_FILES, hashlib.sha256(b"card").hexdigest())).encode()]


TARGETS = (
    Target("format scanner", run_scanner, text_seeds, is_python=True),
    Target("splitters", run_splitters, text_seeds, is_python=True),
    Target("streaming tracker", run_streaming, text_seeds),
    Target("trace from text", run_from_text, text_seeds),
    Target("trace from parts", run_from_parts, parts_seeds),
    Target("trace from tokens", run_from_tokens, token_seeds),
    Target("trace JSON", run_trace_json, trace_json_seeds),
    Target("diagnosis JSON", run_diagnosis_json, diagnosis_seeds),
    Target("records", run_records, record_seeds, is_python=True),
    Target("questions", run_questions, question_seeds, is_python=True),
    Target("manifest", run_manifest, manifest_seeds, is_python=True),
    Target("run folder", run_folder, manifest_seeds),
    Target("file names", run_file_names, name_seeds, is_python=True),
    Target("arguments", run_arguments, argument_seeds),
    Target("saliency file", run_saliency_file, saliency_seeds),
    Target("knockout file", run_knockout_file, knockout_seeds),
    Target("patching file", run_patching_file, patching_seeds),
    Target("GGUF file", run_gguf, gguf_seeds),
    Target("testbed checksums", run_checksums, checksum_seeds),
)


# Mutation

_WORDS = (
    b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-1", b"0", b"1.5", b"9" * 30, b"9" * 5000,
    b'"\\ud800"', b"[]", b"{}", b'""', b"[" * 3000, b'{"a":', b"\\u0000", b"\xff\xfe", b"\xed\xa0\x80",
    b"\xef\xbb\xbf", b"\0", b"\n", b"\r\n\r\n", b"../../etc/passwd", b"<think>", b"</think>",
    b"<|im_start|>user\n", b"<|im_end|>", b"<|channel|>", b"$", b"`", b"```\n", b"\\begin{",
    b"\xe2\x80\xae", b"\xcc\x81" * 50, b"\xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f\x94\xac", b"--", b"=",
    b"F8_E4M3", b"I64", b"BOOL", b"F64",
)  # fmt: skip


def mutate(data: bytes, others: list[bytes], generator: random.Random) -> bytes:
    """One to four random changes of a valid input; of JSON and safetensors often within the structure."""
    is_tensors = data[8:9] == b"{" and len(data) > 8 + int.from_bytes(data[:8], "little")
    if is_tensors and generator.random() < 0.8:
        return _mutate_header(data, generator)
    if data[:1] == b"{" and generator.random() < 0.7:
        return _mutate_lines(data, generator)
    return _mutate_bytes(data, others, generator)


def _mutate_lines(data: bytes, generator: random.Random) -> bytes:
    """Another value somewhere in one of the JSON lines; now and then lines doubled, dropped or exchanged."""
    lines = data.split(b"\n")
    at = generator.randrange(len(lines))
    if lines[at].strip():
        lines[at] = json.dumps(_mutate_json(json.loads(lines[at]), generator)).encode()
    if generator.random() < 0.2:
        other = generator.randrange(len(lines))
        lines[at], lines[other] = lines[other], generator.choice((lines[at], b""))
    return b"\n".join(lines)


def _mutate_bytes(data: bytes, others: list[bytes], generator: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(out) + 1)
        end = min(len(out), at + generator.choice((1, 1, 2, 4, 8, 40, 400)))
        kind = generator.randrange(8)
        if kind == 0 and out:
            out[min(at, len(out) - 1)] ^= 1 << generator.randrange(8)
        elif kind == 1:
            out[at:end] = generator.randbytes(end - at)
        elif kind == 2:
            del out[at:end]
        elif kind == 3:
            out[at:at] = generator.choice(_WORDS)
        elif kind == 4:
            out[at:end] = generator.choice(_WORDS)
        elif kind == 5:
            out[at:at] = out[at:end] * generator.choice((1, 3, 30))
        elif kind == 6:
            other = generator.choice(others)
            start = generator.randrange(len(other) + 1)
            out[at:end] = other[start : start + generator.choice((4, 40, 400))]
        elif generator.random() < 0.2:
            del out[at:]
        else:
            out[at : at + 8] = struct.pack("<q", generator.choice((0, -1, 1, 2**31, 2**62, 2**40, -(2**63))))
    return bytes(out[: 2**20])


def _mutate_header(data: bytes, generator: random.Random) -> bytes:
    """Another value or size somewhere in the header or the document within, lengths put right again."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.get("__metadata__", {})
    if metadata and generator.random() < 0.7:
        name = next(iter(metadata))
        document = json.loads(metadata[name])
        for _ in range(generator.randint(1, 2)):
            document = _mutate_json(document, generator)
        metadata[name] = json.dumps(document)
    else:
        header = _mutate_json(header, generator)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _mutate_json(document: Any, generator: random.Random) -> Any:
    """The document with one value, somewhere, replaced, dropped or doubled."""
    values: list[Any] = [
        None, True, -1, 0, 1, 2**31, 2**63, 2**70, 10**400, 1.5, float("nan"), float("inf"), "", "x",
        "\ud800", "../x", [], [0], [[0]], {}, {"version": 1}, "F32", "F8_E4M3", "BOOL", [0, 0], [2**40,
        2**40],
    ]  # fmt: skip
    holders = []

    def walk(value: Any) -> None:
        if isinstance(value, dict | list) and value:
            holders.append(value)
            for inner in value.values() if isinstance(value, dict) else value:
                walk(inner)

    walk(document)
    if not holders:
        return generator.choice(values)
    holder = generator.choice(holders)
    key = generator.choice(list(holder)) if isinstance(holder, dict) else generator.randrange(len(holder))
    kind = generator.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 5 and isinstance(holder, dict):
        holder[generator.choice(("later", "version", "minor", "", key))] = generator.choice(values)
    elif kind == 1 and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif kind == 2 and isinstance(holder[key], int):
        holder[key] += generator.choice((-1, 1, 2, 100))
    else:
        holder[key] = generator.choice(values)
    return document
