"""Every format gives the same names, shapes and numbers."""

import json
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from lora_diag.errors import InputError
from lora_diag.storage import open_checkpoint
from tests.conftest import save_model, save_sharded, weights
from tests.messages import raises_naming
from tests.storage.sharding import Canary


def save_torch(folder, name, content, **options):
    folder.mkdir()
    torch.save(content, folder / name, **options)
    return folder


OLD = {"_use_new_zipfile_serialization": False}
WRITERS = {
    "folder": save_model,
    "file": lambda folder, tensors: save_model(folder, tensors) / "model.safetensors",
    "shards": save_sharded,
    "index": lambda folder, tensors: save_sharded(folder, tensors) / "model.safetensors.index.json",
    "bin": lambda folder, tensors: save_torch(folder, "pytorch_model.bin", tensors),
    "bin shards": lambda folder, tensors: save_sharded(folder, tensors, suffix="bin"),
    "legacy": lambda folder, tensors: save_torch(folder, "pytorch_model.bin", tensors, **OLD),
    "nested": lambda folder, tensors: (
        save_torch(folder, "last.ckpt", {"state_dict": tensors}) / "last.ckpt"
    ),
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_range_of_every_tensor_is_read_back(tmp_path, write, dtype):
    tensors = weights(3, dtype)
    checkpoint = open_checkpoint(WRITERS[write](tmp_path / "model", tensors))
    assert set(checkpoint) == set(tensors)
    for name, expected in tensors.items():
        info = checkpoint[name]
        assert (info.shape, info.dtype) == (
            tuple(expected.shape),
            str(dtype).removeprefix("torch."),
        )
        flat, half = expected.reshape(-1), expected.numel() // 2
        assert torch.equal(checkpoint.read(name), flat)
        assert torch.equal(checkpoint.read(name, 3, half), flat[3:half])


def test_transposed_views_in_bin_are_read_in_their_own_order(tmp_path):
    matrix = torch.arange(12.0).view(3, 4)
    torch.save({"w": matrix.T, "tied": matrix}, tmp_path / "a.bin")
    checkpoint = open_checkpoint(tmp_path / "a.bin")
    assert torch.equal(checkpoint.read("w", 2, 7), matrix.T.reshape(-1)[2:7])


def test_integer_and_scalar_tensors_are_listed(tmp_path):
    save_file({"ids": torch.arange(5), "scale": torch.tensor(2.0)}, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert checkpoint["ids"].dtype == "int64"
    assert checkpoint["scale"].shape == ()
    assert checkpoint.read("scale").tolist() == [2.0]


def test_read_does_not_alias_file(tmp_path):
    path = save_model(tmp_path / "m", {"w": torch.ones(4, 4)}) / "model.safetensors"
    checkpoint = open_checkpoint(path)
    read = checkpoint.read("w")
    read.zero_()
    assert torch.equal(checkpoint.read("w"), torch.ones(16))


def test_checkpoints_survive_pickling_by_opening_again(tmp_path):
    for kind in ("shards", "bin"):
        checkpoint = open_checkpoint(WRITERS[kind](tmp_path / kind, weights(1)))
        checkpoint.read("lm_head.weight")
        repeated = pickle.loads(pickle.dumps(checkpoint))
        assert torch.equal(repeated.read("lm_head.weight"), checkpoint.read("lm_head.weight"))


def test_link_into_hub_cache_is_allowed(tmp_path):
    real = save_sharded(tmp_path / "blobs", weights(1))
    link = tmp_path / "snapshot"
    link.mkdir()
    for file in real.iterdir():
        (link / file.name).symlink_to(file)
    assert len(open_checkpoint(link)) == len(weights(1))


# Malformed files: one message that names the file, and no tensor read.


def raw(path, header: bytes, data: bytes = b"", length: int | None = None):
    path.write_bytes(
        (len(header) if length is None else length).to_bytes(8, "little") + header + data
    )
    return path


def entry(shape=(2,), dtype="F32", offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


NAMED = b'"w":' + json.dumps(entry()).encode()
BAD_HEADERS = {
    "length beyond the file": (b"{}", b"", 10**15, "header claims"),
    "not json": (b"{nope", b"", None, "header is invalid"),
    "not an object": (b"[1]", b"", None, "not an object"),
    "twice the same name": (b"{%s,%s}" % (NAMED, NAMED), bytes(8), None, "appears twice"),
    "data cut short": (json.dumps({"w": entry()}).encode(), bytes(7), None, "cut short"),
    "data too long": (json.dumps({"w": entry()}).encode(), bytes(9), None, "describes 8"),
    "unknown dtype": (json.dumps({"w": entry(dtype="F31")}).encode(), bytes(8), None, "F31"),
    **{
        f"dtype {dtype!r}": (
            json.dumps({"w": entry(dtype=dtype)}).encode(),
            bytes(8),
            None,
            "unknown dtype",
        )
        for dtype in (["F32"], {"F32": 1}, None, 7)
    },
    "wrong size": (
        json.dumps({"w": entry(shape=(3,))}).encode(),
        bytes(8),
        None,
        "does not match its size",
    ),
    "negative": (
        json.dumps({"w": entry(shape=(-2, -1))}).encode(),
        bytes(8),
        None,
        "invalid shape or offset",
    ),
    "huge": (
        json.dumps({"w": entry(shape=(2**62, 2**62))}).encode(),
        bytes(8),
        None,
        "does not match its size",
    ),
    "boolean shape": (
        json.dumps({"w": entry([True])}).encode(),
        bytes(8),
        None,
        "invalid shape or offset",
    ),
    "no offsets": (b'{"w":{"dtype":"F32","shape":[2]}}', bytes(8), None, "has no dtype"),
    "not a tensor": (b'{"w":7}', bytes(8), None, "has no dtype"),
    "overlap": (
        json.dumps({"v": entry(), "w": entry(offsets=(4, 12))}).encode(),
        bytes(12),
        None,
        "starts at byte",
    ),
    "metadata of numbers": (b'{"__metadata__":{"a":1}}', b"", None, "__metadata__"),
    "deep nesting": (b'{"w":' + b"[" * 100_000, b"", None, "header is invalid"),
    "half a character in a name": (
        json.dumps({"\ud800": entry()}).encode(),
        bytes(8),
        None,
        "header is invalid",
    ),
    "half a character in bytes": (
        b'{"w\xed\xa0\x80":%s}' % json.dumps(entry()).encode(),
        bytes(8),
        None,
        "invalid",
    ),
    "half a character in UTF-16": (
        json.dumps({"\ud800": entry()}).encode("utf-16-le"),
        bytes(8),
        None,
        "invalid",
    ),
    "half a character beside them": (
        rb'{"__metadata__":{"step":"\uDfff"}}',
        b"",
        None,
        "header is invalid",
    ),
}


@pytest.mark.parametrize("kind", BAD_HEADERS)
def test_bad_safetensors_headers_are_named(tmp_path, kind):
    header, data, length, words = BAD_HEADERS[kind]
    path = raw(tmp_path / "a.safetensors", header, data, length)
    with pytest.raises(InputError, match=words) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_files_too_short_for_header(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="at least 8"):
        open_checkpoint(path)


def test_file_shrunk_after_opening_is_reported(tmp_path):
    path = save_model(tmp_path / "m", {"w": torch.ones(1000, 10)}) / "model.safetensors"
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:500])
    with raises_naming(InputError, "ends inside"):
        checkpoint.read("w")


@pytest.mark.parametrize(
    "around", [lambda x: {"w": x}, lambda x: x, lambda x: {"w": torch.ones(2), "x": x}]
)
def test_pickle_with_code_is_refused_and_not_run(tmp_path, around):
    torch.save(around(Canary(tmp_path / "ran")), tmp_path / "a.bin")
    with pytest.raises(InputError, match="could run code"):
        open_checkpoint(tmp_path / "a.bin")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x80\x02broken", b"hello"])
def test_damaged_torch_files(tmp_path, content):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.bin"):
        open_checkpoint(tmp_path / "a.bin")


def _claiming(path, part, size, compression):
    """Write a torch file anew with one part of so many zero bytes; stored, only its entry in the
    directory says so.
    """
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            ours = name.endswith(part)
            archive.writestr(name, bytes(size) if ours and compression else content)
            if ours and not compression:
                archive.getinfo(name).file_size = archive.getinfo(name).compress_size = size


@pytest.mark.parametrize("part", ["data.pkl", "data/0"])
@pytest.mark.parametrize(
    ("compression", "problem"),
    [(zipfile.ZIP_DEFLATED, "is compressed"), (zipfile.ZIP_STORED, "claim 20,000,")],
)
def test_archive_with_larger_content_is_not_unpacked(
    tmp_path, monkeypatch, part, compression, problem
):
    _claiming(tmp_path / "a.bin", part, 20_000_000, compression)
    assert (tmp_path / "a.bin").stat().st_size < 50_000
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch read it"))
    with pytest.raises(InputError, match=problem):
        open_checkpoint(tmp_path / "a.bin")


@pytest.mark.parametrize(
    "content", [[torch.ones(2)], {}, {"a": 1}, torch.ones(2), {"w\ud800": torch.ones(2)}]
)
def test_torch_files_without_named_tensors(tmp_path, content):
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(InputError, match=r"named tensors|valid Unicode"):
        open_checkpoint(tmp_path / "a.bin")


def test_surrogate_pair_is_text(tmp_path):
    header = json.dumps({"w\U0001f600": entry()}).encode()
    assert rb"\ud83d\ude00" in header
    assert list(open_checkpoint(raw(tmp_path / "a.safetensors", header, bytes(8)))) == [
        "w\U0001f600"
    ]


# Folders and indexes.


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "", "..", "a/b.safetensors", "a\\b", "x\0y"]
)
def test_index_may_only_name_plain_files(tmp_path, shard):
    save_model(tmp_path, {"w": torch.ones(2, 2)})
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with raises_naming(InputError, "plain file"):
        open_checkpoint(inside)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"w": 3}}', "[" * 100_000]
)
def test_invalid_indexes_are_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match="index"):
        open_checkpoint(tmp_path)


