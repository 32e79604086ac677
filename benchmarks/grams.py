"""What no exact measurement of a bf16 adapter can do without, in NumPy alone: read, decode, and
form BᵀB and AAᵀ.

Run as ``python benchmarks/grams.py ADAPTER...``; every adapter is a folder of PEFT's.
"""

import json
import os
import sys

import numpy as np

# Rows of a product; 4096 and 11008 are multiples of one of them, and OpenBLAS multiplies such
# blocks without copies.
BLOCKS = (512, 344)

# The largest factor has 11008 × 16 entries.
MOST = 11008 * 16


def grams(adapter: str) -> None:
    """Form the float64 Gram matrix of every factor of one adapter, in memory that is used again."""
    file = os.open(os.path.join(adapter, "adapter_model.safetensors"), os.O_RDONLY)  # noqa: PTH118
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    header = json.loads(os.pread(file, length, 8))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        assert entry["dtype"] == "BF16"
        rows, columns = entry["shape"]
        begin, end = entry["data_offsets"]
        size = rows * columns
        os.preadv(file, [STORED[: end - begin].data], 8 + length + begin)
        np.left_shift(STORED[: end - begin].view("<u2"), 16, out=BITS[:size], dtype=np.uint32)
        factor = BITS[:size].view(np.float32).reshape(rows, columns)
        if rows < columns:
            turned = TURNED[:size].reshape(columns, rows)
            np.copyto(turned, factor.T)
            factor = turned
        block = next((each for each in BLOCKS if len(factor) % each == 0), len(factor))
        wide = WIDE[:size].reshape(-1, block, factor.shape[1])
        np.copyto(wide, factor.reshape(wide.shape))
        half, transposed = factor.shape[1] // 2, wide.transpose(0, 2, 1)
        np.matmul(transposed[:, :half], wide).sum(axis=0)
        np.matmul(transposed[:, half:], wide).sum(axis=0)
    os.close(file)


STORED, BITS = np.empty(2 * MOST, np.uint8), np.empty(MOST, np.uint32)
TURNED, WIDE = np.empty(MOST, np.float32), np.empty(MOST)

if __name__ == "__main__":
    for path in sys.argv[1:]:
        grams(path)
