"""Statistics of real images in files: those that are published with programs, and your own.

    file of                     arrays
    guided-diffusion (ADM)      mu, sigma of pooled features, mu_s, sigma_s of spatial ones; arr_0, images
    pytorch-fid, JiT            mu, sigma
    samples                     arr_0 uint8 [N, H, W, C] alone

mu [F] is the mean of features and sigma [F, F] their unbiased covariance. The file does not say which network computed
the features: their number is all that can be compared with, 2,048 of Inception-v3.
"""

import os
import zipfile
import zlib
from typing import IO, NamedTuple

import numpy as np

from diffusion.metrics.moments import Gaussian


class Reference(NamedTuple):
    """What a file holds: statistics of pooled and of spatial features, None where it has none, and whether images."""

    features: Gaussian | None
    spatial: Gaussian | None
    has_images: bool


def read(path: str | os.PathLike) -> Reference:
    """The statistics in a file .npz; images are not read.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no whole .npz, holds neither statistics nor images, or statistics that no features can have.
    """
    try:
        # The first because NumPy leaves what is no zip open.
        with zipfile.ZipFile(path), np.load(path) as arrays:
            found = {name: arrays[name] for name in ("mu", "sigma", "mu_s", "sigma_s") if name in arrays.files}
            names = sorted(arrays.files)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file of reference statistics {os.fspath(path)}") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(f"{os.fspath(path)} is not a whole npz file: {e}") from e
    if "arr_0" not in names and not {"mu", "sigma"} <= set(names):
        raise ValueError(f"{os.fspath(path)} holds {names}, but neither statistics mu and sigma nor images arr_0")
    features, spatial = (_gaussian(os.fspath(path), found, end) for end in ("", "_s"))
    return Reference(features, spatial, "arr_0" in names)


def write(file: str | os.PathLike | IO[bytes], features: Gaussian, spatial: Gaussian | None = None) -> None:
    """Writes statistics to a file .npz, or to an open one, that the programs above read too."""
    arrays = {"mu": features.mean, "sigma": features.covariance}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    np.savez(file, **arrays)


def _gaussian(path: str, arrays: dict[str, np.ndarray], end: str) -> Gaussian | None:
    mean, covariance = arrays.get(f"mu{end}"), arrays.get(f"sigma{end}")
    if mean is None or covariance is None:
        return None
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise ValueError(f"{path}: mu{end} and sigma{end} must be [F] and [F, F], not {mean.shape} {covariance.shape}")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path}: mu{end} or sigma{end} holds NaN or infinite values: make or download it again")
    if not np.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-6 * np.abs(covariance).max()):
        raise ValueError(f"{path}: sigma{end} is not symmetric, so it is no covariance: make or download it again")
    return Gaussian(mean, (covariance + covariance.T) / 2)
