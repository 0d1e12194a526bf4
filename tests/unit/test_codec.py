"""Images from bytes: what claims an absurd size is refused before anything is allocated; nothing is unpickled."""

import io
import pickle
import resource

import numpy as np
import pytest

from dlops_dist.data.images import decode, encode


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def with_size(jpeg_bytes, height, width):
    """The same JPEG, whose header claims another size."""
    at = jpeg_bytes.index(b"\xff\xc0")
    return jpeg_bytes[: at + 5] + height.to_bytes(2) + width.to_bytes(2) + jpeg_bytes[at + 9 :]


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("size", [(65_500, 65_500), (65_535, 21_846), (9_000, 9_000), (0, 8), (8, 0)])
def test_a_jpeg_that_claims_an_absurd_size_is_refused_unread(size, into, jpeg):
    data = with_size(jpeg(np.zeros((8, 8, 3), np.uint8)), *size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError):
        decode(data, "jpg", np.empty((8, 8, 3), np.uint8) if into else None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.parametrize("size", [(9, 8), (8, 9), (7, 8), (4, 16)])
def test_a_jpeg_of_another_size_does_not_touch_the_buffer(size, jpeg):
    out = np.full((8, 8, 3), 77, np.uint8)
    with pytest.raises(ValueError, match="the manifest says"):
        decode(jpeg(np.zeros((*size, 3), np.uint8)), "jpg", out)
    assert (out == 77).all()


def test_raw_pixels_come_back_and_no_pickle_is_read():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    assert np.array_equal(decode(encode(image, "npy"), "npy"), image)
    assert encode(image, "npy") == npy(image)
    assert np.array_equal(decode(npy(np.asfortranarray(image)), "npy"), image)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


@pytest.mark.parametrize(
    "data",
    [
        npy(np.array([Bomb()], object), allow_pickle=True),
        pickle.dumps(Bomb()),
        npy(np.zeros((2, 2, 3), np.float32)),
        npy(np.zeros((2, 2), np.uint8)),
        npy(np.zeros((2, 2, 4), np.uint8)),
        npy(np.zeros((2, 2, 3), np.uint8))[:-1],
        npy(np.zeros((2, 2, 3), np.uint8)) + b"\0",
        npy(np.zeros((2, 2, 3), np.uint8)).replace(b"(2, 2, 3)", b"(9**9,3)"),
        npy(np.zeros((20, 20, 3), np.uint8)).replace(b"(20, 20, 3)", b"(99999,1,3)"),
        npy(np.zeros((20, 20, 3), np.uint8)).replace(b"(20, 20, 3)", b"(-20,-20,3)"),
        b"",
        b"\x93NUMPY",
    ],
)
def test_what_is_not_raw_pixels_is_refused(data):
    with pytest.raises(ValueError):
        decode(data, "npy")
