"""The implementations that `experiments.bench.patch` compares: in host memory and under XLA, ready to call."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import count
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numba import float32, guvectorize, njit
from numpy.lib.stride_tricks import as_strided, sliding_window_view

from diffusion import patch
from diffusion.patch import compiled, views
from diffusion.patch.geometry import geometry
from experiments.bench.timing import Program


class Case(NamedTuple):
    """A geometry and how many images of it make about 190 MB."""

    name: str
    images: int
    size: tuple[int, int]
    channels: int
    patch: int
    stride: int


CASES = {
    case.name: case
    for case in (
        Case("28x28/7", 60_000, (28, 28), 1, 7, 7),
        Case("28x28/18:10", 60_000, (28, 28), 1, 18, 10),
        Case("224x224x3/16", 300, (224, 224), 3, 16, 16),
        Case("256x256x3/4", 240, (256, 256), 3, 4, 4),
        Case("28x28/7:1", 2_000, (28, 28), 1, 7, 1),
    )
}
THREADS = 2
COPY, COPIES = "copy, 1 thread", f"copy, {THREADS} threads"
NUMBA, NUMBAS = "Numba, 1 thread", f"Numba, {THREADS} threads"
FUSED, FUSEDS = "Numba from uint8, 1 thread", f"Numba from uint8, {THREADS} threads"
VIEW = "NumPy view alone"
BLOG = ("blog naive", "blog jit", "blog guvectorize", "blog whole data set")
# The blog's generator: 100 images repeated 5 times, windows of 18 every 10, alpha = 0.99 ** n with n up to 500.
BATCH, REPEAT, ALPHA, STEPS = 100, 5, 0.99, 500


def token_bytes(case: Case) -> int:
    """Bytes of all float32 tokens of a case."""
    cut = geometry(case.size, case.patch, case.stride)
    return 4 * case.images * prod(cut.grid) * prod(cut.patch) * case.channels


def host_programs(case: Case) -> tuple[dict[str, Program], dict[str, str]]:
    """Implementations in host memory, checked, and the reasons why others are missing."""
    _, b, size, c, p, s = case
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (b, *size, c), np.uint8)
    x = pixels.astype(np.float32)
    expected = views.patchify(x, p, s)
    out, image = np.zeros_like(expected), np.zeros_like(x)
    pool = ThreadPoolExecutor(THREADS - 1)

    def copies() -> None:
        half = b // 2
        other = pool.submit(np.copyto, out[:half], expected[:half])
        np.copyto(out[half:], expected[half:])
        other.result()

    def numba(threads: int) -> Callable[[], np.ndarray]:
        return lambda: compiled.patchify(x, p, s, out=out, threads=threads)

    def fused(threads: int) -> Callable[[], np.ndarray]:
        return lambda: compiled.patchify(pixels, p, s, scale=1 / 127.5, shift=-1, out=out, threads=threads)

    programs: dict[str, Program] = {
        COPY: lambda: np.copyto(out, expected),
        COPIES: copies,
        NUMBA: numba(1),
        NUMBAS: numba(THREADS),
        "Numba, new array": lambda: compiled.patchify(x, p, s, threads=THREADS),
        FUSED: fused(1),
        FUSEDS: fused(THREADS),
        "Numba unpatchify": lambda: compiled.unpatchify(expected, size, p, s, out=image, threads=THREADS),
        "NumPy views, copied": lambda: views.patchify(x, p, s),
        VIEW: lambda: views.windows(x, p, s),
    }
    more, skipped = other_libraries(case, x)
    programs |= more
    for name, program in programs.items():
        if name in (NUMBA, NUMBAS) or name in more:
            result = np.asarray(program())
            if result.shape[-1] == expected.shape[-1]:  # the others keep channels or windows first
                np.testing.assert_array_equal(result.reshape(expected.shape), expected, err_msg=name)
    return programs, skipped


def other_libraries(case: Case, x: np.ndarray) -> tuple[dict[str, Program], dict[str, str]]:
    """The functions of other libraries, called as their documentation says."""
    _, b, (h, w), c, p, s = case
    gh, gw = geometry(case.size, p, s).grid
    programs: dict[str, Program] = {}
    skipped: dict[str, str] = {}

    if c == 1:
        images = x[..., 0]
        programs |= dict(zip(BLOG, blog(images, p, s, gh), strict=True))
    else:
        skipped |= dict.fromkeys(BLOG, "for images without channels")

    def strided() -> np.ndarray:
        steps = (x.strides[0], s * x.strides[1], s * x.strides[2], *x.strides[1:])
        return as_strided(x, (b, gh, gw, p, p, c), steps).copy()

    def sliding() -> np.ndarray:
        view = sliding_window_view(x, (p, p), (1, 2))[:, ::s, ::s]
        return np.ascontiguousarray(np.moveaxis(view, 3, -1)).reshape(b, gh * gw, -1)

    programs["as_strided, copied"] = lambda: strided().reshape(b, gh * gw, -1)
    programs["sliding_window_view, copied"] = sliding
    if p == s:
        programs["NumPy reshape, transpose"] = lambda: (
            x.reshape(b, gh, p, gw, p, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, gh * gw, -1)
        )
    else:
        skipped["NumPy reshape, transpose"] = "windows overlap"

    def missing(name: str, package: str, possible: bool = True, why: str = "windows overlap") -> bool:
        if find_spec(package) is None:
            skipped[name] = f"{package} is not installed"
        elif not possible:
            skipped[name] = why
        return name in skipped

    if not missing("einops", "einops", p == s):
        from einops import rearrange

        programs["einops"] = lambda: rearrange(x, "b (i p) (j q) c -> b (i j) (p q c)", p=p, q=p)
    if not missing("patchify package", "patchify"):
        from patchify import patchify

        programs["patchify package"] = lambda: np.stack(
            [patchify(image, (p, p, c), s if c == 1 else (s, s, c)) for image in x]
        ).reshape(b, gh * gw, -1)
    if not missing("scikit-learn", "sklearn", s == 1 and c == 1, "cuts at stride 1 only"):
        from sklearn.feature_extraction.image import extract_patches_2d

        programs["scikit-learn"] = lambda: np.stack([extract_patches_2d(image, (p, p)) for image in x[..., 0]]).reshape(
            b, gh * gw, -1
        )
    if not missing("torch unfold", "torch"):
        import torch

        torch.set_num_threads(THREADS)
        tensor = torch.from_numpy(x)
        programs["torch unfold"] = lambda: (
            tensor.unfold(1, p, s).unfold(2, p, s).permute(0, 1, 2, 4, 5, 3).reshape(b, gh * gw, -1)
        )
        if not missing("torch pixel_unshuffle", "torch", p == s):
            first = tensor.permute(0, 3, 1, 2).contiguous()
            programs["torch pixel_unshuffle"] = lambda: torch.nn.functional.pixel_unshuffle(first, p)
    return programs, skipped


def blog(images: np.ndarray, p: int, s: int, g: int) -> tuple[Callable[[], np.ndarray], ...]:
    """The blog's four versions for images [B, n, n]."""
    count = len(images)

    def naive(image: np.ndarray) -> np.ndarray:
        return np.array([image[i * s : i * s + p, j * s : j * s + p] for i in range(g) for j in range(g)])

    @njit
    def jitted(image):
        out = np.zeros((g * g, p * p), np.float32)
        n = 0
        for i in range(g):
            for j in range(g):
                window = image[i * s : i * s + p, j * s : j * s + p]
                out[n, :] = np.ascontiguousarray(window).reshape(p * p)
                n += 1
        return out

    vectorized = blog_window(p, s, g)

    @njit
    def whole(images):
        out = np.zeros((len(images), g * g, p * p), np.float32)
        for b in range(len(images)):
            out[b] = jitted(images[b])
        return out

    def run_vectorized() -> np.ndarray:
        out = np.zeros((count, g * g, p * p), np.float32)
        return vectorized(images, out, out)

    return (
        lambda: np.stack(list(map(naive, images))).reshape(count, g * g, p * p),
        lambda: np.stack(list(map(jitted, images))),
        run_vectorized,
        lambda: whole(images),
    )


