"""Small files that ask for much memory or time: pickles that repeat values, shapes without data,
deep settings.
"""

import json
import random
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lora_diag.__main__

# What a command may take beyond what its process takes when it starts.
PEAK, SPACE, SECONDS = 200 << 20, 2 << 30, 30
COUNT = 30_000


def limit(job: dict[str, Any]) -> None:
    """Limit this process before it becomes a command, and note at its end by how much it grew."""
    page = resource.getpagesize()
    size, resident = (
        int(pages) * page for pages in Path("/proc/self/statm").read_text().split()[:2]
    )
    resource.setrlimit(resource.RLIMIT_AS, (size + SPACE, size + SPACE))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    main = lora_diag.__main__.main

    def measured() -> None:
        try:
            main()
        finally:
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
            Path(job["faults"]["peak"]).write_text(str(peak))

    lora_diag.__main__.main = measured


# --- an assembler
# ----------------------------------------------------------------------------------------------------


class Code(bytes):
    """Instructions that leave one value on the stack."""


def name(module: str, of: str) -> Code:
    return Code(f"c{module}\n{of}\n".encode())


def get(index: int) -> Code:
    return Code(b"h" + bytes([index]))


def put(value: Any, index: int) -> Code:
    return Code(code(value) + b"q" + bytes([index]))


def made(kind: Code, **state: Any) -> Code:
    """Return an object with attributes."""
    return Code(kind + b")\x81" + code(state) + b"b")


def call(function: Code, *args: Any) -> Code:
    return Code(function + code(args) + b"R")


def repeated(fragment: Any, count: int = COUNT) -> Code:
    """Return a list of values."""
    return Code(b"](" + code(fragment) * count + b"e")


def code(value: Any) -> bytes:
    """Return the instructions that push a value."""
    match value:
        case Code():
            return value
        case None:
            return b"N"
        case int():
            return b"J" + struct.pack("<i", value) if abs(value) < 2**31 else b"L%dL\n" % value
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(code, value)) + b"t"
        case list():
            return b"](" + b"".join(map(code, value)) + b"e"
    return b"}(" + b"".join(code(key) + code(item) for key, item in value.items()) + b"u"


def nested(levels: int, width: int = 10, kind: str = "list") -> Code:
    """Return a list, or tuple, of lists that are one list: width ** levels leaves.

    It takes the memo's place 9.
    """
    start, end = (b"](", b"e") if kind == "list" else (b"(", b"t")
    inner = b"".join(b"0" + start + get(9) * width + end + b"q\t" for _ in range(levels))
    return Code(put("aaaaa", 9) + inner)


def deep(levels: int) -> Code:
    return Code(b")" + b"\x85" * levels)


BIG = put(Code(b"](" + b"N" * 200_000 + b"e"), 0)
WIDE = put(Code(b"(" + b"N" * 200_000 + b"t"), 0)


def forget(value: Code, then: Code) -> Code:
    """Return ``then``, for which ``value`` has filled the memo."""
    return Code(value + b"0" + then)


def calls(module: str, of: str, argument: Code, count: int = COUNT, how: bytes = b"\x85R") -> Code:
    """Return a list of calls of one function with one argument, which is in the memo's place 0."""
    return forget(
        argument, forget(put(name(module, of), 1), repeated(Code(get(1) + get(0) + how), count))
    )


def keyed(key: Code, count: int = COUNT) -> Code:
    """Return a dictionary in which one key, in the memo's place 0, is set again and again."""
    return forget(key, Code(b"}" + (get(0) + b"Ns") * count))


