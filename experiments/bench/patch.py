"""Races of patch extraction: every rival takes turns with a plain copy of the same bytes, the roof that memory allows.

    python -m experiments.bench.patch --json=patch.json --plot=patch.png
    python -m experiments.bench.patch --cases=28x28/7 --fraction=0.1

Host arrays are float32 images [B, H, W, C] and tokens [B, N, D]. A rival that is not installed, or cannot cut this
geometry, is skipped with a note; one that returns the same order of values is checked against the definition first. The
versions named "blog" are those of Piantedosi, "Diffusion model patch creation"
(piantedosi.github.io/diffusion_model_patch_creation), written anew for any window and stride, in float32; its
"whole data set" returns what it computes. `--plot` draws the seconds of the first case as boxes, and next to that file,
in one ending in _roof, all cases as bars against the copy.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import count, starmap
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from numba import float32, guvectorize, njit
from numpy.lib.stride_tricks import as_strided, sliding_window_view

from diffusion import patch, patch_numba, patch_numpy
from diffusion.geometry import geometry
from experiments import session
from experiments.bench import timing


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

_CASES = flags.DEFINE_list("cases", list(CASES), "Which geometries to race.")
_FRACTION = flags.DEFINE_float("fraction", 1.0, "Races with this fraction of the images.", lower_bound=0.0)
_PLOT = flags.DEFINE_string("plot", None, "Also draw a box plot to this PNG, and bars to the one ending in _roof.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments not understood: {argv[1:]}")
    unknown = [name for name in _CASES.value if name not in CASES]
    if unknown:
        raise app.UsageError(f"--cases={unknown} are not among {list(CASES)}")
    timing.check_json(flags.FLAGS.json)
    result = run(_CASES.value, fraction=_FRACTION.value, rounds=flags.FLAGS.rounds)
    print(report(result))
    timing.write_json(flags.FLAGS.json, result)
    if _PLOT.value:
        draw(result, Path(_PLOT.value))


def run(cases: Sequence[str] = tuple(CASES), *, fraction: float = 1.0, rounds: int = 7) -> dict[str, Any]:
    """All measurements, ready for JSON."""
    result: dict[str, Any] = {"machine": timing.machine(), "cases": {}}
    for name in cases:
        case = CASES[name]._replace(images=max(1, round(CASES[name].images * fraction)))
        host, skipped = host_rivals(case)
        device, calls = device_rivals(case)
        result["cases"][name] = {
            "case": case._asdict(),
            "bytes": token_bytes(case),
            "host": race(host, case.images, rounds),
            "device": race(device, case.images * calls, rounds),
            "skipped": skipped,
        }
    result["generator"] = race(generators(), BATCH * REPEAT, rounds, calls=20)
    return result


def race(rivals: dict[str, Callable[[], Any]], work: int, rounds: int, calls: int = 1) -> dict[str, Any]:
    """`timing.summary` of rivals that do `work` images a call."""

    def repeated(rival: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                rival()

        return run

    timed = rivals if calls == 1 else {name: repeated(rival) for name, rival in rivals.items()}
    return timing.summary(timing.interleave(timed, rounds), dict.fromkeys(rivals, work * calls))


def token_bytes(case: Case) -> int:
    """Bytes of all float32 tokens of a case."""
    cut = geometry(case.size, case.patch, case.stride)
    return 4 * case.images * prod(cut.grid) * prod(cut.patch) * case.channels


def host_rivals(case: Case) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Contenders in host memory, checked, and the reasons why others are missing."""
    _, b, size, c, p, s = case
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (b, *size, c), np.uint8)
    x = pixels.astype(np.float32)
    expected = patch_numpy.patchify(x, p, s)
    out, image = np.zeros_like(expected), np.zeros_like(x)
    pool = ThreadPoolExecutor(THREADS - 1)

    def copies() -> None:
        half = b // 2
        other = pool.submit(np.copyto, out[:half], expected[:half])
        np.copyto(out[half:], expected[half:])
        other.result()

    def numba(threads: int) -> Callable[[], np.ndarray]:
        return lambda: patch_numba.patchify(x, p, s, out=out, threads=threads)

    def fused(threads: int) -> Callable[[], np.ndarray]:
        return lambda: patch_numba.patchify(pixels, p, s, scale=1 / 127.5, shift=-1, out=out, threads=threads)

    rivals: dict[str, Callable[[], Any]] = {
        COPY: lambda: np.copyto(out, expected),
        COPIES: copies,
        NUMBA: numba(1),
        NUMBAS: numba(THREADS),
        "Numba, new array": lambda: patch_numba.patchify(x, p, s, threads=THREADS),
        FUSED: fused(1),
        FUSEDS: fused(THREADS),
        "Numba unpatchify": lambda: patch_numba.unpatchify(expected, size, p, s, out=image, threads=THREADS),
        "NumPy views, copied": lambda: patch_numpy.patchify(x, p, s),
        VIEW: lambda: patch_numpy.windows(x, p, s),
    }
    more, skipped = other_libraries(case, x)
    rivals |= more
    for name, rival in rivals.items():
        if name in (NUMBA, NUMBAS) or name in more:
            result = np.asarray(rival())
            if result.shape[-1] == expected.shape[-1]:  # the others keep channels or windows first
                np.testing.assert_array_equal(result.reshape(expected.shape), expected, err_msg=name)
    return rivals, skipped


