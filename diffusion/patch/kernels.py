"""The kernels of `diffusion.patch.compiled`: one per shape of piece, with every loop bound known to the compiler.

A kernel takes addresses and offsets computed from arrays that the caller has checked; nothing here checks bounds. Moves
between memory and registers are LLVM instructions for which Numba has no Python form.
"""

import os
import threading
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LINE = 64  # bytes of a cache line
PIECE = 1024  # bytes gathered at once, and bytes collected before lines leave: two pieces and a line fit one page
_PAGE = 4096  # bytes of a page of memory

CONVERTIBLE = {"bool": ir.IntType(8), "float32": ir.FloatType(), "float64": ir.DoubleType()}
CONVERTIBLE |= {f"{sign}int{bits}": ir.IntType(bits) for sign in ("", "u") for bits in (8, 16, 32, 64)}

# Compilation. Numba keeps its compiler lock in a global that a forked child inherits as it was: held forever, if
# another thread was compiling. All compilation here happens under a lock that fork waits for.
_lock = threading.RLock()
programs = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def compiled(make: Callable, *constants) -> Callable:
    """The kernel of `make(*constants)`, compiled once; from disk if an earlier process did and could save it."""
    key = (make, *constants)
    if key in programs:
        return programs[key]
    with _lock:
        if key not in programs:
            signature, function = make(*constants)
            # Numba names files after __qualname__. A file of its own for each kernel, because the shared index of files
            # that two processes write at once can end up naming the wrong one.
            function.__qualname__ = "_".join(str(part) for part in (make.__name__, *constants))
            try:
                kernel = njit(signature, nogil=True, cache=True)(function)
            except Exception:  # no folder, no space, a damaged file: compile without the cache
                kernel = njit(signature, nogil=True)(function)
            programs[key] = kernel
        return programs[key]


