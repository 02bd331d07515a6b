"""Every way in which a picture file can be unusual: decoded like the reference picture, or dropped for a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ld_decode import Dropped, decode

pytestmark = pytest.mark.timeout(60)
SIZE = 32


def reference(side=96):
    """A smooth RGB picture without any symmetry, so that a wrong turn or channel order shows."""
    y, x = np.mgrid[0:side, 0:side] / (side - 1)
    pixels = np.stack([x, y * y, (x + 2 * y) / 3 * (1 - x)], axis=-1)  # [H, W, 3]
    return Image.fromarray((255 * pixels).round().astype(np.uint8))


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def expected(image):
    """The plain way: whole picture, Lanczos, [3, SIZE, SIZE]."""
    return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)).transpose(2, 0, 1)


def difference(data, image):
    got = decode(data, SIZE)
    assert got.shape == (3, SIZE, SIZE)
    assert got.dtype == np.uint8
    return np.abs(got.astype(int) - expected(image)).mean()


def half_transparent(mode):
    """The reference with its right half fully transparent over a misleading black, and what it looks like on white."""
    picture, white = reference().convert(mode), reference()
    alpha = Image.new("L", picture.size, 255)
    alpha.paste(0, (48, 0, 96, 96))
    picture.paste(0, (48, 0, 96, 96))
    picture.putalpha(alpha)
    white = white.convert(mode).convert("RGB")
    white.paste("white", (48, 0, 96, 96))
    return picture, white


def png_16bit_rgb(pixels):
    """uint16 [H, W, 3] -> a PNG of 16 bits a channel, which Pillow reads but cannot write."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


