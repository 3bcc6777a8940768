import numpy as np
import pytest

import sparseopt as so
from sparseopt.trend.images import before_and_after, denoise, psnr


def picture(kind, channels=()):
    rng = np.random.default_rng(3)
    top = np.iinfo(kind).max if np.issubdtype(kind, np.integer) else 255.0
    clean = np.where(np.arange(24) < 12, 0.25, 0.75) * np.ones((20, 1))
    clean = clean.reshape(20, 24, *(1 for _ in channels)) * np.ones(channels)
    noisy = clean + 20 / 255 * rng.standard_normal(clean.shape)
    return (clean * top), np.clip(noisy * top, 0, top).astype(kind), float(top)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize(("channels", "couple"), [((), False), ((3,), False), ((3,), True)])
def test_noise_goes_and_type_and_range_stay(kind, channels, couple):
    clean, noisy, top = picture(kind, channels)
    found = denoise(noisy, 20 * top / 255, couple=couple)
    assert found.image.dtype == noisy.dtype
    assert found.image.shape == noisy.shape
    assert float(found.solution.gap) <= 1e-4
    assert psnr(found.image, clean, top) > psnr(noisy, clean, top) + 8


def test_integers_saturate_instead_of_wrapping():
    image = np.full((6, 6), 255, np.uint8)
    image[2, 2] = 0
    assert denoise(image, 1e6).image.min() >= 240
    assert denoise(np.full((4, 4), 255, np.uint8), 3.0).image.min() == 255


def test_alpha_is_kept():
    image = np.random.default_rng(0).integers(0, 255, (8, 9, 4)).astype(np.uint8)
    found = denoise(image, 30.0)
    np.testing.assert_array_equal(found.image[..., 3], image[..., 3])
    assert np.var(found.image[..., 0].astype(float)) < np.var(image[..., 0].astype(float))


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match=r"an image has the shape.*given \(5,\)"):
        denoise(np.zeros(5), 1.0)
    with pytest.raises(ValueError, match="must not be negative"):
        denoise(np.zeros((5, 5)), -1.0)


def test_the_figure_is_written(tmp_path):
    _, noisy, _ = picture(np.uint8)
    before_and_after(noisy, denoise(noisy, 20.0).image, tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 1000


def test_the_answer_is_that_of_the_trend_filter():
    _, noisy, _ = picture(np.float32)
    direct = so.trend_filter(noisy, so.Graph.grid(noisy.shape), so.L1(9.0), 1, tol=1e-4)
    np.testing.assert_array_equal(denoise(noisy, 9.0, 1).image, direct.value)
