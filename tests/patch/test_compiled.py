"""Compiled patches: pieces and lines of memory, conversion, `out`, threads, processes, caches, and noised patches."""

import doctest
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from math import prod

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.random import threefry_2x32
from scipy.special import ndtr

from diffusion.patch import compiled, kernels, views
from diffusion.patch.compiled import fold, noised_patches, patchify, unpatchify
from tests.patch.test_views import arrays, cuts


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.slow
def test_examples_in_docstrings():
    result = doctest.testmod(compiled)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(st.data())
def test_pieces_are_the_view_in_order(data):
    """What the compiled loop does, in slow motion: pieces at their offsets, runs at their strides, byte by byte."""
    size, p, s = data.draw(cuts())
    x = data.draw(arrays((1, *size, data.draw(st.integers(1, 3))), ("u1", "f4", "c16")))
    view = views.token_view(x, p, s, data.draw(st.sampled_from(("hwc", "chw"))))[0]
    limit = data.draw(st.sampled_from((16, 64, 100, 1024)))
    (n1, n2, n3, run), steps, offsets = compiled._pieces(view.shape, view.strides, x.itemsize, limit)
    owner = x
    while owner.base is not None:
        owner = owner.base
    memory = np.frombuffer(owner, np.uint8)
    start = view.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
    pieces = [
        memory[start + at + j1 * steps[0] + j2 * steps[1] + j3 * steps[2] :][:run]
        for at in offsets
        for j1 in range(n1)
        for j2 in range(n2)
        for j3 in range(n3)
    ]
    assert np.concatenate(pieces).tobytes() == view.tobytes()
    assert n1 * n2 * n3 * run <= max(limit, run)


def test_a_long_run_is_cut_into_pieces_of_at_most_the_limit():
    (n1, n2, n3, run), _, offsets = compiled._pieces((3, 16000), (32000, 4), 4, 1024)
    assert (n1, n2, n3, run, len(offsets)) == (1, 1, 1, 1000, 3 * 64)
    (_, _, _, run), _, offsets = compiled._pieces((2, 10007), (80000, 4), 4, 1024)  # a prime
    assert (run, len(offsets)) == (4 * 10007, 2)


@pytest.mark.parametrize("shape,p,s", [((6, 28, 28, 1), 7, 7), ((5, 30, 1), 10, 5), ((2, 4096, 1), 2048, 2048)])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dtype", ["f4", "u1"])
def test_every_alignment_of_the_output(monkeypatch, rng, shape, p, s, stream, dtype):
    """Lines begin at any of the offsets that an array may have, past the caches or not; neighbours stay untouched."""
    monkeypatch.setattr(compiled, "_STREAM", 0 if stream else 1 << 40)
    monkeypatch.setattr(compiled, "_CHUNK", 1)  # one image a call: each begins where the one before ended
    x = rng.integers(0, 200, shape).astype(dtype)
    expected = views.patchify(x, p, s)
    store = np.zeros(expected.nbytes + 256, np.uint8)
    for offset in range(0, 68, expected.itemsize if dtype == "f4" else 7):
        store[:] = 171
        at = offset + -store.__array_interface__["data"][0] % 64
        out = store[at : at + expected.nbytes].view(dtype).reshape(expected.shape)
        patchify(x, p, s, out=out, threads=1 + offset % 2)
        np.testing.assert_array_equal(out, expected)
        assert (store[:at] == 171).all()
        assert (store[at + expected.nbytes :] == 171).all()


def test_more_than_the_caches_hold(rng):
    x = rng.integers(0, 256, (3001, 28, 28, 1), np.uint8)
    tokens = patchify(x, 7, dtype=np.float32, scale=1 / 127.5, shift=-1, threads=3)
    assert x.nbytes + tokens.nbytes > 2 * compiled._CHUNK
    expected = views.patchify(x, 7).astype(np.float32) * np.float32(1 / 127.5) + np.float32(-1)
    np.testing.assert_array_equal(tokens, expected)
    assert tokens.min() == -1
    assert tokens.max() == 1
    back = unpatchify(tokens, (28, 28), 7, threads=2)
    np.testing.assert_array_equal(patchify(back, 7, threads=1), tokens)


CONVERSIONS = [
    ("u1", "f4"),
    ("i2", "f8"),
    ("?", "f4"),
    ("u8", "f4"),
    ("i8", "i2"),
    ("u1", "i8"),
    ("i1", "i4"),
    ("f8", "f4"),
    ("f4", "f8"),
    ("u1", "f2"),
    ("f2", "f4"),
    (">f4", "f4"),
    ("f4", ">f8"),
    ("f4", "c8"),
    ("g", "f8"),
]


