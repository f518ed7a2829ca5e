"""Reader of untrusted pickles that runs nothing.

Hides: the pickle machine. It knows 40 opcodes and calls nothing: globals, calls and persistent objects are
passed to methods of the reader, which return inert values or refuse them. Memory stays within a small
multiple of the size of the pickle. Reference: the opcode table of CPython's `pickletools`.
"""

from __future__ import annotations

import io
import pickletools
from typing import Any

OPCODES = {op.code.encode("latin-1"): op for op in pickletools.opcodes}
VALUES = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINBYTES",
    "SHORT_BINBYTES",
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TAKES = {  # number of items that an opcode takes from the stack; 0 means all since the mark
    "TUPLE": 0,
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "APPEND": 1,
    "APPENDS": 0,
    "SETITEM": 2,
    "SETITEMS": 0,
}
MAX_DEPTH = 50


class PickleReader:
    """Reader of pickles; a subclass defines the allowed opcodes and names, and what stands for them.

    Its methods raise ValueError for anything that is not allowed.
    """

    opcodes: frozenset[str] = frozenset()
    max_containers = 200_000  # the optimizer state of a 256-layer model has 20,000

    def admit(self, name: str) -> Any:
        """Return the placeholder of a global, named `module attribute`."""
        raise ValueError(f"it asks for {name[:80]!r}")

    def call(self, function: Any, args: Any) -> Any:
        """Return the placeholder of the result of a call."""
        raise ValueError("it calls something")

    def find(self, claim: Any) -> Any:
        """Return the placeholder of an object stored outside the pickle."""
        raise ValueError("it refers to another file")

    def build(self, target: Any, state: Any) -> None:
        """Record the state of an object."""
        raise ValueError("it sets the state of an object")

    def read(self, data: bytes) -> Any:
        """Return the value of a pickle.

        Raises:
            ValueError: The pickle is damaged, or holds something that this reader does not allow.
        """
        try:
            return self._follow(io.BytesIO(data))
        except (LookupError, TypeError, ArithmeticError, UnicodeError) as error:
            raise ValueError(
                f"its pickle is cut short or damaged ({type(error).__name__})"
            ) from None

    def _follow(self, file: io.BytesIO) -> Any:
        stack: list[Any] = []
        stacks: list[list[Any]] = []  # the stacks below each mark
        memo: dict[int, Any] = {}
        n_containers = 0
        while code := file.read(1):
            # Read an opcode and its argument.
            op = OPCODES.get(code)
            if op is None or op.name not in self.opcodes:
                raise ValueError(f"it uses the pickle opcode {op.name if op else code.hex()}")
            name = op.name
            arg: Any = op.arg.reader(file) if op.arg else None

            # Carry it out.
            if name in VALUES:
                if isinstance(arg, str):
                    arg.encode()  # refuses lone surrogates
                stack.append(arg)
            elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
                memo[len(memo) if arg is None else arg] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[arg])
            elif name in CONSTANTS:
                stack.append(CONSTANTS[name])
            elif name == "MARK":
                if len(stacks) == MAX_DEPTH:
                    raise ValueError("its containers are nested too deeply")
                stacks.append(stack)
                stack = []
            elif name in TAKES:
                items = [stack.pop() for _ in range(TAKES[name])][::-1]
                if not TAKES[name]:
                    items, stack = stack, stacks.pop()
                if name.startswith("TUPLE"):
                    n_containers += 1
                    stack.append(tuple(items))
                else:
                    fill_container(stack[-1], items, list if name.startswith("APPEND") else dict)
            elif name in ("EMPTY_DICT", "EMPTY_LIST"):
                n_containers += 1
                stack.append({} if name == "EMPTY_DICT" else [])
            elif name in ("GLOBAL", "STACK_GLOBAL"):
                stack.append(self.admit(arg or " ".join([stack.pop(), stack.pop()][::-1])))
            elif name in ("REDUCE", "NEWOBJ"):
                args, function = stack.pop(), stack.pop()
                stack.append(self.call(function, args))
            elif name == "BINPERSID":
                stack.append(self.find(stack.pop()))
            elif name == "BUILD":
                state = stack.pop()
                self.build(stack[-1], state)
            elif name == "STOP":
                if len(stack) != 1 or stacks or file.read(1):
                    raise ValueError("it holds more or less than one value")
                return stack[0]

            if n_containers > self.max_containers:
                raise ValueError(f"it holds more than {self.max_containers:,} containers")
        raise ValueError("it is cut off before its end")


def fill_container(target: Any, items: list[Any], kind: Any) -> None:
    """Append items to a list, or set alternating keys and values of a dictionary."""
    if type(target) is not kind:
        raise ValueError(f"it fills a {type(target).__name__} as if it were a {kind.__name__}")
    if kind is list:
        target.extend(items)
    elif all(type(key) in (str, int, bytes) for key in items[::2]):
        target.update(zip(items[::2], items[1::2], strict=True))
    else:
        raise ValueError("a dictionary key in it is neither text nor number nor bytes")