PICKLES: dict[str, Code] = {
    "calls with a list": calls("a", "B", BIG, how=b"R"),
    "sets": calls("builtins", "set", BIG),
    "sizes": calls("torch", "Size", BIG),
    "texts": calls("_codecs", "encode", put("a" * 100_000, 0)),
    "keywords": forget(
        WIDE, forget(put(name("a", "B"), 1), repeated(Code(get(1) + get(0) + b"}NNs\x92")))
    ),
    "dictionaries": calls("collections", "OrderedDict", put([(i, 0) for i in range(10_000)], 0)),
    "a long key": keyed(WIDE),
    "a key of shared tuples": Code(b"}" + nested(60, 2, "tuple") + b"Ns"),
    "a deep key": Code(b"}" + deep(300_000) + b"Ns"),
    "keys of one hash": Code(
        b"}(" + b"".join(code(i * (2**61 - 1)) + b"N" for i in range(30_000)) + b"u"
    ),
    "a large memo": Code(b"Nr\xff\xff\xff\x7f"),
    "bytes by number": call(name("builtins", "bytearray"), 20_000_000_000),
    "deep lists": Code(b"]" * 100_000 + b"a" * 99_999),
    "nested lists": nested(9),
    "a long integer": Code(b"I" + b"9" * 1_000_000 + b"\n"),
}


def pickled(value: Any, protocol: bytes = b"\x80\x02") -> bytes:
    return protocol + code(value) + b"."


# --- files
# -----------------------------------------------------------------------------------------------------------


def index(folder: Path, root: Any) -> Path:
    """Write the index of a distributed checkpoint."""
    folder.mkdir(exist_ok=True)
    (folder / "__0_0.distcp").write_bytes(b"x" * 64)
    (folder / ".metadata").write_bytes(pickled(root))
    return folder


def archive(path: Path, root: Any) -> Path:
    """Write a torch file with 64 bytes of data."""
    with zipfile.ZipFile(path, "w") as file:
        for part, content in (
            ("data.pkl", pickled(root)),
            ("byteorder", b"little"),
            ("data/0", bytes(64)),
        ):
            file.writestr(f"a/{part}", content)
        file.writestr("a/version", "3\n")
    return path


def ranks(folder: Path, root: Any) -> Path:
    """Write the file of the only rank."""
    folder.mkdir(exist_ok=True)
    archive(folder / "model_world_size_1_rank_0.pt", root)
    return folder


def zero(folder: Path, model: Any, **state: Any) -> Path:
    """Write the files of DeepSpeed's only rank."""
    step = folder / "global_step1"
    step.mkdir(parents=True, exist_ok=True)
    state = {
        "zero_stage": 2,
        "partition_count": [1],
        "single_partition_of_fp32_groups": [TENSOR],
    } | state
    archive(step / "zero_pp_rank_0_mp_rank_00_optim_states.pt", {"optimizer_state_dict": state})
    archive(step / "mp_rank_00_model_states.pt", model)
    return folder


STORAGE = Code(code(("storage", name("torch", "FloatStorage"), "0", "cpu", 16)) + b"Q")
REBUILD = name("torch._utils", "_rebuild_tensor_v2")


def tensor(shape: Any = (16,), strides: Any = (1,), storage: Code = STORAGE) -> Code:
    return call(REBUILD, storage, 0, shape, strides, 0, {})


TENSOR = tensor()
CHUNK = made(name("x", "ChunkStorageMetadata"), offsets=(0,), sizes=(2,))
PROPERTIES = made(name("x", "TensorProperties"), dtype=name("torch", "float32"))
SHARD = made(
    name("x", "Shard"), metadata=made(name("x", "ShardMetadata"), shard_offsets=[0]), tensor=TENSOR
)


def dcp(
    relative: Any = "__0_0.distcp",
    offsets: Any = (0,),
    size: Any = (2,),
    path: Any = ("w",),
    key: Any = "w",
) -> Code:
    """Return an index of one tensor."""
    described = made(
        name("x", "TensorStorageMetadata"), properties=PROPERTIES, size=size, chunks=[CHUNK]
    )
    place = made(name("x", "StorageInfo"), relative_path=relative, offset=0, length=64)
    where = made(name("x", "MetadataIndex"), fqn="w", offset=offsets)
    entries = {"state_dict_metadata": (code(key), described), "storage_data": (where, place)}
    written = {field: Code(b"}" + one + other + b"s") for field, (one, other) in entries.items()}
    return made(name("x", "Metadata"), **written, planner_data={"w": path})


