"""Read a pickle as data, without importing or calling anything.

A pickle is a program that builds objects. This interpreter runs it over plain data: numbers, text, tuples, lists and
dictionaries are built as such, and every class, function and object becomes a ``Record`` of its name, its arguments
and its state. So a pickle of any class, of any version of a library, is read without that library, and one that was
made to run code does not run it. ``pickletools`` decodes the instructions and allocates nothing by a length that the
pickle claims.

Reference: ``pickletools`` of the standard library, which documents every instruction.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_diag.errors import InputError


def _make_dict(pairs: Any = ()) -> dict[Any, Any]:
    return {_make_key(key): value for key, value in pairs}


# The classes that are read as Python values: module and name -> how they are built from their arguments.
PLAIN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _make_dict,
    ("torch", "Size"): tuple,
    ("builtins", "set"): tuple,
    ("builtins", "frozenset"): tuple,
    ("__builtin__", "set"): tuple,
}


@dataclass(slots=True, eq=False)
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
        parts = self.state if isinstance(self.state, tuple) else (self.state,)
        return next((part[key] for part in parts if isinstance(part, dict) and key in part), None)


@dataclass(slots=True, eq=False)
class Persistent:
    """A reference to an object outside the pickle, such as a storage of a torch file."""

    id: Any


class _Mark:
    """The marker of a stack."""


_MARK = _Mark()


def load(content: bytes, path: Path, description: str) -> Any:
    """Read a pickle as data.

    Args:
        content: The pickle.
        path: The file that holds it, for messages.
        description: Description for messages, such as ``the index``.

    Returns:
        The data: None, booleans, numbers, text, bytes, tuples, lists, dictionaries, ``Record`` and ``Persistent``.

    Raises:
        InputError: It is no pickle, or damaged.
    """
    machine = _Machine()
    try:
        for instruction, argument, _ in pickletools.genops(content):
            machine.run(instruction.name, argument)
        return machine.pop()
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"{path}: {description} is not a readable pickle: {reason}; copy or save it again") from error


class _Machine:
    """The stack and the memory of a pickle."""

    def __init__(self) -> None:
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
        """Remove the topmost value."""
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark is in place of a value")
        return value

    def pop_to_mark(self) -> list[Any]:
        """Remove the values above the topmost mark, and the mark."""
        index = len(self.stack) - 1
        while self.stack[index] is not _MARK:
            index -= 1
            if index < 0:
                raise ValueError("a mark is missing")
        values = self.stack[index + 1 :]
        del self.stack[index:]
        return values

    def top(self) -> Any:
        value = self.stack[-1]
        if value is _MARK:
            raise ValueError("a mark is in place of a value")
        return value

    def memoize(self, index: int) -> None:
        self.memory[index] = self.top()

    def drop(self, _: Any) -> None:
        self.stack.pop()

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Record):
            target.items.extend(values)
        elif not isinstance(target, tuple):  # a set, which is read as a tuple, is only filled where it is empty
            raise ValueError(f"it adds entries to a {type(target).__name__}")

    def store(self, values: list[Any]) -> None:
        target = self.top()
        pairs = [(_make_key(key), value) for key, value in zip(values[::2], values[1::2], strict=True)]
        if isinstance(target, dict):
            target.update(pairs)
        elif isinstance(target, Record):
            target.items.extend(pairs)
        else:
            raise ValueError(f"it adds entries to a {type(target).__name__}")

    def build(self, _: Any) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Record):
            target.state = state

    def name(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("a class has no name")
        self.stack.append(Record(module, name))

    def call(self, target: Any, args: Any) -> None:
        """Push the stand-in for a call or a new object on the stack."""
        if not isinstance(target, Record) or not isinstance(args, tuple | list):
            raise ValueError(f"it calls a {type(target).__name__}")
        plain = PLAIN.get((target.module, target.name)) if target.args is None else None
        self.stack.append(plain(*args) if plain else Record(target.module, target.name, tuple(args)))

    def reduce(self, _: Any) -> None:
        args, target = self.pop(), self.pop()
        self.call(target, args)

    def reduce_with_keywords(self, _: Any) -> None:
        keywords, args, target = self.pop(), self.pop(), self.pop()
        self.call(target, (*args, keywords) if keywords else args)


def _make_key(key: Any) -> Any:
    """Return a key of a dictionary; nested tuples, which Python hashes by recursion in C, are refused."""
    if isinstance(key, tuple) and any(isinstance(part, tuple) for part in key):
        raise ValueError("a key is a tuple of tuples")
    return key


def _make_sequence(machine: _Machine, values: list[Any]) -> None:
    machine.stack.append(tuple(values))


def _pop_mark(machine: _Machine, _: Any) -> None:
    machine.pop_to_mark()


def _make_tuple(count: int) -> Callable[[_Machine, Any], None]:
    def run(machine: _Machine, _: Any) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(values)))

    return run


def _inst(machine: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    machine.call(Record(module, name), machine.pop_to_mark())


def _obj(machine: _Machine, _: Any) -> None:
    target, *args = machine.pop_to_mark()
    machine.call(target, args)


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.pop(), machine.pop()
    machine.name(module, name)


def _dict(machine: _Machine, _: Any) -> None:
    values = machine.pop_to_mark()
    machine.stack.append({})
    machine.store(values)


def _do_nothing(machine: _Machine, _: Any) -> None:
    """Do nothing: protocol, frames, and the end."""


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

_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _do_nothing,
    "FRAME": _do_nothing,
    "STOP": _do_nothing,
    "POP": _Machine.drop,
    "POP_MARK": _pop_mark,
    "DUP": lambda machine, _: machine.stack.append(machine.top()),
    "TUPLE": lambda machine, _: _make_sequence(machine, machine.pop_to_mark()),
    "FROZENSET": lambda machine, _: _make_sequence(machine, machine.pop_to_mark()),
    "TUPLE1": _make_tuple(1),
    "TUPLE2": _make_tuple(2),
    "TUPLE3": _make_tuple(3),
    "LIST": lambda machine, _: machine.stack.append(machine.pop_to_mark()),
    "DICT": _dict,
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "ADDITEMS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.store([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.store(machine.pop_to_mark()),
    "GLOBAL": lambda machine, argument: machine.name(*argument.split(" ", 1)),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.reduce_with_keywords,
    "INST": _inst,
    "OBJ": _obj,
    "BUILD": _Machine.build,
    "PUT": _Machine.memoize,
    "BINPUT": _Machine.memoize,
    "LONG_BINPUT": _Machine.memoize,
    "MEMOIZE": lambda machine, _: machine.memoize(len(machine.memory)),
    "GET": lambda machine, argument: machine.stack.append(machine.memory[argument]),
    "BINGET": lambda machine, argument: machine.stack.append(machine.memory[argument]),
    "LONG_BINGET": lambda machine, argument: machine.stack.append(machine.memory[argument]),
    "PERSID": lambda machine, argument: machine.stack.append(Persistent(argument)),
    "BINPERSID": lambda machine, _: machine.stack.append(Persistent(machine.pop())),
}