GREY = np.asarray(reference().convert("L"))
DEEP = {
    "16-bit grey PNG": (GREY.astype(np.uint16) * 257, "PNG"),
    "16-bit grey TIFF": (GREY.astype(np.uint16) * 257, "TIFF"),
    "16-bit big-endian TIFF": ((GREY.astype(np.uint16) * 257).astype(">u2"), "TIFF"),
    "32-bit TIFF, 8 bits used": (GREY.astype(np.int32), "TIFF"),
    "32-bit TIFF, 16 bits used": (GREY.astype(np.int32) * 257, "TIFF"),
    "float TIFF, 0..1": (GREY.astype(np.float32) / 255, "TIFF"),
    "float TIFF, 0..255": (GREY.astype(np.float32), "TIFF"),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_pixels_keep_their_brightness(name):
    pixels, format = DEEP[name]
    assert difference(saved(Image.fromarray(pixels), format), Image.fromarray(GREY)) < 1


def test_a_dark_16_bit_picture_stays_as_dark_as_it_is():
    dark = GREY // 4
    picture = Image.fromarray(dark.astype(np.uint16) * 257)
    assert difference(saved(picture, "PNG"), Image.fromarray(dark)) < 1


@pytest.mark.parametrize("pixels", [GREY.astype(np.float32) / 127.5 - 1, GREY.astype(np.int32) * 65793])
def test_pixels_of_an_unknown_scale_are_stretched(pixels):
    stretched = (GREY - GREY.min()) * (255 / np.ptp(GREY))
    assert difference(saved(Image.fromarray(pixels), "TIFF"), Image.fromarray(stretched.astype(np.uint8))) < 1


def test_16_bit_rgb():
    assert difference(png_16bit_rgb(np.asarray(reference()).astype(np.uint16) * 257), reference()) < 1


PLAIN = {
    "RGB PNG": (reference(), "PNG", {}, 0.5),
    "grey PNG": (reference().convert("L"), "PNG", {}, 0.5),
    "grey JPEG": (reference().convert("L"), "JPEG", {"quality": 95}, 2),
    "palette PNG": (reference().quantize(256), "PNG", {}, 0.5),
    "GIF": (reference().quantize(256), "GIF", {}, 0.5),
    "bilevel PNG": (reference().convert("1"), "PNG", {}, 0.5),
    "CMYK TIFF": (reference().convert("CMYK"), "TIFF", {}, 0.5),
    "CMYK JPEG": (reference().convert("CMYK"), "JPEG", {"quality": 95}, 2),
    "progressive JPEG": (reference(), "JPEG", {"quality": 95, "progressive": True}, 2),
    "BMP": (reference(), "BMP", {}, 0.5),
    "large JPEG, decoded at a reduced scale": (reference(1024), "JPEG", {"quality": 95}, 2),
}


@pytest.mark.parametrize("name", PLAIN)
def test_modes_look_as_they_should(name):
    image, format, options, tolerance = PLAIN[name]
    assert difference(saved(image, format, **options), image) < tolerance


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_alpha_is_laid_on_white(mode):
    picture, on_white = half_transparent(mode)
    assert difference(saved(picture, "PNG"), on_white) < 1


def test_a_transparent_palette_entry_is_laid_on_white():
    picture = Image.new("P", (96, 96), 0)
    picture.putpalette([0, 0, 0, 200, 30, 60])
    picture.paste(1, (0, 0, 48, 96))
    on_white = Image.new("RGB", (96, 96), "white")
    on_white.paste((200, 30, 60), (0, 0, 48, 96))
    assert difference(saved(picture, "PNG", transparency=0), on_white) < 1
    assert difference(saved(picture, "GIF", transparency=0), on_white) < 1


def test_a_transparent_colour_is_laid_on_white():
    picture = Image.new("RGB", (96, 96), (1, 2, 3))
    picture.paste((200, 30, 60), (0, 0, 48, 96))
    on_white = Image.new("RGB", (96, 96), "white")
    on_white.paste((200, 30, 60), (0, 0, 48, 96))
    assert difference(saved(picture, "PNG", transparency=(1, 2, 3)), on_white) < 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("side", [96, 512], ids=["whole", "reduced"])
def test_exif_orientation_is_undone(orientation, side):
    """Each stored picture is the reference turned the way that its tag undoes (TIFF 6.0, tag 274)."""
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = reference(side)
    stored = upright.transpose(turned[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[274] = orientation
    assert difference(saved(stored, "JPEG", quality=95, exif=exif), upright) < 2


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(160, 96), (96, 161)])
def test_the_centred_square_is_kept(size, orientation):
    wide = Image.new("RGB", size, (255, 0, 0))
    left, top = (size[0] - 96) // 2, (size[1] - 96) // 2
    inner = reference().transpose(Image.Transpose.ROTATE_90) if orientation == 6 else reference()
    wide.paste(inner, (left, top))
    exif = Image.Exif()
    exif[274] = orientation
    assert difference(saved(wide, "PNG", exif=exif), reference()) < 3  # half a pixel where the margin is odd


def test_a_small_picture_is_enlarged():
    assert difference(saved(reference(28), "PNG"), reference(28)) < 1


def bomb(side):
    """A PNG that claims side x side pixels; decoding it would come to nothing, so only its size can be the reason."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")):
        body += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return body


JPEG, PNG = saved(reference(), "JPEG"), saved(reference(), "PNG")
NAN = np.full((96, 96), np.nan, np.float32)
BAD = {
    "null": (None, "empty row"),
    "no bytes": (b"", "empty row"),
    "HTML": (b"<html><body>404</body></html>", "not a picture"),
    "random bytes": (bytes(range(256)), "not a picture"),
    "one pixel": (saved(Image.new("RGB", (1, 1)), "PNG"), "too small"),
    "a line": (saved(Image.new("RGB", (500, 2)), "PNG"), "too small"),
    "JPEG cut short": (JPEG[: len(JPEG) // 2], "damaged"),
    "PNG cut short": (PNG[: len(PNG) // 2], "damaged"),
    "not a number": (saved(Image.fromarray(NAN), "TIFF"), "pixels not finite"),
    "bomb below Pillow's own limit": (bomb(9_000), "too many pixels"),
    "bomb at Pillow's warning": (bomb(12_000), "too many pixels"),
    "bomb at Pillow's error": (bomb(30_000), "too many pixels"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_unusable_rows_are_dropped_for_a_reason(name):
    data, reason = BAD[name]
    with pytest.raises(Dropped, match=f"^{reason}$"):
        decode(data, SIZE)
