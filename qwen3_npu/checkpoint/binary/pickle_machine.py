"""An unpickler that builds plain values only.

Python's own unpickler calls any object that `find_class` returns, and sets attributes of any object on its stack. This
one does neither: a name becomes a `Name`, a call of it goes to the caller's `build`, and only `Unknown`s and namespaces
take a state. Opcodes: https://docs.python.org/3/library/pickletools.html, those of protocols 2 to 5.
"""

from __future__ import annotations

import argparse
import dataclasses
import struct
from collections.abc import Callable
from typing import Any

_DEPTH = 4  # of tuples in a key: hashing recurses without a limit


class NotPlain(ValueError):
    """The pickle is damaged, or describes something that is not a plain value."""


@dataclasses.dataclass(frozen=True)
class Name:
    """A name in a pickle. Nothing is imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Unknown:
    """Placeholder for an object of a class that is not imported. It keeps arguments and state and does nothing."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: Name, args: tuple) -> None:
        self.name, self.args = name, args
        self.state: object = None


class Machine:
    """Runs one pickle.

    Args:
        build: (name, arguments) -> result of the call.
        value: name -> its value, where a name is used as a value.
        persistent: persistent id -> its value.
    """

    def __init__(
        self,
        data: bytes,
        build: Callable[[Name, tuple], object],
        value: Callable[[Name], object],
        persistent: Callable[[object], object],
    ) -> None:
        self.data, self.build, self.value, self.persistent = data, build, value, persistent
        self.at = 0
        self.stack: list[object] = []
        self.marks: list[list[object]] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        """The value. Raises: NotPlain."""
        data, table = self.data, _TABLE
        try:
            while True:
                code = data[self.at]
                self.at += 1
                if code == 0x2E:  # STOP
                    return _plain(self, self.stack.pop())
                step = table[code]
                if step is None:
                    raise NotPlain(f"opcode {bytes([code])!r} at byte {self.at - 1} is not one of a plain pickle")
                step(self)
        except (IndexError, KeyError, TypeError, AttributeError, struct.error, OverflowError, UnicodeError) as error:
            raise NotPlain(f"damaged at byte {self.at} ({type(error).__name__})") from None

    def take(self, count: int) -> bytes:
        """The next bytes."""
        found = self.data[self.at : self.at + count]
        if len(found) != count:
            raise NotPlain("it ends early")
        self.at += count
        return found

    def number(self, size: int) -> int:
        """The next unsigned integer."""
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        """The text up to the next end of line."""
        end = self.data.find(b"\n", self.at, self.at + 4096)
        if end < 0:
            raise NotPlain("a name ends early")
        found = self.data[self.at : end]
        self.at = end + 1
        return found.decode("utf-8")

    def marked(self) -> list[Any]:
        """The values that were pushed since the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items


def _plain(m: Machine, item: object) -> Any:
    """Replace a name that is used as a value."""
    return m.value(item) if type(item) is Name else item


def _all_plain(m: Machine, items: list[Any]) -> list[Any]:
    return [m.value(item) if type(item) is Name else item for item in items]


def _check_key(key: object, depth: int = 0) -> None:
    if type(key) is tuple:
        if depth == _DEPTH or len(key) > 64:
            raise NotPlain("a key is nested too deeply")
        for item in key:
            _check_key(item, depth + 1)
    elif isinstance(key, (list, dict, set)):
        raise NotPlain(f"a {type(key).__name__} is no key")


def _push(read: Callable[[Machine], Any]) -> Callable[[Machine], None]:
    def step(m: Machine) -> None:
        item = read(m)  # may put another stack in place
        m.stack.append(item)

    return step


def _tuple(count: int) -> Callable[[Machine], None]:
    def step(m: Machine) -> None:
        if len(m.stack) < count:
            raise NotPlain("a tuple of too few items")
        m.stack[-count:] = [tuple(_all_plain(m, m.stack[-count:]))]

    return step


def _mark(m: Machine) -> None:
    m.marks.append(m.stack)
    m.stack = []


def _put(m: Machine, index: int) -> None:
    m.memo[index] = m.stack[-1]


def _global(m: Machine) -> None:
    module = m.line()
    m.stack.append(Name(module, m.line()))


def _stack_global(m: Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise NotPlain("a name that is no text")
    m.stack.append(Name(module, name))


def _call(m: Machine) -> None:
    args, name = m.stack.pop(), m.stack.pop()
    if type(name) is not Name or type(args) is not tuple:
        raise NotPlain("a call of something that is no name")
    m.stack.append(m.build(name, args))


def _call_with_keywords(m: Machine) -> None:
    if m.stack.pop() != {}:
        raise NotPlain("a call with keyword arguments")
    _call(m)


def _state(m: Machine) -> None:
    """BUILD. The state of plain containers (a state dict's `_metadata`) is dropped, since nothing reads it."""
    state = _plain(m, m.stack.pop())
    target = m.stack[-1]
    if type(target) is Unknown:
        target.state = state
    elif type(target) is argparse.Namespace:
        # No `__class__` or `__dict__`: copied by setattr, they would change what the copy is.
        if type(state) is not dict or not all(type(key) is str and not key.startswith("__") for key in state):
            raise NotPlain("a namespace whose state is no dict of names")
        vars(target).update(state)
    elif type(target) not in (dict, list):
        raise NotPlain(f"state for a {type(target).__name__}, which has none")


def _set_items(m: Machine, items: list[Any]) -> None:
    target = m.stack[-1]
    if type(target) is Unknown:
        return
    if type(target) is not dict or len(items) % 2:
        raise NotPlain("items for something that is no dict")
    for key, item in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:
            _check_key(key)
        target[_plain(m, key)] = _plain(m, item)


def _set_item(m: Machine) -> None:
    item, key = m.stack.pop(), m.stack.pop()
    _set_items(m, [key, item])


def _dict(m: Machine) -> None:
    items = m.marked()
    m.stack.append({})
    _set_items(m, items)


def _append(m: Machine, items: list[Any]) -> None:
    target = m.stack[-1]
    if type(target) is Unknown:
        return
    if type(target) is not list:
        raise NotPlain("items for something that is no list")
    target += _all_plain(m, items)


def _append_one(m: Machine) -> None:
    item = m.stack.pop()
    _append(m, [item])


def plain_set(items: Any) -> set:
    """A set of hashable plain values. Raises: NotPlain."""
    for item in items:
        _check_key(item)
    return set(items)


def _add_items(m: Machine) -> None:
    items = m.marked()
    if type(m.stack[-1]) is not set:
        raise NotPlain("items for something that is no set")
    m.stack[-1].update(plain_set(_all_plain(m, items)))


def _text(size: int) -> Callable[[Machine], None]:
    return _push(lambda m: m.take(m.number(size)).decode("utf-8", "surrogatepass"))


def _bytes(size: int) -> Callable[[Machine], None]:
    return _push(lambda m: m.take(m.number(size)))


def _old_text(size: int) -> Callable[[Machine], None]:
    return _push(lambda m: m.take(m.number(size)).decode("latin1"))


def _integer(size: int) -> Callable[[Machine], None]:
    return _push(lambda m: int.from_bytes(m.take(m.number(size)), "little", signed=True))


_OPCODES: dict[int, Callable[[Machine], Any]] = {
    0x80: lambda m: m.take(1),  # PROTO
    0x95: lambda m: m.take(8),  # FRAME
    ord("("): _mark,
    ord("0"): lambda m: m.stack.pop(),
    ord("1"): lambda m: m.marked(),
    ord("2"): _push(lambda m: m.stack[-1]),
    ord("N"): _push(lambda m: None),
    0x88: _push(lambda m: True),
    0x89: _push(lambda m: False),
    ord("K"): _push(lambda m: m.number(1)),
    ord("M"): _push(lambda m: m.number(2)),
    ord("J"): _push(lambda m: int.from_bytes(m.take(4), "little", signed=True)),
    0x8A: _integer(1),
    0x8B: _integer(4),
    ord("G"): _push(lambda m: struct.unpack(">d", m.take(8))[0]),
    0x8C: _text(1),
    ord("X"): _text(4),
    0x8D: _text(8),
    ord("C"): _bytes(1),
    ord("B"): _bytes(4),
    0x8E: _bytes(8),
    0x96: _push(lambda m: bytearray(m.take(m.number(8)))),
    ord("U"): _old_text(1),
    ord("T"): _old_text(4),
    ord(")"): _push(lambda m: ()),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    ord("t"): _push(lambda m: tuple(_all_plain(m, m.marked()))),
    ord("]"): _push(lambda m: []),
    ord("l"): _push(lambda m: _all_plain(m, m.marked())),
    ord("a"): _append_one,
    ord("e"): lambda m: _append(m, m.marked()),
    ord("}"): _push(lambda m: {}),
    ord("d"): _dict,
    ord("s"): _set_item,
    ord("u"): lambda m: _set_items(m, m.marked()),
    0x8F: _push(lambda m: set()),
    0x90: _add_items,
    0x91: _push(lambda m: frozenset(plain_set(_all_plain(m, m.marked())))),
    ord("c"): _global,
    0x93: _stack_global,
    ord("R"): _call,
    0x81: _call,  # NEWOBJ
    0x92: _call_with_keywords,  # NEWOBJ_EX
    ord("b"): _state,
    ord("q"): lambda m: _put(m, m.number(1)),
    ord("r"): lambda m: _put(m, m.number(4)),
    0x94: lambda m: _put(m, len(m.memo)),
    ord("h"): _push(lambda m: m.memo[m.number(1)]),
    ord("j"): _push(lambda m: m.memo[m.number(4)]),
    ord("Q"): _push(lambda m: m.persistent(m.stack.pop())),
}
_TABLE: list[Callable[[Machine], Any] | None] = [_OPCODES.get(code) for code in range(256)]
