"""Packed checkpoints made from random codes, and the weights they stand for: float64 loops, from
the formulas.
"""

import numpy as np
import torch

from tests.storage.quantizing import float8_value

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP4 += [-value for value in FP4]
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes, bits):
    """Return rows of codes as rows of 32-bit words: one stream of bits each, the lowest first."""
    rows = []
    for row in codes:
        number = 0
        for at, code in enumerate(row):
            number |= int(code) << (at * bits)
        count = -(-len(row) * bits // 32)
        rows.append([number >> (32 * at) & 0xFFFFFFFF for at in range(count)])
    return np.array(rows, dtype=np.uint64).astype(np.uint32).view(np.int32)


def pairs(codes):
    """Return rows of 4-bit codes as bytes, the first code in the low half."""
    return torch.from_numpy(codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)


def compressed(module, shape, bits=4, groups=2, zeros=False, ordered=False, seed=0):
    """compressed-tensors, pack-quantized: return the stored tensors, the weight and its steps."""
    rng = np.random.default_rng(seed)
    out, columns = shape
    codes, z = rng.integers(0, 2**bits, shape), rng.integers(0, 2**bits, (out, groups))
    scale = torch.tensor(rng.uniform(0.01, 0.1, (out, groups))).bfloat16()
    group = (
        rng.integers(0, groups, columns)
        if ordered
        else [j * groups // columns for j in range(columns)]
    )
    s = scale.double().numpy()
    tensors = {
        f"{module}.weight_packed": torch.from_numpy(words(codes, bits)),
        f"{module}.weight_scale": scale,
        f"{module}.weight_shape": torch.tensor(shape),
    }
    if zeros:
        tensors[f"{module}.weight_zero_point"] = torch.from_numpy(words(z.T, bits).T.copy())
    if ordered:
        tensors[f"{module}.weight_g_idx"] = torch.tensor(group, dtype=torch.int32)
    return tensors, *transposed(
        codes, z.T if zeros else np.full(z.T.shape, 2 ** (bits - 1)), s.T, group
    )


def float4(module, shape, kind="nvfp4", seed=0):
    """NVFP4 of compressed-tensors or ModelOpt, or MXFP4 of compressed-tensors."""
    rng = np.random.default_rng(seed)
    group = 32 if kind == "mxfp4" else 16
    codes = rng.integers(0, 16, shape)
    grid = (*shape[:-1], shape[-1] // group)
    exponents = rng.integers(100, 130, grid)
    eight = rng.integers(1, 0x7E, grid)
    name = "weight" if kind == "modelopt" else "weight_packed"
    tensors = {f"{module}.{name}": pairs(codes.reshape(-1, shape[-1])).view(*shape[:-1], -1)}
    if kind == "mxfp4":
        tensors[f"{module}.weight_scale"] = torch.tensor(exponents).to(torch.uint8)
    else:
        tensors[f"{module}.weight_scale"] = (
            torch.tensor(eight).to(torch.uint8).view(torch.float8_e4m3fn)
        )
        key = "weight_scale_2" if kind == "modelopt" else "weight_global_scale"
        tensors[f"{module}.{key}"] = torch.tensor(0.25 if kind == "modelopt" else 800.0)
    weight, steps = np.empty(shape), np.empty(shape)
    for at in np.ndindex(*shape):
        place = (*at[:-1], at[-1] // group)
        if kind == "mxfp4":
            scale = 2.0 ** (int(exponents[place]) - 127)
        else:
            scale = float8_value(int(eight[place]), "float8_e4m3fn") * (
                0.25 if kind == "modelopt" else 1 / 800
            )
        weight[at] = FP4[codes[at]] * scale
        steps[at] = fp4_step(FP4[codes[at]], 4 if kind == "mxfp4" else 2) * scale
    return tensors, weight, steps


def fp4_step(value, last=4):
    """Return the distance from a 4-bit float to its farther neighbour; ``last`` at the end, where
    it may saturate.
    """
    if abs(value) == 6:
        return last
    below = [abs(value) - other for other in FP4[:8] if other < abs(value)]
    above = [other - abs(value) for other in FP4[:8] if other > abs(value)]
    return max(min(below, default=0), min(above, default=0))


def gptq(module, shape, bits=4, groups=2, ordered=True, v2=False, seed=0):
    """GPTQ; zero points of 0 do not occur in v1."""
    rng = np.random.default_rng(seed)
    out, columns = shape
    codes = rng.integers(0, 2**bits, shape)
    z = rng.integers(0 if v2 else 1, 2**bits, (groups, out))
    scale = torch.tensor(rng.uniform(0.01, 0.1, (groups, out))).half()
    group = (
        rng.integers(0, groups, columns)
        if ordered
        else [j * groups // columns for j in range(columns)]
    )
    tensors = {
        f"{module}.qweight": torch.from_numpy(words(codes, bits).T.copy()),
        f"{module}.qzeros": torch.from_numpy(words(z if v2 else z - 1, bits)),
        f"{module}.scales": scale,
    }
    if ordered:
        tensors[f"{module}.g_idx"] = torch.tensor(group, dtype=torch.int32)
    return tensors, *transposed(codes, z, scale.double().numpy(), group)


def awq(module, shape, groups=2, seed=0):
    """AWQ, version gemm."""
    rng = np.random.default_rng(seed)
    out, columns = shape
    codes, z = rng.integers(0, 16, shape), rng.integers(0, 16, (groups, out))
    scale = torch.tensor(rng.uniform(0.01, 0.1, (groups, out))).half()
    group = [j * groups // columns for j in range(columns)]

    def packed(rows):
        ordered = [[row[8 * w + at] for w in range(out // 8) for at in ORDER] for row in rows]
        return torch.from_numpy(words(ordered, 4))

    tensors = {
        f"{module}.qweight": packed(codes.T),
        f"{module}.qzeros": packed(z),
        f"{module}.scales": scale,
    }
    return tensors, *transposed(codes, z, scale.double().numpy(), group)


def transposed(codes, z, s, group):
    """Return the weight and its steps from codes ``(out, in)`` and zeros and scales
    ``(groups, out)``.
    """
    weight, steps = np.empty(codes.shape), np.empty(codes.shape)
    for i, j in np.ndindex(*codes.shape):
        weight[i, j] = (int(codes[i, j]) - int(z[group[j], i])) * s[group[j], i]
        steps[i, j] = s[group[j], i]
    return weight, steps


def mlx(module, shape, bits=4, group=32, seed=0):
    """MLX, mode affine; a stack of experts where the shape has three dimensions."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, shape)
    grid = (*shape[:-1], shape[-1] // group)
    scale, bias = (torch.tensor(rng.uniform(-0.1, 0.1, grid)).bfloat16() for _ in range(2))
    packed = words(codes.reshape(-1, shape[-1]), bits).reshape(*shape[:-1], -1)
    tensors = {
        f"{module}.weight": torch.from_numpy(packed).view(torch.uint32),
        f"{module}.scales": scale,
        f"{module}.biases": bias,
    }
    weight, steps = np.empty(shape), np.empty(shape)
    s, b = scale.double().numpy(), bias.double().numpy()
    for at in np.ndindex(*shape):
        place = (*at[:-1], at[-1] // group)
        weight[at] = codes[at] * s[place] + b[place]
        ends = codes[at] in (0, 2**bits - 1)
        steps[at] = (
            abs(s[place]) * (1 + ends) + (abs(s[place] * codes[at]) + abs(b[place])) / 2**7
        )  # of bfloat16
    return tensors, weight, steps


def experts(name, shape, seed=0):
    """MXFP4 of gpt-oss: ``shape`` is the presented (E, in, out)."""
    rng = np.random.default_rng(seed)
    count, columns, out = shape
    codes = rng.integers(0, 16, (count, out, columns))
    exponents = rng.integers(100, 130, (count, out, columns // 32))
    blocks = pairs(codes.reshape(-1, columns)).view(count, out, columns // 32, 16)
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": torch.tensor(exponents).to(torch.uint8)}
    weight, steps = np.empty(shape), np.empty(shape)
    for e, i, o in np.ndindex(*shape):
        scale = 2.0 ** (int(exponents[e, o, i // 32]) - 127)
        weight[e, i, o] = FP4[codes[e, o, i]] * scale
        steps[e, i, o] = fp4_step(FP4[codes[e, o, i]]) * scale
    return tensors, weight, steps
