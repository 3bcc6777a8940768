"""`so.trend.denoise`: images and volumes keep type, range and opacity; the weight is chosen."""

import numpy as np
import pytest

import sparseopt as so
from sparseopt.trend import denoise, trend_path
from tests.tiers import often


def psnr(image, reference, peak=255.0):
    return 10 * np.log10(peak**2 / np.mean((image.astype(float) - reference) ** 2))


def picture(kind, channels=()):
    rng = np.random.default_rng(3)
    top = np.iinfo(kind).max if np.issubdtype(kind, np.integer) else 255.0
    clean = np.where(np.arange(24) < 12, 0.25, 0.75) * np.ones((20, 1))
    clean = clean.reshape(20, 24, *(1 for _ in channels)) * np.ones(channels)
    noisy = clean + 20 / 255 * rng.standard_normal(clean.shape)
    return (clean * top), np.clip(noisy * top, 0, top).astype(kind), float(top)


@pytest.mark.parametrize(
    ("kind", "channels", "couple"),
    [(np.uint8, (), False), (np.uint16, (), False), (np.float32, (), False), (np.uint16, (3,), True)],
)
def test_noise_goes_and_type_and_range_stay(kind, channels, couple):
    clean, noisy, top = picture(kind, channels)
    found = denoise(noisy, 20 * top / 255, couple=couple)
    assert (found.image.dtype, found.image.shape) == (noisy.dtype, noisy.shape)
    assert float(found.solution.gap) <= 1e-4
    assert psnr(found.image, clean, top) > psnr(noisy, clean, top) + 8


def test_colours_are_coupled_and_isotropic_unless_told_otherwise():
    rows, columns = np.indices((20, 24))
    clean = 60.0 + 100 * (((rows - 10) ** 2 + (columns - 12) ** 2 < 50)[..., None] * [1, 0.7, -0.5])
    noisy = np.clip(clean + 20 * np.random.default_rng(0).standard_normal(clean.shape), 0, 255).astype(np.uint8)
    options = {"isotropic": False, "couple": False}
    usual, apart = denoise(noisy, 20.0), denoise(noisy, 20.0, **options)
    np.testing.assert_array_equal(usual.image, denoise(noisy, 20.0, isotropic=True, couple=True).image)
    assert (usual.isotropic, usual.couple, apart.isotropic, apart.couple) == (True, True, False, False)
    best, best_apart = (
        max(psnr(denoise(noisy, weight, **which).image, clean) for weight in (20.0, 28.0, 40.0, 56.0, 80.0))
        for which in ({}, options)
    )
    assert best > best_apart + 1
    grey = denoise(noisy[..., 0], 20.0)
    np.testing.assert_allclose(grey.image, apart.image[..., 0], atol=1)
    assert not grey.isotropic


def test_integers_saturate_instead_of_wrapping_and_keep_their_digits():
    image = np.full((20, 24), 255, np.uint8)
    image[2, 2] = 0
    assert denoise(image, 1e6).image.min() >= 240
    for kind, value in ((np.uint8, 255), (np.uint32, 2**32 - 1), (np.int32, 2**31 - 1), (np.int32, -(2**31))):
        assert (denoise(np.full((20, 24), value, kind), 10.0).image == value).all()


def test_opacity_is_kept_and_two_components_of_a_field_are_channels(rng):
    image = rng.integers(0, 255, (20, 24, 4)).astype(np.uint8)
    found = denoise(image, 30.0).image
    np.testing.assert_array_equal(found[..., 3], image[..., 3])
    assert np.var(found[..., 0].astype(float)) < np.var(image[..., 0].astype(float))
    field = rng.standard_normal((20, 24, 2)).astype(np.float32)
    assert np.var(denoise(field, 1.0).image[..., 1]) < 0.5 * np.var(field[..., 1])
    grey = image[..., :2]
    for given in (grey, (grey / 255).astype(np.float32)):
        np.testing.assert_array_equal(denoise(given, 0.1).image[..., 1], given[..., 1])
    apart = denoise(grey, 30.0, alpha=False).image
    assert np.var(apart[..., 1].astype(float)) < np.var(grey[..., 1].astype(float))


