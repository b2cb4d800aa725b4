"""Image files to pixels: reading a file wherever it is, decoding it, and saying what cannot be decoded."""

import io
import os
import struct
import zlib
from pathlib import Path
from urllib.parse import unquote_to_bytes

from PIL import Image, ImageOps, UnidentifiedImageError

DEEP_MODES = ("I", "F")
MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485
"""Default limit of an image's size, Pillow's own for a warning: more than that takes some 700 MB to decode."""

# What Pillow's decoders raise at damaged files, besides errors of their own: found by damaging files of every format.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,  # AVIF; as NotImplementedError also DDS and BLP
    LookupError,
    ArithmeticError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class UndecodableError(ValueError):
    """An image that cannot be decoded: its message is the reason."""


def decode_image(file: dict | None, max_pixels: int) -> Image.Image:
    """The image upright, in mode RGBA; of several frames the first.

    Args:
        file: Bytes, path or both, as `datasets` has them undecoded.
        max_pixels: Larger images are not decoded.

    Raises:
        UndecodableError: If there is none, or it is damaged, too large, or not of 8 bits a channel.
        RuntimeError: If the file is there, but cannot be reached now.
    """
    content, path = (None, None) if file is None else (file["bytes"], file["path"])
    try:
        if content is None:
            if path is None:
                raise UndecodableError("the row is empty")
            content = read_file(path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UndecodableError(error.strerror or str(error)) from error
    try:
        with Image.open(io.BytesIO(content)) as image:
            if (count := image.width * image.height) > max_pixels:
                raise ValueError(f"it has {count:,} pixels, more than --max_image_pixels {max_pixels}")
            if image.mode.startswith(DEEP_MODES):
                raise ValueError(f"its mode is {image.mode}, not 8 bits a channel")
            return _turn_upright(image).convert("RGBA")
    except UnidentifiedImageError as error:
        raise UndecodableError("its format is unknown") from error
    except _DECODER_ERRORS as error:
        raise UndecodableError(str(error) or type(error).__name__) from error


def local_path(path: str | None) -> str | None:
    """The path of a file on this machine, whatever its name; `None` for one that is remote or inside an archive.

    Args:
        path: A path or URI. Names that are no UTF-8 come as URIs.
    """
    if path is None:
        return None
    if path.startswith("file://"):
        return os.fsdecode(unquote_to_bytes(path.removeprefix("file://")))
    return path if os.path.isabs(path) or os.path.exists(path) else None


def read_file(path: str) -> bytes:
    """Content of a file, which may be remote, or inside an archive.

    Raises:
        FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError: If there is no such file for us.
        RuntimeError: If it is there, but cannot be reached now: that is no corrupt image, which might be left out.
    """
    import fsspec  # `datasets` brings it

    try:
        if (local := local_path(path)) is not None:
            return Path(local).read_bytes()
        with fsspec.open(path) as data:
            return data.read()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError):
        raise
    except OSError as error:
        raise RuntimeError(f"The image {path!r} cannot be read: {error}.") from error


def name_image(file: dict | None, row: int) -> str:
    """What to call an image, as `datasets` has it undecoded, in a message."""
    path = file and file["path"]
    return f"row {row}" if path is None else f"{path!r} (row {row})"


def _turn_upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF data say that it was held; damaged ones turn nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except _DECODER_ERRORS:
        return image
