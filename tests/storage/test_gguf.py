"""The GGUF container against the gguf package's writer, tables and decoder, and against damage of
every kind.
"""

import struct

import numpy as np
import pytest
import torch

from lora_diag.errors import InputError
from lora_diag.storage.gguf import CODECS, TYPES, GgufFile
from tests.messages import raises_naming
from tests.storage.test_fuzz import assert_mutants_are_read_or_refused

gguf = pytest.importorskip("gguf")


@pytest.fixture
def file(tmp_path):
    """Write one tensor of every readable type."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_type("model")
    writer.add_block_count(2)
    writer.add_rope_freq_base(500000.0)
    writer.add_token_list([f"t{i}" for i in range(5000)])
    writer.add_token_types([1] * 5000)
    writer.add_array("llama.attention.head_count", [4, 8])
    written = {}
    for name, dtype in (
        ("f32", np.float32),
        ("f16", np.float16),
        ("f64", np.float64),
        ("i32", np.int32),
    ):
        written[name] = (rng.standard_normal((3, 7)) * 9).astype(dtype)
        writer.add_tensor(name, written[name])
    raw = rng.standard_normal((5, 96)).astype(np.float32)
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.BF16):
        data = gguf.quants.quantize(raw, kind)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        written[kind.name] = gguf.quants.dequantize(data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m.gguf", written


def test_gguf_reads_what_the_library_wrote(file):
    path, written = file
    opened = GgufFile(path)
    assert list(opened.tensors) == list(written)
    for name, values in written.items():
        info = opened.tensors[name]
        assert info.shape == values.shape
        whole = opened.read(name, 0, info.numel)
        np.testing.assert_array_equal(
            whole.double().numpy().reshape(values.shape), values.astype(np.float64)
        )
        for start, stop in ((0, 0), (1, 2), (20, 21), (5, 20)):
            assert torch.equal(opened.read(name, start, stop), whole[start:stop])
    assert opened.metadata["general.type"] == "model"
    assert opened.fields["llama.block_count"] == 2
    assert opened.fields["llama.rope.freq_base"] == 500000.0
    assert opened.fields["llama.attention.head_count"] == [4, 8]
    assert (
        opened.fields["tokenizer.ggml.tokens"] is opened.fields["tokenizer.ggml.token_type"] is None
    )


def test_gguf_steps_are_the_gap_between_codes(file):
    path, _ = file
    opened = GgufFile(path)
    values, steps = (
        opened.read("Q8_0", 30, 70).double(),
        opened.read_scales("Q8_0", 30, 70).double(),
    )
    codes = values / steps
    assert torch.allclose(
        opened.read_steps("Q8_0", 30, 70).double(), steps * (1 + codes.abs() / 1024)
    )
    assert torch.allclose(codes, codes.round(), atol=1e-9)
    assert codes.abs().max() <= 127
    assert opened.read_steps("f16", 0, 3) is None


def test_gguf_block_sizes_equal_library():
    sizes = {int(kind): size for kind, size in gguf.constants.GGML_QUANT_SIZES.items()}
    assert {code: (kind.block, kind.size) for code, kind in TYPES.items() if code in sizes} == sizes
    assert {kind.name for kind in TYPES.values()} >= set(CODECS)


def test_gguf_cut_anywhere_is_refused(file, tmp_path):
    content = file[0].read_bytes()
    data = GgufFile(file[0])
    last = max(begin for _, begin in data._spans.values())
    for size in [*range(200), *range(200, len(content), 997), last + 1]:
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(InputError, match=r"cut\.gguf: "):
            GgufFile(tmp_path / "cut.gguf")


def header(*parts, tensors=0, fields=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + b"".join(parts)


def text(value):
    return struct.pack("<Q", len(value)) + value


def tensor(name, shape, kind, offset):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HUGE = 2**63 - 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"GGUX" + bytes(60), "does not begin with GGUF"),
        (header(version=1), "version 1"),
        (header(version=3 << 24), "big-endian"),
        (header(fields=HUGE), "the file ends inside the key of field 0"),
        (header(tensors=HUGE), "the file ends inside the name of tensor 0"),
        (header(struct.pack("<Q", HUGE), fields=1), "claims 9,223,372,036,854,775,807 bytes"),
        (header(text(b"k") + struct.pack("<I", 13), fields=1), "unknown type 13"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 4, HUGE), fields=1), "inside k"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 8, HUGE), fields=1), "inside k"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 9, 1), fields=1), "the field 'k' has"),
        (header(*[text(b"k") + struct.pack("<IB", 0, 1)] * 2, fields=2), "'k' appears twice"),
        (header(text(b"\xff") + struct.pack("<IB", 0, 1), fields=1), "not UTF-8"),
        (
            header(text(b"general.alignment") + struct.pack("<II", 4, 3), fields=1),
            "not a power of two",
        ),
        (header(tensor(b"w", [1] * 5, 0, 0), bytes(99), tensors=1), "claims 5 dimensions"),
        (header(tensor(b"w", [4], 99, 0), bytes(99), tensors=1), "unknown type 99"),
        (header(tensor(b"w", [HUGE, HUGE], 0, 0), bytes(99), tensors=1), "the file holds"),
        (header(tensor(b"w", [4], 0, 32), bytes(99), tensors=1), "starts at byte 32"),
        (
            header(tensor(b"w", [4], 0, 0), tensor(b"v", [4], 0, 0), bytes(99), tensors=2),
            "starts at byte 0",
        ),
        (
            header(tensor(b"w", [4], 0, 0), tensor(b"w", [4], 0, 32), bytes(99), tensors=2),
            "'w' appears twice",
        ),
        (header(tensor(b"w", [33, 2], 8, 0), bytes(999), tensors=1), "not whole blocks of 32"),
    ],
)
def test_gguf_refuses_false_headers(tmp_path, content, problem):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(InputError, match=problem):
        GgufFile(tmp_path / "m.gguf")


def test_damaged_gguf_is_read_or_refused(file):
    assert_mutants_are_read_or_refused(file[0])


def test_gguf_type_without_a_codec_is_refused_by_name(tmp_path):
    content = header(tensor(b"w", [256], 21, 0), tensors=1)
    (tmp_path / "m.gguf").write_bytes(content + bytes(-len(content) % 32 + 110))
    opened = GgufFile(tmp_path / "m.gguf")
    assert opened.tensors["w"].stored == "iq3_s"
    with raises_naming(InputError, "IQ3_S", "decoded"):
        opened.read("w", 0, 256)
