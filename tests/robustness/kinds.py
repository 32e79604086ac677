"""What is damaged, and the command that is given it.

A kind takes a random generator, the folder of whole inputs and an empty folder, writes a damaged
input into the latter and returns the words of a command. Paths in them are relative to the empty
folder, except those of whole inputs.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.robustness import bombs, mutate

Kind = Callable[[random.Random, Path, Path], list[str]]


def _damage(path: Path, how: Callable[[bytes, random.Random], bytes], rng: random.Random) -> None:
    path.write_bytes(how(path.read_bytes(), rng))


def _read_as(rng: random.Random, whole: Path, path: str, base: str) -> list[str]:
    """Return a command that reads a checkpoint, or an adapter on ``base``."""
    on = str(whole / base)
    commands = [["inspect", path], ["plan", path], ["spectrum", on, path, "-q", "-o", "out.jsonl"]]
    commands += [
        ["spectrum", path, on, "-q", "--allow-unmatched"],
        ["intruders", on, path, "--json"],
    ]
    return rng.choice(commands)


def in_folder(*names: str, base: str = "", config: float = 0.0) -> Kind:
    """Return a kind: a checkpoint in one file or, with a probability, its configuration."""

    def damage(rng: random.Random, whole: Path, at: Path) -> list[str]:
        name = rng.choice(names)
        folder = shutil.copytree(whole / name, at / "m")
        if (folder / "config.json").exists() and rng.random() < config:
            _damage(folder / "config.json", mutate.damaged_json, rng)
        else:
            _damage(folder / "model.safetensors", mutate.damaged_safetensors, rng)
        return _read_as(rng, whole, "m", base or name)

    return damage


def sharded(rng: random.Random, whole: Path, at: Path) -> list[str]:
    """A shard index, or one of its shards."""
    suffix = rng.choice(["safetensors", "bin"])
    folder = shutil.copytree(whole / ("sharded" if suffix == "safetensors" else "bins"), at / "m")
    files = sorted(folder.iterdir())
    index = next(file for file in files if file.name.endswith(".index.json"))
    match rng.randrange(4):
        case 0:
            rng.choice(files).unlink()
        case 1:
            shard = rng.choice([file for file in files if file != index])
            _damage(
                shard,
                mutate.damaged_safetensors if suffix == "safetensors" else mutate.damaged_bytes,
                rng,
            )
        case _:
            _damage(index, mutate.damaged_json, rng)
    return _read_as(rng, whole, "m", "base")


def torch_file(rng: random.Random, whole: Path, at: Path) -> list[str]:
    """A torch file: a zip, the legacy format, or a pickle that wants to run code."""
    name = rng.choice(["zip.pt", "zip.pt", "legacy.bin", "runs.pt"])
    (at / name).write_bytes(mutate.damaged_archive((whole / name).read_bytes(), rng))
    return _read_as(rng, whole, name, "base")


def patch(rng: random.Random, whole: Path, at: Path) -> list[str]:
    """A sparse patch over a whole BASE."""
    (at / "p.safetensors").write_bytes(
        mutate.damaged_safetensors((whole / "patch.safetensors").read_bytes(), rng)
    )
    base = str(whole / "base")
    more = rng.choice([["-q"], ["-q", "-o", "out.jsonl"], ["--json"]])
    return rng.choice(
        [["spectrum", base, "p.safetensors", *more], ["intruders", base, "p.safetensors", *more]]
    )


def distributed(rng: random.Random, whole: Path, at: Path) -> list[str]:
    """A distributed checkpoint, the files of ranks or DeepSpeed's: an index, or a file with parts
    of tensors.
    """
    folder = shutil.copytree(whole / rng.choice(["dcp", "ranks", "zero"]), at / "m")
    _damage(
        rng.choice(sorted(path for path in folder.rglob("*") if path.is_file())),
        mutate.damaged_archive,
        rng,
    )
    return _read_as(rng, whole, "m", "base")


def adapter(rng: random.Random, whole: Path, at: Path) -> list[str]:
    """An adapter of any family: PEFT's, kohya's, LoHa, LoKr, diffusers', MLX's."""
    family = rng.choice(sorted((whole / "adapters").iterdir()))
    folder = shutil.copytree(family, at / "m")
    config = folder / "adapter_config.json"
    if config.exists() and rng.random() < 0.5:
        _damage(config, mutate.damaged_json, rng)
    else:
        _damage(next(folder.glob("*.safetensors")), mutate.damaged_safetensors, rng)
    base = str(whole / "fc")
    commands = [
        ["inspect", "m"],
        ["spectrum", "m", "-q"],
        ["spectrum", base, "m", "-q", "-o", "out.jsonl"],
    ]
    commands += [["fleet", "m", "-q"], ["extract", base, "m", "--rank", "1", "-q", "-o", "new"]]
    return rng.choice([*commands, ["verify-merge", base, "m", base, "-q"]])


def adapter_config(rng: random.Random, whole: Path, at: Path) -> list[str]:
    """``adapter_config.json`` of a LoRA, read by every command that takes one."""
    folder = shutil.copytree(whole / "lora", at / "m")
    _damage(folder / "adapter_config.json", mutate.damaged_json, rng)
    base, tuned, other = (str(whole / name) for name in ("base", "tuned", "lora2"))
    return rng.choice(
        [
            ["spectrum", base, "m", "-q"],
            ["residual", base, tuned, "m", "-q", "-o", "out.jsonl"],
            ["interference", base, "m", other, "-q", "-o", "out.jsonl"],
            ["verify-merge", base, "m", tuned, "-q"],
            ["extract", base, tuned, "--ranks", "m/adapter_config.json", "-q", "-o", "new"],
            ["overlap", base, "m", str(whole / "gradients"), "-q"],
        ]
    )


def gradients(rng: random.Random, whole: Path, at: Path) -> list[str]:
    """A gradient snapshot."""
    folder = shutil.copytree(whole / "gradients", at / "g")
    _damage(next(folder.iterdir()), mutate.damaged_safetensors, rng)
    base, tuned = str(whole / "base"), str(whole / "tuned")
    overlap = ["overlap", base, tuned, "g", "-q", "-o", "out.jsonl"]
    return rng.choice([overlap, ["spectrum", base, "--gradients", "g", "-q"]])


def gguf(rng: random.Random, whole: Path, at: Path) -> list[str]:
    """A GGUF model; by its name or, under another name, by its bytes."""
    name = rng.choice(["m.gguf"] * 4 + ["m.safetensors", "m.bin", "m.pt", "m", "m.json"])
    (at / name).write_bytes(mutate.damaged_bytes((whole / "gguf.gguf").read_bytes(), rng))
    return _read_as(rng, whole, name, "gguf.gguf")


def bomb(rng: random.Random, whole: Path, at: Path) -> list[str]:
    """A pickle that repeats values, as an index, a torch file, or a part of either."""
    value = bombs.costly(rng)
    match rng.randrange(6):
        case 0:
            bombs.index(at / "m", value)
        case 1:
            fields = {
                "relative": "__0_0.distcp",
                "offsets": (0,),
                "size": (2,),
                "path": ("w",),
                "key": "w",
            }
            bombs.index(at / "m", bombs.dcp(**fields | {rng.choice(sorted(fields)): value}))
        case 2:
            bombs.ranks(
                at / "m",
                {"w": rng.choice([bombs.sharded(size=value), bombs.sharded(shards=value)])},
            )
        case 3:
            bombs.ranks(
                at / "m", {"w": rng.choice([bombs.placed(value), bombs.tensor(shape=value), value])}
            )
        case 4:
            bombs.zero(
                at / "m",
                {"param_shapes": rng.choice([value, [value], [{"w": value}]])},
                other=value,
            )
        case 5:
            bombs.archive(
                at / "m",
                {"w": rng.choice([value, bombs.tensor(shape=value), bombs.tensor()]), "x": value},
            )
    return _read_as(rng, whole, "m", "base")


def policy(rng: random.Random, whole: Path, at: Path) -> list[str]:
    """A policy."""
    name = rng.choice(["policy", "policy", "adapter-basic", "merge", "full-ft-drift"])
    content = mutate.damaged_toml((whole / f"{name}.toml").read_bytes(), rng)
    if rng.random() < 0.2:
        content = (
            rng.choice([b"%s", b"[[rule]]\n%s", b"[checks]\n%s", b"# %s"]) % bombs.costly_toml(rng)
            + content
        )
    (at / "p.toml").write_bytes(content)
    runs = [
        str(whole / "runs" / f"{run}.jsonl")
        for run in rng.sample(["spectrum", "residual", "overlap", "merge"], 2)
    ]
    runs = [run.replace("merge.jsonl", "verify-merge.jsonl") for run in runs]
    more = rng.choice([[], ["--junit", "j.xml"], ["--model-card", "c.md"], ["-o", "out.jsonl"]])
    return ["gate", "p.toml", *runs, *more]


def results(rng: random.Random, whole: Path, at: Path) -> list[str]:
    """A results file, read by every command that takes one."""
    name = rng.choice(sorted((whole / "runs").iterdir()))
    (at / "r.jsonl").write_bytes(mutate.damaged_results(name.read_bytes(), rng))
    base, tuned = str(whole / "base"), str(whole / "tuned")
    commands = [
        *(["inspect", "r.jsonl", *more] for more in ([], ["--by", "layer"], ["--json"])),
        *(["report", "r.jsonl", "--format", form] for form in ("md", "csv")),
        ["gate", str(whole / "policy.toml"), "r.jsonl"],
        ["gate", "--policy", rng.choice(["adapter-basic", "merge", "full-ft-drift"]), "r.jsonl"],
        ["gate", "init", "r.jsonl"],
        ["allocate", "r.jsonl", "--params", "300", "-o", "out.jsonl"],
        ["allocate", "r.jsonl", "--energy", "0.9"],
        ["extract", base, tuned, "--ranks", "r.jsonl", "-q", "-o", "new"],
    ]
    if name.stem == "spectrum":
        commands += [["spectrum", base, tuned, "-q", "-o", "r.jsonl", "--resume"]] * 3
    return rng.choice(commands)


def pages(rng: random.Random, whole: Path, at: Path) -> list[str]:
    """A results file, drawn and made a page; slow, so few of them."""
    name = rng.choice(sorted((whole / "runs").iterdir()))
    (at / "r.jsonl").write_bytes(mutate.damaged_results(name.read_bytes(), rng))
    return rng.choice(
        [["plot", "r.jsonl", "-o", "figures"], ["report", "r.jsonl", "-o", "out.html", "-q"]]
    )


OPTIONS = (
    *(
        "--layers",
        "--exclude",
        "--device",
        "--workers",
        "--by",
        "-o",
        "--json",
        "--resume",
        "--verify",
        "-q",
    ),
    *(
        "--ranks",
        "--top",
        "--tol",
        "--svd",
        "--seed",
        "--rank",
        "--energy",
        "--params",
        "--total-rank",
        "--weights",
    ),
    *(
        "--density",
        "--epsilon",
        "--reference",
        "--policy",
        "--junit",
        "--figure",
        "--format",
        "--label",
    ),
    *("--overwrite", "--split", "--dtype", "--signal", "--nope", "--help"),
)
MEASURING = (
    "spectrum",
    "residual",
    "overlap",
    "interference",
    "intruders",
    "verify-merge",
    "extract",
)
COMMANDS = (
    *MEASURING,
    "allocate",
    "plan",
    "gate",
    "inspect",
    "plot",
    "report",
    "probe",
    "nope",
    "",
)
VALUES = (
    "4,8",
    "auto",
    "exact",
    "krylov",
    "(",
    "q_proj",
    "out.jsonl",
    "0.9",
    "10M",
    "2",
    "type",
    "layer",
    "init",
    "-",
)


def words(rng: random.Random, whole: Path, at: Path) -> list[str]:
    """Mistaken arguments: options of other commands, values of other options, paths of
    other kinds.
    """
    paths = [
        str(whole / name)
        for name in ("base", "tuned", "lora", "gradients", "policy.toml", "zip.pt", "nowhere")
    ]
    paths += [str(whole / "runs" / f"{name}.jsonl") for name in ("spectrum", "residual", "gate")]
    pool = [
        *OPTIONS,
        *VALUES,
        *paths,
        *paths,
        *(str(junk) for junk in mutate.JUNK if isinstance(junk, str | int | float)),
    ]
    chosen = [rng.choice(COMMANDS), *(rng.choice(pool) for _ in range(rng.randrange(7)))]
    # What an argument of a program cannot hold is no finding; and this machine's own files are not
    # written to.
    chosen = [word.replace("\0", "").encode("utf-8", "ignore").decode() for word in chosen]
    return [word for word in chosen if not word.startswith(("..", "/dev"))]


PIECES = (
    *("a", "q_proj", ".", r"\.", ".*", "(a+)+", "(?#:)", "(?x: a +)", "(?=a)"),
    *("(?:a|a)*", "[a-z_.0-9]+", "{2,9}", "(", "|", "$"),
)

# Part of every password and query in an address; no message may have it.
SECRET = "Qz7"


def patterns(rng: random.Random, whole: Path, at: Path) -> list[str]:
    """A regular expression in ``adapter_config.json``, of pieces that a backtracking engine may
    take long to match.
    """
    folder = shutil.copytree(whole / "lora", at / "m")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    pattern = "".join(rng.choices(PIECES, k=rng.randint(1, 8)))
    key = rng.choice(
        ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"]
    )
    config[key] = {pattern: 2} if key in {"rank_pattern", "alpha_pattern"} else pattern
    path.write_text(json.dumps(config))
    base = str(whole / "base")
    return rng.choice(
        [["spectrum", base, "m", "-q"], ["spectrum", "m", "-q"], ["portability", "m"], ["fleet", "m", "-q"],
         ["extract", base, str(whole / "tuned"), "--ranks", "m/adapter_config.json", "-q", "-o", "new"]]
    )  # fmt: skip


def addresses(rng: random.Random, whole: Path, at: Path) -> list[str]:
    """Malformed addresses with secrets, and those of a port where nothing answers; no other host is
    named.
    """
    scheme = rng.choice(
        [
            "http://",
            "https://",
            "http:/",
            "HTTP://",
            " http://",
            "s3://",
            "gs://",
            "hf://",
            "ftp://",
        ]
    )
    users = ["me:{}@", "me:{}/{}@", "{}:{}#@", "me:{} {}@", "me:{}'{}@", "me:1?{}@", "me:[{}@"]
    user = rng.choice([*users, *([""] * (scheme.strip().lower()[0] == "h" and scheme != "hf://"))])
    user = user.replace("{}", SECRET)
    parts = [*"@:/#[]% '\"<>\\", ":99999", "::1", ".safetensors", "%40", "é"]
    address = f"{scheme}{user}127.0.0.1:9{''.join(rng.choices(parts, k=rng.randint(0, 5)))}"
    address += rng.choice(["", f"?{SECRET}", f"?a@b={SECRET}"])
    command = rng.choice(
        [
            "inspect",
            "spectrum",
            "plan",
            "fleet",
            "portability",
            "report",
            "gate",
            "residual",
            "nope",
        ]
    )
    return [command, *(str(whole / "base") for _ in range(rng.randrange(2))), address]


KINDS: dict[str, Kind] = {
    "safetensors": in_folder("tuned", base="base"),
    "quantized": in_folder("nf4", "int8", "fp8", "rows", config=0.5),
    "packed": in_folder("ct", "nvfp4", "gptq", "awq", "mlx", "mxfp4", config=0.3),
    "configuration": in_folder("base", base="tuned", config=1.0),
    **{
        kind.__name__.replace("_", " "): kind
        for kind in (
            *(
                sharded,
                torch_file,
                patch,
                distributed,
                adapter,
                adapter_config,
                gradients,
                gguf,
                bomb,
            ),
            *(policy, results, pages, words, patterns, addresses),
        )
    },
}


def prepare(kind: str, number: int, seed: int, whole: Path, at: Path) -> list[str]:
    """Make the damaged input of a number; the same for the same numbers."""
    at.mkdir()
    os.chdir(at)
    return KINDS[kind](random.Random(f"{seed} {kind} {number}"), whole, at)
