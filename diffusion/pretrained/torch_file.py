"""Reads tensors from a file of `torch.save`, without PyTorch and without running code from the file.

    archive/data.pkl        a pickle: a program for a stack machine that builds the dicts            (1)
    archive/data/<key>      the bytes of one storage                                               (2)
    tensor = storage[offset + sum_i index_i stride_i]                                              (3)

    before PyTorch 1.6: four programs one after another, a number that marks the format, its version, the machine, and
    (1); then a program for the list of keys, and for each key an int64 and that many values of (2)        (4)

Unpickling can call any function that the file names. Here an interpreter of a few opcodes reads the program as data: it
supports dicts, lists, tuples, numbers and strings, and only the names `OrderedDict`, the storages and the functions
that stand for (3); an `argparse.Namespace`, which training programs save beside the weights, is read as an empty dict.
For every other name or opcode it raises an error. Sizes, offsets and strides are checked against
the size of the storage, and nothing larger than the file is allocated.
"""

import io
import os
import pickletools
import sys
import zipfile
from math import prod
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_STORAGES = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": jnp.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
}
_TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_PARAMETER, _DICT = "torch._utils._rebuild_parameter", "collections.OrderedDict"
_NAMESPACE = "argparse.Namespace"
_NAMES = {*_STORAGES, *_TENSORS, _PARAMETER, _DICT, _NAMESPACE}

# The first bytes of (4): a pickled number.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}


class _Name(str):
    """A name in `_NAMES`. What it names is never imported."""


class _Storage(NamedTuple):
    key: str
    values: np.ndarray  # flat


def read(path: str | os.PathLike) -> Any:
    """The saved object: nested dicts and lists of arrays, numbers and strings.

    Arrays are read-only views (3), which may share memory. bfloat16 tensors become arrays of the dtype of `ml_dtypes`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file contains other objects than tensors, is damaged, or has another format.
    """
    with open(path, "rb") as file:
        start = file.read(len(_LEGACY))
    try:
        if start == _LEGACY:
            with open(path, "rb") as file:
                return _Legacy(file.read()).load()
        with zipfile.ZipFile(path) as archive:
            return _Archive(archive, os.path.getsize(path)).load()
    except _Unsupported as e:
        raise ValueError(
            f"{path} {e}, which is not supported: only dicts of tensors are read, so save model.state_dict() alone"
        ) from None
    except Exception as e:  # A damaged program or archive makes the readers raise almost any exception.
        raise ValueError(f"{path} is not a file of torch.save, or damaged ({type(e).__name__}: {e})") from None


class _Unsupported(Exception):
    """The program does something other than describe data."""


