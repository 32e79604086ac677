"""Hub ids against a cache laid out as ``huggingface_hub`` does, without a network."""

import builtins
import json
import shutil

import pytest
import torch

from lora_diag.errors import InputError
from lora_diag.storage import locate_files, open_checkpoint
from lora_diag.storage.hub import HubId, parse
from tests.adapters.making import adapter, normal
from tests.conftest import save_model, save_sharded, weights
from tests.messages import raises_naming

hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache; a request would fail the test."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.HfApi, "model_info", forbidden)
    monkeypatch.setattr(hub, "hf_hub_download", forbidden)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def forbidden(*words, **options):
    raise AssertionError(f"a request was made: {words} {options}")


def put(
    cache, folder, repo="org/name", subfolder="", revision="main", sha=SHA, only=lambda name: True
):
    """Lay files out as the cache does: blobs, a snapshot of links, a ref."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / sha / subfolder
    for part in (snapshot, root / "blobs", root / "refs"):
        part.mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(sha)
    for number, file in enumerate(sorted(folder.iterdir())):
        if only(file.name):
            blob = root / "blobs" / f"{sha[:8]}{subfolder.replace('/', '')}{number}"
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(blob)
    return snapshot


def model(folder, seed=1, save=save_model):
    save(folder, weights(seed))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("org/name", HubId("org/name", "", None)),
        ("org/name@main", HubId("org/name", "", "main")),
        ("org/name-1.5_b@refs/pr/7", HubId("org/name-1.5_b", "", "refs/pr/7")),
        ("org/name/sub/folder", HubId("org/name", "sub/folder", None)),
        ("org/name/sub@v1", HubId("org/name", "sub", "v1")),
    ],
)
def test_valid_hub_ids_are_parsed(words, expected):
    assert parse(words) == expected
    assert str(expected) == words


@pytest.mark.parametrize(
    "words",
    ["name", "/org/name", "../org/name", "org/../name", "org/na..me", "org//name", "org/name/", "org/name@",
     "org/name@a..b", "", "org/na me", "org/näme", "org/na\nme", "org/name\n", "-org/name", "a--b/c",
     "runs/model.safetensors", "o/" + 96 * "n"],
)  # fmt: skip
def test_invalid_hub_ids_are_refused(words):
    assert parse(words) is None


def test_cached_model_is_read_without_request(cache, tmp_path):
    snapshot = put(cache, model(tmp_path / "m"))
    checkpoint = open_checkpoint("org/name")
    assert str(checkpoint.path) == "org/name"
    assert SHA in checkpoint.notes[0]
    assert torch.equal(checkpoint.read("lm_head.weight"), weights(1)["lm_head.weight"].reshape(-1))
    assert locate_files("org/name").files == snapshot


def test_shards_revisions_and_subfolders(cache, tmp_path):
    other = SHA[::-1]
    put(cache, model(tmp_path / "a", 1, save_sharded), revision="v1")
    put(cache, model(tmp_path / "b", 2), revision="refs/pr/1", subfolder="merged/last", sha=other)
    for words, seed in (
        ("org/name@v1", 1),
        (f"org/name@{SHA}", 1),
        ("org/name/merged/last@refs/pr/1", 2),
    ):
        read = open_checkpoint(words).read("lm_head.weight")
        assert torch.equal(read, weights(seed)["lm_head.weight"].reshape(-1))
    for words in ("org/name", "org/name@v2", "org/name/merged@v1", "org/other@v1"):
        with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
            open_checkpoint(words)


def test_local_path_wins(cache, tmp_path):
    put(cache, model(tmp_path / "m", 1))
    model(tmp_path / "org" / "name", 2)
    assert torch.equal(
        open_checkpoint("org/name").read("lm_head.weight"), weights(2)["lm_head.weight"].reshape(-1)
    )


def test_partial_download_is_not_read(cache, tmp_path):
    put(cache, model(tmp_path / "m", 1, save_sharded), only=lambda name: "00002" not in name)
    with raises_naming(InputError, "incomplete", "Hugging Face"):
        open_checkpoint("org/name")


def test_adapter_is_found_with_its_configuration(cache, tmp_path):
    snapshot = put(cache, adapter(tmp_path, {"x.lora_A.weight": normal(2, 4)}))
    assert locate_files("org/name").files == snapshot
    with pytest.raises(InputError, match="is an adapter"):
        open_checkpoint("org/name")


# Downloads, from a folder that plays the Hub.


class FakeHub:
    """Serves a folder as ``org/name``, and records requests."""

    def __init__(self, cache, folder, monkeypatch):
        self.cache, self.folder, self.requests = cache, folder, []
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub.HfApi, "model_info", lambda _, repo, revision: self.info(repo))
        monkeypatch.setattr(hub, "hf_hub_download", self.download)

    def info(self, repo):
        assert repo == "org/name"
        names = [
            str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file()
        ]
        return hub.ModelInfo(id=repo, sha=SHA, siblings=[{"rfilename": name} for name in names])

    def download(self, repo, name, revision):
        assert revision == SHA
        self.requests.append(name)
        snapshot = put(self.cache, self.folder, only=lambda other: other == name)
        return str(snapshot / name)


def test_only_configuration_index_and_its_shards_are_downloaded(cache, tmp_path, monkeypatch):
    folder = model(tmp_path / "m", 1, save_sharded)
    for name in (
        "pytorch_model.bin",
        "README.md",
        "model-00001-of-00001.gguf",
        "consolidated.safetensors",
    ):
        (folder / name).write_text("large")
    fake = FakeHub(cache, folder, monkeypatch)
    assert len(open_checkpoint("org/name")) == len(weights(1))
    shards = {f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
    assert set(fake.requests) == shards | {"config.json", "model.safetensors.index.json"}

    monkeypatch.setattr(hub.HfApi, "model_info", forbidden)
    assert len(open_checkpoint("org/name")) == len(weights(1))


def test_repository_without_weights(cache, tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "README.md").write_text("hello")
    FakeHub(cache, tmp_path / "m", monkeypatch)
    with raises_naming(InputError, "complete set", "weights"):
        open_checkpoint("org/name")


@pytest.mark.parametrize("shard", ["../../x", "*", "a/b", 3])
def test_index_on_hub_may_only_name_plain_files(cache, tmp_path, monkeypatch, shard):
    folder = model(tmp_path / "m", 1)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    fake = FakeHub(cache, folder, monkeypatch)
    with pytest.raises(InputError, match=r"plain file name|must map|is missing"):
        open_checkpoint("org/name")
    assert set(fake.requests) == {"config.json", "model.safetensors.index.json"}


def test_hub_failures_give_one_message(cache, monkeypatch):
    from huggingface_hub import errors

    def failing(kind, words):
        def model_info(*_, **__):
            error = kind.__new__(kind)
            Exception.__init__(error, words)
            raise error

        return model_info

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for kind, words, expected in (
        (errors.GatedRepoError, "403", "gated"),
        (errors.RepositoryNotFoundError, "404", "no such model"),
        (errors.RevisionNotFoundError, "404", "no revision v9"),
        (ConnectionError, "name resolution\nfailed", r"cannot be reached \(name resolution\)"),
        (OSError, "https://host/x?sig=secret failed", r"cannot be reached \(https://host/x\)"),
        (TimeoutError, "", r"cannot be reached \(TimeoutError\)"),
    ):
        monkeypatch.setattr(hub.HfApi, "model_info", failing(kind, words))
        with pytest.raises(InputError, match=expected) as caught:
            open_checkpoint("org/name@v9")
        assert "no such file or folder" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_huggingface_hub_names_extra(cache, monkeypatch):
    original = builtins.__import__

    def refusing(name, *words, **options):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return original(name, *words, **options)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(InputError, match=r"\.\[hub\]"):
        open_checkpoint("org/name")


def test_invalid_file_names_are_refused(cache):
    for words in ("a" * 5000, "a\0b"):
        with pytest.raises(InputError, match="no such file"):
            open_checkpoint(words)
