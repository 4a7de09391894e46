"""zemosaic_pipeline.fits.writer: what astropy reads back, and what failures leave."""

from __future__ import annotations

import errno
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from astropy.io import fits

from scenes.fits_samples import IMAGE, H, W, celestial_header, pixels, save
from zemosaic_pipeline.errors import RunError
from zemosaic_pipeline.fits.writer import MosaicWriter


def blocks(h, w, size):
    return [(y, x) for y in range(0, h, size) for x in range(0, w, size)]


@pytest.mark.parametrize("dtype", ["f4", "u2"])
@pytest.mark.parametrize("shape", [(H, W), (3, H, W), (3, 60, 50)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pwrite", [True, False])
def test_written_blocks_come_back(tmp_path, monkeypatch, dtype, shape, interleaved, pwrite):
    if not pwrite:
        monkeypatch.delattr(os, "pwrite", raising=False)
    data = pixels("f4", shape) * 60 - 20000
    data[..., 2, 3], data[..., 3, 3] = np.nan, np.inf
    alpha = pixels("u1", shape[-2:])
    header = celestial_header(ZMPROD="science", LONGTEXT="x" * 100, NAXIS=7, BZERO=3.0)
    for line in ("made by a test", "made by a test"):
        header.add_history(line)
    path = tmp_path / "m.fits"
    with MosaicWriter(path, header, shape, dtype, shape[-2:], interleaved) as writer:
        places = blocks(*shape[-2:], 8)[::-1]

        def put(place):
            y, x = place
            writer.write_block(y, x, data[..., y : y + 8, x : x + 8])
            writer.write_alpha(y, x, alpha[y : y + 8, x : x + 8])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(put, places))
        assert not path.exists()

    expected = np.nan_to_num(data, nan=0, posinf=0)
    if dtype == "u2":
        expected = np.clip(np.rint(expected), 0, 65535)
        assert (expected == 0).sum() > 3 and (expected == 65535).any()
    if interleaved and len(shape) == 3:
        expected = np.moveaxis(expected, 0, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fits.open(path) as hdul:
            hdul.verify("exception")
            assert [hdu.name for hdu in hdul] == ["PRIMARY", "ALPHA"]
            np.testing.assert_array_equal(hdul[0].data, expected)
            assert hdul[0].data.dtype.newbyteorder("=") == np.dtype(dtype)
            np.testing.assert_array_equal(hdul[1].data, alpha)
            assert list(hdul[0].header["HISTORY"]) == ["made by a test"] * 2
            assert hdul[0].header["LONGTEXT"] == "x" * 100
            assert hdul[0].header["ZMPROD"] == "science"
    content = path.read_bytes()
    assert len(content) % 2880 == 0
    assert content.endswith(bytes(2880 - shape[-1] * shape[-2] % 2880))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", ["f4", "u2"])
def test_full_rows_are_one_write_a_channel_and_the_rest_is_zero(tmp_path, monkeypatch, dtype):
    with MosaicWriter(tmp_path / "m.fits", celestial_header(), (3, H, W), dtype) as writer:
        calls, real = [], writer._write_at
        monkeypatch.setattr(writer, "_write_at", lambda *a: (calls.append(a[0]), real(*a)))
        writer.write_block(4, 0, np.ones((3, 5, W)))
        assert len(calls) == 3
    data = fits.getdata(tmp_path / "m.fits")
    assert (data[:, 4:9] == 1).all() and data.sum() == 3 * 5 * W


def test_same_image_as_astropy_would_write(tmp_path):
    data, header = pixels("f4", (3, H, W)), celestial_header()
    save(tmp_path / "a.fits", data, header)
    with MosaicWriter(tmp_path / "b.fits", header, data.shape) as writer:
        writer.write_block(0, 0, data)
    assert fits.FITSDiff(tmp_path / "a.fits", tmp_path / "b.fits", ignore_comments=["*"]).identical


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(error), MosaicWriter(tmp_path / "m.fits", celestial_header(), (H, W)) as writer:
        writer.write_block(0, 0, IMAGE)
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "pwrite"), reason="the fault is put into os.pwrite")
@pytest.mark.parametrize("after", [0, 4])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch, after):
    real, calls = os.pwrite, []

    def pwrite(*args):
        calls.append(args)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with (
        pytest.raises(RunError, match=r"disk is full: .*m\.fits"),
        MosaicWriter(tmp_path / "m.fits", celestial_header(), (3, H, W)) as writer,
    ):
        for _ in range(9):
            writer.write_block(0, 0, np.ones((3, H, W)))
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_told_before_anything_is_written(tmp_path):
    writer = MosaicWriter(tmp_path / "m.fits", celestial_header(), (3, 10**7, 10**7))
    with pytest.raises(RunError, match="make room"), writer:
        pass
    with pytest.raises(RunError, match="cannot be written"):
        MosaicWriter(tmp_path / "no" / "m.fits", celestial_header(), (H, W)).__enter__()
    assert not list(tmp_path.iterdir())


def test_a_block_outside_is_a_programming_error(tmp_path):
    with MosaicWriter(tmp_path / "m.fits", celestial_header(), (3, H, W)) as writer:
        for y, x, shape in [(0, 1, (3, H, W)), (-1, 0, (3, 2, 2)), (0, 0, (1, H, W)), (0, 0, (H, W))]:
            with pytest.raises(ValueError, match="block"):
                writer.write_block(y, x, np.zeros(shape))
        with pytest.raises(ValueError, match="ALPHA"):
            writer.write_alpha(0, 0, np.zeros((2, 2), "u1"))
