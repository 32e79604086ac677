"""Read a pickle as data, without importing or calling anything.

A pickle is a program that builds objects. Here it builds plain data: numbers, text, tuples, lists
and dictionaries are built as such, and every class, function and object, but those of ``PLAIN``,
becomes a ``PickledObject`` of its name, its arguments and its state. So a pickle of any class, of
any version of a library, is read without that library, and one that was made to run code does not
run it.

Memory and time are proportional to the pickle: containers share what the memo repeats, and what is
copied or hashed again is counted. A nested list of 700 bytes can have 10⁹ leaves, so no value is
formatted: ``describe`` names it in a message.

The interpreter is ``pickle._Unpickler``, the standard library's in Python: instructions that look
up names, call, hash or allocate by a number are replaced, those that take values from outside the
pickle are refused. The one in C, ``pickle.Unpickler``, cannot be used: it stores the memo as an
array of the largest index (a pickle of 10 bytes took 2 GB), hashes keys by recursion (10⁶ nested
tuples end the process, 60 shared ones take 2⁶⁰ steps), and its calls cannot be counted.

Reference: ``pickletools`` of the standard library, which documents every instruction.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from lora_diag.errors import InputError

# Entries that calls may copy and keys may hash: 8 MB of references, and one per byte of the pickle.
# Files that torch, torch.distributed and DTensor write take 0.06 to 0.13 per byte.
FREE_ENTRIES, ENTRIES_PER_BYTE = 1_000_000, 1

# Types of values whose entries a call may copy.
_SIZED = (str, bytes, bytearray, tuple, list, dict)
# Instructions of protocols 0 to 5, without those with values from outside the pickle.
_STANDARD = {
    ord(opcode.code): pickle._Unpickler.dispatch[ord(opcode.code)]
    for opcode in pickletools.opcodes
    if opcode.proto <= 5
    and opcode.name not in {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}
}
# Errors that a damaged pickle raises, in addition to those of ``pickle`` and ``struct``.
_DAMAGED = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    EOFError,
)


def _make_dict(pairs: Any = ()) -> dict[Any, Any]:
    """Return the dictionary of these pairs, after checking the keys."""
    return {_check_key(key): value for key, value in pairs}


def _make_bytes(content: Any = b"", *_: Any) -> Any:
    """Return the first argument of a bytearray, its content; refuse a number of bytes."""
    if isinstance(content, int):
        raise ValueError(
            "it asks for bytes by their number"
        )  # the only way to allocate by a number in torch's reader
    return content


# The classes that are read as Python values: module and name -> how they are built from their
# arguments.
PLAIN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _make_dict,
    ("torch", "Size"): tuple,
    ("builtins", "set"): tuple,
    ("builtins", "frozenset"): tuple,
    ("__builtin__", "set"): tuple,
    ("__builtin__", "frozenset"): tuple,
    ("builtins", "bytearray"): _make_bytes,
    ("__builtin__", "bytearray"): _make_bytes,
}


@dataclass(slots=True, eq=False, repr=False)
class PickledObject:
    """A class, a function or an object of a pickle, as data.

    Args:
        module: Module of the class or function.
        name: Its name.
        args: Its arguments; None if it was only named.
        state: State of the object.
        items: Items appended to it or stored in it.
    """

    module: str
    name: str
    args: tuple[Any, ...] | None = None
    state: Any = None
    items: list[Any] = field(default_factory=list)

    def get(self, key: str) -> Any:
        """Return an attribute from the state; None if it does not exist.

        The state of a class with slots is ``(dictionary or None, slots)``.
        """
        parts = self.state[:2] if isinstance(self.state, tuple) else (self.state,)
        return next((part[key] for part in parts if isinstance(part, dict) and key in part), None)


def attribute(value: Any, key: str, position: int | None = None) -> Any:
    """Return an attribute of a record, from its state or by its position among the arguments or in
    a state; else None.

    Args:
        value: A value of a pickle.
        key: Name of the attribute.
        position: Its position in the arguments of the class, or in a state that is a tuple; None if
            it has none.
    """
    if not isinstance(value, PickledObject):
        return None
    if (found := value.get(key)) is not None or position is None:
        return found
    tuples = (items for items in (value.args, value.state) if isinstance(items, tuple))
    return next((items[position] for items in tuples if position < len(items)), None)


@dataclass(slots=True, eq=False, repr=False)
class Persistent:
    """A reference to an object outside the pickle, such as a storage of a torch file."""

    id: Any


def describe(value: Any) -> str:
    """Return a value for a message: at most 200 characters of text, or the kind of any
    other value.
    """
    return repr(value[:200]) if isinstance(value, str) else f"a {type(value).__name__}"


def load(content: bytes | BinaryIO, path: Path, description: str) -> Any:
    """Return the content of a pickle as data.

    Args:
        content: The pickle, or a file that is read to the end of its next pickle.
        path: The file that holds it, for messages.
        description: Description for messages, such as ``the index``.

    Returns:
        The data: None, booleans, numbers, text, bytes, bytearrays, tuples (also for frozensets, and
            for
        sets that a call builds), lists (also for other sets), dictionaries, ``PickledObject`` and
            ``Persistent``.

    Raises:
        InputError: It is no pickle, is damaged, or copies the same entries again and again.
    """
    try:
        return _Interpreter(io.BytesIO(content) if isinstance(content, bytes) else content).load()
    except (*_DAMAGED, pickle.UnpicklingError, struct.error) as error:
        reason = str(error) or type(error).__name__
        raise InputError(
            f"{path}: {description} is not a readable pickle: {reason}; copy or save it again"
        ) from error


class _Interpreter(pickle._Unpickler):
    """The standard library's interpreter, without imports and calls, and with limited hashing.

    Args:
        file: The pickle, and what may follow it.
    """

    read: Callable[[int], bytes]
    stack: list[Any]
    append: Callable[[Any], None]  # to the stack
    pop_mark: Callable[
        [], list[Any]
    ]  # Remove the topmost mark and the values above it; return the values.

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._begin, self._copied = file, file.tell(), 0
        end = file.seek(0, io.SEEK_END)
        file.seek(self._begin)
        super().__init__(file, encoding="latin-1")
        # A file allocates as many bytes as are requested, and a pickle may claim any number.
        self._file_read = lambda count: file.read(min(count, end - file.tell()))

    def find_class(self, module: str, name: str) -> PickledObject:
        """Return a class or function as data."""
        return PickledObject(module, name)

    def persistent_load(self, pid: Any) -> Persistent:
        """Return a reference as data."""
        return Persistent(pid)

    def _instantiate(self, target: Any, args: list[Any]) -> None:
        self._call(target, tuple(args))

    def _call(self, target: Any, args: Any) -> None:
        """Push what stands for a call or a new object: a value if its class is in ``PLAIN``, else a
        record.
        """
        if not isinstance(target, PickledObject) or not isinstance(args, tuple):
            raise ValueError(f"it calls a {type(target).__name__} with a {type(args).__name__}")
        self._spend(len(args) + sum(len(value) for value in args if isinstance(value, _SIZED)))
        plain = PLAIN.get((target.module, target.name)) if target.args is None else None
        self.append(plain(*args) if plain else PickledObject(target.module, target.name, args))

    def _spend(self, entries: int) -> None:
        """Count entries that a call may copy or a dictionary hashes; refuse more than the bytes
        read so far explain.
        """
        self._copied += entries
        if self._copied > FREE_ENTRIES + ENTRIES_PER_BYTE * (self._file.tell() - self._begin):
            raise ValueError("it copies the same entries again and again")

    def _extend(self, values: list[Any]) -> None:
        """Append values to the topmost one, a list or a record; a tuple, as which a set is read,
        stays as it is.
        """
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, PickledObject):
            target.items.extend(values)
        elif not isinstance(
            target, tuple
        ):  # a set, which is read as a tuple, is only filled where it is empty
            raise ValueError(f"it adds entries to a {type(target).__name__}")

    def _store(self, values: list[Any]) -> None:
        """Store alternating keys and values in the topmost value, a dictionary or a record."""
        target = self.stack[-1]
        self._spend(sum(len(key) for key in values[::2] if isinstance(key, tuple)))
        pairs = [
            (_check_key(key), value) for key, value in zip(values[::2], values[1::2], strict=True)
        ]
        if isinstance(target, dict):
            target.update(pairs)
        elif isinstance(target, PickledObject):
            target.items.extend(pairs)
        else:
            raise ValueError(f"it adds entries to a {type(target).__name__}")

    def _reduce(self) -> None:
        args, target = self.stack.pop(), self.stack.pop()
        self._call(target, args)

    def _reduce_with_keywords(self) -> None:
        """Push a call with keyword arguments; their dictionary, unless empty, becomes the last
        argument.
        """
        keywords = self.stack.pop()
        if keywords:
            self.stack[-1] = (*self.stack[-1], keywords)
        self._reduce()

    def _make_dict(self) -> None:
        values = self.pop_mark()
        self.append({})
        self._store(values)

    def _build(self) -> None:
        """Remove the topmost value, and make it the state of the one below if that is a record."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, PickledObject):
            target.state = state

    def _read_bytearray(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **_STANDARD,
        **dict.fromkeys((pickle.REDUCE[0], pickle.NEWOBJ[0]), _reduce),
        **dict.fromkeys(
            (pickle.APPENDS[0], pickle.ADDITEMS[0]), lambda self: self._extend(self.pop_mark())
        ),
        pickle.NEWOBJ_EX[0]: _reduce_with_keywords,
        pickle.APPEND[0]: lambda self: self._extend([self.stack.pop()]),
        pickle.SETITEM[0]: lambda self: self._store([self.stack.pop(), self.stack.pop()][::-1]),
        pickle.SETITEMS[0]: lambda self: self._store(self.pop_mark()),
        pickle.DICT[0]: _make_dict,
        pickle.EMPTY_SET[0]: _STANDARD[pickle.EMPTY_LIST[0]],
        pickle.FROZENSET[0]: _STANDARD[pickle.TUPLE[0]],
        pickle.BUILD[0]: _build,
        pickle.BYTEARRAY8[0]: _read_bytearray,
    }


def _check_key(key: Any) -> Any:
    """Return a key of a dictionary, after checking that hashing it is cheap.

    Nested tuples, which Python hashes by recursion in C, are refused, and long integers, of which
    many have one hash.
    """
    parts = key if isinstance(key, tuple) else (key,)
    if any(isinstance(part, tuple) for part in parts):
        raise ValueError("a key is a tuple of tuples")
    if any(isinstance(part, int) and part.bit_length() > 64 for part in parts):
        raise ValueError("a key is an integer of more than 64 bits")
    return key
