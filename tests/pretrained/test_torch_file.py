"""Files of torch.save, read without PyTorch: the same numbers, and no code of the file is run.

tests/data/torch_save.pt was written by PyTorch 2.13. Tests that take `torch` write files and are skipped without it.
"""

import io
import pickle
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.pretrained import torch_file

SAVED = Path(__file__).parents[1] / "data" / "torch_save.pt"
SIGNED = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8")  # its first tensors


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def assert_same(found, saved):
    """`found` equals what was saved, with arrays for tensors, in value, shape and dtype."""
    if isinstance(saved, dict):
        assert isinstance(found, dict) and list(found) == list(saved)
        for name in saved:
            assert_same(found[name], saved[name])
    elif hasattr(saved, "detach"):
        assert found.shape == tuple(saved.shape) and found.dtype.name == str(saved.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found.astype(np.float64), saved.detach().double().numpy())
    elif isinstance(saved, np.ndarray):
        assert found.shape == saved.shape and found.dtype == saved.dtype
        np.testing.assert_array_equal(found, saved)
    elif isinstance(saved, list | tuple):
        assert type(found) is type(saved)
        for a, b in zip(found, saved, strict=True):
            assert_same(a, b)
    else:
        assert found == saved and type(found) is type(saved)


def test_a_file_of_pytorch_is_read():
    """All dtypes, views with strides and offsets, a scalar, an empty tensor, a parameter."""
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    signed, unsigned = np.arange(-2, 4).reshape(2, 3), np.arange(6).reshape(2, 3) % 3
    tensors = {name: signed.astype(jnp.dtype(name)) for name in SIGNED}
    tensors |= {"uint8": unsigned.astype(np.uint8), "bool": unsigned.astype(bool)}
    tensors |= {"transposed": base.T, "slice": base[1:, 2:5], "steps": base[::2, ::3]}
    tensors |= {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 3), np.float32)}
    tensors |= {"parameter": np.full((2, 2), 0.5, np.float32)}
    found = torch_file.read(SAVED)
    assert_same(found, {"ema": tensors, "step": 3, "name": "é"})
    ema = found["ema"]  # tensors that share a storage take no memory of their own
    assert np.shares_memory(ema["transposed"], ema["slice"]) and np.shares_memory(ema["slice"], ema["steps"])
    assert not any(x.flags.writeable for x in ema.values() if x.size)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_of_every_kind_are_read(tmp_path, protocol, torch):
    torch.manual_seed(0)
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {name: (torch.randn(3, 2) * 4).to(getattr(torch, name)) for name in (*SIGNED, "uint8", "bool")}
    tensors |= {"transposed": base.T, "slice": base[1:, 2:5], "steps": base[::2, ::3], "whole": base}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "diagonal": torch.diagonal(base)}
    tensors |= {"parameter": torch.nn.Parameter(torch.randn(2, 2))}
    tensors |= {"channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)}
    torch.save(tensors, tmp_path / "saved.pt", pickle_protocol=protocol)
    assert_same(torch_file.read(tmp_path / "saved.pt"), tensors)


def test_a_state_dict_and_a_training_checkpoint_are_read(tmp_path, torch):
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


def test_the_other_byte_order_is_converted(tmp_path):
    little = torch_file.read(SAVED)["ema"]
    sizes = {f"data/{i}": little[name].dtype.itemsize for i, name in enumerate(SIGNED)}

    def swap(name, content):
        if name.endswith("byteorder"):
            return b"big"
        size = next((n for end, n in sizes.items() if name.endswith(end)), None)
        return content if size is None else np.frombuffer(content, f"u{size}").byteswap().tobytes()

    rewrite(SAVED, tmp_path / "swapped.pt", swap)
    big = torch_file.read(tmp_path / "swapped.pt")["ema"]
    for name in SIGNED:
        assert_same(big[name], little[name])


def rewrite(source, to, change, compression=zipfile.ZIP_STORED):
    """Copies a zip archive, with members changed to change(name, content)."""
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


class Name:
    """Pickles as the function or class `module.name`, whether it exists or not."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __call__(self):
        raise AssertionError("only pickled")


class Call:
    """Pickles as a call of the function `name` with `arguments`."""

    def __init__(self, name, *arguments):
        self.call = name, arguments

    def __reduce__(self):
        return self.call


class Reference(tuple):
    """Pickles as a persistent id."""


class Pickler(pickle._Pickler):
    def persistent_id(self, value):
        return tuple(value) if isinstance(value, Reference) else None

    def save(self, value, *rest, **options):
        if not isinstance(value, Name):
            super().save(value, *rest, **options)
        elif self.proto < 4:
            self.write(f"c{value.module}\n{value.name}\n".encode())
        else:
            self.save(value.module)
            self.save(value.name)
            self.write(pickle.STACK_GLOBAL)


def program(value, protocol=2):
    file = io.BytesIO()
    Pickler(file, protocol).dump(value)
    return file.getvalue()


FLOAT, DOUBLE = Name("torch", "FloatStorage"), Name("torch", "DoubleStorage")
FLOATS = Reference(("storage", FLOAT, "0", "cpu", 6))


def tensor(storage=FLOATS, offset=0, size=(2, 3), stride=(3, 1)):
    hooks = Call(Name("collections", "OrderedDict"))
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), storage, offset, size, stride, False, hooks)


@pytest.mark.parametrize("protocol", [2, 4])
def test_programs_written_by_these_tests_are_read(tmp_path, protocol):
    path = archive(tmp_path / "a.pt", program({"x": tensor()}, protocol), [np.arange(6, dtype="f4").tobytes()])
    np.testing.assert_array_equal(torch_file.read(path)["x"], np.arange(6).reshape(2, 3))


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("posix.system", ("touch {marker}",)),
        ("builtins.eval", ("open('{marker}', 'w')",)),
        ("builtins.exec", ("open('{marker}', 'w')",)),
        ("builtins.getattr", ("x", "upper")),
        ("torch.serialization.load", ("{marker}",)),
        ("torch._utils._rebuild_device_tensor_from_numpy", (1,)),
    ],
)
def test_a_program_that_uses_any_other_name_is_an_error(tmp_path, protocol, name, arguments):
    marker = tmp_path / "marker"
    arguments = [a.format(marker=marker) if isinstance(a, str) else a for a in arguments]
    call = Call(Name(*name.rsplit(".", 1)), *arguments)
    path = archive(tmp_path / "bad.pt", program({"x": call}, protocol))
    with pytest.raises(ValueError, match="not supported") as caught:
        torch_file.read(path)
    if protocol > 1:  # older ones use unsupported instructions before
        assert f"uses the name '{name}'" in str(caught.value)
    assert "save model.state_dict() alone" in str(caught.value)
    assert not marker.exists()


def test_a_pickled_module_is_an_error(tmp_path, torch):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"uses the name 'torch\.nn\.modules\.linear\.Linear', which is not supported"):
        torch_file.read(tmp_path / "module.pt")


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        (b"\x80\x02(S'x'\ni__main__\nX\n.", "uses the pickle instruction STRING"),
        (b"\x80\x02(cos\nsystem\nX\x01\x00\x00\x00xo.", "uses the name 'os.system'"),
        (b"\x80\x02(iposix\nsystem\n.", "uses the pickle instruction INST"),
        (b"\x80\x02\x82\x01.", "uses the pickle instruction EXT1"),
        (b"\x80\x02ctorch\nFloatStorage\n)\x81.", "uses the pickle instruction NEWOBJ"),
        (b"\x80\x02ctorch\nFloatStorage\n}b.", "sets the state of an object"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage"),
        (b"\x80\x02X\x01\x00\x00\x00x)R.", "calls an object that is not a function"),
        (b"\x80\x02}(ctorch\nFloatStorage\n)K\x01u.", "has a key|not a dict"),
        (b"\x80\x02})K\x01s.", "has a key of type tuple"),
        (b"\x80\x02K\x01Q.", "refers to 1 as a storage"),
        (b"\x80\x02]K\x01K\x02s.", "sets items of an object that is not a dict"),
        (b"\x80\x02}K\x01a.", "appends to an object that is not a list"),
        (b"\x80\x02R.", "damaged"),
        (b"\x80\x02}", "damaged"),
        (b"", "damaged"),
        (b"\x80\x02X\xff\xff\xff\x7fx.", "damaged"),
    ],
)
def test_only_instructions_that_describe_data_are_executed(tmp_path, instructions, message):
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
        {"storage": Reference(("storage", FLOAT, "0", "cpu", 7))},
        {"storage": Reference(("storage", FLOAT, "0", "cpu", -1))},
        {"storage": Reference(("storage", DOUBLE, "0", "cpu", 6))},
        {"storage": Reference(("storage", FLOAT, "1", "cpu", 6))},
        {"storage": Reference(("storage", FLOAT, "../data.pkl", "cpu", 1))},
        {"storage": Reference(("module", FLOAT, "0", "cpu", 6))},
        {"storage": tensor()},
    ],
)
def test_tensors_outside_their_storage_are_an_error(tmp_path, bad):
    path = archive(tmp_path / "bad.pt", program({"x": tensor(**bad)}), [np.arange(6, dtype="f4").tobytes()])
    with pytest.raises(ValueError, match=r"bad\.pt"):
        torch_file.read(path)


def test_files_of_other_formats_are_an_error(tmp_path):
    content = SAVED.read_bytes()
    for bad in (
        b"",
        b"hello",
        torch_file._LEGACY + b"the rest",
        pickle.dumps({"x": 1}),
        content[: len(content) // 2],
        content[100:],
    ):
        (tmp_path / "bad.pt").write_bytes(bad)
        with pytest.raises(ValueError, match=r"bad\.pt is not a file of torch\.save, or damaged"):
            torch_file.read(tmp_path / "bad.pt")
    rewrite(SAVED, tmp_path / "packed.pt", lambda name, content: content, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed or encrypted"):
        torch_file.read(tmp_path / "packed.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as file:
        file.writestr("readme", "hello")
    with pytest.raises(ValueError, match="has 0 programs"):
        torch_file.read(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError):
        torch_file.read(tmp_path / "none.pt")


def test_files_of_older_versions_of_pytorch_are_read(tmp_path, torch):
    """Views of one storage, every dtype, a parameter, and a dict inside."""
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {name: (torch.arange(6.0).reshape(3, 2)).to(getattr(torch, name)) for name in (*SIGNED, "uint8", "bool")}
    tensors |= {"transposed": base.T, "slice": base[1:, 2:5], "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    tensors |= {"parameter": torch.nn.Parameter(torch.ones(2, 2))}
    saved = {"model": torch.nn.Conv2d(3, 4, 3).state_dict(), "ema": tensors, "step": 3}
    torch.save(saved, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    found = torch_file.read(tmp_path / "legacy.pt")
    assert_same(found, {**saved, "model": dict(saved["model"])})
    assert np.shares_memory(found["ema"]["transposed"], found["ema"]["slice"])


def legacy(path, program, storages, keys="01"):
    """A file as PyTorch wrote it before 1.6."""
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [torch_file._LEGACY, pickle.dumps(1001, 2), pickle.dumps(machine, 2), program, pickle.dumps(list(keys), 2)]
    path.write_bytes(b"".join([*parts, *(n.to_bytes(8, "little") + content for n, content in storages)]))
    return path


def old_tensors(a=6, b=4, views=None):
    """A program of two tensors, whose references to storages have a sixth entry, as they had."""
    first, second = (
        Reference(("storage", FLOAT, "0", "cpu", a, views)),
        Reference(("storage", DOUBLE, "1", "cpu", b, views)),
    )
    return program({"a": tensor(first), "b": tensor(second, 0, (2, 2), (1, 2))})


OLD = [(6, np.arange(6, dtype="<f4").tobytes()), (4, np.arange(4, dtype="<f8").tobytes())]


def test_programs_of_the_older_format_are_read(tmp_path):
    found = torch_file.read(legacy(tmp_path / "a.pt", old_tensors(), OLD))
    np.testing.assert_array_equal(found["a"], np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(found["b"], [[0, 2], [1, 3]])
    assert not found["a"].flags.writeable


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"storages": OLD[:1]}, "exceeds the file"),
        ({"storages": [OLD[0], (2**62, OLD[1][1])]}, "exceeds the file"),
        ({"storages": [OLD[0], (3, OLD[1][1])]}, "storage 1 must have 4 values of float64 and has 3"),
        ({"keys": "02"}, "damaged"),
        ({"keys": "0"}, "damaged"),
        ({"program": old_tensors(b=5)}, "storage 1 must have 5"),
        ({"program": old_tensors(views=("0", 0, 3))}, "as a storage, which is not supported"),
        (
            {"program": program({"a": tensor(), "b": tensor(Reference(("storage", DOUBLE, "0", "cpu", 6)))})},
            "is used as",
        ),
        ({"program": program({"a": Call(Name("posix", "system"), "true")})}, "uses the name 'posix.system'"),
    ],
)
def test_damage_and_other_names_in_the_older_format_are_an_error(tmp_path, changed, message):
    given = {"program": old_tensors(), "storages": OLD} | changed
    with pytest.raises(ValueError, match=rf"bad\.pt.*{message}"):
        torch_file.read(legacy(tmp_path / "bad.pt", **given))


def test_a_flipped_byte_of_a_storage_is_detected(tmp_path):
    content = bytearray(SAVED.read_bytes())
    content[content.index(np.arange(24, dtype="f4").tobytes()) + 6] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match="CRC"):
        torch_file.read(tmp_path / "x.pt")


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    """The program and the storages of a small state dict."""
    b = Reference(("storage", DOUBLE, "1", "cpu", 4))
    instructions = program({"a": tensor(), "b": tensor(b, 0, (2, 2), (1, 2))})
    storages = [np.ones(6, "f4").tobytes(), np.arange(4.0).tobytes()]
    path = archive(tmp_path_factory.mktemp("torch") / "undamaged.pt", instructions, storages)
    np.testing.assert_array_equal(torch_file.read(path)["b"], [[0, 2], [1, 3]])
    return path, instructions, storages


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_program_gives_arrays_in_bounds_or_a_value_error(undamaged, data):
    path, instructions, storages = undamaged
    damaged = bytearray(instructions)
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    assert_in_bounds(archive(path.with_name("damaged.pt"), bytes(damaged), storages))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_file_of_the_older_format_gives_arrays_in_bounds_or_a_value_error(undamaged, data):
    path = legacy(undamaged[0].with_name("damaged_legacy.pt"), old_tensors(), OLD)
    damaged = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(len(torch_file._LEGACY), len(damaged) - 1), min_size=1, max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    assert_in_bounds(path)


def assert_in_bounds(path):
    try:
        found = torch_file.read(path)
    except ValueError:
        return
    for x in found.values() if isinstance(found, dict) else ():
        assert not isinstance(x, np.ndarray) or x.size <= 32 and x.sum() is not None