def test_index_is_compared_with_shards(tmp_path):
    folder = save_sharded(tmp_path / "m", weights(1))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name, shard = next(iter(content["weight_map"].items()))

    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"ghost": shard}}))
    with pytest.raises(InputError, match="ghost"):
        open_checkpoint(folder)

    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    checkpoint = open_checkpoint(folder)
    assert name not in checkpoint
    assert name in checkpoint.notes[0]

    (folder / shard).unlink()
    with pytest.raises(InputError, match=shard):
        open_checkpoint(folder)


def test_missing_or_unreadable_file_is_reported(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="unknown format"):
        open_checkpoint(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["adapter_config.json"], "adapter"),
        (["__0_0.distcp"], r"give its folder, with the file \.metadata in it: '.*/a folder'"),
        (
            ["pytorch_model_fsdp_0"],
            "accelerate merge-weights '.*/a folder/pytorch_model_fsdp_0' out",
        ),
        (
            ["mp_rank_01_model_states.pt"],
            r"give the folder .*zero_to_fp32\.py '?/[^']*[^r]'? out --safe",
        ),
        (["_CHECKPOINT_METADATA", "manifest.ocdbt"], "Orbax .* orbaxport"),
        (["latest_checkpointed_iteration.txt"], "Megatron .* megatron-bridge"),
        (["rank0.engine", "config.json"], "TensorRT"),
        (["qmodel.pt"], "HQQ"),
    ],
)
def test_foreign_folders_are_refused_with_remedy(tmp_path, files, words):
    folder = tmp_path / "a folder"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")
    for path in (folder, folder / files[0]):
        if path.suffix != ".json":
            with pytest.raises(InputError, match=words):
                open_checkpoint(path)


def test_config_json_next_to_adapter_is_model_config(tmp_path):
    folder = save_model(tmp_path / "model", {"a.weight": torch.ones(2, 2)})
    save_file({"a.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert open_checkpoint(folder).config == {"model_type": "llama"}
    assert open_checkpoint(folder / "adapter_model.safetensors").config == {}
