"""Whether bytes are a pickle, or hold one. Nothing is loaded: programs are read by `pickletools`."""

from __future__ import annotations

import ast
import pickletools
import re
from collections.abc import Iterator
from typing import Any

NAMES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib", "*.dill", "*.cloudpickle", "*.pt2",
         "*.mar", "*.nemo")  # fmt: skip
START = 1 << 16  # bytes from which a pickle is known
_CALLS = frozenset(("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "REDUCE", "BUILD"))
_TEXTS = {"SHORT_BINUNICODE", "BINUNICODE", "UNICODE", "BINUNICODE8", "SHORT_BINSTRING", "BINSTRING", "STRING"}
_MARK = re.compile(rb"\x80[\x02-\x05](?=[\x80-\x98()\]}cXUVKMJGNIqrtT])")
# A name that a program of protocol 0 or 1 asks for, and the opcode that comes next: a mark, an empty tuple, a memo.
_OLD = re.compile(rb"c[A-Za-z_][\w.]{0,80}\n[A-Za-z_][\w.]{0,80}\n(?=[()pqr])")
_DOTTED = re.compile(r"[A-Za-z_]\w+(\.\w+)*")


def is_pickle(start: bytes) -> str:
    """What a layer is by its first bytes; empty if it is no pickle."""
    if start[:1] == b"\x80" and len(start) > 2 and start[1] in range(2, 6):
        return "a pickle by its first bytes"
    if start.startswith(b"\x93NUMPY"):
        return "a NumPy file of objects, which is a pickle" if _has_objects(start) else ""
    if start[:1] in (b"c", b"(", b"i", b"]", b"}"):  # protocols 0 and 1 are text, and have no mark
        return "a pickle by its first bytes" if _is_old(start) else ""
    return ""


def holds_pickle(block: bytes) -> bool:
    """Whether a program that asks for a function stands anywhere in a block; one that lists plain values may."""
    for found in _MARK.finditer(block):
        if _names_something(block[found.start() : found.start() + START]):
            return True
    calls = _CALLS - {"GLOBAL"}  # a name alone may be two lines of a text
    return any(_is_old(block[found.start() : found.start() + START], calls) for found in _OLD.finditer(block))


def _has_objects(start: bytes) -> bool:
    text = re.search(rb"\{.*?\}", start[:4096], re.DOTALL)
    try:
        return bool(text) and "O" in str(ast.literal_eval(text[0].decode("latin-1")).get("descr", ""))
    except (ValueError, SyntaxError, AttributeError):
        return False


def _opcodes(program: bytes) -> Iterator[tuple[str, Any]]:
    """Opcodes with their arguments, as far as the bytes are a program."""
    try:
        for opcode, argument, _ in pickletools.genops(program):
            yield opcode.name, argument
    except Exception:  # whatever is wrong, the program ends there
        return


def _is_old(start: bytes, calls: frozenset[str] = _CALLS) -> bool:
    called = False
    for name, _ in _opcodes(start):
        called = called or name in calls
        if name == "STOP":
            return called
    return False


def _names_something(start: bytes) -> bool:
    """Whether a program asks for a function by a name that may be one. It need not end: that may be far away."""
    texts: list[str] = []
    for name, argument in _opcodes(start):
        if name in _TEXTS:
            texts = [*texts[-1:], str(argument)]
        elif (
            name == "STACK_GLOBAL"
            and len(texts) == 2
            and all(map(_DOTTED.fullmatch, texts))
            or name in ("GLOBAL", "INST")
            and all(map(_DOTTED.fullmatch, str(argument).split(" ", 1)))
        ):
            return True
    return False
