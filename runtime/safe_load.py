"""Reads what torch.save writes of tensors and plain values, and refuses everything else, whoever made the file.

torch.load(weights_only=True) runs no foreign code either. But it expands what is compressed, calls functions that take
memory at will, and hashes any key of a dict: a tuple nested a million times, in 1 MB, ends the process.
"""

import pickle
import pickletools
import sys
import zipfile
from collections.abc import Callable
from typing import BinaryIO

import torch
from torch import Tensor


def safe_load(file: BinaryIO, size: int) -> object:
    """The content of a file of `size` bytes, on the CPU, in time and memory in proportion to them.

    UnpicklingError if it holds other things than tensors and plain values; any other exception if it is damaged.
    """
    with zipfile.ZipFile(file) as archive:  # of a pickle, data.pkl, and of the bytes of each storage, data/0, data/1, ...
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its entries are compressed")
        if len(set(names)) < len(names) or sum(entry.file_size for entry in entries) > size:
            raise ValueError("its entries overlap")
        root = next(name for name in names if name.endswith("/data.pkl")).removesuffix("data.pkl")
        if archive.read(root + "byteorder").decode() != sys.byteorder:
            raise ValueError("it is from a machine with another byte order")
        storages: dict[str, Tensor] = {}

        def storage(_, dtype: torch.dtype, key: str, *rest) -> Tensor:
            name = root + "data/" + key
            if name not in storages:
                values = bytearray(archive.read(name))
                storages[name] = torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
            return storages[name]

        return _unpickle(archive.read(root + "data.pkl"), storage)


def _tensor(storage: Tensor, offset: int, shape: tuple, stride: tuple, *rest) -> Tensor:
    tensor = storage.as_strided(shape, stride, offset)  # an error if that reaches beyond the storage
    if tensor.numel() > storage.numel():  # with a stride of 0 a single value would be enough
        raise ValueError("a tensor has more values than are stored of it")
    return tensor


NAMES = {  # what torch.save refers to, and what stands for it here
    "collections OrderedDict": lambda: {}, "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": lambda tensor, *rest: tensor,
    "torch FloatStorage": torch.float32, "torch DoubleStorage": torch.float64, "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16, "torch LongStorage": torch.int64, "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16, "torch CharStorage": torch.int8, "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool}
VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TAKEN = {  # how much an instruction takes from the stack; 0 is all since the last mark
    "SETITEM": 2, "APPEND": 1, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2, "BINPERSID": 1, "BUILD": 1, "STOP": 1,
    "SETITEMS": 0, "APPENDS": 0, "TUPLE": 0}


def _is_key(key: object) -> bool:
    return type(key) is str or (type(key) is int and 0 <= key < 2**32)  # whose hashes take no time


def _unpickle(program: bytes, storage: Callable[..., Tensor]) -> object:
    """Follow the few pickle instructions that tensors and plain values need. UnpicklingError at any other.

    storage: called with what torch.save notes of a storage.
    """
    stack, marks, memo = [], [], {}
    for instruction, value, _ in pickletools.genops(program):
        name = instruction.name
        if name in TAKEN:
            at = len(stack) - TAKEN[name] if TAKEN[name] else marks.pop()
            taken = stack[at:]  # from the top of the stack, lowest first
            del stack[at:]
        match name:
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(value)
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(VALUES[name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(taken))
            case "SETITEM" | "SETITEMS" if all(map(_is_key, taken[::2])):
                stack[-1].update(zip(taken[::2], taken[1::2], strict=True))
            case "APPEND" | "APPENDS":
                stack[-1].extend(taken)
            case "MARK":
                marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "GLOBAL" if value in NAMES:
                stack.append(NAMES[value])
            case "REDUCE":
                stack.append(taken[0](*taken[1]))
            case "BINPERSID":
                stack.append(storage(*taken[0]))
            case "PROTO" | "BUILD":  # BUILD: the attributes of an OrderedDict, which are not read
                pass
            case "STOP":
                return taken[0]
            case _:
                raise pickle.UnpicklingError("it holds something other than tensors and plain values; nothing of it was run")
    raise EOFError
