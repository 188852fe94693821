"""Tasks on images: decoding, crops, the centre, pairs with text; damaged and huge ones by name."""

import io
import math
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from basestone.data.errors import DataConfigError, DataError
from basestone.data.tasks.image_text import CLIP_IMAGES, TextFrame, frame_text, image_text_pair
from basestone.data.tasks.images import ImageSettings, decode_image, image_array, labelled_image
from basestone.data.tasks.sample_random import SampleRandom

PLAIN = ImageSettings(size=32, resize=40, mean=(0, 0, 0), std=(1, 1, 1))


def picture(width: int = 90, height: int = 60, seed: int = 0) -> Image.Image:
    """Draw a smooth picture in which every place looks different."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = np.sin(9 * x + seed) * np.cos(7 * y)
    return Image.fromarray((np.stack([x, y, (waves + 1) / 2], axis=2) * 255).astype(np.uint8))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("form", "options", "largest"),
    [("PNG", {}, 0), ("WEBP", {"lossless": True}, 0), ("JPEG", {"quality": 95}, 12)],
)
def test_each_format_gives_the_pixels(form: str, options: dict, largest: int) -> None:
    decoded = decode_image(encoded(picture(), form, **options), "a", 1 << 20)
    difference = np.asarray(decoded, int) - np.asarray(picture(), int)
    assert decoded.mode == "RGB" and decoded.size == (90, 60) and abs(difference).max() <= largest


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_each_mode_becomes_rgb(mode: str) -> None:
    form = "JPEG" if mode == "CMYK" else "PNG"
    decoded = decode_image(encoded(picture().convert(mode), form), "a", 1 << 20)
    assert (
        decoded.mode == "RGB" and abs(np.asarray(decoded, int).mean() - np.asarray(picture(), int).mean()) < 20
    )


def test_sixteen_bits_keep_their_grey() -> None:
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(grey), "PNG"), "a", 1 << 20))
    assert np.array_equal(decoded[:, :, 0], grey >> 8) and np.array_equal(decoded[:, :, 0], decoded[:, :, 2])


def test_evaluation_is_the_centre() -> None:
    found = labelled_image(encoded(picture(), "PNG"), 7, "a", PLAIN, None)
    resized = picture().resize((60, 40), Image.Resampling.BICUBIC).crop((14, 4, 46, 36))
    assert found.label == 7 and found.image.dtype == np.float32 and found.image.shape == (3, 32, 32)
    assert np.allclose(found.image, np.asarray(resized, np.float32).transpose(2, 0, 1) / 255, atol=1e-6)
    tall = image_array(encoded(picture(60, 90), "PNG"), "a", PLAIN, None)
    expected = picture(60, 90).resize((40, 60), Image.Resampling.BICUBIC).crop((4, 14, 36, 46))
    assert np.allclose(tall, np.asarray(expected, np.float32).transpose(2, 0, 1) / 255, atol=1e-6)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (224, 224), (90, 500), (227, 1000)])
def test_evaluation_is_that_of_hugging_face_clip(size: tuple[int, int]) -> None:
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    theirs = clip.CLIPImageProcessorPil()(picture(*size), return_tensors="np")["pixel_values"][0]
    ours = image_array(encoded(picture(*size), "PNG"), "a", CLIP_IMAGES, None)
    assert np.abs(ours - theirs).max() < 1e-5


def test_normalisation() -> None:
    white = encoded(Image.new("RGB", (40, 40), (255, 0, 51)), "PNG")
    found = image_array(white, "a", ImageSettings(size=8, resize=8), None)[:, 0, 0]
    assert np.allclose(found, [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225], atol=1e-5)


def _regions(num_samples: int, image: Image.Image, settings: ImageSettings) -> list[tuple[float, ...]]:
    """Read from the colours of crops where they lay: red is x, green is y."""
    content = encoded(image, "PNG")
    found = []
    for sample in range(num_samples):
        array = image_array(content, "a", settings, SampleRandom(5, sample))
        left, right = array[0, :, 0].mean(), array[0, :, -1].mean()
        found.append((left, right, array[1, 0].mean(), array[1, -1].mean()))
    return found


def test_crops_have_the_published_areas_and_ratios_and_half_are_mirrored() -> None:
    settings = ImageSettings(size=16, resize=16, mean=(0, 0, 0), std=(1, 1, 1))
    regions = np.array(_regions(2000, picture(200, 200), settings))
    mirrored = regions[:, 0] > regions[:, 1]
    assert abs(mirrored.sum() - 1000) <= 5 * math.sqrt(2000 / 4)
    scale = 16 / 15  # the outer pixels' middles lie a sixteenth inside the crop
    widths, heights = abs(regions[:, 1] - regions[:, 0]) * scale, (regions[:, 3] - regions[:, 2]) * scale
    areas, ratios = widths * heights, widths / heights
    assert 0.06 < areas.min() < 0.12 and 0.9 < areas.max() <= 1.06
    assert 0.68 < ratios.min() < 0.8 and 1.25 < ratios.max() < 1.45
    # crops of up to half the image nearly always fit, so their areas are uniform
    small = areas[areas < 0.5]
    assert abs(small.mean() - 0.29) < 5 * 0.42 / math.sqrt(12 * len(small)) + 0.01


def test_a_part_is_cut_and_resized_as_pillow_does() -> None:
    content = encoded(picture(), "PNG")
    whole = ImageSettings(
        size=20, resize=20, mean=(0, 0, 0), std=(1, 1, 1), crop_area=(1, 1), crop_ratio=(1.5, 1.5), flip=0
    )
    expected = (
        np.asarray(picture().resize((20, 20), Image.Resampling.BICUBIC), np.float32).transpose(2, 0, 1) / 255
    )
    assert np.allclose(image_array(content, "a", whole, SampleRandom(0, 0)), expected, atol=1e-6)
    flipped = ImageSettings(**{**whole.__dict__, "flip": 1.0})
    assert np.allclose(image_array(content, "a", flipped, SampleRandom(0, 0)), expected[:, :, ::-1], atol=1e-6)


def test_a_crop_that_never_fits_is_the_middle() -> None:
    strip = encoded(picture(400, 10), "PNG")
    settings = ImageSettings(
        size=10, resize=10, mean=(0, 0, 0), std=(1, 1, 1), crop_area=(0.9, 1), flip=0, crop_ratio=(1, 1)
    )
    middle = picture(400, 10).crop((195, 0, 205, 10))
    assert np.allclose(
        image_array(strip, "a", settings, SampleRandom(0, 3)),
        np.asarray(middle, np.float32).transpose(2, 0, 1) / 255,
    )


def test_a_sample_number_gives_a_crop() -> None:
    content = encoded(picture(), "JPEG")
    first = [image_array(content, "a", PLAIN, SampleRandom(1, n)) for n in range(4)]
    again = [image_array(content, "b", PLAIN, SampleRandom(1, n)) for n in range(4)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], first[1])


def test_a_damaged_image_is_named() -> None:
    content = encoded(picture(), "JPEG")
    for damaged in (content[:200], b"", b"no image at all", content[:2], encoded(picture(), "GIF")):
        with pytest.raises(
            DataError, match=r"image shard-3\.tar:cat7 cannot be decoded .* it is damaged or no"
        ) as e:
            image_array(damaged, "shard-3.tar:cat7", PLAIN, None)
        assert e.value.exit_code == 76
    flipped = bytearray(encoded(picture(), "PNG"))
    flipped[len(flipped) // 2] ^= 255
    with pytest.raises(DataError, match="image x cannot be decoded"):
        image_array(bytes(flipped), "x", PLAIN, None)


def _png_of(width: int, height: int) -> bytes:
    """Write a PNG that claims a size, and holds nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