def shared_parts(count: int = 3_000) -> Code:
    """Return an index whose tensors have one list of parts."""
    place = made(name("x", "StorageInfo"), relative_path="__0_0.distcp", offset=0, length=64)
    parts = forget(put(CHUNK, 0), forget(put(place, 1), put(repeated(get(0)), 2)))
    kind = made(name("x", "TensorStorageMetadata"), properties=PROPERTIES, size=(2,), chunks=get(2))
    names = [f"w{i}" for i in range(count)]
    where = b"".join(
        made(name("x", "MetadataIndex"), fqn=each, offset=(0,)) + get(1) for each in names
    )
    described = forget(parts, forget(put(kind, 3), Code(code({each: get(3) for each in names}))))
    places = Code(b"}(" + where + b"u")
    return made(
        name("x", "Metadata"), state_dict_metadata=described, storage_data=places, planner_data=None
    )


def distributed(kind: str, state: Any) -> Code:
    """Return a tensor of a subclass."""
    rebuild = name("torch._tensor", "_rebuild_from_type_v2")
    return call(rebuild, name("a", "f"), name("x", kind), (), state)


def sharded(size: Any = (16,), shards: Any = None) -> Code:
    meta = made(name("x", "ShardedTensorMetadata"), size=size)
    return distributed("ShardedTensor", (shards if shards is not None else [SHARD], meta))


def placed(placements: Any) -> Code:
    meta, mesh = (
        made(name("x", "TensorMeta"), shape=(16,)),
        made(name("x", "DeviceMesh"), _coordinate_on_dim=[0]),
    )
    spec = made(name("x", "DTensorSpec"), tensor_meta=meta, placements=placements, mesh=mesh)
    return distributed("DTensor", {"_local_tensor": TENSOR, "_spec": spec})


def shared_values(value: Code, count: int = 10_000) -> Code:
    """Return a state dict of one value under many names."""
    return forget(put(value, 5), Code(code({f"w{i}": get(5) for i in range(count)})))


GROUP = put({f"w{i}": (0,) for i in range(3_000)}, 0)


def expanded(path: Path) -> Path:
    torch.save({"w": torch.ones(1, 32_768).expand(32_768, 32_768)}, path)
    return path


def legacy(path: Path, root: Any) -> Path:
    """Write the format of torch before 1.6."""
    magic = pickled(0x1950A86A20F9469CFC6C)
    path.write_bytes(magic + pickled(1001) + pickled({}) + pickled(root) + pickled([]))
    return path


def costly(rng: random.Random) -> Code:
    """Return a value whose parts are repeated by random instructions."""
    starts: list[Any] = [[0] * 50_000, (0,) * 50_000, "a" * 50_000, ("a", 0), [[0, 1]], {"a": 1}]
    value = put(rng.choice(starts), 0)
    for _ in range(rng.randint(1, 3)):
        function = put(name(*rng.choice(CALLED)), 1)
        match rng.randrange(6):
            case 0:
                again = repeated(get(0), rng.choice([2, 10, 20_000]))
            case 1:
                how = rng.choice([b"R", b"\x85R", b"\x81", b"\x85\x81", b"}\x92", b")\x81", b"b"])
                again = forget(function, repeated(Code(get(1) + get(0) + how), 20_000))
            case 2:
                again = Code(b"}" + (get(0) + get(0) + b"s") * 20_000)
            case 3:
                again = nested(
                    rng.choice([3, 9, 60]), rng.choice([2, 10]), rng.choice(["list", "tuple"])
                )
            case 4:
                again = Code(
                    b"("
                    + get(0) * rng.choice([2, 20_000])
                    + rng.choice([b"t", b"l", b"d", b"\x91"])
                )
            case _:
                again = made(rng.choice([get(0), Code(function)]), a=get(0))
        value = put(forget(value, again), 0)
    return value


