"""A pipe, device or folder in the place of a file ends with one message, and never waits."""

import os
import shutil
from pathlib import Path

import pytest

from lora_diag.errors import InputError
from lora_diag.files import open_regular
from lora_diag.storage.file_bytes import FileBytes
from tests.conftest import ROOT, time_limit
from tests.messages import raises_naming

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")

SAMPLES = ROOT / "sample_checkpoints"

# A command that refuses an input takes less than one second.
SECONDS = 30

# Inputs whose weights are found in a folder, and what stands in their place.
PLACES = [
    *(
        "model.safetensors",
        "other.safetensors",
        "model.gguf",
        "pytorch_model.bin",
        "adapter_model.safetensors",
    ),
    *(
        "adapter.gguf",
        "model.safetensors.index.json",
        "config.json",
        ".metadata",
        "x_optim_states.pt",
    ),
    *(
        "model_world_size_1_rank_0.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "model-00001-of-00002.gguf",
    ),
    *("grad_step000001.safetensors", "__0_0.distcp", "shard-00001-of-00002.safetensors", "latest"),
    *("pytorch_model/mp_rank_00_model_states.pt", "adapter_config.json", "adapters.safetensors"),
]


def place(path: Path, what: str) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["pipe", "device", "folder"])
@pytest.mark.parametrize("name", PLACES)
def test_no_command_waits_for_what_is_no_file(
    loradiag, tmp_path: Path, name: str, what: str
) -> None:
    place(tmp_path / "in" / name, what)
    for words in (["inspect", "in"], ["spectrum", SAMPLES / "base", "in"], ["inspect", f"in/{name}"],
                  ["spectrum", "--gradients", "in"]):  # fmt: skip
        ran = loradiag(*words, patience=SECONDS)
        assert ran.code == 3, ran.out + ran.err
        assert ran.err.count("\n") == 1
        assert "in" in ran.err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_pipe_in_adapter_does_not_wait(loradiag, tmp_path: Path, name: str) -> None:
    shutil.copytree(SAMPLES / "lora_r4", tmp_path / "a")
    (tmp_path / "a" / name).unlink()
    os.mkfifo(tmp_path / "a" / name)
    assert loradiag("fleet", "a", SAMPLES / "lora_r16", patience=SECONDS).code == 3
    assert loradiag("spectrum", SAMPLES / "base", "a", patience=SECONDS).code == 3


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to(os.devnull)
    for name in ("pipe", "null", "."):
        with time_limit(SECONDS), raises_naming(InputError, "not a regular file"):
            open_regular(tmp_path / name)
        with time_limit(SECONDS), raises_naming(InputError, "not a regular file"):
            FileBytes(tmp_path / name).fill(memoryview(bytearray(1)), 0, "w")
    (tmp_path / "file").write_bytes(b"abc")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"abc"
