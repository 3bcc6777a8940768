"""Images and volumes inside pip packages, read without a download.

| name | what | package | terms |
|---|---|---|---|
| camera, coffee, chelsea | photographs | scikit-image | CC0 by the photographers |
| astronaut | photograph | scikit-image | NASA, no known restrictions |
| hubble_deep_field | astronomy | scikit-image | NASA, may be used freely |
| retina | medicine: eye ground, colour | scikit-image | CC0 |
| microaneurysms | medicine: eye ground, green channel | scikit-image | CC0 |
| immunohistochemistry | medicine: stained colon tissue | scikit-image | no known restrictions |
| shepp_logan_phantom | medicine: test phantom of a head | scikit-image, BSD-3 | no terms stated |
| brain | volume: T1-weighted template of the brain, 1 mm | nilearn | copyright notice stays, see below |

The terms of scikit-image's images are in the docstrings of `skimage.data`.

The brain is the ICBM 152 template, release 2009a, nonlinear, symmetric (Fonov, Evans, McKinstry, Almli, Collins,
NeuroImage 47, 2009), an average of 152 people. Copyright 1993-2009 Louis Collins, McConnell Brain Imaging Centre,
Montreal Neurological Institute, McGill University: use, copy, change and distribution without fee are permitted if that
notice appears in all copies. nilearn itself is BSD-3 and states no terms for the file.
"""

import importlib.util
from pathlib import Path

import numpy as np

from sparseopt.core.base.arguments import suggest
from sparseopt.experiments.read.volumes import Scan, from_above, read_scan
from sparseopt.experiments.task import Strict

PICTURES = (
    "camera", "coffee", "chelsea", "astronaut", "hubble_deep_field", "retina", "microaneurysms",
    "immunohistochemistry", "shepp_logan_phantom",
)  # fmt: skip
VOLUMES = ("brain",)
# The files of nilearn need none of its dependencies.
INSTALL = {
    "skimage": "pip install scikit-image",
    "nilearn": "pip install --no-deps nilearn",
    "nibabel": "pip install 'sparseopt[volumes]'",
}


class Picture(Strict):
    """An image or a volume, or a part of it, in grey levels 0..255.

    Attributes:
        name: one of `PICTURES` or `VOLUMES`.
        crop: the part to use: first row, first column, height and width; for a volume the first place on its three axes
            (right, ahead, up) and three lengths.
        size: rows and columns to scale (the part of) the image to, with anti-aliasing; not for a volume.
        grey: convert to one channel, by luminance.
    """

    name: str = "camera"
    crop: tuple[int, int, int, int] | tuple[int, int, int, int, int, int] | None = None
    size: int | tuple[int, int] | None = None
    grey: bool = False

    def check(self) -> None:
        """Raise ValueError if the image or its package is missing, or if it does not have this part."""
        if self.name not in (*PICTURES, *VOLUMES):
            raise ValueError(f"there is no picture {self.name!r}: {suggest(self.name, (*PICTURES, *VOLUMES))}")
        if self.crop is not None and len(self.crop) != 2 * self.axes:
            raise ValueError(f"a crop of {self.name} has {2 * self.axes} numbers, given {self.crop}")
        if self.axes == 3 and self.size is not None:
            raise ValueError(f"{self.name} is a volume and is not scaled: leave out size={self.size}, and take a crop")
        for package in ("skimage",) if self.axes == 2 else ("nilearn", "nibabel"):
            require(package)

    @property
    def axes(self) -> int:
        """3 for a volume, 2 for an image."""
        return 3 if self.name in VOLUMES else 2

    def shown(self, values: np.ndarray) -> np.ndarray:
        """The drawable part of an array like `load()`: for a volume its middle slice from above, face upwards."""
        return values if self.axes == 2 else from_above(values)

    def load(self) -> np.ndarray:
        """`[height, width]`, `[height, width, channels]` or a volume `[right, ahead, up]`, float64.

        Raises:
            ValueError: as for `check`, or if a crop leaves the image.
        """
        self.check()
        if self.axes == 3:
            return self._part(np.asarray(_brain().values, np.float64))
        import skimage.data
        from skimage.color import rgb2gray
        from skimage.transform import resize

        stored = getattr(skimage.data, self.name)()
        image = np.asarray(stored, np.float64) * (255.0 if stored.dtype.kind == "f" else 1.0)
        image = self._part(image)
        if self.grey and image.ndim == 3:
            image = rgb2gray(image[..., :3])
        if self.size is not None:
            sizes = (self.size, self.size) if isinstance(self.size, int) else self.size
            image = resize(image, (*sizes, *image.shape[2:]), order=1, anti_aliasing=True, preserve_range=True)
        return image

    def _part(self, image: np.ndarray) -> np.ndarray:
        if self.crop is None:
            return image
        firsts, lengths, shape = self.crop[: self.axes], self.crop[self.axes :], image.shape[: self.axes]
        if not all(0 <= first < first + n <= most for first, n, most in zip(firsts, lengths, shape, strict=True)):
            raise ValueError(f"the crop {self.crop} leaves {self.name}, which is {shape}")
        return image[tuple(slice(first, first + n) for first, n in zip(firsts, lengths, strict=True))]


def require(package: str) -> Path:
    """The folder of an installed package, without importing it; ValueError with the command that installs it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ValueError(f"the data needs the package {package}: {INSTALL[package]}")
    return Path(found.origin).parent


def _brain() -> Scan:
    file = "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    return read_scan(require("nilearn") / "datasets" / "data" / file)