@pytest.mark.parametrize("source,target", CONVERSIONS)
def test_conversion_is_that_of_numpy(rng, source, target):
    x = rng.integers(-(2**62), 2**62, (3, 9, 9, 1))
    x = x.astype(source) if np.dtype(source).kind != "f" else (x / 2**60).astype(source)
    if x.dtype.kind == "f":
        x[0, 0, 0], x[1, 1, 1] = np.nan, np.inf
    tokens = patchify(x, 3, dtype=target)
    expected = views.patchify(x, 3).astype(target)
    assert tokens.dtype == target
    assert tokens.tobytes() == expected.tobytes()


@pytest.mark.parametrize("source,target", [(s, t) for s, t in CONVERSIONS if t in ("f2", "f4", "f8", ">f8")])
def test_scaling_is_computed_wide_and_rounded_once(rng, source, target):
    x = rng.integers(0, 100, (3, 9, 9, 1)).astype(source)
    wide = np.result_type(source, target, np.float32)
    expected = (x.astype(wide) * wide.type(0.3) + wide.type(-7)).astype(target)
    tokens = patchify(x, 3, dtype=target, scale=0.3, shift=-7)
    np.testing.assert_array_equal(tokens, views.patchify(expected, 3))


def test_the_output_gives_the_dtype():
    out = np.empty((2, 4, 4), np.float32)
    assert patchify(np.ones((2, 4, 4, 1), np.uint8), 2, scale=0.5, out=out) is out
    assert (out == 0.5).all()


X = np.zeros((2, 4, 4, 1), np.uint8)
STORE = np.zeros(64, np.uint8)
LOCKED = np.zeros((2, 4, 4), np.uint8)
LOCKED.flags.writeable = False


@pytest.mark.parametrize(
    "error,words,options",
    [
        (TypeError, "out has dtype float64, expected uint8", {"out": np.zeros((2, 4, 4)), "dtype": np.uint8}),
        (TypeError, "out must be a NumPy array, got list", {"out": [0] * 32}),
        (ValueError, r"out has shape \(2, 4, 5\), expected \(2, 4, 4\)", {"out": np.zeros((2, 4, 5), np.uint8)}),
        (ValueError, "C-contiguous", {"out": np.zeros((4, 4, 2), np.uint8).T}),
        (ValueError, "writeable", {"out": LOCKED}),
        (ValueError, "aligned", {"out": np.zeros(129, np.uint8)[1:].view(np.float32).reshape(2, 4, 4)}),
        (ValueError, "overlaps", {"x": STORE[:32].reshape(2, 4, 4, 1), "out": STORE[31:63].reshape(2, 4, 4)}),
        (TypeError, "float32 does not convert to uint8", {"x": X.astype(np.float32), "dtype": np.uint8}),
        (TypeError, "complex64 does not convert to float32", {"x": X.astype(np.complex64), "dtype": np.float32}),
        (TypeError, "uint8: pass dtype=np.float32", {"scale": 2.0}),
        (TypeError, "complex64: pass dtype", {"scale": 2.0, "dtype": np.complex64}),
        (ValueError, "scale=nan", {"scale": float("nan"), "dtype": np.float32}),
        (ValueError, "shift=inf", {"shift": float("inf"), "dtype": np.float32}),
        (ValueError, "threads=0", {"threads": 0}),
    ],
)
def test_refusals(error, words, options):
    with pytest.raises(error, match=words):
        patchify(**{"x": X, "patch_size": 2, **options})


def test_unpatchify_and_fold_check_their_output():
    tokens = np.zeros((2, 4, 9))
    for f in (fold, unpatchify):
        with pytest.raises(ValueError, match="out has shape"):
            f(tokens, (5, 5), 3, 2, out=np.zeros((2, 5, 5)))
        with pytest.raises(ValueError, match="overlaps"):
            f(tokens, (5, 5), 3, 2, out=tokens.reshape(-1)[:50].reshape(2, 5, 5, 1))
        out = np.full((2, 5, 5, 1), 7.0)
        assert f(tokens, (5, 5), 3, 2, out=out) is out
        assert (out == 0).all()


