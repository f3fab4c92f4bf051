"""Image bytes -> PIL. The one place where a picture is opened and made RGB.

Invariant: what `prepare` accepted is decoded the same way in training; a damaged file raises ImageError and
is never shown half grey (Pillow's LOAD_TRUNCATED_IMAGES stays off). Only plain raster formats are opened, so
no file starts another program (EPS would). RGB as the official loader does: `convert("RGB")`, alpha dropped,
EXIF rotation ignored (internvl_chat dataset.py); 16-bit gray, which Pillow would clip, keeps its high byte.
"""

import io
import warnings

from PIL import Image, ImageFile

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


class ImageError(ValueError):
    """Bytes that do not give a picture. `bomb`: refused for its size alone."""

    def __init__(self, message: str, *, bomb: bool = False):
        super().__init__(message)
        self.bomb = bomb


def open_image(data: bytes) -> Image.Image:
    """The picture's header: size, mode and format are known, pixels not decoded. Raises ImageError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(str(error), bomb=True) from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise many types for a damaged header
        raise ImageError(f"{type(error).__name__}: {error}") from error


def decode_rgb(data: bytes) -> Image.Image:
    """The whole picture in RGB, every byte of it decoded. Raises ImageError."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "a library has turned LOAD_TRUNCATED_IMAGES on"
    image = open_image(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            return to_rgb(image)
    except Image.DecompressionBombError as error:
        raise ImageError(str(error), bomb=True) from None
    except MemoryError:
        raise
    except Exception as error:  # likewise for damaged pixels
        raise ImageError(f"{type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode Pillow reads to 8-bit RGB; a picture that is RGB is not copied."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        import numpy

        gray = numpy.asarray(image).astype(numpy.int64)
        if image.mode != "I" or gray.max(initial=0) > 255:
            gray >>= 8
        return Image.fromarray(gray.clip(0, 255).astype(numpy.uint8), "L").convert("RGB")
    return image.convert("RGB")
