"""``extract --format``: the factors of the PEFT adapter, read back from each layout, and by its own
library.
"""

import json

import numpy as np
import pytest

from lora_diag.adapters import open_adapter
from lora_diag.decisions.extract.run import extract
from lora_diag.errors import InputError, UsageError
from tests.adapters import making
from tests.adapters.making import changes, close, normal

HEADS = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2}
LAYERS = {
    "model.layers.0.self_attn.q_proj.weight": (16, 12),
    "model.layers.0.self_attn.o_proj.weight": (12, 16),
    "model.layers.0.mlp.up_proj.weight": (20, 12),
}
IMAGE = {"down_blocks.0.attn.to_q.weight": (10, 8), "mid_block.conv.weight": (6, 4, 3, 3)}


def pair(tmp_path, shapes, config):
    before = {name: normal(*shape) for name, shape in shapes.items()}
    after = {}
    for rank, (name, weight) in enumerate(before.items(), start=1):
        rows = weight.reshape(len(weight), -1)
        change = normal(len(rows), rank, seed=5) @ normal(rank, rows.shape[1], seed=6)
        after[name] = weight + change.reshape(weight.shape)
    base = making.base(tmp_path, before, config)
    return base, making.write(tmp_path / "tuned" / "model.safetensors", after).parent


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("form", "shapes", "config"),
    [
        ("mlx", LAYERS, HEADS),
        ("gguf", LAYERS, HEADS),
        ("kohya", IMAGE, {"_class_name": "UNet2DConditionModel"}),
        ("diffusers", IMAGE, {"_class_name": "UNet2DConditionModel"}),
    ],
)
def test_extract_format_holds_the_same_factors(tmp_path, form, shapes, config, dtype):
    base, tuned = pair(tmp_path, shapes, config)
    for name in ("peft", form):
        results = extract(
            base, tuned, tmp_path / name, energy=0.999999, format=name, adapter_dtype=dtype
        )
        assert {record.layer: record.rank for record in results} == {
            layer: i for i, layer in enumerate(shapes, 1)
        }
    plain, other = (changes(tmp_path / name, base)[0] for name in ("peft", form))
    assert plain.keys() == other.keys() == shapes.keys()
    for layer, change in plain.items():
        close(other[layer], change, 1e-12)
    adapter = open_adapter(tmp_path / form)
    assert adapter.form == form
    assert {update.dtype for update in adapter.reading.updates} == {dtype}
    card = (tmp_path / form / "README.md").read_text()
    assert f"--format {form}" in card
    assert "PeftModel" not in card


def test_extract_gguf_is_read_by_the_library(tmp_path):
    gguf = pytest.importorskip("gguf")
    base, tuned = pair(tmp_path, LAYERS, HEADS)
    extract(base, tuned, tmp_path / "out", rank=2, format="gguf")
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    result = {tensor.name: np.array(tensor.data, np.float64) for tensor in reader.tensors}
    a, b = (result[f"blk.0.ffn_up.weight.lora_{side}"] for side in "ab")
    expected, _ = changes(tmp_path / "out", base)
    close(b @ a, expected["model.layers.0.mlp.up_proj.weight"], 1e-12)
    assert reader.fields["adapter.lora.alpha"].contents() == 2.0


@pytest.mark.parametrize(
    ("form", "config", "error", "message"),
    [
        ("onnx", HEADS, UsageError, "use peft"),
        ("kohya", HEADS, InputError, "which part of a pipeline"),
        ("gguf", {"model_type": "bloom"}, InputError, "not known"),
    ],
)
def test_extract_format_is_refused_before_anything_is_written(
    tmp_path, form, config, error, message
):
    base, tuned = pair(tmp_path, LAYERS, config)
    with pytest.raises(error, match=message):
        extract(base, tuned, tmp_path / "out", rank=2, format=form)
    assert not list(tmp_path.glob("out*"))


def test_extract_format_resumes_and_is_replaced(tmp_path):
    base, tuned = pair(tmp_path, LAYERS, HEADS)
    extract(base, tuned, tmp_path / "out", rank=2, format="gguf")
    (tmp_path / "out").rename(tmp_path / "out.part")
    (tmp_path / "out.part" / "adapter.gguf").unlink()
    (tmp_path / "out.part" / "README.md").unlink()
    with pytest.raises(UsageError, match="did not finish"):
        extract(base, tuned, tmp_path / "out", rank=2, format="gguf")
    extract(base, tuned, tmp_path / "out", rank=1, format="mlx", overwrite=True)
    assert (
        json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_parameters"][
            "rank"
        ]
        == 1
    )
    assert not (tmp_path / "out" / "adapter.gguf").exists()