def other_libraries(case: Case, x: np.ndarray) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """What people use today, as its documentation says."""
    _, b, (h, w), c, p, s = case
    gh, gw = geometry(case.size, p, s).grid
    rivals: dict[str, Callable[[], Any]] = {}
    skipped: dict[str, str] = {}

    if c == 1:
        images = x[..., 0]
        rivals |= dict(zip(BLOG, blog(images, p, s, gh), strict=True))
    else:
        skipped |= dict.fromkeys(BLOG, "for images without channels")

    def strided() -> np.ndarray:
        steps = (x.strides[0], s * x.strides[1], s * x.strides[2], *x.strides[1:])
        return as_strided(x, (b, gh, gw, p, p, c), steps).copy()

    def sliding() -> np.ndarray:
        view = sliding_window_view(x, (p, p), (1, 2))[:, ::s, ::s]
        return np.ascontiguousarray(np.moveaxis(view, 3, -1)).reshape(b, gh * gw, -1)

    rivals["as_strided, copied"] = lambda: strided().reshape(b, gh * gw, -1)
    rivals["sliding_window_view, copied"] = sliding
    if p == s:
        rivals["NumPy reshape, transpose"] = lambda: (
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

        rivals["einops"] = lambda: rearrange(x, "b (i p) (j q) c -> b (i j) (p q c)", p=p, q=p)
    if not missing("patchify package", "patchify"):
        from patchify import patchify

        rivals["patchify package"] = lambda: np.stack(
            [patchify(image, (p, p, c), s if c == 1 else (s, s, c)) for image in x]
        ).reshape(b, gh * gw, -1)
    if not missing("scikit-learn", "sklearn", s == 1 and c == 1, "cuts at stride 1 only"):
        from sklearn.feature_extraction.image import extract_patches_2d

        rivals["scikit-learn"] = lambda: np.stack([extract_patches_2d(image, (p, p)) for image in x[..., 0]]).reshape(
            b, gh * gw, -1
        )
    if not missing("torch unfold", "torch"):
        import torch

        torch.set_num_threads(THREADS)
        tensor = torch.from_numpy(x)
        rivals["torch unfold"] = lambda: (
            tensor.unfold(1, p, s).unfold(2, p, s).permute(0, 1, 2, 4, 5, 3).reshape(b, gh * gw, -1)
        )
        if not missing("torch pixel_unshuffle", "torch", p == s):
            first = tensor.permute(0, 3, 1, 2).contiguous()
            rivals["torch pixel_unshuffle"] = lambda: torch.nn.functional.pixel_unshuffle(first, p)
    return rivals, skipped


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

    # The second argument only tells guvectorize the shape of the output, which no input has.
    @guvectorize([(float32[:, :], float32[:, :], float32[:, :])], "(m,n),(q,d)->(q,d)", nopython=True)
    def vectorized(image, shape, out):
        n = 0
        for i in range(g):
            for j in range(g):
                window = image[i * s : i * s + p, j * s : j * s + p]
                out[n, :] = np.ascontiguousarray(window).reshape(p * p)
                n += 1

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


def device_rivals(case: Case) -> tuple[dict[str, Callable[[], Any]], int]:
    """XLA on the default device against its own copies of the same bytes, and how often each cuts in one call."""
    _, b, size, c, p, s = case
    x = jax.random.normal(jax.random.key(0), (b, *size, c))
    tokens = jax.block_until_ready(jax.jit(lambda x: patch.patchify(x, p, s))(x))
    calls = 1 if x.device.platform == "cpu" else 20  # a device that is fast is asked for more, to hide the asking

    def finish(f: Callable, value: jax.Array) -> Callable[[], jax.Array]:
        compiled = jax.jit(f)
        return lambda: jax.block_until_ready([compiled(value) for _ in range(calls)][-1])

    def dilated(x: jax.Array) -> jax.Array:
        order = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated_patches(x, (p, p), (s, s), "VALID", dimension_numbers=order)

    rivals = {
        "XLA copy of tokens": finish(jnp.copy, tokens),
        "XLA copy of images": finish(jnp.copy, x),
        "XLA patchify": finish(lambda x: patch.patchify(x, p, s), x),
        "XLA unpatchify": finish(lambda t: patch.unpatchify(t, size, p, s), tokens),
        "XLA dilated patches": finish(dilated, x),
    }
    return rivals, calls


def generators() -> dict[str, Callable[[], Any]]:
    """The blog's data generator, step by step, and ours in one pass, with noise drawn inside or given to both."""
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
        return patch_numba.noised_patches(pixels[..., None], eps, alpha, 1 - alpha, p, s, scale=1 / 255, out=out)

    return {
        "blog generator": separate,
        "blog generator, noise given": lambda: separate(noise),
        "noised_patches": single,
        "noised_patches, noise given": lambda: single(noise32),
    }


def blog_window(p: int, s: int, g: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The blog's guvectorized cut, which also serves its generator."""

    @guvectorize([(float32[:, :], float32[:, :], float32[:, :])], "(m,n),(q,d)->(q,d)", nopython=True)
    def cut(image, shape, out):
        n = 0
        for i in range(g):
            for j in range(g):
                window = image[i * s : i * s + p, j * s : j * s + p]
                out[n, :] = np.ascontiguousarray(window).reshape(p * p)
                n += 1

    return cut


def targets(result: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(what, measured ratio, ratio to reach) of everything this benchmark exists to hold."""
    rows = []

    def over(fast: str, slow: str, table: dict[str, Any]) -> float:
        return table[fast]["speed_over"][slow]

    for name, case in result["cases"].items():
        host, device = case["host"], case["device"]
        first = name == "28x28/7"
        less = 1 if first else 0.9  # what holds for the first geometry holds for the others within a tenth
        rows.append((f"{name}: {NUMBAS} over {COPIES}", over(NUMBAS, COPIES, host), 0.95 * less))
        rows.append((f"{name}: {NUMBA} over {COPY}", over(NUMBA, COPY, host), 0.85 * less))
        rows.append((f"{name}: {FUSEDS} over {COPIES}", over(FUSEDS, COPIES, host), 1.25 * less))
        if first:
            best = min((b for b in BLOG if b in host), key=lambda b: host[b]["seconds"])
            rows.append((f"{name}: {NUMBAS} over {best}", over(NUMBAS, best, host), 10))
        copy = "XLA copy of tokens"
        rows.append((f"{name}: XLA patchify over its copy", over("XLA patchify", copy, device), 1 / 1.25))
        rows.append((f"{name}: XLA unpatchify over its copy", over("XLA unpatchify", copy, device), 1 / 1.5))
    speed = result["generator"]["noised_patches"]["speed_over"]["blog generator"]
    rows.append(("noised_patches over the blog's generator", speed, 5))
    speed = result["generator"]["noised_patches, noise given"]["speed_over"]["blog generator, noise given"]
    rows.append(("the same, noise given to both", speed, 5))
    return rows


def report(result: dict[str, Any]) -> str:
    """All tables, for people."""
    parts = []
    for name, case in result["cases"].items():
        for where, roof in (("host", COPIES), ("device", "XLA copy of tokens")):
            size = case["bytes"] / case["case"]["images"] / 1e9
            rows = [
                [rival, f"{row['per_second']:,.0f}", f"{size * row['per_second']:.2f}", timing.over(row, roof)]
                for rival, row in case[where].items()
                if rival != VIEW
            ]
            parts.append(timing.table(f"{name}, {where}", ["images/s", "GB/s of tokens", f"over {roof}"], rows))
        view = case["host"][VIEW]
        parts.append(f"{VIEW}, nothing copied: {view['seconds'] * view['work'] * 1e6:.0f} us a call")
        parts.extend(starmap("skipped {}: {}".format, case["skipped"].items()))
    rows = [
        [name, f"{row['per_second']:,.0f}", timing.over(row, "blog generator")]
        for name, row in result["generator"].items()
    ]
    parts.append(timing.table(f"generator, {REPEAT} x {BATCH}", ["images/s", "over blog generator"], rows))
    rows = [[what, f"{got:.2f}", f"{goal:.2f}", "yes" if got >= goal else "NO"] for what, got, goal in targets(result)]
    parts.append(timing.table("target", ["measured", "at least", "held"], rows))
    return "\n\n".join(parts)


def draw(result: dict[str, Any], path: Path) -> None:
    """Box plot of the first case to `path`, bars of all cases against the copy next to it."""
    from matplotlib.figure import Figure

    name, case = next(iter(result["cases"].items()))
    box_plot(Figure((9, 6), layout="constrained"), name, case).savefig(path, dpi=120)
    bars(Figure((10, 6), layout="constrained"), result).savefig(path.with_stem(f"{path.stem}_roof"), dpi=120)


def box_plot(figure, name: str, case: dict[str, Any]):
    """Images per second of every rival in every round, fastest on top."""
    host = {rival: row for rival, row in case["host"].items() if rival not in (VIEW, "Numba unpatchify")}
    order = sorted(host, key=lambda rival: host[rival]["per_second"])
    ax = figure.add_subplot()
    ax.boxplot(
        [[row["work"] / t for t in row["timings"]] for row in map(host.get, order)],
        orientation="horizontal", tick_labels=order,
    )  # fmt: skip
    ax.set(xscale="log", xlabel="images per second", title=f"{name}, {case['case']['images']:,} images, float32")
    ax.grid(axis="x", alpha=0.3)
    return figure


def bars(figure, result: dict[str, Any]):
    """Speed of the main contenders in each case, where the copy with all threads is 1."""
    shown = [
        NUMBA,
        NUMBAS,
        FUSEDS,
        "NumPy views, copied",
        "NumPy reshape, transpose",
        "einops",
        "torch unfold",
        *BLOG[2:],
    ]
    ax = figure.add_subplot()
    names = list(result["cases"])
    for k, rival in enumerate(shown):
        heights = [
            result["cases"][name]["host"].get(rival, {"speed_over": {COPIES: 0}})["speed_over"][COPIES]
            for name in names
        ]
        ax.bar(np.arange(len(names)) + (k - len(shown) / 2) * 0.09, heights, 0.09, label=rival)
    ax.axhline(1, color="black", linestyle="--", linewidth=1)
    ax.set_xticks(range(len(names)), names)
    ax.set(ylabel=f"speed, {COPIES} = 1", title="Against the memory roof")
    ax.legend(fontsize="small", ncols=3)
    return figure


if __name__ == "__main__":
    session.run(main, timing.define_flags)
