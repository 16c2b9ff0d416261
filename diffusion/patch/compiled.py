"""Patches in Numba: the views of `diffusion.patch.views`, copied at memory speed by compiled kernels.

The strides of a view of windows give the address of each output value, so patching is a copy. Its speed depends on
three properties of memory:

1. Values that are contiguous in both arrays form runs (a row of a window: 28 bytes at patch size 7). With a length
   known at compile time a run is two vector moves, otherwise a loop. So one kernel is compiled per shape of *piece*,
   the last axes of the view that fit in 1 KiB; the rest of the geometry is a table of offsets, built by NumPy.
2. A store to a cache line that is not in cache first reads that line: a third of the traffic of a copy. Pieces are
   therefore collected in one page of scratch memory and written in whole 64-byte lines, converted and scaled on the
   way, and past the caches (non-temporal stores) if the arrays would not fit there anyway. One page, because a store
   that crosses a page boundary waits for all earlier ones.
3. The hardware prefetcher does not follow the order in which windows read rows. The kernel prefetches in memory order,
   as far ahead as the rows of one line of windows reach.

Kernels (`patch.kernels`) release the GIL and run on plain threads that start and end inside the call. They use no
threading layer of Numba and keep no state between calls, so calls from many threads, after a fork and in spawned
workers behave alike. Compiled code is cached on disk between processes where Numba finds a folder to write to.

Signatures, order of values and errors are those of `diffusion.patch`; results are the same bit for bit.
"""

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from math import isfinite, prod
from operator import index

import numpy as np

from diffusion.patch import kernels, views
from diffusion.patch.geometry import array_geometry, check_summable, coverage, token_geometry
from diffusion.patch.random_numbers import gauss_kernel

_LEAD = 8192  # bytes to prefetch beyond the rows that a line of windows spans
_STREAM = 1 << 24  # bytes read and written from which the caches do not help
_CHUNK = 1 << 22  # bytes written per call of a copying kernel
_BLOCK = 1 << 19  # the same where a second pass should find the chunk in cache
_THREADS = 8  # more threads do not increase memory bandwidth

_SUMMABLE = ("float32", "float64", "complex64", "complex128")