@pytest.mark.parametrize(
    "size,p,s", [((9,), 3, 2), ((5, 7), 3, 2), ((3, 5, 4), (2, 3, 2), (1, 2, 2)), ((3, 3, 3, 3), 2, 1)]
)
@pytest.mark.parametrize("layout", ["hwc", "chw"])
@pytest.mark.parametrize("dtype", ["f8", "c8", "f2"])
def test_sums_are_those_of_numpy(rng, size, p, s, layout, dtype):
    tokens = rng.standard_normal(views.patchify(np.zeros((3, *size, 2)), p, s).shape).astype(dtype)
    for name in ("fold", "unpatchify"):
        expected = getattr(views, name)(tokens, size, p, s, layout=layout)
        given_order = getattr(compiled, name)(tokens[::-1], size, p, s, layout=layout)[::-1]
        np.testing.assert_array_equal(given_order, expected)


def noised_reference(x0, eps, alpha, sigma, p, s, level, scale, shift, layout):
    """The blog's steps, each an array: tile, scale, mix, cut twice, append the level."""
    f = np.float32
    tiled = np.concatenate([x0] * (len(eps) // len(x0))).astype(f) * f(scale) + f(shift)
    column = (slice(None), *[None] * (eps.ndim - 1))
    xt = alpha.astype(f)[column] * tiled + sigma.astype(f)[column] * eps
    tokens = views.patchify(xt, p, s, layout=layout)
    last = np.broadcast_to(level.astype(f)[:, None, None], (len(eps), 1, tokens.shape[-1]))
    return np.concatenate([tokens, last], 1), views.patchify(eps, p, s, layout=layout)


@pytest.mark.parametrize(
    "size,p,s,c,layout",
    [
        ((28, 28), 18, 10, 1, "hwc"),
        ((6, 8), 2, None, 3, "chw"),
        ((20,), 5, 3, 2, "hwc"),
        ((3, 4, 5), (2, 2, 3), (1, 2, 2), 2, "chw"),
    ],
)
def test_noised_patches_are_the_separate_steps(rng, size, p, s, c, layout):
    x0 = rng.integers(0, 256, (4, *size, c), np.uint8)
    eps = rng.standard_normal((12, *size, c), np.float32)
    alpha, sigma, level = rng.random((3, 12))
    expected = noised_reference(x0, eps, alpha, sigma, p, s, level, 1 / 127.5, -1, layout)
    options = {"layout": layout, "scale": 1 / 127.5, "shift": -1}
    for threads in (1, 2):
        noised, target = noised_patches(x0, eps, alpha, sigma, p, s, level=level, threads=threads, **options)
        np.testing.assert_array_equal(noised, expected[0])
        np.testing.assert_array_equal(target, expected[1])
    again = noised_patches(x0, eps.astype(np.float64), alpha, sigma, p, s, out=(noised, target), **options)
    assert again[0] is noised
    np.testing.assert_array_equal(noised[:, -1, 0], alpha.astype(np.float32))  # the default level


@pytest.mark.parametrize("size", [(28, 28, 1), (3, 5, 1)])
def test_noise_is_the_published_generator_and_transform(size):
    """Threefry of JAX, and the radius and the angle in double precision."""
    seed, n, half = (7 << 32) + 5, 6, -(-prod(size) // 2)
    words = np.stack(
        [
            threefry_2x32(
                jnp.array([5, 7], jnp.uint32),
                jnp.concatenate([jnp.full(half, r, jnp.uint32), jnp.arange(half, dtype=jnp.uint32)]),
            ).reshape(2, half)
            for r in range(n)
        ],
        1,
    )
    radius = np.sqrt(-2 * np.log((words[0] // 2 + 0.5) / 2**31)) * (1 - 2.0 * (words[0] % 2))
    angle = np.pi * words[1].view(np.int32) / 2**32
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1)[:, : prod(size)]
    eps = drawn(seed, n, size)
    np.testing.assert_allclose(eps, expected, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(drawn(seed, 2 * n, size, threads=2)[:n], eps)


def test_drawn_noise_is_what_the_mixture_and_the_targets_hold(rng):
    x0 = rng.integers(0, 256, (4, 28, 28, 1), np.uint8)
    alpha, sigma = rng.random((2, 3000))  # enough to be cut into chunks for several threads
    eps = drawn(3, 3000, (28, 28, 1)).reshape(-1, 28, 28, 1)
    for threads in (1, 2):
        got = noised_patches(x0, 3, alpha, sigma, 18, 10, threads=threads)
        for one, other in zip(got, noised_patches(x0, eps, alpha, sigma, 18, 10), strict=True):
            np.testing.assert_array_equal(one, other)


def test_noise_is_normal_and_independent():
    """Moments, distribution and correlations within five standard errors of their values for independent normals."""
    x = np.concatenate([drawn(seed, 1000, (28, 28, 1)) for seed in (0, 1)]).astype(np.float64)
    n = x.size
    moments = [x.mean(), (x**2).mean() - 1, (x**3).mean(), (x**4).mean() - 3]
    assert np.abs(moments / np.sqrt(np.array([1, 2, 15, 96]) / n)).max() < 5
    ordered = np.sort(x.reshape(-1))
    normal = ndtr(ordered)
    assert np.abs(normal - (np.arange(n) + 0.5) / n).max() < 2.5 / np.sqrt(n)  # Kolmogorov: p = 7e-6
    pairs = {
        "within a row": (x[:, 1:], x[:, :-1]),
        "cosine and sine": (x[:, :392], x[:, 392:]),
        "rows": (x[1:], x[:-1]),
        "seeds": (x[:1000], x[1000:]),
    }
    for name, (a, b) in pairs.items():
        for u, v in ((a, b), ((a**2 - 1) / 2**0.5, (b**2 - 1) / 2**0.5)):
            assert abs((u * v).mean()) < 5 / np.sqrt(u.size), name


def drawn(seed, n, size, threads=1):
    """The noise [n, prod(size)] of a seed: one window is the whole image."""
    zero = np.zeros((1, *size), np.uint8)
    return noised_patches(zero, seed, np.zeros(n), np.ones(n), size[:-1], threads=threads)[1].reshape(n, -1)


def test_noised_patches_of_nothing():
    noised, target = noised_patches(np.zeros((0, 4, 1)), np.zeros((0, 4, 1)), np.zeros(0), np.zeros(0), 2)
    assert (noised.shape, target.shape) == ((0, 3, 2), (0, 2, 2))


@pytest.mark.parametrize(
    "error,words,change",
    [
        (ValueError, "multiple of the 2 images", {"eps": np.zeros((3, 4, 4, 1))}),
        (ValueError, "multiple of the 2 images", {"eps": np.zeros((4, 4, 5, 1))}),
        (TypeError, "eps has dtype int64", {"eps": np.zeros((4, 4, 4, 1), np.int64)}),
        (ValueError, "eps=-1 is not a seed", {"eps": -1}),
        (TypeError, "x0 has dtype complex128", {"x0": np.zeros((2, 4, 4, 1), complex)}),
        (ValueError, r"alpha has shape \(3,\)", {"alpha": np.zeros(3)}),
        (ValueError, r"sigma\[1\] is not finite", {"sigma": np.array([0, np.nan, 0, 0])}),
        (ValueError, r"level\[3\] is not finite", {"level": np.array([0, 0, 0, np.inf])}),
        (ValueError, "scale=nan", {"scale": float("nan")}),
        (ValueError, "does not tile", {"patch_size": 3}),
        (ValueError, "up to 3 spatial axes", {"x0": np.zeros((2, 2, 2, 2, 2, 1)), "eps": np.zeros((2, 2, 2, 2, 2, 1))}),
        (ValueError, r"out\[0\] has shape", {"out": (np.zeros((4, 4, 4), np.float32),) * 2}),
        (TypeError, r"out\[0\] has dtype float64", {"out": (np.zeros((4, 5, 4)), np.zeros((4, 4, 4)))}),
    ],
)
def test_noised_patches_refuses(error, words, change):
    good = {"x0": X, "eps": np.zeros((4, 4, 4, 1)), "alpha": np.ones(4), "sigma": np.ones(4), "patch_size": 2}
    with pytest.raises(error, match=words):
        noised_patches(**{**good, **change})


def test_noised_patches_refuses_outputs_that_overlap():
    store = np.zeros((4, 5, 4), np.float32)
    with pytest.raises(ValueError, match=r"out\[1\] overlaps"):
        noised_patches(
            X, np.zeros((4, 4, 4, 1)), np.ones(4), np.ones(4), 2, out=(store, store.reshape(-1)[:64].reshape(4, 4, 4))
        )


@pytest.mark.slow
def test_many_threads_at_once(rng):
    """Callers that are threads themselves, each with helpers, some compiling."""
    x = rng.random((400, 36, 36, 1), np.float32)
    sizes = (2, 3, 4, 6, 9, 12) * 2
    with ThreadPoolExecutor(len(sizes)) as pool:
        every = list(pool.map(lambda p: patchify(x, p, threads=2), sizes))
    for p, tokens in zip(sizes, every, strict=True):
        np.testing.assert_array_equal(tokens, views.patchify(x, p))


def test_an_error_in_a_helper_reaches_the_caller():
    def work(start, stop):
        if start:
            raise RuntimeError(f"at {start}")

    with pytest.raises(RuntimeError, match="at "):
        compiled._in_chunks(work, 8, 1 << 22, 1 << 22, 2)


def run(*arguments: str, **environment: str) -> str:
    """Output of a Python process of its own; a crash, a hang or an exception fails the test."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that children that hang can be ended with it
    )
    try:
        output, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors
    return output


CHECK = """
import os, threading, time, numpy as np
from diffusion.patch import compiled, kernels, views
x = np.arange(300 * 28 * 28, dtype=np.float32).reshape(300, 28, 28, 1)
def check(p, x=x):
    x = np.repeat(x, 10, 0)  # enough for two threads
    assert (compiled.patchify(x, p, threads=2) == views.patchify(x, p)).all()
"""

FORK = """
check(7)
stop = threading.Event()
def compile_all_the_time():
    n = 1
    while not stop.is_set():
        compiled.patchify(np.zeros((2, 64 + n, 1), np.uint8), 64 + n)  # another length, another kernel
        n += 1
        time.sleep(0.001)  # locks are not fair: without a pause fork may wait for long
thread = threading.Thread(target=compile_all_the_time)
thread.start()
children = []
for p in (2, 4, 14):
    child = os.fork()
    if not child:
        check(p)
        os._exit(0)
    children.append(child)
codes = [os.waitpid(child, 0)[1] for child in children]
stop.set()
thread.join()
assert codes == [0, 0, 0], codes
"""

SPAWN = """
import multiprocessing
if __name__ == "__main__":
    check(7)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        got = pool.starmap(compiled.patchify, [(x, 7), (x, 14), (x, 7), (x, 4)])
    for p, tokens in zip((7, 14, 7, 4), got):
        assert (tokens == views.patchify(x, p)).all()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_while_another_thread_compiles(tmp_path):
    run("-c", CHECK + FORK, NUMBA_CACHE_DIR=str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["workqueue", "omp", "tbb"])
def test_threads_under_every_threading_layer(layer):
    script = CHECK + (
        "threads = [threading.Thread(target=check, args=(p,)) for p in (7, 4, 7, 4)]\n"
        "[t.start() for t in threads], [t.join() for t in threads]\ncheck(7)\n"
        "child = os.fork()\nif not child: check(7); os._exit(0)\nassert os.waitpid(child, 0)[1] == 0\n"
    )
    run("-c", script, NUMBA_THREADING_LAYER=layer)


@pytest.mark.slow
def test_spawned_workers(tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(CHECK + SPAWN)
    run(str(script))


HITS = CHECK + "check(7)\nprint(sum(sum(k.stats.cache_hits.values()) for k in kernels.programs.values()))"


@pytest.mark.slow
def test_compiled_code_is_kept_between_processes(tmp_path):
    assert run("-c", HITS, NUMBA_CACHE_DIR=str(tmp_path)).split() == ["0"]
    assert run("-c", HITS, NUMBA_CACHE_DIR=str(tmp_path)).split() == ["1"]
    for path in tmp_path.rglob("*.nb[ci]"):  # and damage to it does no harm
        path.write_bytes(path.read_bytes()[:40])
    assert run("-c", HITS, NUMBA_CACHE_DIR=str(tmp_path)).split() == ["0"]


ONLY_THERE = "UserProvidedCacheLocator"  # Numba would otherwise try the source's folder, then the user's


@pytest.mark.slow
def test_no_folder_to_keep_it_in(tmp_path):
    (tmp_path / "file").touch()
    nowhere = {"NUMBA_CACHE_DIR": str(tmp_path / "file" / "below"), "NUMBA_CACHE_LOCATOR_CLASSES": ONLY_THERE}
    assert run("-c", HITS, **nowhere).split() == ["0"]


@pytest.mark.slow
def test_each_kernel_has_files_of_its_own():
    """Two processes that write one index of files at once could otherwise swap the code of two geometries."""
    shapes = (7, 28), (4, 28), (7, 24)
    programs = [kernels.compiled(kernels.copy_kernel, 1, 1, *shape, "", "", "") for shape in shapes]
    assert len({program.py_func.__qualname__ for program in programs}) == 3
