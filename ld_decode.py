"""One picture file in, one uint8 square out: orientation, transparency, deep and float pixels, centre crop, resize."""

from __future__ import annotations

import io

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

MIN_SIDE = 8  # px; smaller pictures are tracking pixels and placeholders
MAX_PIXELS = 64_000_000  # refused before decoding; stays below the size at which Pillow itself begins to warn

# EXIF orientation -> what undoes it (TIFF 6.0, tag 274)
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Dropped(Exception):
    """A row that cannot become a picture; its text is the reason under which it is counted."""


def decode(data, size):
    """Bytes of a picture file -> uint8 array [3, size, size].

    The largest centred square is kept and resized with Lanczos. EXIF orientation is applied, transparency is laid on
    white, 16-bit and float pixels are scaled to 0..255. Raises `Dropped` with the reason, and nothing else.
    """
    if not data:
        raise Dropped("empty row")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Dropped("too many pixels")
            if min(image.size) < MIN_SIDE:
                raise Dropped("too small")
            square = _square(image, size)
    except UnidentifiedImageError:
        raise Dropped("not a picture") from None
    except Image.DecompressionBombError:
        raise Dropped("too many pixels") from None
    except Dropped:
        raise
    except Exception:  # Pillow's decoders raise some ten kinds of error on damaged files
        raise Dropped("damaged") from None
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))  # [3, size, size]


def _square(image, size):
    """Opened picture -> RGB picture of size x size, upright."""
    image.draft(image.mode, (2 * size, 2 * size))  # JPEG alone: decode at 1/2, 1/4 or 1/8, at least twice the target
    turn = UPRIGHT.get(_orientation(image))
    rgb = _rgb(image)
    width, height = rgb.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    square = rgb.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=2.0)
    return square if turn is None else square.transpose(turn)


def _orientation(image):
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


def _rgb(image):
    """Any mode -> RGB, without `convert`'s silent clipping of deep pixels and dropping of transparency."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(to_8bit(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def to_8bit(pixels):
    """Deep or float pixels, any shape -> uint8 of the same shape.

    Integers: 16 bit (and wider types that hold no more) by the 16-bit full scale, wider types that hold no more than
    255 as they are. Floats: 0..1 and 0..255 by those scales. Everything else is stretched from its minimum to its
    maximum, for want of a known scale. Raises `Dropped` where a pixel is not finite.
    """
    if pixels.dtype in (np.uint8, np.bool_):
        return pixels.astype(np.uint8) * (255 if pixels.dtype == np.bool_ else 1)
    values = pixels.astype(np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite((low, high)).all():
        raise Dropped("pixels not finite")
    if pixels.dtype.kind == "f":
        scales = (1.0, 255.0)
    else:
        scales = (65535.0,) if pixels.dtype.itemsize == 2 else (255.0, 65535.0)
    scale = next((scale for scale in scales if 0 <= low and high <= scale), None)
    if scale is None:
        values, scale = values - low, high - low
    return (values * (255 / scale)).round().astype(np.uint8)