def device_programs(case: Case) -> tuple[dict[str, Program], int]:
    """XLA on the default device against its own copies of the same bytes, and how often each cuts in one call."""
    _, b, size, c, p, s = case
    x = jax.random.normal(jax.random.key(0), (b, *size, c))
    tokens = jax.block_until_ready(jax.jit(lambda x: patch.patchify(x, p, s))(x))
    calls = 1 if x.device.platform == "cpu" else 20  # several in a row hide what starting one costs

    def finish(f: Callable, value: jax.Array) -> Callable[[], jax.Array]:
        compiled = jax.jit(f)
        return lambda: jax.block_until_ready([compiled(value) for _ in range(calls)][-1])

    def dilated(x: jax.Array) -> jax.Array:
        order = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated_patches(x, (p, p), (s, s), "VALID", dimension_numbers=order)

    programs = {
        "XLA copy of tokens": finish(jnp.copy, tokens),
        "XLA copy of images": finish(jnp.copy, x),
        "XLA patchify": finish(lambda x: patch.patchify(x, p, s), x),
        "XLA unpatchify": finish(lambda t: patch.unpatchify(t, size, p, s), tokens),
        "XLA dilated patches": finish(dilated, x),
    }
    return programs, calls


def generators() -> dict[str, Program]:
    """The blog's data generator, step by step, and ours in one pass, with noise sampled inside or given to both."""
    p, s, g, n = 18, 10, 2, 28
    rng, seeds = np.random.default_rng(0), count()
    old = np.random.RandomState(0)
    pixels = rng.integers(0, 256, (BATCH, n, n), np.uint8)
    images = pixels / 255
    noise = rng.standard_normal((BATCH * REPEAT, n, n))
    noise32 = noise.astype(np.float32)[..., None]
    out = np.empty((BATCH * REPEAT, g * g + 1, p * p), np.float32), np.empty((BATCH * REPEAT, g * g, p * p), np.float32)
    cut = blog_window(p, s, g)

    def separate(eps: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        tiled = np.tile(images, (REPEAT, 1, 1))
        eps = old.randn(*tiled.shape) if eps is None else eps
        alpha = np.ones(len(tiled)) * ALPHA ** old.randint(0, STEPS + 1, len(tiled))
        noised = np.einsum("i,ikj->ikj", alpha, tiled) + np.einsum("i,ikj->ikj", 1 - alpha, eps)
        shape = np.zeros((len(tiled), g * g, p * p)).astype("float32")
        target_shape = np.zeros((len(tiled), g * g, p * p)).astype("float32")
        patches = cut(noised.astype("float32"), shape)
        level = np.einsum("i,ikj->ikj", alpha, np.ones((len(tiled), 1, p * p)))
        return np.concatenate([patches, level], axis=1), cut(eps.astype("float32"), target_shape)

    def single(eps: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        eps = next(seeds) if eps is None else eps
        alpha = ALPHA ** rng.integers(0, STEPS + 1, BATCH * REPEAT)
        return compiled.noised_patches(pixels[..., None], eps, alpha, 1 - alpha, p, s, scale=1 / 255, out=out)

    return {
        "blog generator": separate,
        "blog generator, noise given": lambda: separate(noise),
        "noised_patches": single,
        "noised_patches, noise given": lambda: single(noise32),
    }


def blog_window(p: int, s: int, g: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The blog's cut under guvectorize; the second argument only gives the shape of the output, which no input has."""

    @guvectorize([(float32[:, :], float32[:, :], float32[:, :])], "(m,n),(q,d)->(q,d)", nopython=True)
    def cut(image, shape, out):
        n = 0
        for i in range(g):
            for j in range(g):
                window = image[i * s : i * s + p, j * s : j * s + p]
                out[n, :] = np.ascontiguousarray(window).reshape(p * p)
                n += 1

    return cut
