"""Damage: what a random generator makes of bytes, JSON, lines of text and words of a command."""

import io
import json
import random
import zipfile
from collections.abc import Callable
from typing import Any

NUMBERS = [
    0,
    -1,
    1,
    2,
    1.5,
    -0.0,
    1e-320,
    1e308,
    10**30,
    2**31,
    2**63,
    -(2**63),
    float("inf"),
    float("nan"),
]
TEXTS = [
    "",
    "x",
    "0",
    "1e9",
    "../../etc/passwd",
    "/dev/zero",
    "\x1b[31m",
    "é\u202e",
    "\ud800",
    "a" * 3000,
    "float32",
]
JUNK: list[Any] = [
    *(None, True, False, *NUMBERS, *TEXTS),
    *([], [1], [0], [[0, 1]], [None], ["x"], {}, {"a": "b"}, {"": 0}, {"fc": 1}),
]
TOKENS = [
    *(
        b"\0",
        b"\n",
        b"\r\n",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"[" * 3000,
        b'{"a":' * 1500,
        b"NaN",
        b"Infinity",
        b"-1",
    ),
    *(
        b"1e999",
        b"9" * 400,
        b"9" * 5000,
        b"\\u0000",
        b'"',
        b"}",
        b"]",
        b",",
        b'{"record":"run"',
        b"\x1b]0;x\x07",
    ),
]
# As little-endian float32: not a number, both infinities, the largest, the smallest.
FLOATS = [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\1\0\0\0"]
SETTINGS = [
    *(
        b"0",
        b"-1",
        b"1e400",
        b"inf",
        b"nan",
        b"true",
        b"''",
        b"'x'",
        b"[]",
        b"['a']",
        b"{}",
        b"{a=1}",
        b"2024-01-01",
    ),
    *(
        b"'('",
        b"'energy.8 >= '",
        b"'fro < 1e999'",
        b"'nope.nope > 1'",
        b"'all(energy) == 3'",
        b"'%s'",
        b"'9' * 3",
    ),
    *(b'"\\u001b[31m"', b"99999999999999999999999", b"'no = such'", b"[[1]]", b'"""\n"""'),
]


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip bits, set bytes, cut, repeat or insert, one to four times."""
    result = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(result) + 1)
        length = rng.choice([1, 2, 4, 8, 64, 1000])
        match rng.randrange(7):
            case 0 if at < len(result):
                result[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(result):
                result[at] = rng.choice([0, 1, 127, 128, 255, *b'0123456789-.e"[]{},:'])
            case 2:
                del result[at : at + length]
            case 3:
                result[at:at] = result[at : at + length]
            case 4:
                result[at:at] = rng.choice(TOKENS)
            case 5:
                del result[at:]
            case 6:
                other = rng.randrange(len(result) + 1)
                result[at : at + length] = result[other : other + length]
    return bytes(result)


def damaged_value(value: Any, rng: random.Random) -> Any:
    """Replace, remove, rename or repeat something in a JSON value, somewhere inside it."""
    if not value or not isinstance(value, dict | list) or rng.random() < 0.05:
        return _nudged(value, rng) if rng.random() < 0.4 else rng.choice(JUNK)
    if isinstance(value, dict):
        copy = dict(value)
        key = rng.choice(list(copy))
        match rng.randrange(8):
            case 0:
                del copy[key]
            case 1:
                copy[str(rng.choice(JUNK))] = copy[key]
            case 2:
                copy[rng.choice(list(copy))] = copy[key]
            case _:
                copy[key] = damaged_value(copy[key], rng)
        return copy
    copy_ = list(value)
    at = rng.randrange(len(copy_))
    match rng.randrange(6):
        case 0:
            del copy_[at]
        case 1:
            copy_.insert(at, copy_[rng.randrange(len(copy_))])
        case _:
            copy_[at] = damaged_value(copy_[at], rng)
    return copy_


def _nudged(value: Any, rng: random.Random) -> Any:
    """Return something near a value and of its kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice([-1, 1, 2, -value, 255, 10**6])
    if isinstance(value, float):
        return value * rng.choice([-1.0, 1e-30, 1e30, 1.01, 1e300])
    if isinstance(value, str) and value:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(["", ".", "x", "\n", "/", value]) + value[at + 1 :]
    return rng.choice(JUNK)


def dump(value: Any) -> bytes:
    """Return JSON as Python writes it: NaN and lone surrogates included."""
    return json.dumps(value).encode()


def damaged_json(content: bytes, rng: random.Random) -> bytes:
    """Damage a JSON file by its structure or, one time in three, by its bytes."""
    try:
        value = json.loads(content)
    except ValueError:  # it was damaged before
        return damaged_bytes(content, rng)
    if rng.random() < 0.33:
        return damaged_bytes(content, rng)
    for _ in range(rng.randint(1, 3)):
        value = damaged_value(value, rng)
    return dump(value)


def damaged_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Damage the length, the header or the data of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    match rng.randrange(6):
        case 0:
            length = rng.choice(
                [0, 1, length - 1, length + 1, 2**40, 2**63, 2**64 - 1, len(content) - 8]
            )
            return length.to_bytes(8, "little") + header + data
        case 1:
            return content[:8] + header + damaged_bytes(data, rng)
        case 2:
            return content[:8] + header + _numbers(data, rng)
        case 3:
            return damaged_bytes(content, rng)
        case _:
            header = damaged_json(header, rng)
            return len(header).to_bytes(8, "little") + header + data


def _numbers(data: bytes, rng: random.Random) -> bytes:
    """Put numbers that are not finite, too large or too small in the place of some entries."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(max(1, len(result) - 8)) // 4 * 4
        result[at : at + 4] = rng.choice(FLOATS)
    return bytes(result[: len(data)])


def damaged_archive(content: bytes, rng: random.Random) -> bytes:
    """Damage the pickle inside a torch file, under a right checksum; half of the time or without
    one, any bytes.
    """
    if rng.random() < 0.5 or not zipfile.is_zipfile(io.BytesIO(content)):
        return damaged_bytes(content, rng)
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(written, "w") as new:
        for info in old.infolist():
            part = old.read(info)
            new.writestr(
                info.filename,
                damaged_bytes(part, rng) if info.filename.endswith("data.pkl") else part,
            )
    return written.getvalue()


def damaged_lines(
    content: bytes, rng: random.Random, inside: Callable[[bytes, random.Random], bytes]
) -> bytes:
    """Remove, repeat, exchange or damage whole lines."""
    lines = content.split(b"\n")
    for _ in range(rng.randint(1, 3)):
        at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        match rng.randrange(6):
            case 0 if len(lines) > 1:
                del lines[at]
            case 1:
                lines.insert(other, lines[at])
            case 2:
                lines[at], lines[other] = lines[other], lines[at]
            case 3:
                lines = lines[: at + 1]
            case _:
                lines[at] = inside(lines[at], rng)
    return b"\n".join(lines)


def damaged_record(line: bytes, rng: random.Random) -> bytes:
    """Damage one line of a results file."""
    return (
        damaged_json(line, rng)
        if line.startswith(b"{") and line.endswith(b"}")
        else damaged_bytes(line, rng)
    )


def damaged_results(content: bytes, rng: random.Random) -> bytes:
    """Damage a results file, by its lines or by its bytes."""
    return (
        damaged_bytes(content, rng)
        if rng.random() < 0.2
        else damaged_lines(content, rng, damaged_record)
    )


def damaged_setting(line: bytes, rng: random.Random) -> bytes:
    """Give a line of TOML another value, another key, or other bytes."""
    key, equals, _ = line.partition(b"=")
    value = rng.choice(SETTINGS)
    match rng.randrange(4):
        case 0:
            return damaged_bytes(line, rng)
        case 1:
            return (
                rng.choice([b"extra", b"name", b"require", b"layers", b"severity"]) + b" = " + value
            )
        case _:
            return key + b"= " + value if equals else line + b" = " + value


def damaged_toml(content: bytes, rng: random.Random) -> bytes:
    """Damage a policy, by its lines or by its bytes."""
    return (
        damaged_bytes(content, rng)
        if rng.random() < 0.2
        else damaged_lines(content, rng, damaged_setting)
    )
