"""Read a pickle as data, without importing or calling anything.

A pickle is a program that builds objects. This interpreter runs it over plain data: numbers, text, tuples, lists and
dictionaries are built as such, and every class, function and object becomes a ``Record`` of its name, its arguments
and its state. So a pickle of any class, of any version of a library, is read without that library, and one that was
made to run code does not run it. ``pickletools`` decodes the instructions and allocates nothing by a length that the
pickle claims.

Memory and time are proportional to the pickle: containers share what the memo repeats, and what is copied or hashed
again is counted. A nested list of 700 bytes can have 10⁹ leaves, so no value is formatted: ``describe`` names it in a
message.

This is no subclass of ``pickle.Unpickler`` with an inert ``find_class``: that class stores the memo as an array of the
largest index (a pickle of 10 bytes took 2 GB), hashes keys by recursion in C (10⁶ nested tuples end the process, 60
shared ones take 2⁶⁰ steps), and calls cannot be counted. ``pickle._Unpickler``, in Python, is private, and all methods
but those for numbers and text would be overridden.

Reference: ``pickletools`` of the standard library, which documents every instruction.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lora_diag.errors import InputError

# Entries that calls may copy and keys may hash: 8 MB of references, and one per byte of the pickle. Files that torch,
# torch.distributed and DTensor write take 0.06 to 0.13 per byte.
FREE_ENTRIES, ENTRIES_PER_BYTE = 1_000_000, 1


def _make_dict(pairs: Any = ()) -> dict[Any, Any]:
    return {_check_key(key): value for key, value in pairs}


def _make_bytes(content: Any = b"", *_: Any) -> Any:
    if isinstance(content, int):
        raise ValueError("it asks for bytes by their number")  # the only way to allocate by a number in torch's reader
    return content


# The classes that are read as Python values: module and name -> how they are built from their arguments.
PLAIN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _make_dict,
    ("torch", "Size"): tuple,
    ("builtins", "set"): tuple,
    ("builtins", "frozenset"): tuple,
    ("__builtin__", "set"): tuple,
    ("builtins", "bytearray"): _make_bytes,
    ("__builtin__", "bytearray"): _make_bytes,
}


@dataclass(slots=True, eq=False, repr=False)
class Record:
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
    """Return an attribute of a record, from its state or by its position among the arguments or in a state; else None.

    Args:
        value: A value of a pickle.
        key: Name of the attribute.
        position: Its position in the arguments of the class, or in a state that is a tuple; None if it has none.
    """
    if not isinstance(value, Record):
        return None
    if (found := value.get(key)) is not None or position is None:
        return found
    tuples = (items for items in (value.args, value.state) if isinstance(items, tuple))
    return next((items[position] for items in tuples if position < len(items)), None)


@dataclass(slots=True, eq=False, repr=False)
class Persistent:
    """A reference to an object outside the pickle, such as a storage of a torch file."""

    id: Any


class _Mark:
    """The marker of a stack."""


_MARK = _Mark()


def describe(value: Any) -> str:
    """Return a value for a message: at most 200 characters of text, or the kind of any other value."""
    return repr(value[:200]) if isinstance(value, str) else f"a {type(value).__name__}"


def load(content: bytes | BinaryIO, path: Path, description: str) -> Any:
    """Read a pickle as data.

    Args:
        content: The pickle, or a file that is read to the end of its next pickle.
        path: The file that holds it, for messages.
        description: Description for messages, such as ``the index``.

    Returns:
        The data: None, booleans, numbers, text, bytes, tuples, lists, dictionaries, ``Record`` and ``Persistent``.

    Raises:
        InputError: It is no pickle, or damaged.
    """
    machine = _Machine()
    begin = 0 if isinstance(content, bytes) else content.tell()
    try:
        for instruction, argument, position in pickletools.genops(content):
            machine.budget = FREE_ENTRIES + ENTRIES_PER_BYTE * ((position or 0) - begin)
            machine.run(instruction.name, argument)
        return machine.pop()
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"{path}: {description} is not a readable pickle: {reason}; copy or save it again") from error


class _Machine:
    """The stack and the memory of a pickle, and the entries copied or hashed so far with their limit."""

    def __init__(self) -> None:
        self.copied = self.budget = 0
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        """Run one instruction."""
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        else:
            _INSTRUCTIONS[name](self, argument)

    def pop(self) -> Any:
        """Remove and return the topmost value; refuse a mark."""
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark is in place of a value")
        return value

    def pop_to_mark(self) -> list[Any]:
        """Remove the topmost mark and the values above it; return the values."""
        index = len(self.stack) - 1
        while self.stack[index] is not _MARK:
            index -= 1
            if index < 0:
                raise ValueError("a mark is missing")
        values = self.stack[index + 1 :]
        del self.stack[index:]
        return values

    def top(self) -> Any:
        """Return the topmost value, which stays; refuse a mark."""
        value = self.stack[-1]
        if value is _MARK:
            raise ValueError("a mark is in place of a value")
        return value

    def memoize(self, index: int) -> None:
        self.memory[index] = self.top()

    def drop(self, _: Any) -> None:
        self.stack.pop()

    def append(self, values: list[Any]) -> None:
        """Append values to the topmost one, a list or a record; a tuple, as which a set is read, stays as it is."""
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Record):
            target.items.extend(values)
        elif not isinstance(target, tuple):  # a set, which is read as a tuple, is only filled where it is empty
            raise ValueError(f"it adds entries to a {type(target).__name__}")

    def store(self, values: list[Any]) -> None:
        """Store alternating keys and values in the topmost value, a dictionary or a record."""
        target = self.top()
        self.spend(sum(len(key) for key in values[::2] if isinstance(key, tuple)))
        pairs = [(_check_key(key), value) for key, value in zip(values[::2], values[1::2], strict=True)]
        if isinstance(target, dict):
            target.update(pairs)
        elif isinstance(target, Record):
            target.items.extend(pairs)
        else:
            raise ValueError(f"it adds entries to a {type(target).__name__}")

    def build(self, _: Any) -> None:
        """Remove the topmost value, and make it the state of the one below if that is a record."""
        state, target = self.pop(), self.top()
        if isinstance(target, Record):
            target.state = state

    def push_name(self, module: Any, name: Any) -> None:
        """Push a class or function on the stack, as data."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("a class has no name")
        self.stack.append(Record(module, name))

    def call(self, target: Any, args: Any) -> None:
        """Push what stands for a call or a new object: a value if its class is in ``PLAIN``, else a record."""
        if not isinstance(target, Record) or not isinstance(args, tuple):
            raise ValueError(f"it calls a {type(target).__name__}")
        self.spend(len(args) + sum(len(value) for value in args if isinstance(value, _SIZED)))
        plain = PLAIN.get((target.module, target.name)) if target.args is None else None
        self.stack.append(plain(*args) if plain else Record(target.module, target.name, args))

    def reduce(self, _: Any) -> None:
        args, target = self.pop(), self.pop()
        self.call(target, args)

    def reduce_with_keywords(self, _: Any) -> None:
        keywords, args, target = self.pop(), self.pop(), self.pop()
        if not isinstance(args, tuple):
            raise ValueError(f"it calls with a {type(args).__name__}")
        self.call(target, (*args, keywords) if keywords else args)

    def spend(self, entries: int) -> None:
        """Count entries that a call may copy or a dictionary hashes."""
        self.copied += entries
        if self.copied > self.budget:
            raise ValueError("it copies the same entries again and again")


