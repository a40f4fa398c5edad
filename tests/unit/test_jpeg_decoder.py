"""simplejpeg in Pillow's place: the same pixels to the last bit, or not used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from io import BytesIO
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from image_spectra import photograph
from PIL import Image

from siglane.config.preprocess import LOCAL_DECODE
from siglane.errors import ImageError
from siglane.image import jpeg
from siglane.image.decode import decode


@pytest.fixture(autouse=True)
def another_choice() -> Iterator[None]:
    """Which decoder is used is found out once; here by each test."""
    jpeg._decoder.cache_clear()
    yield
    jpeg._decoder.cache_clear()


def file_of(image: Image.Image, orientation: int = 1, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = BytesIO()
    image.save(buffer, "JPEG", exif=exif, **options)
    return buffer.getvalue()


def by_pillow(data: bytes, monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(jpeg, "read_pixels", lambda file: None)
        return decode(data, LOCAL_DECODE).rgb


class TestWhereItIsInstalled:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("simplejpeg")

    @pytest.mark.parametrize("subsampling", [0, 1, 2])
    @pytest.mark.parametrize("progressive", [False, True])
    @pytest.mark.parametrize("quality", [5, 75, 100])
    def test_pixels_are_equal(
        self, subsampling: int, progressive: bool, quality: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for width, height, orientation in ((61, 47, 1), (640, 480, 6), (17, 333, 7), (1, 1, 3)):
            image = photograph(64, 48).resize((width, height))
            data = file_of(image, orientation, subsampling=subsampling, progressive=progressive, quality=quality)
            assert jpeg.read_pixels(BytesIO(data)) is not None
            assert np.array_equal(decode(data, LOCAL_DECODE).rgb, by_pillow(data, monkeypatch))

    def test_grey_and_restarts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        image = photograph(90, 70)
        for data in (file_of(image.convert("L")), file_of(image, restart_marker_blocks=3)):
            assert jpeg.read_pixels(BytesIO(data)) is not None
            assert np.array_equal(decode(data, LOCAL_DECODE).rgb, by_pillow(data, monkeypatch))

    def test_rare_and_damaged_ones_are_pillows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        image = photograph(90, 70)
        whole = file_of(image)
        for data in (file_of(image.convert("CMYK")), file_of(image, keep_rgb=True), whole[:-2]):
            assert jpeg.read_pixels(BytesIO(data)) is None
            assert np.array_equal(decode(data, LOCAL_DECODE).rgb, by_pillow(data, monkeypatch))
        with pytest.raises(ImageError, match="damaged or incomplete"):
            decode(whole[: len(whole) // 2], LOCAL_DECODE)


def test_without_it_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    data = file_of(photograph(90, 70))
    assert jpeg.read_pixels(BytesIO(data)) is None
    assert decode(data, LOCAL_DECODE).size == (90, 70)


def test_another_libjpeg_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    other = ModuleType("simplejpeg")
    other.decode_jpeg = lambda data, **options: np.asarray(Image.open(BytesIO(data)).convert("RGB")) ^ 1  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "simplejpeg", other)
    data = file_of(photograph(90, 70))
    assert jpeg.read_pixels(BytesIO(data)) is None
    assert [one for one in caplog.messages if "simplejpeg decodes other pixels than Pillow here" in one]
