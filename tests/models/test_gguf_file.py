import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, dequantize
from tiny_gguf import write_tiny_gguf

from stepflow_tl.errors import ModelError
from stepflow_tl.models import gguf_file
from stepflow_tl.models.gguf_file import GgufFile


@pytest.fixture
def path(tmp_path):
    return write_tiny_gguf(tmp_path / "m.gguf")


def test_a_file_of_another_kind_is_refused(tmp_path):
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"not a checkpoint at all")
    with pytest.raises(ModelError, match=r"is not a GGUF file: it starts with b'not '"):
        GgufFile.open(other)


@pytest.mark.parametrize("n_bytes", [10, 30, 200, 3000])
def test_a_truncated_header_is_refused(n_bytes, path):
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(ModelError, match="is truncated or damaged; install it again"):
        GgufFile.open(path)


def test_a_file_cut_in_half_is_refused_when_it_is_opened_and_names_the_tensor(path):
    data = path.read_bytes()
    start = GgufFile.open(path).data_start
    path.write_bytes(data[: (len(data) + start) // 2])
    with pytest.raises(
        ModelError, match=r"ends inside tensor blk\.0\.\S+: it is \d+ bytes or more too short"
    ):
        GgufFile.open(path)


def test_one_byte_less_is_refused_and_the_whole_file_is_not(path):
    whole = GgufFile.open(path)
    last = max(whole.tensors, key=lambda entry: entry.offset)
    end = whole.data_start + last.offset + last.n_rows * last.row_bytes
    path.write_bytes(path.read_bytes()[:end])
    GgufFile.open(path)
    path.write_bytes(path.read_bytes()[: end - 1])
    with pytest.raises(ModelError, match="it is 1 bytes or more too short"):
        GgufFile.open(path)


def test_an_old_version_is_refused(tmp_path):
    old = tmp_path / "old.gguf"
    old.write_bytes(b"GGUF" + (2).to_bytes(4, "little") + bytes(16))
    with pytest.raises(ModelError, match="is GGUF version 2; only version 3 is read"):
        GgufFile.open(old)


def test_a_part_of_a_split_model_is_refused_with_the_command_that_joins(tmp_path):
    part = write_tiny_gguf(tmp_path / "renamed.gguf", metadata={"split.no": 1, "split.count": 3})
    with pytest.raises(ModelError, match="is part 2 of 3 of a split model. Join .* llama-gguf-split --merge"):
        GgufFile.open(part)


def test_a_file_says_what_its_model_is_called_and_else_has_its_own_name(tmp_path, path):
    assert GgufFile.open(path).name == "m"
    named = write_tiny_gguf(tmp_path / "n.gguf", metadata={"general.name": "Tiny"})
    assert GgufFile.open(named).name == "Tiny"


@pytest.mark.parametrize("quantization", ["F32", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("values_at_once", [1, 2000, 1 << 22])
def test_a_tensor_read_a_few_rows_at_a_time_is_the_tensor(
    quantization, values_at_once, tmp_path, monkeypatch
):
    monkeypatch.setattr(gguf_file, "_VALUES_AT_ONCE", values_at_once)
    file = GgufFile.open(write_tiny_gguf(tmp_path / "m.gguf", quantization=quantization, d_model=256))
    entry = next(entry for entry in file.tensors if entry.name == "blk.0.attn_k.weight")
    start = file.data_start + entry.offset
    raw = np.frombuffer(file.path.read_bytes()[start : start + entry.n_rows * entry.row_bytes], np.uint8)
    whole = dequantize(raw.reshape(entry.n_rows, -1), GGMLQuantizationType(entry.quantization))
    ours = file.dequantise(entry, torch.bfloat16)
    assert ours.shape == entry.shape == (128, 256) and ours.float().std() > 0.01
    assert torch.equal(ours, torch.from_numpy(whole.copy()).to(torch.bfloat16))


def test_a_quantisation_that_cannot_be_decoded_is_named_with_the_cure(tmp_path):
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("a.weight", np.zeros((2, 32), dtype=np.int8), raw_dtype=GGMLQuantizationType.I8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile.open(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=r"holds a\.weight quantised as I8, .* pip install -U gguf"):
        file.dequantise(file.tensors[0], torch.float32)
