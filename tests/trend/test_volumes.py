"""Pictures and volumes in files: round trips, what is refused, and `sparseopt denoise` on them."""

import json

import numpy as np
import pytest

from sparseopt.experiments.read.files import FileError
from sparseopt.experiments.read.images import write_image
from sparseopt.experiments.read.volumes import Scan, check_format, read_known, read_scan, write_scan

nibabel = pytest.importorskip("nibabel", reason='NIfTI needs nibabel: pip install "sparseopt[volumes]"')
tifffile = pytest.importorskip("tifffile", reason='TIFF stacks need tifffile: pip install "sparseopt[images]"')

RNG = np.random.default_rng(7)
AFFINE = np.array([[-2.0, 0, 0, 10], [0, 0.5, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1]])


def blocks(shape=(6, 12, 10), kind=np.uint16, noise=20.0):
    clean = np.full(shape, 400.0)
    clean[2:, 4:9, 3:8] = 900
    noisy = clean + noise * RNG.standard_normal(shape)
    return clean, noisy.astype(kind)


def nifti(path, values, slope=None):
    image = nibabel.Nifti1Image(values, AFFINE)
    if slope is not None:
        image.header.set_slope_inter(slope, 0)
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".tif", ".npz"])
def test_a_volume_comes_back_as_it_was_written(tmp_path, kind, ending):
    _, values = blocks(kind=kind)
    given = read_scan(nifti(tmp_path / "given.nii", values))
    path = tmp_path / f"volume{ending}"
    check_format(path, given)
    write_scan(path, values, given)
    found = read_scan(path)
    np.testing.assert_array_equal(found.values, values)
    assert found.values.dtype == kind
    assert found.volume
    assert found.shape == values.shape
    assert found.spacing == (None if ending == ".tif" else (2.0, 0.5, 3.0))
    if ending.startswith(".nii"):
        np.testing.assert_array_equal(nibabel.load(path).affine, AFFINE)


def test_a_scaled_nifti_is_read_in_its_units(tmp_path):
    _, values = blocks(kind=np.int16)
    image = nibabel.Nifti1Image(values, AFFINE)
    image.header.set_data_dtype(np.int16)
    image.header.set_slope_inter(0.25, 10)
    nibabel.save(image, tmp_path / "scaled.nii")
    found = read_scan(tmp_path / "scaled.nii").values
    np.testing.assert_allclose(found, nibabel.load(tmp_path / "scaled.nii").get_fdata())
    assert found.dtype.kind == "f"


def test_coloured_stacks_and_pictures_of_floats(tmp_path):
    colours = RNG.integers(0, 255, (4, 9, 8, 3), np.uint8)
    tifffile.imwrite(tmp_path / "colours.tif", colours, photometric="rgb")
    found = read_scan(tmp_path / "colours.tif")
    np.testing.assert_array_equal(found.values, colours)
    assert found.shape == (4, 9, 8)
    np.savez(tmp_path / "picture.npz", image=RNG.standard_normal((5, 6)).astype(np.float32))
    picture = read_scan(tmp_path / "picture.npz")
    assert not picture.volume
    write_scan(tmp_path / "picture.tif", picture.values, picture)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "picture.tif"), picture.values)


