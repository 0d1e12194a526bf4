"""What is kept of the test images that a run's result has looked at."""

import numpy as np
import pytest
import torch

from dlops_dist.engine.gallery import Gallery, confused
from dlops_dist.engine.geometry import neighbours, pair_distances, plane


@pytest.mark.parametrize("shape", [(50, 6), (6, 50), (4, 4)])
def test_the_map_is_that_of_principal_components(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    places, parts = plane(x)
    centred = (x - x.mean(dim=0)).double().numpy()
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    expected = u[:, :2] * s[:2]
    assert np.allclose(np.abs(places), np.abs(expected), atol=1e-5)
    assert np.allclose(np.abs((places * expected).sum(axis=0)), (expected**2).sum(axis=0), rtol=1e-5), "one direction"
    assert np.allclose(parts, (s**2 / (s**2).sum())[:2])
    assert all(places[np.abs(places).argmax(axis=0), [0, 1]] > 0), "the same whatever sign the solver chose"


@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (2, 2)])
def test_few_images_have_places_too(shape):
    places, parts = plane(torch.ones(shape))
    assert (places.shape, parts.shape) == ((shape[0], 2), (2,))
    assert np.isfinite(places).all()
    assert np.isfinite(parts).all()


def test_neighbours_are_the_nearest_others_nearest_first():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(2))
    found = neighbours(x, np.array([0, 17]))
    for query, *nearest in found.tolist():
        distances = {i: float((x[query] - x[i]).norm()) for i in range(30) if i != query}
        assert nearest == sorted(distances, key=distances.get)[:5]
    assert neighbours(x[:3], np.array([1])).shape == (1, 3)
    assert neighbours(x[:1], np.array([0])).tolist() == [[0]]


def test_pairs_are_counted_by_their_distance_apart_for_the_same_class_and_others():
    x, labels = torch.tensor([[0.0], [1.0], [10.0], [11.0]]), np.array([0, 0, 1, 1])
    ends, parts = pair_distances(x, labels)
    assert (ends[0], ends[-1], len(ends)) == (0, 11, 41)
    assert [ends[parts[0].argmax()] <= 1, parts[0].max(), parts[0].sum()] == [True, 1, 1]
    assert parts[1][ends[:-1] < 8.7].sum() == 0
    assert parts[1].sum() == pytest.approx(1)
    for few in (torch.zeros(1, 2), torch.zeros(3, 2)):
        assert np.isfinite(pair_distances(few, np.arange(len(few)))[1]).all()


def test_pairs_that_are_confused_come_most_frequent_first():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    predicted = np.array([0, 1, 1, 0, 0, 2, 0, 2])
    assert confused(labels, predicted, 3) == [((0, 1), [1, 2]), ((1, 0), [3, 4]), ((2, 0), [6])]
    assert confused(labels, labels, 3) == []
    assert confused(labels, np.full(8, -1), 3) == []


def small():
    numbers = np.arange(4)
    return Gallery(
        {"dataset": "x", "test": 4}, ("<b>", "Ü, y"), numbers % 2, numbers % 2, numbers, np.zeros((4, 2), np.float32),
        np.array([0.6, 0.2]),
        np.linspace(0, 1, 3), np.full((2, 2), 0.5),
        np.array([[0, 1], [3, 2]]), np.array([1, 3]), np.array([0]), [b"a", b"", b"ccc"],
    )  # fmt: skip


def test_what_is_written_is_read_again(tmp_path):
    small().save(tmp_path)
    read = Gallery.of((tmp_path / "gallery.npz").read_bytes())
    assert (read.facts, read.classes, read.jpegs) == (small().facts, small().classes, [b"a", b"", b"ccc"])
    assert np.array_equal(read.neighbours, small().neighbours)
    assert [read.picture(image) for image in range(4)] == [None, b"a", None, b""]
    assert list(read.samples()) == [(0, [b"ccc"])]


@pytest.mark.parametrize("how", ["cut", "empty", "another version"])
def test_a_damaged_file_is_a_value_error(how, tmp_path, monkeypatch):
    if how == "another version":
        monkeypatch.setattr("dlops_dist.engine.gallery.FORMAT", 0)
    small().save(tmp_path)
    monkeypatch.undo()
    content = (tmp_path / "gallery.npz").read_bytes()
    content = {"cut": content[:-100], "empty": b"", "another version": content}[how]
    with pytest.raises(ValueError, match=r"gallery\.npz"):
        Gallery.of(content)


def test_names_are_shortened_where_they_still_tell_classes_apart():
    def names(*classes):
        return Gallery({}, classes, *[np.zeros(0)] * 10).names

    assert names("n01443537 goldfish, Carassius auratus", "n1 x") == ("goldfish", "n1 x")
    assert names("n02012849 crane", "n03126707 crane") == ("n02012849 crane", "n03126707 crane")