CALLED = [
    *(
        ("a", "B"),
        ("builtins", "set"),
        ("builtins", "bytearray"),
        ("collections", "OrderedDict"),
        ("torch", "Size"),
    ),
    *(
        ("_codecs", "encode"),
        ("torch", "Tensor"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("collections", "Counter"),
    ),
]


def costly_toml(rng: random.Random) -> bytes:
    """Return a line of a policy with a deep key or value."""
    part = rng.choice(["a", '"a"', "'a'", "a-b", '"."'])
    count = rng.choice([3, 15, 17, 3_000, 30_000])
    key = rng.choice([".", " . "]).join([part] * count)
    line = rng.choice(
        ["{0} = 1", "[{0}]", "[[{0}]]", "x = {{{0} = 1}}", "x = [{1}", "x = {2}", "x = '{0}'"]
    )
    return f"{line}\n".format(key, "[" * count, "{a = " * count).encode()


SHAPES = {"param_shapes": [{"w": (16,)}]}
Write = Callable[[Path], Path]
FILES: dict[str, Write] = {
    **{f"index: {kind}": lambda at, root=root: index(at / "m", root) for kind, root in PICKLES.items()},
    **{f"torch: {kind}": lambda at, root=root: archive(at / "m.bin", {"w": root}) for kind, root in PICKLES.items()},
    "rank: calls with a list": lambda at: ranks(at / "m", PICKLES["calls with a list"]),
    "index: nested file": lambda at: index(at / "m", dcp(relative=nested(9))),
    "index: nested path": lambda at: index(at / "m", dcp(path=nested(60, 2, "tuple"))),
    "index: shared offset": lambda at: index(at / "m", dcp(offsets=nested(60, 2, "tuple"))),
    "index: deep offset": lambda at: index(at / "m", dcp(offsets=deep(300_000))),
    "index: nested shape": lambda at: index(at / "m", dcp(size=nested(9))),
    "index: nested key": lambda at: index(at / "m", dcp(key=made(name("a", "B"), x=nested(9)))),
    "index: shared parts": lambda at: index(at / "m", shared_parts()),
    "rank: shared shape": lambda at: ranks(at / "m", {"w": sharded(size=nested(60, 2, "tuple"))}),
    "rank: deep shape": lambda at: ranks(at / "m", {"w": sharded(size=deep(300_000))}),
    "rank: shared shards": lambda at: ranks(
        at / "m", shared_values(forget(put(SHARD, 0), sharded(shards=repeated(get(0)))))),
    "rank: placements": lambda at: ranks(
        at / "m",
        shared_values(forget(put(made(name("x", "Replicate")), 0), placed(Code(b"(" + get(0) * COUNT + b"t"))))),
    "rank: nested storage": lambda at: ranks(
        at / "m",
        {"w": tensor(storage=Code(code(("storage", name("torch", "FloatStorage"), nested(9), "cpu", 16)) + b"Q"))}),
    "zero: shared paddings": lambda at: zero(
        at / "m", SHAPES, param_alignment_paddings=forget(put(repeated(0), 0), repeated(get(0)))),
    "zero: shared groups": lambda at: zero(
        at / "m", {"param_shapes": forget(GROUP, repeated(get(0), 50_000))},
        single_partition_of_fp32_groups=forget(put(TENSOR, 0), repeated(get(0), 50_000))),
    "zero: nested alias": lambda at: zero(at / "m", SHAPES | {"shared_params": [[nested(9), "w"]]}),
    "torch: expanded": lambda at: expanded(at / "m.bin"),
    "torch: nested lists, legacy": lambda at: legacy(at / "m.bin", {"w": nested(9)}),
    "torch: bytes by number, legacy": lambda at: legacy(at / "m.bin", Code(b"\x8e" + (2**34).to_bytes(8, "little"))),
    "torch: sets, legacy": lambda at: legacy(at / "m.bin", {"w": PICKLES["sets"]}),
}  # fmt: skip


# --- policies
# --------------------------------------------------------------------------------------------------------

RULE = '[[rule]]\nname = "r{0}"\nrequire = "relative <= 0.3"\n'
POLICIES: dict[str, str] = {
    "a dotted key": ".".join(["a"] * 45_000) + " = 1\n",
    "quoted parts": ".".join(['"a"', "'a'"] * 10_000) + " = 1\n",
    "a deep table": "[" + ".".join(["a"] * 45_000) + "]\n",
    "a key after a string": 'x = ["""\n"""" , {' + ".".join(["a"] * 40_000) + ' = 1}, "x"]\n',
    "nested tables": "x = " + "{a = " * 15_000,
    "nested lists": "x = " + "[" * 90_000,
    "a long file": "x = 1\n" * 1_000_000,
    "many rules": "".join(RULE.format(number) for number in range(1_500)),
    "quotes": "x = " + '"\\' * 40_000 + "\n",
}


# --- configurations of trainers
# --------------------------------------------------------------------------------------

# The limit of YAML, below which a parser is asked at all.
YAML_BYTES = 100_000
LORA = "base_model: x\nadapter: lora\nlora_r: 8\nlora_alpha: 16\n"
NAMES = [f"m{number}" for number in range(60_000)]


def yaml_of(text: str, size: int = YAML_BYTES) -> Write:
    return lambda at: write(at / "c.yaml", text[:size])


def peft_of(**values: Any) -> Write:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], **values}
    return lambda at: write(at / "c.json", json.dumps(config))


