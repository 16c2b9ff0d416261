"""Files of torch.save, read without PyTorch: the same numbers, and nothing but numbers."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.pretrained import torch_file


def assert_same(found, saved):
    """`found` is what was saved, arrays for tensors, in value, shape and dtype."""
    if isinstance(saved, dict):
        assert isinstance(found, dict) and list(found) == list(saved)
        for name in saved:
            assert_same(found[name], saved[name])
    elif isinstance(saved, torch.Tensor):
        assert found.shape == tuple(saved.shape) and found.dtype.name == str(saved.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found.astype(np.float64), saved.detach().double().numpy())
    elif isinstance(saved, list | tuple):
        assert type(found) is type(saved)
        for a, b in zip(found, saved, strict=True):
            assert_same(a, b)
    else:
        assert found == saved and type(found) is type(saved)


def saved_tensors():
    torch.manual_seed(0)
    base = torch.arange(24.0).reshape(4, 6)
    dtypes = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    tensors = {name: (torch.randn(3, 2) * 4).to(getattr(torch, name)) for name in dtypes}
    tensors |= {"transposed": base.T, "slice": base[1:, 2:5], "steps": base[::2, ::3], "whole": base}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "diagonal": torch.diagonal(base)}
    return tensors | {
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_of_every_kind_come_back(tmp_path, protocol):
    saved = saved_tensors()
    torch.save(saved, tmp_path / "saved.pt", pickle_protocol=protocol)
    assert_same(torch_file.read(tmp_path / "saved.pt"), saved)


def test_a_state_dict_and_a_training_checkpoint_come_back(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = {
        "state": {0: {"exp_avg": torch.randn(2, 3)}},
        "param_groups": [{"betas": (0.9, 0.99), "amsgrad": False}],
    }
    checkpoint = {"model": model.state_dict(), "opt": optimizer, "step": 3, "name": "é", "none": None, "big": 2**40}
    torch.save(checkpoint, tmp_path / "run.pt")
    found = torch_file.read(tmp_path / "run.pt")
    assert_same(found["model"], dict(model.state_dict()))
    assert_same({k: v for k, v in found.items() if k != "model"}, {k: v for k, v in checkpoint.items() if k != "model"})


def test_tensors_that_share_a_storage_take_no_memory_of_their_own(tmp_path):
    base = torch.arange(1000.0).reshape(10, 100)
    torch.save({"rows": base, "columns": base.T, "tail": base[5:]}, tmp_path / "shared.pt")
    found = torch_file.read(tmp_path / "shared.pt")
    assert np.shares_memory(found["rows"], found["columns"]) and np.shares_memory(found["rows"], found["tail"])
    assert not any(x.flags.writeable for x in found.values())


def test_the_other_byte_order_is_turned(tmp_path):
    saved = {"a": torch.tensor([1.0, -2.5]), "b": torch.tensor([1.5, 2.0], dtype=torch.bfloat16)}
    torch.save(saved, tmp_path / "native.pt")

    def turn(name, content):
        if name.endswith("byteorder"):
            return b"big"
        sizes = {"data/0": 4, "data/1": 2}
        size = next((n for end, n in sizes.items() if name.endswith(end)), None)
        return content if size is None else np.frombuffer(content, f"u{size}").byteswap().tobytes()

    rewrite(tmp_path / "native.pt", tmp_path / "turned.pt", turn)
    assert_same(torch_file.read(tmp_path / "turned.pt"), saved)


def rewrite(source, to, change, compression=zipfile.ZIP_STORED):
    """Copies a zip archive, its members as change(name, content) gives them."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(to, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def archive(path, program, storages=()):
    """A file with the program `program` and storages of the given bytes."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
        for key, content in enumerate(storages):
            file.writestr(f"archive/data/{key}", content)
    return path


class Stands:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Reference(tuple):
    """Pickles as a persistent id."""


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return tuple(value) if isinstance(value, Reference) else None


def program(value, protocol=2):
    file = io.BytesIO()
    Pickler(file, protocol).dump(value)
    return file.getvalue()


FLOATS = Reference(("storage", torch.FloatStorage, "0", "cpu", 6))


def tensor(storage=FLOATS, offset=0, size=(2, 3), stride=(3, 1)):
    return Stands(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())


def test_programs_made_for_these_tests_are_read(tmp_path):
    found = torch_file.read(archive(tmp_path / "a.pt", program({"x": tensor()}), [np.arange(6, dtype="f4").tobytes()]))
    np.testing.assert_array_equal(found["x"], np.arange(6).reshape(2, 3))


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {marker}",), "posix.system"),
        (eval, ("open('{marker}', 'w')",), "builtins.eval"),
        (exec, ("open('{marker}', 'w')",), "builtins.exec"),
        (getattr, ("x", "upper"), "builtins.getattr"),
        (torch.load, ("{marker}",), "torch.serialization.load"),
        (torch._utils._rebuild_device_tensor_from_numpy, (1,), "torch._utils._rebuild_device_tensor_from_numpy"),
    ],
)
def test_a_program_that_asks_for_anything_else_is_refused_by_name(tmp_path, protocol, function, arguments, name):
    marker = tmp_path / "marker"
    arguments = [a.format(marker=marker) if isinstance(a, str) else a for a in arguments]
    path = archive(tmp_path / "bad.pt", program({"x": Stands(function, *arguments)}, protocol))
    with pytest.raises(ValueError, match="refused") as caught:
        torch_file.read(path)
    if protocol > 1:  # older ones have instructions of their own for what comes before
        assert f"asks for '{name}'" in str(caught.value).replace("__builtin__", "builtins")
    assert "save model.state_dict() by itself" in str(caught.value)
    assert not marker.exists()


def test_a_pickled_module_is_refused_by_name(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"asks for 'torch\.nn\.modules\.linear\.Linear': refused"):
        torch_file.read(tmp_path / "module.pt")


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        (b"\x80\x02(S'x'\ni__main__\nX\n.", "uses the pickle instruction STRING"),
        (b"\x80\x02(cos\nsystem\nX\x01\x00\x00\x00xo.", "asks for 'os.system'"),
        (b"\x80\x02(iposix\nsystem\n.", "uses the pickle instruction INST"),
        (b"\x80\x02\x82\x01.", "uses the pickle instruction EXT1"),
        (b"\x80\x02ctorch\nFloatStorage\n)\x81.", "uses the pickle instruction NEWOBJ"),
        (b"\x80\x02ctorch\nFloatStorage\n}b.", "sets the state of an object"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage"),
        (b"\x80\x02X\x01\x00\x00\x00x)R.", "calls what is no name"),
        (b"\x80\x02}(ctorch\nFloatStorage\n)K\x01u.", "has a key|odd|no dict"),
        (b"\x80\x02})K\x01s.", "has a key of type tuple"),
        (b"\x80\x02K\x01Q.", "refers to 1, which is no storage"),
        (b"\x80\x02]K\x01K\x02s.", "puts items into what is no dict"),
        (b"\x80\x02}K\x01a.", "appends to what is no list"),
        (b"\x80\x02R.", "damaged"),
        (b"\x80\x02}", "damaged"),
        (b"", "damaged"),
        (b"\x80\x02X\xff\xff\xff\x7fx.", "damaged"),
    ],
)
def test_no_instruction_but_those_of_data_is_carried_out(tmp_path, instructions, message):
    with pytest.raises(ValueError, match=message):
        torch_file.read(archive(tmp_path / "bad.pt", instructions))


@pytest.mark.parametrize(
    "bad",
    [
        {"offset": 1},
        {"offset": -1},
        {"offset": 10**30},
        {"size": (3, 3)},
        {"size": (2, -3)},
        {"size": (2, True)},
        {"size": (2, 3.0)},
        {"stride": (3,)},
        {"stride": (4, 1)},
        {"stride": (-3, 1)},
        {"stride": (3, 2**62)},
        {"size": (10**9, 10**9), "stride": (0, 0)},
        {"size": (7,), "stride": (0,)},
        {"size": (0, 10**30)},
        {"storage": Reference(("storage", torch.FloatStorage, "0", "cpu", 7))},
        {"storage": Reference(("storage", torch.FloatStorage, "0", "cpu", -1))},
        {"storage": Reference(("storage", torch.DoubleStorage, "0", "cpu", 6))},
        {"storage": Reference(("storage", torch.FloatStorage, "1", "cpu", 6))},
        {"storage": Reference(("storage", torch.FloatStorage, "../data.pkl", "cpu", 1))},
        {"storage": Reference(("module", torch.FloatStorage, "0", "cpu", 6))},
        {"storage": tensor()},
    ],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, bad):
    path = archive(tmp_path / "bad.pt", program({"x": tensor(**bad)}), [np.arange(6, dtype="f4").tobytes()])
    with pytest.raises(ValueError, match=r"bad\.pt"):
        torch_file.read(path)


def test_files_of_other_kinds_are_refused(tmp_path):
    saved = {"x": torch.ones(50)}
    torch.save(saved, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"format of PyTorch before 1\.6.*save it again"):
        torch_file.read(tmp_path / "legacy.pt")
    torch.save(saved, tmp_path / "good.pt")
    content = (tmp_path / "good.pt").read_bytes()
    for bad in (b"", b"hello", pickle.dumps({"x": 1}), content[: len(content) // 2], content[100:]):
        (tmp_path / "bad.pt").write_bytes(bad)
        with pytest.raises(ValueError, match=r"bad\.pt is not a file of torch\.save, or damaged"):
            torch_file.read(tmp_path / "bad.pt")
    rewrite(tmp_path / "good.pt", tmp_path / "packed.pt", lambda name, content: content, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed or encrypted"):
        torch_file.read(tmp_path / "packed.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as file:
        file.writestr("readme", "hello")
    with pytest.raises(ValueError, match="holds 0 programs"):
        torch_file.read(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError):
        torch_file.read(tmp_path / "none.pt")


def test_a_flipped_byte_of_a_storage_is_noticed(tmp_path):
    torch.save({"x": torch.ones(500)}, tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[content.index(np.ones(8, "f4").tobytes()) + 6] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match="CRC"):
        torch_file.read(tmp_path / "x.pt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The program and the storages of a small state dict."""
    path = tmp_path_factory.mktemp("torch") / "whole.pt"
    torch.save({"a": torch.ones(2, 3), "b": torch.arange(4).reshape(2, 2).T}, path)
    with zipfile.ZipFile(path) as file:
        return path, file.read("whole/data.pkl"), [file.read(f"whole/data/{key}") for key in "01"]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_program_gives_arrays_in_bounds_or_one_kind_of_error(whole, data):
    path, instructions, storages = whole
    damaged = bytearray(instructions)
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    try:
        found = torch_file.read(archive(path.with_name("damaged.pt"), bytes(damaged), storages))
    except ValueError:
        return
    for x in found.values() if isinstance(found, dict) else ():
        assert not isinstance(x, np.ndarray) or x.size <= 32 and x.sum() is not None
