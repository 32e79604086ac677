"""Quantized checkpoints made from random codes, and the weights they stand for: float64 loops, from
the formulas.
"""

import json
from itertools import pairwise

import numpy as np
import torch

NF4 = [
    *(
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
    ),
    *(
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
    ),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
FP4 = [0, 0.0052083333, 0.66666667, 1, 0.33333333, 0.5, 0.16666667, 0.25]
FP4 += [-value for value in FP4]
TABLES = {"nf4": NF4, "fp4": FP4}

# name -> bits of exponent and mantissa, bias, codes that are not numbers.
FLOAT8 = {
    "float8_e4m3fn": (4, 3, 7, {0x7F, 0xFF}),
    "float8_e5m2": (5, 2, 15, {code for code in range(256) if code & 0x7C == 0x7C}),
}


def four_bit(name, shape, kind="nf4", block=64, nested=None, seed=0):
    """Return the stored tensors of a 4-bit weight, and the weight (float64)."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    codes = rng.integers(0, 16, count)
    table = np.float32(TABLES[kind])
    state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
    blocks = -(-count // block)
    tensors = {}
    if nested is None:
        absmax = rng.uniform(0.01, 0.1, blocks).astype(np.float32)
        tensors[f"{name}.absmax"] = torch.from_numpy(absmax.copy())
    else:
        nested_codes = rng.integers(0, 256, blocks).astype(np.uint8)
        nested_table = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        nested_absmax = rng.uniform(0.01, 0.02, -(-blocks // nested)).astype(np.float32)
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.05}
        absmax = [
            float(nested_table[code]) * float(nested_absmax[b // nested]) + 0.05
            for b, code in enumerate(nested_codes)
        ]
        tensors[f"{name}.absmax"] = torch.from_numpy(nested_codes)
        tensors[f"{name}.nested_absmax"] = torch.from_numpy(nested_absmax)
        tensors[f"{name}.nested_quant_map"] = torch.from_numpy(nested_table)
    weight = np.array(
        [float(table[code]) * float(absmax[k // block]) for k, code in enumerate(codes)]
    )
    padded = [*codes.tolist(), 0] if count % 2 else codes.tolist()
    packed = [padded[k] * 16 + padded[k + 1] for k in range(0, len(padded), 2)]
    tensors[name] = torch.tensor(packed, dtype=torch.uint8).view(-1, 1)
    tensors[f"{name}.quant_map"] = torch.from_numpy(table.copy())
    tensors[f"{name}.quant_state.bitsandbytes__{kind}"] = as_bytes(state)
    return tensors, weight.reshape(shape)


def as_bytes(state) -> torch.Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def eight_bit(module, shape, seed=0):
    """Return the stored tensors of an LLM.int8 weight, and the weight (float64)."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, shape)
    scb = rng.uniform(0.01, 0.1, shape[0]).astype(np.float32)
    tensors = {
        f"{module}.weight": torch.from_numpy(codes.astype(np.int8)),
        f"{module}.SCB": torch.from_numpy(scb),
        f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, codes * scb.astype(np.float64)[:, None] / 127


def float8_value(code: int, kind: str) -> float:
    """Decode one 8-bit float by its definition."""
    exponent_bits, mantissa_bits, bias, _ = FLOAT8[kind]
    sign = -1.0 if code & 0x80 else 1.0
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    fraction = (code & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - bias)
    return sign * (1 + fraction) * 2.0 ** (exponent - bias)


def scaled(
    name,
    shape,
    grid,
    block,
    kind="float8_e4m3fn",
    suffix="_scale_inv",
    scale_dtype=torch.float32,
    seed=0,
):
    """Return the stored tensors of a weight with a scale per block, and the weight (float64).

    ``grid`` is the stored shape of the scales, ``block`` the size of the blocks over the last two
    dimensions.
    """
    rng = np.random.default_rng(seed)
    if kind == "int8":
        codes = rng.integers(-128, 128, shape).astype(np.int8)
        values, stored = codes.astype(np.float64), torch.from_numpy(codes)
    else:
        legal = [code for code in range(256) if code not in FLOAT8[kind][3]]
        codes = rng.choice(legal, shape).astype(np.uint8)
        values = np.array([float8_value(int(code), kind) for code in codes.reshape(-1)]).reshape(
            shape
        )
        stored = torch.from_numpy(codes).view(getattr(torch, kind))
    scale = (
        torch.tensor(2.0 ** rng.integers(-8, -2, grid) * rng.uniform(1, 2, grid))
        .float()
        .to(scale_dtype)
    )
    flat_scale = scale.float().double().numpy().reshape(-1)
    matrices, (rows, columns) = int(np.prod(shape[:-2])), shape[-2:]
    down, across = -(-rows // block[0]), -(-columns // block[1])
    weight = np.empty((matrices, rows, columns))
    for e in range(matrices):
        for i in range(rows):
            for j in range(columns):
                at = (e * down + i // block[0]) * across + j // block[1]
                weight[e, i, j] = (
                    values.reshape(weight.shape)[e, i, j] * flat_scale[at % len(flat_scale)]
                )
    return {name: stored, name + suffix: scale}, weight.reshape(shape)


def step_of(value: float, storable: list[float]) -> float:
    """Return the distance from a storable number to its farther neighbour."""
    ordered = sorted({float(number) for number in storable})
    around = [(low, high) for low, high in pairwise(ordered) if value in (low, high)]
    return max(high - low for low, high in around)


def without(part):
    """Return a change of stored tensors: one is missing."""
    return lambda tensors: tensors.pop(part)


def replaced(part, value):
    """Return a change of stored tensors: one is another."""
    return lambda tensors: tensors.update({part: value})
