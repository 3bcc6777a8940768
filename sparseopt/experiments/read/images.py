"""Images as files: PNG, TIFF, JPEG and others, grey or colour, 8 or 16 bit. An invalid file is a `FileError`."""

import io
import math
import struct
import warnings
from pathlib import Path

import numpy as np

from sparseopt.experiments.read.files import FileError, readable, reading
from sparseopt.system.files import write_whole

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Formats that are only data: Pillow's reader of PostScript, for example, starts a program.
IMAGE_FORMATS = ("PNG", "TIFF", "JPEG", "WEBP", "BMP", "GIF", "PPM")
IMAGE_KINDS = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm")
# Pillow's own limit for decompression bombs.
MAX_PIXELS = 89_478_485


def read_image(path: str | Path) -> np.ndarray:
    """An image of at most `MAX_PIXELS` as `[height, width]` or `[height, width, channels]`, uint8 or uint16."""
    from PIL import Image

    file = readable(path, "a PNG or TIFF")
    with reading(f"{file} as an image"), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if _is_deep_colour_png(file):
            return _read_deep_png(file)
        try:
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                # A program may have disabled Pillow's own limit.
                _check_pixels(image.size, file)
                if image.format == "TIFF" and image.mode in ("RGB", "RGBA"):
                    return _read_colour_tiff(file)
                plain = {"1": "L", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}.get(image.mode, image.mode)
                return _checked_image(np.asarray(image.convert(plain)), file)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise FileError(f"{file} is too large to read: {error}; crop it or scale it down first") from error


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write uint8 or uint16 pixels in the format of the file's ending, the whole file or nothing."""
    write_whole(Path(path), encoded_image(Path(path), image))


def encoded_image(file: Path, image: np.ndarray) -> bytes:
    """What `write_image` writes; a FileError if the format cannot hold such pixels."""
    from PIL import Image

    deep, kind, stream = image.dtype == np.uint16, file.suffix.lower(), io.BytesIO()
    if deep and kind not in (".png", ".tif", ".tiff"):
        raise FileError(f"{file} cannot hold 16-bit pixels; name a .png or .tif file")
    if deep and image.ndim == 3 and kind == ".png":
        import png

        height, width, channels = image.shape
        writer = png.Writer(width, height, greyscale=channels < 3, alpha=channels in (2, 4), bitdepth=16)
        writer.write(stream, image.reshape(height, width * channels))
    elif deep and image.ndim == 3 and image.shape[-1] == 2:
        raise FileError(f"{file} cannot hold 16-bit grey with opacity; name a .png file")
    elif deep and image.ndim == 3:
        import tifffile

        tifffile.imwrite(stream, image)
    else:
        try:
            Image.fromarray(image).save(stream, Image.registered_extensions()[kind])
        except (KeyError, TypeError, ValueError, OSError) as error:
            why = f"unknown file extension: {kind}" if isinstance(error, KeyError) else error
            raise FileError(f"cannot write {file}: {why}; name a .png file") from error
    return stream.getvalue()


def _is_deep_colour_png(file: Path) -> bool:
    with file.open("rb") as stream:
        head = stream.read(26)
    # Bytes 24 and 25 of a PNG are the bit depth and the colour type; Pillow reads type 0, grey, in full depth.
    return head.startswith(PNG_SIGNATURE) and len(head) == 26 and head[24] == 16 and head[25] != 0


def _read_deep_png(file: Path) -> np.ndarray:
    import png

    with file.open("rb") as stream:
        _check_pixels(struct.unpack(">II", stream.read(24)[16:]), file)
    # `asDirect` reads rows on demand: a stream with more data than claimed is never unpacked completely.
    width, height, rows, info = png.Reader(filename=str(file)).asDirect()
    pixels = np.empty((height, width * info["planes"]), np.uint16)
    count = 0
    for count, row in enumerate(rows, 1):
        pixels[count - 1] = row
    if count != height:
        raise FileError(f"cannot read {file} as an image: it has {count} of {height} rows")
    return _checked_image(pixels.reshape(height, width, info["planes"]), file)


def _read_colour_tiff(file: Path) -> np.ndarray:
    """Read a TIFF in colour; Pillow reduces 16 bits to 8, tifffile keeps them."""
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        series = tiff.series[0]
        # tifffile may report another size than Pillow; channels may be the first or the last axis.
        _check_pixels((math.prod(series.shape) // 4, 1), file)
        values = series.asarray()
        return _checked_image(np.moveaxis(values, 0, -1) if series.axes.startswith("S") else values, file)


def _check_pixels(size: tuple[int, ...], file: Path) -> None:
    if math.prod(size) > MAX_PIXELS:
        raise FileError(
            f"{file} claims {math.prod(size):,} pixels, at most {MAX_PIXELS:,} are read; crop it or scale it down first"
        )


def _checked_image(image: np.ndarray, file: Path) -> np.ndarray:
    image = image.astype(image.dtype.newbyteorder("="), copy=False)
    if image.ndim not in (2, 3) or image.size == 0 or image.dtype not in (np.uint8, np.uint16):
        raise FileError(f"{file} holds {image.dtype} of shape {list(image.shape)}; give 8- or 16-bit grey or colour")
    return image