def broken(tmp_path):
    """Files that are refused, by what is said of them."""
    four = nibabel.Nifti1Image(np.zeros((3, 4, 5, 2), np.float32), AFFINE)
    nibabel.save(four, tmp_path / "series.nii")
    coloured = np.zeros((3, 4, 5), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    nibabel.save(nibabel.Nifti1Image(coloured, AFFINE), tmp_path / "rgb.nii")
    (tmp_path / "short.nii").write_bytes(b"not a header")
    np.savez(tmp_path / "other.npz", signal=np.zeros(3))
    np.savez(tmp_path / "flat.npz", volume=np.zeros((3, 4)))
    np.savez(tmp_path / "object.npz", volume=np.array([[[{}]]], dtype=object))
    (tmp_path / "text.npz").write_text("no archive")
    return {
        "series.nii": "(3, 4, 5, 2); give a volume of three axes",
        "rgb.nii": "give a volume of one number a voxel",
        "short.nii": "cannot read",
        "other.npz": "it holds signal, expected one of volume, image",
        "flat.npz": "its array volume has the shape (3, 4)",
        "object.npz": "pickled",
        "text.npz": "it is not an NPZ archive",
        "absent.nii": "there is no file",
    }


def test_what_is_no_volume_is_refused(tmp_path):
    for name, text in broken(tmp_path).items():
        with pytest.raises(FileError) as error:
            read_scan(tmp_path / name)
        assert text in str(error.value), name


def test_a_volume_and_floats_need_a_file_that_holds_them(tmp_path):
    scan = read_scan(nifti(tmp_path / "given.nii", blocks()[1]))
    with pytest.raises(FileError, match=r"cannot hold a volume; name a file that ends in one of .npz, .tif, .tiff"):
        check_format(tmp_path / "out.png", scan)
    np.savez(tmp_path / "float.npz", image=np.zeros((3, 4)))
    with pytest.raises(FileError, match="cannot hold a picture of float64"):
        check_format(tmp_path / "out.png", read_scan(tmp_path / "float.npz"))
    with pytest.raises(FileError, match=r"ends in one of .npz, .tif, .tiff$"):
        check_format(tmp_path / "out.nii", read_scan(tmp_path / "float.npz"))


def test_a_mask_has_the_shape_of_its_scan(tmp_path):
    scan = read_scan(nifti(tmp_path / "given.nii", blocks()[1]))
    known = RNG.random(scan.shape) > 0.3
    np.savez(tmp_path / "known.npz", volume=known)
    np.testing.assert_array_equal(read_known(tmp_path / "known.npz", scan), known)
    np.savez(tmp_path / "other.npz", volume=known[1:])
    with pytest.raises(FileError, match=r"has the shape \(5, 12, 10\), and the scan that it belongs to \(6, 12, 10\)"):
        read_known(tmp_path / "other.npz", scan)


def test_the_opacity_of_a_mask_says_nothing(tmp_path):
    mask = np.zeros((6, 7, 4), np.uint8)
    mask[..., 3], mask[:3, :, :3] = 255, 255
    write_image(tmp_path / "mask.png", mask)
    known = read_known(tmp_path / "mask.png", Scan(np.zeros((6, 7), np.uint8)))
    np.testing.assert_array_equal(known, mask[..., 0] > 0)


def test_a_volume_may_lie_in_one_page(tmp_path, rng):
    volume = rng.integers(0, 2**16, (4, 16, 16), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "volume.tif", volume, volumetric=True, photometric="minisblack")
    found = read_scan(tmp_path / "volume.tif")
    assert found.volume
    np.testing.assert_array_equal(found.values, volume)


def test_the_command_denoises_a_scan_with_holes(tmp_path, command):
    clean, noisy = blocks(kind=np.float32)
    noisy[3, 6, 5] = np.nan
    source, output = nifti(tmp_path / "scan.nii", noisy), tmp_path / "calm.nii.gz"
    status, _, err = command("denoise", source, "--output", output)
    assert status == 2
    assert "NaN" in err
    assert "--missing" in err
    assert not output.exists()
    status, out, err = command("denoise", source, "--output", output, "--isotropic", "--missing")
    assert status == 0, err
    assert "of the least estimated error" in out
    fitted = nibabel.load(output)
    np.testing.assert_array_equal(fitted.affine, AFFINE)
    assert np.abs(fitted.get_fdata() - clean).mean() < 10
    assert abs(fitted.get_fdata()[3, 6, 5] - 900) < 40
    summary = json.loads((tmp_path / "calm.nii-summary.json").read_text())
    assert summary["status"] == "CONVERGED"
    assert summary["spacing"] == [2.0, 0.5, 3.0]
    assert summary["isotropic"]
    assert (tmp_path / "calm.nii-before-after.png").is_file()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--spacing", "1,2"), "one positive number for each of its 3 axes"),
        (("--spacing", "wide"), "--spacing takes numbers separated by commas"),
        (("--isotropic", "--order", 1), "takes order 0 and a grid of 2 or 3 axes, given order 1"),
    ],
)
def test_options_that_do_not_fit_end_before_any_work(tmp_path, command, options, text):
    source = nifti(tmp_path / "scan.nii", blocks()[1])
    status, _, err = command("denoise", source, "--output", tmp_path / "calm.npz", "--weight", 20, *options)
    assert status == 2
    assert text in " ".join(err.split())
    assert not (tmp_path / "calm.npz").exists()
