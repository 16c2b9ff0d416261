"""Normal noise as compiled vector code: the host's generator, a function of seed and row on any machine."""

import math

import numpy as np
from numba import njit, types


def gauss_kernel():
    """Fills rows of normal noise [n, 2 k]; row r is a function of (seed, first + r).

    Words (w0, w1) of Threefry at counter (first + r, j) give two values, as in Box and Muller (1958) but with an angle
    over half a circle and a radius of either sign:

        radius = (-1)^(w0 mod 2) sqrt(-2 ln((floor(w0 / 2) + 1/2) / 2^31)),    angle = pi w1 / 2^32, w1 in [-2^31, 2^31)

    With the logarithm and the circle as series of IEEE operations the loop becomes vector code, and every machine gets
    the same noise.
    """
    f, i4, u4 = np.float32, np.int32, np.uint32

    def gauss(seed, first, out):
        key0, key1 = u4(seed), u4(seed >> np.uint64(32))
        half = out.shape[1] // 2
        for r in range(out.shape[0]):
            for j in range(half):
                w0, w1 = _threefry(key0, key1, u4(first + r), u4(j))
                square = f(-2) * _log((f(i4(w0 >> u4(1))) + f(0.5)) * f(2.0**-31))
                radius = f(math.sqrt(square))
                radius = -radius if w0 & u4(1) else radius
                cosine, sine = _circle(f(i4(w1)) * f(math.pi / 2**32))
                out[r, j] = radius * cosine
                out[r, half + j] = radius * sine

    return types.void(types.uint64, types.intp, types.Array(types.float32, 2, "C")), gauss


@njit(error_model="numpy")
def _circle(angle):
    """Cosine and sine of a float32 in [-pi/2, pi/2]."""
    f = np.float32
    z = angle * angle
    cosine, sine = f(1), f(1)
    for m in range(12, 0, -2):
        cosine = f(1) - cosine * z * f(1 / (m * (m - 1)))
        sine = f(1) - sine * z * f(1 / (m * (m + 1)))
    return cosine, sine * angle


@njit(error_model="numpy")  # a division that could raise would keep the loop from becoming vectors
def _log(u):
    """Natural logarithm of a normal float32: u = 2^e m with m about 1, ln m = 2 artanh((m - 1) / (m + 1))."""
    f, i4 = np.float32, np.int32
    bits = np.float32(u).view(np.int32)
    e = i4(i4(bits - i4(0x3F3504F3)) >> i4(23))  # 0x3F3504F3 is sqrt(1/2)
    m = np.int32(bits - i4(e << i4(23))).view(np.float32)
    s = (m - f(1)) / (m + f(1))
    z = s * s
    return f(e) * f(math.log(2)) + f(2) * s * (f(1) + z * (f(1 / 3) + z * (f(1 / 5) + z * (f(1 / 7) + z * f(1 / 9)))))


@njit
def _threefry(key0, key1, x0, x1):
    """Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)."""
    u4 = np.uint32
    key2 = u4(key0 ^ key1 ^ u4(0x1BD11BDA))
    x0, x1 = u4(x0 + key0), u4(x1 + key1)
    x0, x1 = _four_rounds(x0, x1, 13, 15, 26, 6, key1, u4(key2 + u4(1)))
    x0, x1 = _four_rounds(x0, x1, 17, 29, 16, 24, key2, u4(key0 + u4(2)))
    x0, x1 = _four_rounds(x0, x1, 13, 15, 26, 6, key0, u4(key1 + u4(3)))
    x0, x1 = _four_rounds(x0, x1, 17, 29, 16, 24, key1, u4(key2 + u4(4)))
    return _four_rounds(x0, x1, 13, 15, 26, 6, key2, u4(key0 + u4(5)))


@njit
def _four_rounds(x0, x1, r1, r2, r3, r4, add0, add1):
    x0, x1 = _round(x0, x1, np.uint32(r1))
    x0, x1 = _round(x0, x1, np.uint32(r2))
    x0, x1 = _round(x0, x1, np.uint32(r3))
    x0, x1 = _round(x0, x1, np.uint32(r4))
    return np.uint32(x0 + add0), np.uint32(x1 + add1)


@njit
def _round(x0, x1, r):
    x0 = np.uint32(x0 + x1)
    return x0, np.uint32(np.uint32(np.uint32(x1 << r) | np.uint32(x1 >> np.uint32(np.uint32(32) - r))) ^ x0)