def arguments_of(**state: Any) -> Write:
    """Write an adapter's folder with a Trainer's arguments."""

    def make(folder: Path) -> Path:
        write(
            folder / "adapter_config.json",
            json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8}),
        )
        archive(
            folder / "training_args.bin",
            made(name("transformers.training_args", "TrainingArguments"), **state),
        )
        return folder

    return make


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


CONFIGURATIONS: dict[str, Write] = {
    "brackets": yaml_of("[" * 990_000, 990_000),
    "brackets below the limit": yaml_of("[" * YAML_BYTES),
    "braces": yaml_of("{a: " * YAML_BYTES),
    "dashes": yaml_of("- " * 400_000, 800_000),
    "dashes below the limit": yaml_of("- " * YAML_BYTES),
    "keys": yaml_of("".join(f"k{number}: {number}\n" for number in range(70_000)), 990_000),
    "keys below the limit": yaml_of("".join(f"k{number}: {number}\n" for number in range(6_000))),
    "base 60": yaml_of(f"{LORA}learning_rate: 1{':1' * 450_000}\n", 990_000),
    "base 60 below the limit": yaml_of(f"{LORA}learning_rate: 1{':1' * 49_000}\n"),
    "hexadecimal": yaml_of(f"{LORA}learning_rate: 0x{'f' * 99_000}\n"),
    "a merged table": yaml_of(
        f"{LORA}m: &m {{{': 1, '.join(NAMES[:8_000])}: 1}}\nn: {{<<: [*m, *m, *m, *m, *m]}}\n"
    ),
    "targets": yaml_of(f"{LORA}lora_target_modules: [{', '.join(NAMES)}]\n", 990_000),
    "targets in JSON": peft_of(target_modules=NAMES, modules_to_save=NAMES),
    "one long target": peft_of(target_modules=["a" * 900_000]),
    "ranks": peft_of(rank_pattern=dict.fromkeys(NAMES, 8)),
    **{
        f"arguments: {key}": arguments_of(**{key: nested(9)})
        for key in ("learning_rate", "optim", "dtype")
    },
    "arguments: torch_dtype": arguments_of(torch_dtype=nested(9)),
    "arguments: integer": arguments_of(
        learning_rate=Code(b"\x8b" + struct.pack("<i", 900_000) + b"\x7f" * 900_000)
    ),
}