def test_a_decompression_bomb_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"image big has 9000 x 8000 pixels, more than 67108864; raise max_pixels"
    ):
        image_array(_png_of(9000, 8000), "big", ImageSettings(), None)
    with pytest.raises(DataError, match=r"image bomb cannot be decoded \(DecompressionBombError"):
        image_array(_png_of(60_000, 60_000), "bomb", ImageSettings(), None)
    assert decode_image(encoded(picture(), "PNG"), "a", 90 * 60).size == (90, 60)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.data())
def test_any_damage_gives_an_image_or_a_named_error(form: str, data: st.DataObject) -> None:
    content = bytearray(encoded(picture(24, 24), form))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert image_array(cut, "z", PLAIN, SampleRandom(0, 0)).shape == (3, 32, 32)
    except DataError as error:
        assert "image z " in str(error)


@given(st.lists(st.integers(10, 99), max_size=30), st.integers(3, 20))
def test_a_text_ends_with_eos_in_its_context(text: list[int], context: int) -> None:
    tokens, eos_position = frame_text(np.array(text, np.int32), TextFrame(context, bos=1, eos=2, pad=0))
    kept = min(len(text), context - 2)
    assert tokens.tolist() == [1, *text[:kept], 2, *[0] * (context - kept - 2)]
    assert tokens[eos_position] == 2 and tokens.dtype == "int32"


def test_text_is_framed_as_hugging_face_clip_frames_it(tmp_path) -> None:  # type: ignore[no-untyped-def]
    transformers = pytest.importorskip("transformers")
    letters = [chr(c) + end for c in range(97, 123) for end in ("", "</w>")]
    names = {name: number for number, name in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    theirs = transformers.CLIPTokenizer(vocab=names, merges=[])
    bos, eos = theirs.bos_token_id, theirs.eos_token_id
    for text in ("cat", "a cat on a mat that sat"):
        wanted = theirs(text, padding="max_length", truncation=True, max_length=12)["input_ids"]
        plain = np.array(theirs(text, add_special_tokens=False)["input_ids"])
        assert frame_text(plain, TextFrame(12, bos, eos, theirs.pad_token_id))[0].tolist() == wanted


def test_a_pair_holds_image_and_text() -> None:
    content = encoded(picture(300, 260), "WEBP")
    frame = TextFrame(8, bos=1, eos=2, pad=0)
    pair = image_text_pair(content, np.array([5, 6]), "p", frame, CLIP_IMAGES, SampleRandom(0, 1))
    assert pair.image.shape == (3, 224, 224) and pair.tokens.tolist() == [1, 5, 6, 2, 0, 0, 0, 0]
    assert pair.eos_position == 3
    with pytest.raises(DataError, match="image q cannot"):
        image_text_pair(content[:50], np.array([5, 6]), "q", frame, CLIP_IMAGES, None)


def test_mistakes_in_settings_are_named() -> None:
    with pytest.raises(DataConfigError, match="300 pixels from a shorter side of 256"):
        ImageSettings(size=300)
    with pytest.raises(DataConfigError, match=r"crops of areas \(0.5, 0.1\)"):
        ImageSettings(crop_area=(0.5, 0.1))
    with pytest.raises(DataConfigError, match="context of 2 tokens"):
        TextFrame(2, 0, 1, 2)


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(DataConfigError, match=r"pip install 'basestone\[images\]'"):
        decode_image(b"", "a", 1)