def _check_key(key: Any) -> Any:
    """Return a key of a dictionary, after checking that hashing it is cheap.

    Nested tuples, which Python hashes by recursion in C, are refused, and long integers, of which many have one hash.
    """
    parts = key if isinstance(key, tuple) else (key,)
    if any(isinstance(part, tuple) for part in parts):
        raise ValueError("a key is a tuple of tuples")
    if any(isinstance(part, int) and part.bit_length() > 64 for part in parts):
        raise ValueError("a key is an integer of more than 64 bits")
    return key


def _pop_mark(machine: _Machine, _: Any) -> None:
    machine.pop_to_mark()


def _make_tuple_instruction(count: int) -> Callable[[_Machine, Any], None]:
    """Return the instruction that makes a tuple of the topmost values."""

    def run(machine: _Machine, _: Any) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(values)))

    return run


def _run_inst(machine: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    machine.call(Record(module, name), tuple(machine.pop_to_mark()))


def _run_obj(machine: _Machine, _: Any) -> None:
    target, *args = machine.pop_to_mark()
    machine.call(target, tuple(args))


def _run_stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.pop(), machine.pop()
    machine.push_name(module, name)


def _run_dict(machine: _Machine, _: Any) -> None:
    values = machine.pop_to_mark()
    machine.stack.append({})
    machine.store(values)


def _do_nothing(machine: _Machine, _: Any) -> None:
    """Do nothing: protocol, frames, and the end."""


# Types of values whose entries a call may copy.
_SIZED = (str, bytes, bytearray, tuple, list, dict)

# Instructions whose argument is the value.
_VALUES = frozenset({
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
})  # fmt: skip

_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
    "MARK": lambda: _MARK,
}


def _read_memory(machine: _Machine, index: int) -> None:
    machine.stack.append(machine.memory[index])


def _make_tuple(machine: _Machine, _: Any) -> None:
    machine.stack.append(tuple(machine.pop_to_mark()))


def _append_many(machine: _Machine, _: Any) -> None:
    machine.append(machine.pop_to_mark())


_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _do_nothing),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.memoize),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _read_memory),
    **dict.fromkeys(("TUPLE", "FROZENSET"), _make_tuple),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), _append_many),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.reduce),
    **{f"TUPLE{count}": _make_tuple_instruction(count) for count in (1, 2, 3)},
    "MEMOIZE": lambda machine, _: machine.memoize(len(machine.memory)),
    "POP": _Machine.drop,
    "POP_MARK": _pop_mark,
    "DUP": lambda machine, _: machine.stack.append(machine.top()),
    "LIST": lambda machine, _: machine.stack.append(machine.pop_to_mark()),
    "DICT": _run_dict,
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "SETITEM": lambda machine, _: machine.store([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.store(machine.pop_to_mark()),
    "GLOBAL": lambda machine, argument: machine.push_name(*argument.split(" ", 1)),
    "STACK_GLOBAL": _run_stack_global,
    "NEWOBJ_EX": _Machine.reduce_with_keywords,
    "INST": _run_inst,
    "OBJ": _run_obj,
    "BUILD": _Machine.build,
    "PERSID": lambda machine, argument: machine.stack.append(Persistent(argument)),
    "BINPERSID": lambda machine, _: machine.stack.append(Persistent(machine.pop())),
}
