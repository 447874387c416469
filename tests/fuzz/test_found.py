"""What fuzzing found, one test a fault."""

import json
import math
import struct

import numpy as np
import pytest
import torch
from run_folders import done, failed, result, write_manifest
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_gguf import write_tiny_gguf

from stepflow_tl import ReasoningTrace, StepSaliency, summarize
from stepflow_tl.diagnosis import Diagnosis
from stepflow_tl.errors import InputFileError, ModelError, ResultFileError, TraceError
from stepflow_tl.evaluation.questions import read_questions
from stepflow_tl.models.gguf import GgufCheckpoint
from stepflow_tl.results.result import read_head


@pytest.mark.parametrize("parts", [("\ud800", "a", "b"), ("q", "\udfff", ""), ("q", "a", "b\udc80")])
def test_half_a_character_in_a_part_is_a_trace_error(tiny_tokenizer, parts):
    with pytest.raises(TraceError, match="holds half a character"):
        ReasoningTrace.from_parts(tiny_tokenizer, *parts)
    with pytest.raises(TraceError, match="holds half a character"):
        ReasoningTrace.from_text(tiny_tokenizer, "".join(parts), format="plain")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text": ["a", "b"]}, "text and format must be strings"),
        ({"format": ["plain"]}, "text and format must be strings"),
        ({"tokens": [True]}, "expected a list of whole numbers"),
        ({"tokens": [1.5]}, "expected a list of whole numbers"),
        ({"tokens": [2**70]}, "Not a trace"),
        ({"steps": 3}, "Not a trace"),
        ({"causal": []}, "Not a trace"),
        ({"token_char_spans": [[0]]}, "expected pairs"),
    ],
)
def test_json_of_the_wrong_kinds_is_no_trace(change, reason):
    with pytest.raises(TraceError, match=reason):
        ReasoningTrace.from_json({**result(0).trace.to_json(), **change})


@pytest.mark.parametrize("data", [[], "x", None, 3])
def test_json_that_is_no_object_is_no_diagnosis(data):
    from_json = getattr(Diagnosis.from_json, "__wrapped__", Diagnosis.from_json)
    with pytest.raises(ResultFileError, match="not a diagnosis but a"):
        from_json(data) if from_json is Diagnosis.from_json else from_json(Diagnosis, data)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": ' + "9" * 5000 + ', "answer": "x"}', "not JSON"),
        ('{"question": "\\ud800", "answer": "x"}', "`question`: The text holds half a character"),
    ],
)
def test_a_question_that_python_cannot_read_or_write_is_an_input_error(tmp_path, line, reason):
    path = tmp_path / "questions.jsonl"
    path.write_text(line)
    with pytest.raises(InputFileError, match=f"line 1: {reason}"):
        read_questions(path)


@pytest.mark.parametrize(
    "layers", [[math.inf, 0, 1, 2], [1e300, 0, 1, 2], [0.5, 1, 2, 3], ["0", 1, 2, 3], "0123"]
)
def test_layers_that_are_no_whole_numbers_are_damage(tmp_path, layers):
    path = result(0).save(tmp_path / "map")
    with safe_open(path, framework="pt") as file:
        document = {**json.loads(file.metadata()[StepSaliency.schema.name]), "layers": layers}
        save_file(
            {name: file.get_tensor(name) for name in file.keys()},
            path,
            {StepSaliency.schema.name: json.dumps(document)},
        )
    with pytest.raises(ResultFileError, match="its content is inconsistent"):
        StepSaliency.load(path)
    with pytest.raises(ResultFileError, match="its content is inconsistent"):
        read_head(path, StepSaliency)


def test_a_manifest_without_settings_or_header_is_refused(tmp_path):
    line = done(tmp_path, "a", result(0))
    write_manifest(tmp_path, line, header={"schema": 1, "kind": "header", "settings": []})
    with pytest.raises(ResultFileError, match="settings is a list, expected an object"):
        summarize(tmp_path)
    (tmp_path / "manifest.jsonl").write_text("\n" + json.dumps(line) + "\n")  # a blank line before it
    with pytest.raises(ResultFileError, match="does not begin with a header"):
        summarize(tmp_path)


def test_counts_beyond_32_bits_are_written(tmp_path):
    write_manifest(tmp_path, done(tmp_path, "a", result(0), n_summary=2**40), failed("b"))
    assert summarize(tmp_path, out=tmp_path / "t.parquet").n_traces == 1


@pytest.fixture
def gguf(tmp_path):
    return write_tiny_gguf(tmp_path / "m.gguf")


def test_the_whole_tiny_gguf_loads(gguf):
    checkpoint = GgufCheckpoint.open(gguf)
    model = checkpoint.model(torch.float32)
    tokens = torch.tensor([checkpoint.tokenizer()("ab c 12").input_ids])
    assert torch.isfinite(model(tokens).logits).all()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"llama.embedding_length", b"llama.embedding_lengtx"),  # a key that is missing
        (b"tokenizer.ggml.eos_token_id", b"tokenizer.ggml.eos_token_ix"),
        (b"output_norm.weight", b"output_nopm.weight"),  # an unknown tensor
        (b"blk.0.ffn_up.weight", b"blk.7.ffn_up.weight"),
        (b"blk.0.ffn_up.weight", b"blkx0.ffn_up.weight"),
        (b"llama.block_count\x04\x00\x00\x00\x01", b"llama.block_count\x04\x00\x00\x00\x02"),
        (b"llama.embedding_length\x04\0\0\0\x20\0\0\0", b"llama.embedding_length\x04\0\0\0\x20\0\0\x7f"),
    ],
)  # fmt: skip
def test_gguf_metadata_that_does_not_fit_is_a_model_error_early(gguf, old, new, monkeypatch):
    data = gguf.read_bytes()
    assert data.count(old) == 1
    gguf.write_bytes(data.replace(old, new))

    def allocate(self, dtype):
        raise AssertionError("weights were read")

    monkeypatch.setattr(GgufCheckpoint, "weights", allocate)
    with pytest.raises(ModelError):
        GgufCheckpoint.open(gguf).model(torch.float32)


@pytest.mark.parametrize("content", [b"", b"GGUF", None])
def test_a_gguf_file_that_is_empty_or_missing_is_a_model_error(tmp_path, content):
    path = tmp_path / "m.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match="truncated or damaged|cannot read"):
        GgufCheckpoint.open(path)


def test_gguf_arrays_nested_without_end_are_a_model_error(tmp_path):
    nested = struct.pack("<IQ", 9, 1) * 5000
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9)
    (tmp_path / "m.gguf").write_bytes(head + nested)
    with pytest.raises(ModelError, match="RecursionError"):
        GgufCheckpoint.open(tmp_path / "m.gguf")


def test_gguf_weights_that_are_not_finite_are_refused(gguf):
    data = gguf.read_bytes()
    ones = np.ones(32, dtype=np.float32).tobytes()
    assert ones in data
    gguf.write_bytes(data.replace(ones, np.full(32, np.nan, dtype=np.float32).tobytes()))
    with pytest.raises(ModelError, match="not finite"):
        dict(GgufCheckpoint.open(gguf).weights(torch.float32))
