"""Images and volumes as files, with the spacing of their voxels.

An image is what `images.read_image` reads, or an array `image` in an NPZ file. A volume is a TIFF with several pages,
NIfTI (.nii, .nii.gz; the extra `volumes`), or an array `volume` in an NPZ file, which may also hold its `spacing`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from sparseopt.experiments.read.files import (
    FileError,
    check_unpacked,
    npz_array,
    opened_npz,
    readable,
    reading,
    write_npz,
)
from sparseopt.experiments.read.images import encoded_image, read_image, write_image

NIFTI, NPZ, TIFF = (".nii", ".nii.gz"), (".npz",), (".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class Scan:
    """An image or a volume."""

    values: np.ndarray  # `[height, width]` or `[depth, height, width]`, or either with channels
    volume: bool = False
    spacing: tuple[float, ...] | None = None  # of a volume's axes; None for ones
    source: Any = None  # the NIfTI image, whose header and affine map an output keeps

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape without channels."""
        return self.values.shape[: 3 if self.volume else 2]

    def shown(self, values: np.ndarray) -> np.ndarray:
        """The part of an array of this shape that an image can show: for a volume the middle slice."""
        if not self.volume:
            return values
        return values[values.shape[0] // 2] if self.source is None else from_above(values)


def from_above(values: np.ndarray) -> np.ndarray:
    """The middle slice of a NIfTI volume, whose axes point right, ahead and up, with ahead upwards."""
    return np.rot90(values[:, :, values.shape[2] // 2])


def read_scan(path: str | Path) -> Scan:
    """An image or a volume; a FileError if the file cannot be read as either."""
    file = readable(path, "a TIFF, NIfTI or NPZ")
    name = file.name.lower()
    with reading(f"{file} as a volume"):
        if name.endswith(NIFTI):
            return _read_nifti(file)
        if name.endswith(NPZ):
            return _read_npz(file)
        if name.endswith(TIFF) and (stack := _read_stack(file)) is not None:
            return stack
    return Scan(read_image(file))


def check_format(path: Path, scan: Scan) -> None:
    """Raise a FileError unless a scan of this kind can be written to a file with this name."""
    kinds = NPZ + TIFF + (NIFTI if scan.source is not None else ())
    if (scan.volume or scan.values.dtype.kind == "f") and not path.name.lower().endswith(kinds):
        what = "a volume" if scan.volume else f"a picture of {scan.values.dtype}"
        raise FileError(f"{path} cannot hold {what}; name a file that ends in one of {', '.join(kinds)}")
    channels = scan.values.shape[len(scan.shape) :]
    if path.name.lower().endswith(NIFTI + NPZ):
        return
    if not (scan.volume or scan.values.dtype.kind == "f"):
        encoded_image(path, scan.values[:1, :1])
    elif channels and channels[0] not in (3, 4):
        raise FileError(f"{path} cannot hold {channels[0]} channels of this kind; name a file that ends in .npz")


def write_scan(path: Path, values: np.ndarray, like: Scan) -> None:
    """Write values with the other parts of a scan, in the format of the file's ending, after `check_format`."""
    name = path.name.lower()
    if name.endswith(NIFTI):
        import nibabel

        header = like.source.header.copy()
        header.set_data_dtype(values.dtype)
        header.set_slope_inter(1, 0)
        nibabel.save(nibabel.Nifti1Image(values, like.source.affine, header), path)
    elif name.endswith(NPZ):
        more: dict[str, Any] = {} if like.spacing is None else {"spacing": np.asarray(like.spacing)}
        write_npz(path, {"volume" if like.volume else "image": values, **more})
    elif like.volume or values.dtype.kind == "f":
        import tifffile

        colours = values.ndim > len(like.shape)
        tifffile.imwrite(path, values, photometric="rgb" if colours else "minisblack")
    else:
        write_image(path, values)


def read_known(path: Path, scan: Scan) -> np.ndarray:
    """Which pixels or voxels of a scan are known: where a file of its shape, with or without channels, is not 0."""
    mask = read_scan(path)
    if mask.shape != scan.shape:
        raise FileError(f"{path} has the shape {mask.shape}, and the scan that it belongs to {scan.shape}")
    values = mask.values
    if not scan.volume and values.ndim == 3 and values.shape[-1] in (2, 4):
        values = values[..., :-1]  # without the opacity
    known = np.nan_to_num(values) != 0
    return known.any(axis=-1) if known.ndim > len(scan.shape) else known


def _read_nifti(file: Path) -> Scan:
    try:
        import nibabel
    except ImportError as error:
        raise FileError(f'reading {file} needs nibabel: pip install "sparseopt[volumes]"') from error
    image = nibabel.Nifti1Image.from_filename(file)
    shape = tuple(size for i, size in enumerate(image.shape) if i < 3 or size > 1)
    if len(shape) != 3:
        raise FileError(f"{file} has the shape {image.shape}; give a volume of three axes, as one time of a series")
    check_unpacked(int(np.prod(shape)) * image.header.get_data_dtype().itemsize, file)
    values = np.asarray(image.dataobj).reshape(shape)
    if values.dtype.kind not in "uif":
        raise FileError(f"{file} holds {values.dtype}; give a volume of one number a voxel")
    spacing = tuple(float(size) for size in image.header.get_zooms()[:3])
    return Scan(values, True, spacing if all(size > 0 for size in spacing) else None, image)


def _read_npz(file: Path) -> Scan:
    with opened_npz(file, "volume=v") as arrays:
        name, values = npz_array(arrays, ("volume", "image"), file)
        volume = name == "volume"
        if values.ndim not in (range(3, 5) if volume else range(2, 4)) or values.size == 0:
            raise ValueError(f"its array {name} has the shape {values.shape}")
        if not (volume and "spacing" in arrays):
            return Scan(values, volume)
        _, spacing = npz_array(arrays, ("spacing",), file)
        return Scan(values, volume, tuple(map(float, spacing.reshape(-1))))


def _read_stack(file: Path) -> Scan | None:
    """A TIFF of a volume, in several pages or in one; None for a single image."""
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        series = tiff.series[0]
        if len(tiff.series) != 1 or (len(tiff.pages) < 2 and len(series.shape) - ("S" in series.axes) < 3):
            return None
        colours = series.axes.endswith("S")
        if len(series.shape) != 3 + colours or "S" in series.axes[:-1]:
            raise FileError(f"{file} has the shape {series.shape}, axes {series.axes}; give a stack of pictures")
        check_unpacked(int(np.prod(series.shape)) * series.dtype.itemsize, file)
        values = series.asarray()
        if values.dtype.kind not in "uif":
            raise FileError(f"{file} holds {values.dtype}; give a stack of grey or coloured pictures")
        return Scan(values, True)
