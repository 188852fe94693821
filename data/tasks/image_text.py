"""Pair an image with its text for contrastive training (Radford et al. 2021, "CLIP", section 2.4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import DataConfigError
from .images import ImageSettings, image_array
from .sample_random import SampleRandom

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# as OpenCLIP trains: a crop of nearly the whole image, no flip, which would mirror writing
CLIP_IMAGES = ImageSettings(
    size=224,
    resize=224,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    crop_area=(0.9, 1.0),
    flip=0.0,
)


@dataclass(frozen=True)
class ImageTextSample:
    """Hold an image, float32 [3, size, size], and a text, int32 [context_length].

    ``eos_position`` is where the text ends: there its features are read.
    """

    image: np.ndarray
    tokens: np.ndarray
    eos_position: int


@dataclass(frozen=True)
class TextFrame:
    """Say how a text fills its context: bos, tokens, eos, then padding."""

    context_length: int
    bos: int
    eos: int
    pad: int

    def __post_init__(self) -> None:
        """Raise DataConfigError for a context without room."""
        if self.context_length < 3:
            raise DataConfigError(
                f"a text has a context of {self.context_length} tokens; at least 3 are needed"
            )


def image_text_pair(
    content: bytes,
    text: np.ndarray,
    name: str,
    frame: TextFrame,
    settings: ImageSettings,
    random: SampleRandom | None,
) -> ImageTextSample:
    """Give an image and its framed text, int [num_tokens]; without ``random`` the image is that of evaluation.

    Raises DataError that names the sample where the image is damaged or too large.
    """
    tokens, eos_position = frame_text(text, frame)
    return ImageTextSample(image_array(content, name, settings, random), tokens, eos_position)


def frame_text(text: np.ndarray, frame: TextFrame) -> tuple[np.ndarray, int]:
    """Return ``(tokens, eos_position)``, int32 [context_length]; a text that is too long loses its end, not the eos."""
    kept = text[: frame.context_length - 2]
    tokens = np.full(frame.context_length, frame.pad, np.int32)
    tokens[: len(kept) + 2] = [frame.bos, *kept, frame.eos]
    return tokens, len(kept) + 1