class _Machine:
    """Interprets programs. A subclass has `values(key, dtype)`: a storage, flat."""

    def run(self, program: bytes) -> Any:
        """The value of a program, run on a stack of values."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def popped() -> list[Any]:
            start = marks.pop()
            values = stack[start:]
            del stack[start:]
            return values

        def fill(target: Any, values: list[Any]) -> None:
            if not isinstance(target, dict) or len(values) % 2:
                raise ValueError("the program sets items of an object that is not a dict")
            for k, v in zip(values[::2], values[1::2], strict=True):
                if not isinstance(k, str | int):
                    raise _Unsupported(f"has a key of type {type(k).__name__}")
                target[k] = v

        for opcode, argument, _ in pickletools.genops(program):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case name if name in _CONSTANTS:
                    stack.append(_CONSTANTS[name])
                case name if name in _VALUES:
                    stack.append(argument)
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_TUPLE":
                    stack.append(())
                case "MARK":
                    marks.append(len(stack))
                case "TUPLE":
                    stack.append(tuple(popped()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                    n = int(name[-1])
                    stack[-n:] = [tuple(stack[-n:])]
                case "APPEND":
                    value = stack.pop()
                    _list(stack[-1]).append(value)
                case "APPENDS":
                    values = popped()
                    _list(stack[-1]).extend(values)
                case "SETITEM":
                    values = [stack.pop(-2), stack.pop()]
                    fill(stack[-1], values)
                case "SETITEMS":
                    values = popped()
                    fill(stack[-1], values)
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    stack.append(_allowed(*argument.split(" ", 1)))
                case "STACK_GLOBAL":
                    stack[-2:] = [_allowed(*stack[-2:])]
                case "BINPERSID":
                    stack[-1] = self._storage(stack[-1])
                case "REDUCE":
                    stack[-2:] = [self._call(*stack[-2:])]
                case "NEWOBJ":
                    if stack[-2:] != [_NAMESPACE, ()] or not isinstance(stack[-2], _Name):
                        raise _Unsupported("uses the pickle instruction NEWOBJ")
                    stack[-2:] = [{}]
                case "BUILD":
                    # The version numbers that a state dict has as attributes, or the content of a Namespace.
                    stack.pop()
                    if not isinstance(stack[-1], dict):
                        raise _Unsupported("sets the state of an object")
                case "STOP":
                    return stack.pop()
                case name:
                    raise _Unsupported(f"uses the pickle instruction {name}")
        raise ValueError("the program does not end")

    def _call(self, name: Any, arguments: Any) -> Any:
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise _Unsupported("calls an object that is not a function")
        if name in _TENSORS:
            return self._tensor(*arguments[:4])
        if name == _PARAMETER:
            return arguments[0]
        if name == _DICT:
            return dict(*arguments)
        raise _Unsupported(f"calls {name}")

    def _storage(self, reference: Any) -> _Storage:
        key, dtype, numel = _checked(reference)
        values = self.values(key, dtype)
        if numel > len(values):
            raise ValueError(f"storage {key} must have {numel} values of {values.dtype} and has {len(values)}")
        return _Storage(key, values[:numel])

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> np.ndarray:
        """Eq. (3)."""
        if not isinstance(storage, _Storage):
            raise _Unsupported("makes a tensor of an object that is not a storage")
        key, values = storage
        if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)) or len(size) != len(stride):
            raise ValueError(f"a tensor has offset {offset!r}, size {size!r} and stride {stride!r}")
        if 0 in size:
            return np.zeros(size, values.dtype)
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        # A tensor with more elements than its storage repeats some of them, and its size could be anything.
        if prod(size) > len(values) or last >= len(values):
            raise ValueError(
                f"a tensor of size {list(size)}, stride {list(stride)} and offset {offset} exceeds its storage {key} "
                f"of {len(values)} values"
            )
        strides = [s * values.itemsize for s in stride]
        return np.lib.stride_tricks.as_strided(values[offset:], size, strides, writeable=False)


class _Archive(_Machine):
    def __init__(self, archive: zipfile.ZipFile, length: int) -> None:
        self._archive, self._storages = archive, {}
        programs = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise ValueError(f"it has {len(programs)} programs data.pkl, must have one")
        self._root = programs[0].removesuffix("data.pkl")
        members = archive.infolist()
        # Members must be uncompressed, and together not larger than the file, so that none unpacks to a huge size.
        if any(m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1 for m in members):
            raise ValueError("its members are compressed or encrypted")
        if any(m.file_size != m.compress_size for m in members) or sum(m.file_size for m in members) > length:
            raise ValueError("its members are larger than the file")
        order = self._member("byteorder").decode() if f"{self._root}byteorder" in archive.namelist() else "little"
        self._swap = order != sys.byteorder

    def load(self) -> Any:
        return self.run(self._member("data.pkl"))

    def values(self, key: str, dtype: np.dtype) -> np.ndarray:
        if (key, dtype) not in self._storages:
            values = self._member(f"data/{key}")
            values = np.frombuffer(values, f"u{dtype.itemsize}", len(values) // dtype.itemsize)
            self._storages[key, dtype] = (values.byteswap() if self._swap else values).view(dtype)
        return self._storages[key, dtype]

    def _member(self, name: str) -> bytes:
        return self._archive.read(self._root + name)


class _Dtypes(_Machine):
    """Runs a program only for the dtypes of its storages: without them (4) does not say where each one lies."""

    def __init__(self) -> None:
        self.found: dict[str, np.dtype] = {}

    def _storage(self, reference: Any) -> _Storage:
        key, dtype, _ = _checked(reference)
        if self.found.setdefault(key, dtype) != dtype:
            raise ValueError(f"storage {key} is used as {self.found[key]} and as {dtype}")
        return _Storage(key, np.zeros(0, dtype))

    def _tensor(self, *_: Any) -> None:
        return None


class _Legacy(_Machine):
    """Eq. (4). The bytes are little-endian, whatever the machine that wrote them."""

    def __init__(self, content: bytes) -> None:
        file, ends = io.BytesIO(content), [0]
        for _ in range(5):
            for _ in pickletools.genops(file):  # reads up to the program's last instruction
                pass
            ends.append(file.tell())
        self._program, keys = content[ends[3] : ends[4]], content[ends[4] : ends[5]]
        dtypes = _Dtypes()
        dtypes.run(self._program)
        self._content, self._places, start = content, {}, ends[5]
        for key in _list(dtypes.run(keys)):
            numel = int.from_bytes(content[start : start + 8], "little")
            self._places[key] = start + 8, numel
            start += 8 + numel * dtypes.found[key].itemsize
            if start > len(content):
                raise ValueError(f"storage {key} of {numel} values exceeds the file")

    def load(self) -> Any:
        return self.run(self._program)

    def values(self, key: str, dtype: np.dtype) -> np.ndarray:
        start, numel = self._places[key]
        values = np.frombuffer(self._content, f"u{dtype.itemsize}", numel, start)
        return (values if sys.byteorder == "little" else values.byteswap()).view(dtype)


def _checked(reference: Any) -> tuple[str, np.dtype, int]:
    """Key, dtype and number of values of a storage, from a program's reference to it."""
    match reference:
        case ("storage", _Name() as kind, str(key), str(), int(numel), *views) if kind in _STORAGES and numel >= 0:
            if views in ([], [None]):
                return key, np.dtype(_STORAGES[kind]), numel
    raise _Unsupported(f"refers to {reference!r:.80} as a storage")


def _allowed(module: Any, name: Any) -> _Name:
    full = f"{module}.{name}"
    if full not in _NAMES:
        raise _Unsupported(f"uses the name {full!r:.80}")
    return _Name(full)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("the program appends to an object that is not a list")
    return value
