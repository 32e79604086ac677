"""Sharded training states, written with torch's own classes: DCP folders and one file per rank."""

import io
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import metadata as stored
from torch.distributed.checkpoint.filesystem import _StorageInfo


class Canary:
    """Code that a pickle would run: it makes a file."""

    def __init__(self, at):
        self.at = at

    def __reduce__(self):
        return Path.touch, (self.at,)


def assert_same(checkpoint, tensors):
    """Assert that a checkpoint holds just these tensors, in any range."""
    assert set(checkpoint) == set(tensors)
    rng = np.random.default_rng(0)
    for name, expected in tensors.items():
        assert (checkpoint[name].shape, getattr(torch, checkpoint[name].dtype)) == (
            expected.shape,
            expected.dtype,
        )
        flat = expected.reshape(-1)
        ends = np.sort(rng.integers(0, flat.numel() + 1, 14))
        for start, stop in [(0, flat.numel()), (0, 0), *pairwise(map(int, ends))]:
            assert torch.equal(checkpoint.read(name, start, stop), flat[start:stop])
        assert checkpoint.read_bytes(name) == flat.view(torch.uint8).numpy().tobytes()


def save_dcp(folder, tensors, cuts, planned=None, extra=()):
    """Write a DCP folder of several files.

    Args:
        folder: The folder.
        tensors: By key.
        cuts: Key -> for each dimension, the sizes of the pieces; every box becomes a part.
        planned: Key -> path, as planners write it.
        extra: Keys of entries that are no tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [io.BytesIO() for _ in range(2)]
    described, places, number = {}, {}, 0
    for key, value in tensors.items():
        boxes = [((), ())]
        for sizes in cuts.get(key, [[size] for size in value.shape]):
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            boxes = [
                ((*o, at), (*n, size))
                for o, n in boxes
                for at, size in zip(starts, sizes, strict=True)
            ]
        chunks = []
        for offsets, sizes in boxes:
            part = (
                value[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
                .contiguous()
                .clone()
            )
            file = number % 2
            begin = files[file].tell()
            torch.save(part, files[file])
            place = _StorageInfo(f"__{file}_0.distcp", begin, files[file].tell() - begin)
            places[stored.MetadataIndex(key, torch.Size(offsets), len(chunks))] = place
            chunks.append(stored.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            number += 1
        properties = stored.TensorProperties(dtype=value.dtype)
        described[key] = stored.TensorStorageMetadata(properties, value.shape, chunks)
    described |= {key: stored.BytesStorageMetadata() for key in extra}
    for number, file in enumerate(files):
        (folder / f"__{number}_0.distcp").write_bytes(file.getvalue())
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(stored.Metadata(described, planned, places), file)
    return folder


def save_ranks(folder, make, shape=(2,), names=("fsdp",)):
    """Write one file per rank of a mesh.

    Args:
        folder: The folder.
        make: Given rank and mesh, returns the state dict of that rank; called with a process group
            that moves no data.
        shape: Shape of the mesh.
        names: Names of its dimensions.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    folder.mkdir(parents=True, exist_ok=True)
    world = torch.Size(shape).numel()
    for rank in range(world):
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        try:
            state = make(rank, init_device_mesh("cpu", shape, mesh_dim_names=names))
            torch.save(state, folder / f"model_world_size_{world}_rank_{rank}.pt")
        finally:
            dist.destroy_process_group()
    return folder