def test_the_answer_is_that_of_the_trend_filter():
    _, noisy, _ = picture(np.float32)
    direct = so.trend_filter(noisy, so.Graph.grid(noisy.shape), so.L1(9.0), 1, tol=1e-4)
    np.testing.assert_array_equal(denoise(noisy, 9.0, 1).image, direct.value)


@pytest.mark.parametrize("options", often([{}, {"isotropic": True}, {"order": 1}], {}))
def test_the_chosen_weight_is_nearly_the_best(options):
    rng = np.random.default_rng(1)
    rows, columns = np.indices((48, 48)) - 24
    clean = 60.0 + 100 * (rows**2 + columns**2 < 200) + 50 * (rows > columns)
    if options.get("order"):
        clean = 3.0 * np.abs(rows) + 2.0 * columns
    noisy = clean + 20 * rng.standard_normal(clean.shape)
    counts = []
    found = denoise(noisy, **options, observer=lambda what, done, total: counts.append((done, total)))
    assert [done for done, _ in counts] == list(range(len(counts)))
    assert 4 <= counts[-1][1] == len(counts) <= 6
    errors = [
        np.mean((denoise(noisy, found.weight * factor, **options).image - clean) ** 2)
        for factor in (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
    ]
    assert np.mean((found.image - clean) ** 2) <= 1.1 * min(errors)
    assert float(found.solution.gap) <= 1e-4
    assert abs(found.noise - 20) < 2
    if not options:
        assert found.solution.pieces().shape == (48 * 48,)
        # The weight is where the parabola through the risks of the best power of 2 and of its neighbours is least.
        powers, risks = np.round(np.log2(found.weight / found.noise)) + np.arange(-1, 2), []
        for weight in found.noise * 2.0**powers:
            path = trend_path(noisy, so.Graph.grid(noisy.shape), weights=[weight], tol=1e-3, dtype=np.float32)
            risks += so.select(path, "sure", found.noise).curve.tolist()
        bend, slope, _ = np.polyfit(powers, risks, 2)
        assert found.weight == pytest.approx(found.noise * 2 ** (-slope / (2 * bend)), rel=1e-6)


def test_pixels_that_are_not_known_are_filled_in():
    rng = np.random.default_rng(1)
    clean = 60.0 + 100 * (np.arange(24) > 11) * np.ones((20, 1))
    noisy, known = clean + 5 * rng.standard_normal(clean.shape), rng.random(clean.shape) > 0.4
    masked = denoise(np.where(known, noisy, 0), isotropic=True, known=known)
    marked = denoise(np.where(known, noisy, np.nan), isotropic=True, missing="nan")
    assert masked.weight == marked.weight
    np.testing.assert_array_equal(masked.image, marked.image)
    assert np.abs(masked.image - clean)[~known].mean() < 3


@pytest.mark.thorough
def test_a_volume_has_spacing_and_channels():
    rng = np.random.default_rng(1)
    clean = 60.0 + 100 * (np.indices((6, 10, 9)).sum(axis=0) > 12)
    noisy = clean + 10 * rng.standard_normal(clean.shape)
    plain = denoise(noisy, 8.0, volume=True, isotropic=True)
    same = denoise(noisy, 8.0, volume=True, isotropic=True, spacing=(3.0, 3.0, 3.0))
    np.testing.assert_array_equal(plain.image, same.image)
    apart = denoise(noisy, 8.0, volume=True, isotropic=True, spacing=(3.0, 1.0, 1.0))
    assert np.abs(np.diff(apart.image, axis=0)).sum() > np.abs(np.diff(plain.image, axis=0)).sum()
    colours = denoise(np.stack([noisy, noisy], -1), 8.0, volume=True, isotropic=True)
    np.testing.assert_allclose(colours.image[..., 1], plain.image, atol=0.5)
