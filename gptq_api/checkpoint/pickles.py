"""A pickle looked at before torch opens it: whether it is no more than a state_dict as torch.save writes it.

torch's weights_only keeps code from running; it does not keep `bytearray(2**40)` from taking the memory, nor a key of
tuples that hold each other twice, forty deep, from being hashed for hours. Here nothing is built: opcode by opcode, it
is only noted what kind of thing lies on the stack.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import IO, Literal

import torch

_MAX_BYTES = 64 * 2**20
"""of the pickle itself; a 70B has 1 MiB"""
_LEGACY_PICKLES = 5
"""magic number, protocol, machine, the object, names of its storages"""
_MAKERS = (
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch.Size",
    "torch.device",
)
_OTHER_TENSORS = ("torch._utils._rebuild", "torch._tensor._rebuild", "torch.serialization._get_layout")
_LEAVES = (
    "NONE",
    "NEWTRUE",
    "NEWFALSE",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINSTRING",
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

_Kind = Literal["leaf", "nothing", "leaves", "flat", "dict", "made", "other"]
"""leaf: a number or a name; nothing: the empty tuple; leaves: a tuple of those; flat: a tuple of leaves, such tuples,
dicts and what was made; made: a tensor or its storage; other: lists, and tuples that are deeper. What is looked up,
compared or told in an error of torch's is never deep, so that neither takes long."""


class CodeError(Exception):
    """The pickle calls something; the text is its name."""


class ShapeError(Exception):
    """The pickle is damaged, or none that torch.save wrote."""


class NoTensorError(Exception):
    """The pickle makes tensors that are not plain; the text is by what."""


class _Global(str):
    """The name of what is called, or of a type of storage."""


_MARK = None
_Item = _Kind | _Global | None


def check_pickle(file: Path) -> None:
    """CodeError or ShapeError where it is anything but plain tensors by name; OSError; what torch's reader of zip files
    raises."""
    if not zipfile.is_zipfile(file):
        with file.open("rb") as stream:
            for _ in range(_LEGACY_PICKLES):
                _check(stream)
        return
    size = file.stat().st_size
    with zipfile.ZipFile(file) as container:
        entries = container.infolist()
    # torch never compresses: a compressed entry could be a thousand times its size in memory.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ShapeError("a compressed zip file")
    if sum(entry.file_size for entry in entries) > size:
        raise ShapeError("a zip file whose entries are larger than it")
    # By torch's own reader, so that what is looked at is what is loaded.
    _check(io.BytesIO(torch._C.PyTorchFileReader(str(file)).get_record("data.pkl")))


def _check(stream: IO[bytes]) -> None:
    """One pickle, up to its STOP."""
    stack: list[_Item] = []
    memo: dict[int, _Item] = {}
    start = stream.tell()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if stream.tell() - start > _MAX_BYTES:
                raise ShapeError("its pickle is too long for a state_dict")
            _step(opcode.name, argument, stack, memo)
    except (ValueError, IndexError, KeyError, UnicodeError):
        raise ShapeError("its pickle is damaged, or not torch.save's") from None


def _step(name: str, argument: object, stack: list[_Item], memo: dict[int, _Item]) -> None:
    """IndexError and KeyError for what is not there, ValueError for an opcode that no state_dict needs."""
    if name in _LEAVES:
        stack.append("leaf")
    elif name in ("BINPUT", "LONG_BINPUT") and isinstance(argument, int):
        memo[argument] = _top(stack)
    elif name in ("BINGET", "LONG_BINGET") and isinstance(argument, int):
        stack.append(memo[argument])
    elif name == "GLOBAL":
        stack.append(_global(str(argument)))
    elif name == "MARK":
        stack.append(_MARK)
    elif name == "EMPTY_TUPLE":
        stack.append("nothing")
    elif name == "TUPLE" or name in _TUPLES:
        stack.append(_tuple(_to_mark(stack) if name == "TUPLE" else [_pop(stack) for _ in range(_TUPLES[name])]))
    elif name in ("EMPTY_DICT", "EMPTY_LIST"):
        stack.append("dict" if name == "EMPTY_DICT" else "other")
    elif name in ("APPEND", "APPENDS"):
        _ = _to_mark(stack) if name == "APPENDS" else _pop(stack)
        _require(_top(stack) == "other")
    elif name in ("SETITEM", "SETITEMS"):
        items = _to_mark(stack) if name == "SETITEMS" else [_pop(stack), _pop(stack)]
        _require(len(items) % 2 == 0 and all(key == "leaf" for key in items[1::2]) and _top(stack) == "dict")
    elif name == "BINPERSID":
        # A storage: ("storage", type, name, device, size), and in older files how it is a part of another.
        _require(_pop(stack) in ("leaves", "flat"))
        stack.append("made")
    elif name in ("REDUCE", "NEWOBJ"):
        arguments, made = _pop(stack), _pop(stack)
        _require(isinstance(made, _Global))
        stack.append(_made(str(made), arguments))
    elif name == "BUILD":
        _require(_pop(stack) == "dict" and _top(stack) == "dict")
    elif name not in ("PROTO", "STOP"):
        raise ValueError(name)


def _global(argument: str) -> _Global:
    name = argument.replace(" ", ".", 1)
    if name != "collections.OrderedDict" and not name.startswith("torch."):
        raise CodeError(name)
    return _Global(name)


def _made(name: str, arguments: _Item) -> _Item:
    if name == "collections.OrderedDict":
        _require(arguments == "nothing")  # filled afterwards, item by item
        return "dict"
    if name not in _MAKERS:
        raise NoTensorError(name) if name.startswith(_OTHER_TENSORS) else CodeError(name)
    _require(arguments in ("leaves", "flat"))
    return "made"


def _tuple(items: list[_Item]) -> _Item:
    if all(item == "leaf" or isinstance(item, _Global) for item in items):
        return "leaves" if items else "nothing"
    flat = ("leaf", "nothing", "leaves", "dict", "made")
    return "flat" if all(item in flat or isinstance(item, _Global) for item in items) else "other"


def _top(stack: list[_Item]) -> _Item:
    _require(stack[-1] is not _MARK)
    return stack[-1]


def _pop(stack: list[_Item]) -> _Item:
    _require(stack[-1] is not _MARK)
    return stack.pop()


def _to_mark(stack: list[_Item]) -> list[_Item]:
    """Takes what lies above the last mark, and the mark; the last comes first."""
    items: list[_Item] = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items


def _require(met: bool) -> None:
    if not met:
        raise ValueError