def copy_kernel(n1: int, n2: int, n3: int, run: int, source: str, target: str, wide: str):
    """Copies pieces of n1 x n2 x n3 runs of `run` bytes, converting `source` to `target`; empty names move bytes."""
    source, target = source or "uint8", target or "uint8"
    item, unit = np.dtype(source).itemsize, np.dtype(target).itemsize
    piece = n1 * n2 * n3 * run
    lanes = LINE // unit  # values of one line of output
    line = lanes * item  # and their bytes in the source
    limit = PIECE * item // max(item, unit)
    room = _PAGE * -(-(limit + piece + line) // _PAGE)
    i, f = types.intp, types.float64
    signature = i(i, i, i, i, i, i, i, _given(types.int64, 1), types.boolean, i, f, f, f)

    def copy(origin, out, images, batch, step1, step2, step3, offsets, stream, ahead, ratio, scale, shift):
        scratch = np.empty(room + _PAGE, np.uint8)
        base = scratch.ctypes.data + _PAGE - 1
        base -= base % _PAGE
        skip = out % LINE // unit  # values of the first line that lie before `out`
        out -= out % LINE
        fill = base + skip * item
        written = 0
        fetched = origin
        for b in range(images):
            image = origin + b * batch
            for q in range(offsets.size):
                corner = image + offsets[q]
                for j1 in range(n1):
                    for j2 in range(n2):
                        for j3 in range(n3):
                            run_at = fill + ((j1 * n2 + j2) * n3 + j3) * run
                            _move(run_at, corner + j1 * step1 + j2 * step2 + j3 * step3, run)
                fill += piece
                if fill - base >= limit:
                    at = base
                    if skip > 0:
                        for k in range(skip, lanes):
                            _put(out + k * unit, at + k * item, scale, shift, source, target, wide, 1, False)
                        skip = 0
                        at += line
                        out += LINE
                    lines = (fill - at) // line
                    if stream:
                        for _ in range(lines):
                            _put(out, at, scale, shift, source, target, wide, lanes, True)
                            at += line
                            out += LINE
                    else:
                        for _ in range(lines):
                            _put(out, at, scale, shift, source, target, wide, lanes, False)
                            at += line
                            out += LINE
                    _move(base, at, line)  # the rest, less than a line, is the start of the next
                    fill = base + (fill - at)
                    if ahead > 0:
                        written += lines
                        goal = origin + ahead + np.intp(written * LINE * ratio)
                        while fetched < goal:
                            _prefetch(fetched)
                            fetched += LINE
        at = base
        while skip > 0 and skip < lanes and at + skip * item < fill:
            _put(out + skip * unit, at + skip * item, scale, shift, source, target, wide, 1, False)
            skip += 1
        if skip > 0:
            at += line
            out += LINE
        while at + line <= fill:
            _put(out, at, scale, shift, source, target, wide, lanes, False)
            at += line
            out += LINE
        while at < fill:
            _put(out, at, scale, shift, source, target, wide, 1, False)
            at += item
            out += unit
        _fence()
        return scratch.size  # Numba frees an array after its last use, and an address is not a use

    return signature, copy


def fold_kernel(
    g1: int, g2: int, g3: int, p1: int, p2: int, p3: int, s1: int, s2: int, s3: int, c: int, chw: bool, dtype: str
):
    """Sums tokens [B, N, D] into images [B, n1, n2, n3 * c]: along the last axis first, earlier windows first."""
    n1, n2, n3 = (g1 - 1) * s1 + p1, (g2 - 1) * s2 + p2, (g3 - 1) * s3 + p3
    flat = g1 == p1 == 1  # two axes or one: rows are added to the image itself
    number = getattr(types, dtype)
    signature = types.void(_given(number, 3), types.Array(number, 4, "C"), types.intp, types.intp)

    def add(tokens, image, start, stop):
        row = np.empty(n3 * c, image.dtype)
        slab = np.empty((1 if flat else n2, n3 * c), image.dtype)
        for b in range(start, stop):
            for i in range(n1):
                for j in range(n2):
                    for e in range(n3 * c):
                        image[b, i, j, e] = 0
            for i1 in range(g1):
                for u1 in range(p1):
                    plane = image[b, 0] if flat else slab
                    if not flat:
                        for j in range(n2):
                            for e in range(n3 * c):
                                slab[j, e] = 0
                    for i2 in range(g2):
                        for u2 in range(p2):
                            for e in range(n3 * c):
                                row[e] = 0
                            for i3 in range(g3):
                                token = tokens[b, (i1 * g2 + i2) * g3 + i3]
                                at = i3 * s3 * c
                                if chw:
                                    for k in range(c):
                                        for v in range(p3):
                                            row[at + v * c + k] += token[((k * p1 + u1) * p2 + u2) * p3 + v]
                                else:
                                    for e in range(p3 * c):
                                        row[at + e] += token[(u1 * p2 + u2) * p3 * c + e]
                            for e in range(n3 * c):
                                plane[i2 * s2 + u2, e] += row[e]
                    if not flat:
                        for j in range(n2):
                            for e in range(n3 * c):
                                image[b, i1 * s1 + u1, j, e] += slab[j, e]

    return signature, add


def noise_kernel(
    g1: int, g2: int, g3: int, p1: int, p2: int, p3: int, s1: int, s2: int, s3: int, c: int, chw: bool, source: str
):
    """Mixes alpha (scale x0 + shift) + sigma eps image by image, and cuts it and eps while they are in cache.

    eps holds images from `first` on, each at the start of a row.
    """
    n1, n2, n3 = (g1 - 1) * s1 + p1, (g2 - 1) * s2 + p2, (g3 - 1) * s3 + p3
    size, count, width = n1 * n2 * n3 * c, g1 * g2 * g3, p1 * p2 * p3 * c
    # A window is `bands` x p1 x p2 rows of `runs` runs, `apart` in the image: "chw" takes one channel at a time.
    bands, runs, apart, run = (c, p3, 4 * c, 4) if chw else (1, 1, 0, 4 * p3 * c)
    f, i, tokens = types.float32, types.intp, types.Array(types.float32, 3, "C")
    given = _given(f, 1)
    signature = types.void(
        _given(getattr(types, source), 1), _given(f, 2), i, given, given, given, f, f, i, tokens, tokens, i, i
    )  # fmt: skip

    def noise(x0, eps, first, alpha, sigma, level, scale, shift, images, noised, target, start, stop):
        mixed = np.empty(size, np.float32)
        for r in range(start, stop):
            a, s = alpha[r], sigma[r]
            clean, noisy = x0[r % images * size :], eps[r - first]
            for e in range(size):
                mixed[e] = a * (np.float32(clean[e]) * scale + shift) + s * noisy[e]
            to_noised = noised.ctypes.data + 4 * r * (count + 1) * width
            to_target = target.ctypes.data + 4 * r * count * width
            for i1 in range(g1):
                for i2 in range(g2):
                    for i3 in range(g3):
                        for k in range(bands):
                            for u1 in range(p1):
                                for u2 in range(p2):
                                    at = 4 * ((((i1 * s1 + u1) * n2 + i2 * s2 + u2) * n3 + i3 * s3) * c + k)
                                    for v in range(runs):
                                        _move(to_noised, mixed.ctypes.data + at + v * apart, run)
                                        _move(to_target, noisy.ctypes.data + at + v * apart, run)
                                        to_noised += run
                                        to_target += run
            for e in range(width):
                noised[r, count, e] = level[r]

    return signature, noise


def _given(dtype, ndim: int) -> types.Array:
    """Type of an input array: read-only in the signature, so that both kinds of arrays fit it."""
    return types.Array(dtype, ndim, "C", readonly=True)


# Four instructions for which Numba has no Python form. They take addresses and check no bounds.


@intrinsic(prefer_literal=True)
def _move(typing, to, at, count):
    """Copies a constant number of bytes between places that do not overlap: inlined as vector moves if short."""

    def code(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        copy = builder.module.declare_intrinsic("llvm.memcpy", [byte, byte, ir.IntType(64)])
        n = ir.IntType(64)(count.literal_value)
        builder.call(copy, [builder.inttoptr(args[0], byte), builder.inttoptr(args[1], byte), n, ir.IntType(1)(0)])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, count), code


@intrinsic(prefer_literal=True)
def _put(typing, to, at, scale, shift, source, target, wide, lanes, stream):
    """Converts `lanes` values `source` at one address to `target` at another, through `wide` with scale and shift."""
    source, target, wide, lanes, stream = (t.literal_value for t in (source, target, wide, lanes, stream))

    def kind(name):
        return ir.VectorType(CONVERTIBLE[name], lanes) if lanes > 1 else CONVERTIBLE[name]

    def cast(builder, value, name, to):
        if name == to:
            return value
        a, b = CONVERTIBLE[name], CONVERTIBLE[to]
        if name.startswith("float"):
            return (builder.fpext if to == "float64" else builder.fptrunc)(value, kind(to))
        signed = name.startswith("int")
        if to.startswith("float"):
            return (builder.sitofp if signed else builder.uitofp)(value, kind(to))
        if a.width >= b.width:
            return builder.trunc(value, kind(to)) if a.width > b.width else value
        return (builder.sext if signed else builder.zext)(value, kind(to))

    def spread(builder, number):
        number = cast_scalar(builder, number)
        if lanes == 1:
            return number
        empty = ir.Constant(kind(wide), ir.Undefined)
        first = builder.insert_element(empty, number, ir.IntType(32)(0))
        return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))

    def cast_scalar(builder, number):
        return builder.fptrunc(number, CONVERTIBLE[wide]) if wide == "float32" else number

    def code(context, builder, signature, args):
        value = builder.load(builder.inttoptr(args[1], kind(source).as_pointer()), align=1)
        if wide:
            value = cast(builder, value, source, wide)
            value = builder.fadd(builder.fmul(value, spread(builder, args[2])), spread(builder, args[3]))
            value = cast(builder, value, wide, target)
        else:
            value = cast(builder, value, source, target)
        store = builder.store(value, builder.inttoptr(args[0], kind(target).as_pointer()), align=LINE if stream else 1)
        if stream:
            store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    i, f = types.intp, types.float64
    constants = (types.literal(value) for value in (source, target, wide, lanes, stream))
    return types.void(i, i, f, f, *constants), code


@intrinsic
def _prefetch(typing, at):
    """Asks for the line at an address to be brought into the second-level cache; any address is harmless."""

    def code(context, builder, signature, args):
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        builder.call(fetch, [builder.inttoptr(args[0], byte), word(0), word(2), word(1)])
        return context.get_dummy_value()

    return types.void(types.intp), code


@intrinsic
def _fence(typing):
    """Completes all stores, also those past the caches, before anything that follows."""

    def code(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), code
