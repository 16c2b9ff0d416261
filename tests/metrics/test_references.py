"""Files of statistics: written and read, as other programs lay them out, and what is refused."""

import io

import numpy as np
import pytest

from diffusion.metrics import moments, references


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def fitted(rng, f):
    return moments.gaussian(moments.moments(rng.normal(size=(20, f))))


def test_what_is_written_is_read(rng, tmp_path):
    features, spatial = fitted(rng, 4), fitted(rng, 3)
    references.write(tmp_path / "both.npz", features, spatial)
    found = references.read(tmp_path / "both.npz")
    assert not found.has_images
    for given, read in ((features, found.features), (spatial, found.spatial)):
        assert moments.frechet(given, read) == pytest.approx(0, abs=1e-12)
        np.testing.assert_array_equal(given.mean, read.mean)
    file = io.BytesIO()
    references.write(file, features)
    (tmp_path / "one.npz").write_bytes(file.getvalue())
    assert references.read(tmp_path / "one.npz").spatial is None


def test_the_layouts_of_other_programs_are_read(rng, tmp_path):
    """guided-diffusion's reference batch, float32 statistics as of JiT, and samples without statistics."""
    of = fitted(rng, 5)
    images = rng.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    statistics = {"mu": of.mean, "sigma": of.covariance}
    np.savez(tmp_path / "adm.npz", images, **statistics, mu_s=of.mean[:2], sigma_s=of.covariance[:2, :2])
    np.savez(tmp_path / "jit.npz", **{name: x.astype(np.float32) for name, x in statistics.items()})
    np.savez(tmp_path / "samples.npz", images)
    adm, jit, samples = (references.read(tmp_path / f"{name}.npz") for name in ("adm", "jit", "samples"))
    assert adm.has_images and len(adm.spatial.mean) == 2
    assert jit.features.covariance.dtype == np.float64
    np.testing.assert_allclose(jit.features.covariance, adm.features.covariance, rtol=1e-5, atol=1e-6)
    assert samples == (None, None, True)


def test_images_are_not_read(rng, tmp_path, monkeypatch):
    of = fitted(rng, 2)
    np.savez(tmp_path / "adm.npz", np.zeros((9, 2, 2, 3), np.uint8), mu=of.mean, sigma=of.covariance)
    taken, get = [], np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda self, name: taken.append(name) or get(self, name))
    references.read(tmp_path / "adm.npz")
    assert taken == ["mu", "sigma"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mean": np.zeros(3)}, r"holds \['mean'\], but neither statistics mu and sigma nor images arr_0"),
        ({"mu": np.zeros(3)}, "but neither statistics"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu and sigma must be \[F\] and \[F, F\], not \(3,\) \(4, 4\)"),
        ({"mu": np.zeros((1, 3)), "sigma": np.eye(3)}, r"must be \[F\]"),
        ({"mu": np.array([0, np.nan]), "sigma": np.eye(2)}, "mu or sigma holds NaN or infinite"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 0.5], [0.1, 1]])}, "sigma is not symmetric"),
        ({"arr_0": np.zeros(1), "mu_s": np.zeros(2), "sigma_s": np.eye(3)}, "mu_s and sigma_s must be"),
        ({"mu": np.array([None]), "sigma": np.eye(1)}, "is not a whole npz file: .*pickle"),
    ],
    ids=lambda value: "",
)
def test_what_are_no_statistics_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message) as refusal:
        references.read(tmp_path / "x.npz")
    assert str(refusal.value).startswith(str(tmp_path / "x.npz"))


def test_files_that_are_missing_or_broken_are_refused(rng, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file of reference statistics .*none\.npz"):
        references.read(tmp_path / "none.npz")
    references.write(tmp_path / "whole.npz", fitted(rng, 9))
    content = (tmp_path / "whole.npz").read_bytes()
    for broken in (b"", b"text", content[:-100], content[:700] + b"x" + content[701:]):
        (tmp_path / "broken.npz").write_bytes(broken)
        with pytest.raises(ValueError, match=r"broken\.npz is not a whole npz file"):
            references.read(tmp_path / "broken.npz")
