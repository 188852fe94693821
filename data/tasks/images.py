"""Turn encoded images into arrays: crops and flips for training, the centre for evaluation.

Pillow decodes JPEG, PNG and WebP; nothing else is tried. Random resized crops are those of Szegedy et al. 2015
("Going deeper with convolutions", section 6).
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataConfigError, DataError
from .sample_random import SampleRandom

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP")
CROP_ATTEMPTS = 10
# what Pillow's decoders raise on damaged bytes
DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError)


@dataclass(frozen=True)
class ImageSettings:
    """Say how images become arrays: of ``size`` x ``size`` pixels, normalised by ``mean`` and ``std`` of a channel.

    The defaults are ImageNet's. ``crop_area`` and ``crop_ratio`` bound a training crop's share of the image and its
    width over height; ``flip`` is how often it is mirrored. ``resize`` is the shorter side before the centre crop of
    evaluation. Images of more than ``max_pixels`` are refused before they are decoded.
    """

    size: int = 224
    resize: int = 256
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    max_pixels: int = 64 << 20

    def __post_init__(self) -> None:
        """Raise DataConfigError for settings that give no image."""
        if not 1 <= self.size <= self.resize or min(self.std) <= 0 or self.max_pixels < 1:
            raise DataConfigError(
                f"images of {self.size} pixels from a shorter side of {self.resize}, std {self.std}, at most "
                f"{self.max_pixels} pixels; size is 1 to resize, the rest above 0"
            )
        low, high = self.crop_area
        narrow, wide = self.crop_ratio
        if not 0 < low <= high <= 1 or not 0 < narrow <= wide or not 0 <= self.flip <= 1:
            raise DataConfigError(
                f"crops of areas {self.crop_area}, ratios {self.crop_ratio}, flips {self.flip}; each pair goes from "
                "low to high above 0, areas and flips up to 1"
            )


@dataclass(frozen=True)
class ImageSample:
    """Hold an image, float32 [3, size, size], and its class."""

    image: np.ndarray
    label: int


def labelled_image(
    content: bytes, label: int, name: str, settings: ImageSettings, random: SampleRandom | None
) -> ImageSample:
    """Give an image and its class for classification; without ``random`` the image is that of evaluation.

    Raises DataError that names the sample where the image is damaged or too large.
    """
    return ImageSample(image_array(content, name, settings, random), label)


def image_array(content: bytes, name: str, settings: ImageSettings, random: SampleRandom | None) -> np.ndarray:
    """Decode an image and cut it to size, float32 [3, size, size]: a random crop, or the centre without ``random``.

    Raises DataError that names the sample where the image is damaged or too large.
    """
    image = decode_image(content, name, settings.max_pixels)
    if random is None:
        return _normalise(_centre(image, settings), settings)
    image = _resized_part(image, _random_box(image.width, image.height, settings, random), settings)
    mirrored = random.uniform() < settings.flip
    array = _normalise(image, settings)
    return np.ascontiguousarray(array[:, :, ::-1]) if mirrored else array


def decode_image(content: bytes, name: str, max_pixels: int) -> Image:
    """Decode JPEG, PNG or WebP bytes to RGB, of a moving image the first frame; an alpha channel is dropped.

    Raises DataError that names the sample where the bytes are damaged or hold more pixels than allowed.
    """
    pillow = _pillow()
    try:
        with warnings.catch_warnings():
            # Pillow's own limit on pixels warns first; ours is checked below, before anything is decoded
            warnings.simplefilter("ignore", pillow.DecompressionBombWarning)
            image = pillow.open(io.BytesIO(content), formats=FORMATS)
            if image.width * image.height > max_pixels:
                raise DataError(
                    f"image {name} has {image.width} x {image.height} pixels, more than {max_pixels}; "
                    "raise max_pixels, or take the sample out"
                )
            image.load()
            if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to white
                image = pillow.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except DataError:
        raise
    except (*DECODER_ERRORS, pillow.DecompressionBombError, struct.error, zlib.error) as error:
        raise DataError(
            f"image {name} cannot be decoded ({type(error).__name__}: {str(error)[:120]}); it is damaged or no "
            f"{', '.join(FORMATS)}"
        ) from error


def _random_box(
    width: int, height: int, settings: ImageSettings, random: SampleRandom
) -> tuple[int, int, int, int]:
    """Return ``(left, top, right, bottom)`` of a random part; the middle where ten draws do not fit."""
    low, high = map(math.log, settings.crop_ratio)
    for _ in range(CROP_ATTEMPTS):
        area = width * height * random.uniform(*settings.crop_area)
        ratio = math.exp(random.uniform(low, high))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = random.integer(width - crop_width + 1), random.integer(height - crop_height + 1)
            return left, top, left + crop_width, top + crop_height
    narrow, wide = settings.crop_ratio
    crop_width = max(1, min(width, round(height * wide)))
    crop_height = max(1, min(height, round(width / narrow)))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def _resized_part(image: Image, box: tuple[int, int, int, int], settings: ImageSettings) -> Image:
    return image.crop(box).resize((settings.size, settings.size), _pillow().Resampling.BICUBIC)


def _centre(image: Image, settings: ImageSettings) -> Image:
    """Resize the shorter side, then cut out the middle."""
    shorter, longer = sorted(image.size)
    scaled = int(settings.resize * longer / shorter)
    size = (settings.resize, scaled) if image.width <= image.height else (scaled, settings.resize)
    image = image.resize(size, _pillow().Resampling.BICUBIC)
    left, top = (image.width - settings.size) // 2, (image.height - settings.size) // 2
    return image.crop((left, top, left + settings.size, top + settings.size))


def _normalise(image: Image, settings: ImageSettings) -> np.ndarray:
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / 255
    mean = np.array(settings.mean, np.float32)[:, None, None]
    return np.ascontiguousarray((pixels - mean) / np.array(settings.std, np.float32)[:, None, None])


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataConfigError("images need Pillow; pip install 'basestone[images]'") from error
    return Image