def patchify(
    x: np.ndarray,
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    layout: str = "hwc",
    dtype=None,
    scale: float | None = None,
    shift: float | None = None,
    out: np.ndarray | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Cuts x [B, *S, C] into tokens [B, N, prod(patch) * C], any numeric dtype and memory layout.

    In the same pass values become `dtype(x * scale + shift)`, computed in the dtype that NumPy promotes x, `dtype` and
    float32 to. Bytes to [-1, 1] are `dtype=np.float32, scale=1 / 127.5, shift=-1`.

    >>> x = np.arange(0, 256, 17, np.uint8).reshape(1, 4, 4, 1)
    >>> patchify(x, 2, dtype=np.float32, scale=2 / 255, shift=-1)[0, 0]
    array([-1.        , -0.8666667 , -0.46666664, -0.3333333 ], dtype=float32)

    Args:
      dtype: of the tokens; default that of `out`, else of x. Conversions stay within a kind or widen it (NumPy's
        "same_kind"). Between booleans, integers, float32 and float64 they are compiled; others are NumPy's.
      out: C-contiguous array for the tokens that shares no memory with x; default a new one.
      threads: at most this many at once; default the cores this process may use, up to 8.

    Raises:
      ValueError: x has no spatial axis, the windows do not tile it, the layout is unknown, scale or shift is not
        finite, or `out` has the wrong shape or layout or overlaps x.
      TypeError: x is not numeric, it does not convert to `dtype`, or `out` is not an array of that dtype.
    """
    x = np.asarray(x)
    b, cut, c = array_geometry(x.shape, x.dtype, patch_size, stride, layout)
    dtype = np.dtype(dtype) if dtype is not None else out.dtype if isinstance(out, np.ndarray) else x.dtype
    affine = _affine(x.dtype, dtype, scale, shift)
    out = _output("out", out, (b, prod(cut.grid), prod(cut.patch) * c), dtype, x)
    _copy(views.token_view(x, patch_size, stride, layout), out, x.flags.c_contiguous, affine, threads)
    return out


def fold(
    tokens: np.ndarray,
    size: Sequence[int],
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    layout: str = "hwc",
    out: np.ndarray | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Adds tokens [B, N, D] back into an array [B, *size, C]; the adjoint of `patchify`.

    >>> fold(np.ones((1, 2, 3)), (5,), 3, 2)[0, :, 0].tolist()
    [1.0, 1.0, 2.0, 1.0, 1.0]

    Sums of overlapping windows are compiled for single and double precision, real or complex, and up to three spatial
    axes; others are NumPy's.

    Raises:
      ValueError: N or D does not belong to this geometry, or `out` has the wrong shape or layout or overlaps the
        tokens.
      TypeError: tokens are integers (sums of overlapping integers would not survive the dtype; convert first), or
        `out` is not an array of their dtype.
    """
    tokens = np.asarray(tokens)
    token_geometry(tokens.shape, tokens.dtype, size, patch_size, stride, layout)
    check_summable(tokens.dtype)
    return _join(tokens, size, patch_size, stride, layout, False, out, threads)


def unpatchify(
    tokens: np.ndarray,
    size: Sequence[int],
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    layout: str = "hwc",
    out: np.ndarray | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Puts tokens [B, N, D] back into an array [B, *size, C], averaging overlaps: the inverse of `patchify`.

    >>> x = np.arange(10.0).reshape(1, 10, 1)
    >>> bool((unpatchify(patchify(x, 4, 2), (10,), 4, 2) == x).all())
    True

    Raises:
      ValueError: N or D does not belong to this geometry, or `out` has the wrong shape or layout or overlaps the
        tokens.
      TypeError: tokens of overlapping windows are integers (their average is not an integer), or `out` is not an array
        of their dtype.
    """
    return _join(np.asarray(tokens), size, patch_size, stride, layout, True, out, threads)


def noised_patches(
    x0: np.ndarray,
    eps: np.ndarray | int,
    alpha: np.ndarray,
    sigma: np.ndarray,
    patch_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    *,
    level: np.ndarray | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    layout: str = "hwc",
    out: tuple[np.ndarray, np.ndarray] | None = None,
    threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Images x0 [B, *S, C] and noise eps [R, *S, C] to noised tokens [R, N + 1, D] and targets [R, N, D], in one pass.

        tokens[r, :N] = patchify(alpha[r] (scale x0[r mod B] + shift) + sigma[r] eps[r])
        tokens[r, N] = level[r]                                   (default alpha[r])
        targets[r] = patchify(eps[r])

    in float32. This is the data generator of Piantedosi, "Diffusion model" (piantedosi.github.io/diffusion_model),
    which repeats x0 R / B times, mixes, converts, cuts twice and appends the noise level as a token, each in a pass.

    If eps is a number it is the seed of normal noise, generated in the same pass by vector code, for as many examples
    as alpha has: eps[r] is then a function of (seed, r), on any machine and with any number of threads.

    >>> tokens, targets = noised_patches(np.full((1, 4, 1), 255, np.uint8), np.ones((2, 4, 1), np.float32),
    ...                                  np.array([1.0, 0.5]), np.array([0.0, 0.5]), 2, scale=1 / 255)
    >>> tokens[1].tolist(), targets.shape
    ([[1.0, 1.0], [1.0, 1.0], [0.5, 0.5]], (2, 2, 2))

    Raises:
      ValueError: the geometry is wrong, there are more than three spatial axes, shapes disagree, a coefficient is not
        finite, a seed is not in [0, 2^64), or an array of `out` has the wrong shape or layout or overlaps an input or
        the other.
      TypeError: x0 is not an array of booleans, integers or floats, eps is not of floats, or `out` is not float32.
    """
    x0, seed = np.asarray(x0), eps if isinstance(eps, int | np.integer) else None
    if seed is not None:
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"eps={seed} is not a seed, which is at least 0 and below 2^64")
        eps = np.broadcast_to(np.float32(0), (np.size(alpha), *x0.shape[1:]))  # the shape of the noise to generate
    eps = np.asarray(eps)
    b, cut, c = array_geometry(x0.shape, x0.dtype, patch_size, stride, layout)
    _, grid, patch, step = _three_axes(cut)
    if x0.dtype.name not in kernels.CONVERTIBLE or not x0.dtype.isnative:
        raise TypeError(f"x0 has dtype {x0.dtype}: convert it to one of {', '.join(kernels.CONVERTIBLE)}")
    if eps.dtype.kind != "f":
        raise TypeError(f"eps has dtype {eps.dtype}, expected noise in floating point")
    r = eps.shape[0] if eps.ndim else 0
    if eps.shape[1:] != x0.shape[1:] or r % max(b, 1) or (r and not b):
        raise ValueError(f"eps has shape {eps.shape}, expected [R, {', '.join(map(str, x0.shape[1:]))}] with R a "
                         f"multiple of the {b} images of x0")  # fmt: skip
    alpha, sigma, level = (
        _per_image(name, value, r)
        for name, value in (("alpha", alpha), ("sigma", sigma), ("level", alpha if level is None else level))
    )
    _affine(x0.dtype, np.dtype(np.float32), scale, shift)
    n, d = prod(cut.grid), prod(cut.patch) * c
    noised, target = (None, None) if out is None else out
    noised = _output("out[0]", noised, (r, n + 1, d), np.dtype(np.float32), x0, eps)
    target = _output("out[1]", target, (r, n, d), np.dtype(np.float32), x0, eps, noised)
    if not target.size:
        noised[:, n:] = level[:, None, None]
        return noised, target
    kernel = kernels.compiled(kernels.noise_kernel, *grid, *patch, *step, c, layout == "chw", x0.dtype.name)
    images = np.ascontiguousarray(x0).reshape(-1)
    a, s = np.float32(scale), np.float32(shift)
    rows = np.ascontiguousarray(eps, np.float32).reshape(r, -1) if seed is None else None

    def work(start: int, stop: int) -> None:
        noise, first = rows, 0
        if seed is not None:
            noise, first = np.empty((stop - start, x0[0].size + x0[0].size % 2), np.float32), start
            kernels.compiled(gauss_kernel)(np.uint64(seed), first, noise)
        kernel(images, noise, first, alpha, sigma, level, a, s, b, noised, target, start, stop)

    _in_chunks(work, r, 2 * noised[0].nbytes, _BLOCK, threads)
    return noised, target


def _join(tokens, size, patch_size, stride, layout, average, out, threads) -> np.ndarray:
    """`fold`, or `unpatchify` if `average`."""
    b, cut, c = token_geometry(tokens.shape, tokens.dtype, size, patch_size, stride, layout)
    out = _output("out", out, (b, *cut.size, c), tokens.dtype, tokens)
    if cut.patch == cut.stride:
        view = views.image_view(views.split_tokens(tokens, b, cut, c, layout))
        _copy(view, out, tokens.flags.c_contiguous, None, threads)
        return out
    if tokens.dtype.name not in _SUMMABLE or not tokens.dtype.isnative or len(cut.size) > 3:
        join = views.unpatchify if average else views.fold
        out[...] = join(tokens, size, patch_size, stride, layout=layout)
        return out
    if not out.size:
        return out
    whole, grid, patch, step = _three_axes(cut)
    kernel = kernels.compiled(kernels.fold_kernel, *grid, *patch, *step, c, layout == "chw", tokens.dtype.name)
    tokens, image = np.ascontiguousarray(tokens), out.reshape(b, *whole[:2], whole[2] * c)
    weight = (1 / coverage(cut.size, cut.patch, cut.stride)).astype(out.dtype)[..., None]

    def work(start: int, stop: int) -> None:
        kernel(tokens, image, start, stop)
        if average:
            out[start:stop] *= weight

    _in_chunks(work, b, tokens[0].nbytes + out[0].nbytes, _BLOCK, threads)
    return out


def _copy(view: np.ndarray, out: np.ndarray, ordered: bool, affine, threads: int | None) -> None:
    """Writes view [B, ...] into out, C-contiguous of as many values; `ordered` if the view's array is contiguous."""
    threads = _check_threads(threads)
    if not out.size:
        return
    while len(view) == 1 and view.ndim > 2:  # a single image: its first axis becomes the batch
        view = view[0]
    out = out.reshape(len(view), -1)
    source, target = view.dtype, out.dtype
    wide, scale, shift = affine or (None, 1.0, 0.0)
    if source == target and not wide:
        names = ("", "", "")
    elif all(t.name in kernels.CONVERTIBLE and t.isnative for t in (source, target)):
        names = (source.name, target.name, wide.name if wide else "")
    else:
        _in_chunks(
            lambda start, stop: _convert(view[start:stop], out[start:stop], affine),
            len(view),
            out[0].nbytes,
            _BLOCK,
            threads,
        )
        return
    limit = kernels.PIECE * source.itemsize // max(source.itemsize, target.itemsize)
    shape, steps, offsets = _pieces(view.shape[1:], view.strides[1:], source.itemsize, limit)
    kernel = kernels.compiled(kernels.copy_kernel, *shape, *names)
    origin, batch, destination = _address(view), view.strides[0], _address(out)
    stream = view.nbytes + out.nbytes > _STREAM
    ahead = _span(view[0, 0]) + _LEAD if stream and ordered and batch > 0 and view.ndim > 2 else 0
    ratio = batch / out.strides[0]
    _in_chunks(
        lambda start, stop: kernel(
            origin + start * batch, destination + start * out.strides[0], stop - start, batch, *steps, offsets,
            stream, ahead, ratio, scale, shift,
        ),
        len(view), out.strides[0], _CHUNK, threads,
    )  # fmt: skip


def _convert(view: np.ndarray, out: np.ndarray, affine) -> None:
    if affine:
        wide, scale, shift = affine
        view = view.astype(wide) * wide.type(scale) + wide.type(shift)
    out[...] = view.reshape(out.shape)


@lru_cache(maxsize=256)
def _pieces(shape: tuple[int, ...], strides: tuple[int, ...], item: int, limit: int):
    """Splits the axes of one image's view into a piece (n1, n2, n3, run), its three strides, and offsets of pieces.

    A piece is n1 x n2 x n3 runs of `run` contiguous bytes, as large as `limit` allows; all numbers are in bytes.
    """
    axes = []
    for n, stride in zip(shape, strides, strict=True):
        if axes and axes[-1][1] == n * stride:
            axes[-1] = (axes[-1][0] * n, stride)  # two axes that follow each other in memory are one
        elif n > 1:
            axes.append((n, stride))
    run = item
    if axes and axes[-1][1] == item:
        n, _ = axes.pop()
        keep = _divisor(n, limit // item) if n * item > limit else n
        keep = keep if keep * item >= kernels.LINE else n  # a long run with no useful divisor is copied whole
        run = keep * item
        if keep < n:
            axes.append((n // keep, run))
    inner, room = [], limit // run
    while axes and len(inner) < 3:
        n, stride = axes.pop()
        keep = _divisor(n, room)
        if keep > 1:
            inner.insert(0, (keep, stride))
            room //= keep
        if keep < n:
            axes.append((n // keep, stride * keep))
            break
    inner = [(1, 0)] * (3 - len(inner)) + inner
    offsets = np.zeros(1, np.int64)
    for n, stride in axes:
        offsets = (offsets[:, None] + np.arange(n) * stride).reshape(-1)
    offsets.flags.writeable = False
    return (*(n for n, _ in inner), run), tuple(stride for _, stride in inner), offsets


def _divisor(n: int, most: int) -> int:
    return max((d for d in range(1, min(n, most) + 1) if n % d == 0), default=1)


def _span(view: np.ndarray) -> int:
    return sum((n - 1) * abs(stride) for n, stride in zip(view.shape, view.strides, strict=True))


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _three_axes(cut):
    """Size, grid, patch and stride with axes of length one in front, so that one kernel serves 1-D, 2-D and 3-D."""
    if len(cut.size) > 3:
        raise ValueError(f"compiled for up to 3 spatial axes, got size={cut.size}")
    return ((1,) * (3 - len(values)) + values for values in (cut.size, cut.grid, cut.patch, cut.stride))


def _affine(source: np.dtype, target: np.dtype, scale: float | None, shift: float | None):
    """(dtype to compute in, scale, shift), or None if values are only moved or converted."""
    if not np.can_cast(source, target, "same_kind"):
        raise TypeError(
            f"{source} does not convert to {target} without changing kind; dtype={source} or a wider one does"
        )
    if scale is None and shift is None:
        return None
    if np.can_cast(target, np.int64, "same_kind") or not np.can_cast(target, np.float64, "same_kind"):
        raise TypeError(f"scaled values need a real floating dtype, not {target}: pass dtype=np.float32, for example")
    scale, shift = 1.0 if scale is None else float(scale), 0.0 if shift is None else float(shift)
    if not (isfinite(scale) and isfinite(shift)):
        raise ValueError(f"scale={scale} and shift={shift} must be finite")
    return np.result_type(source, target, np.float32), scale, shift


def _output(name: str, out: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype, *others: np.ndarray):
    if out is None:
        return np.empty(shape, dtype)
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(out).__name__}")
    if out.dtype != dtype:
        raise TypeError(f"{name} has dtype {out.dtype}, expected {dtype}")
    if out.shape != shape:
        raise ValueError(f"{name} has shape {out.shape}, expected {shape}")
    if not (out.flags.c_contiguous and out.flags.aligned and out.flags.writeable):
        raise ValueError(f"{name} must be C-contiguous, aligned and writeable: np.empty({shape}, np.{dtype}) is")
    if any(np.may_share_memory(out, other) for other in others):
        raise ValueError(f"{name} overlaps another argument in memory: pass a separate array")
    return out


def _per_image(name: str, value: np.ndarray, n: int) -> np.ndarray:
    value = np.ascontiguousarray(value, np.float32)
    if value.shape != (n,):
        raise ValueError(f"{name} has shape {value.shape}, expected one number for each of the {n} images of eps")
    if not np.isfinite(value).all():
        raise ValueError(f"{name}[{np.flatnonzero(~np.isfinite(value))[0]}] is not finite")
    return value


def _check_threads(threads: int | None) -> int:
    if threads is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, _THREADS)
    if index(threads) < 1:
        raise ValueError(f"threads={threads} must be positive")
    return index(threads)


def _in_chunks(work: Callable, n: int, each: int, chunk: int, threads: int | None) -> None:
    """Calls work(start, stop) until [0, n) is done, in steps of about `chunk` bytes at `each` bytes per item."""
    step = max(1, chunk // each)
    starts = deque(range(0, n, step))

    def drain() -> None:
        while starts:
            try:
                start = starts.popleft()
            except IndexError:  # another thread took the last one
                return
            work(start, min(start + step, n))

    helpers = min(_check_threads(threads), len(starts), max(1, n * each // _CHUNK)) - 1
    if helpers < 1:
        return drain()
    with ThreadPoolExecutor(helpers) as pool:
        futures = [pool.submit(drain) for _ in range(helpers)]
        drain()
        for future in futures:
            future.result()
    return None
