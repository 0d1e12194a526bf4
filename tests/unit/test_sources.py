"""Official layouts as they come and as they are when damaged; generated images; downloads."""

import fcntl
import gzip
import io
import lzma
import os
import socket
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dlops_dist.data import shapes
from dlops_dist.data.pack import pack
from dlops_dist.data.sources import STL10, TinyImageNet, unpack_stl10
from dlops_dist.data.sources.fetch import Archive, fetch

REAL_ZIP = Path(__file__).parents[3] / "shared" / "data" / "tiny-imagenet-200.zip"


def pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def contents(source) -> dict[str, list[tuple[str, int, bytes]]]:
    """(key, label, bytes) of all samples of each split."""
    return {
        split: [(k, int(y), source.read(split, i)) for i, (k, y) in enumerate(zip(*listing[:2], strict=True))]
        for split, listing in source.splits.items()
    }


# Tiny ImageNet


def test_tiny_imagenet_lists_every_image_sorted_with_its_class(tiny_zip, tiny_files):
    source = TinyImageNet(tiny_zip)
    named = [(f"n0{c}_{i}", c) for c in (1, 2, 3) for i in range(4)]
    train = [(key, c - 1, tiny_files[f"train/n0{c}/images/{key}.JPEG"]) for key, c in named]
    test = sorted((f"val_{i}", i % 3, tiny_files[f"val/images/val_{i}.JPEG"]) for i in range(12))
    assert contents(source) == {"train": train, "test": test}
    assert all(listing.labels.dtype == np.int64 for listing in source.splits.values())
    assert source.classes == ["n01 cat", "n02 dog", "n03"]
    assert source.extension == "jpg"


def test_images_of_the_official_test_split_have_no_labels_and_are_not_listed(tmp_path, tiny_files, write_zip, tiny_zip):
    more = write_zip(tmp_path / "more.zip", {**tiny_files, "test/images/test_0.JPEG": b"never read"})
    assert contents(TinyImageNet(more)) == contents(TinyImageNet(tiny_zip))


@pytest.mark.parametrize("below", ["", "tiny-imagenet-200"])
def test_an_unpacked_folder_gives_what_the_zip_gives(below, tmp_path, tiny_files, write_folder, tiny_zip):
    write_folder(tmp_path / "unpacked" / below, tiny_files)
    zipped, unpacked = TinyImageNet(tiny_zip), TinyImageNet(tmp_path / "unpacked")
    assert contents(unpacked) == contents(zipped)
    assert unpacked.classes == zipped.classes


def test_only_the_first_classes_by_wnid(tiny_zip):
    everything, two = contents(TinyImageNet(tiny_zip)), TinyImageNet(tiny_zip, num_classes=2)
    assert two.classes == ["n01 cat", "n02 dog"]
    assert contents(two) == {split: [s for s in samples if s[1] < 2] for split, samples in everything.items()}


def test_a_source_that_was_read_can_be_copied_to_another_process(tiny_zip, stl10):
    import pickle

    for source in (TinyImageNet(tiny_zip, 2), STL10(stl10, 2)):
        before = contents(source)
        assert contents(pickle.loads(pickle.dumps(source))) == before


WNIDS_OF_VAL = {f"val_{i}.JPEG": f"n0{1 + i % 3}" for i in range(12)}
LAYOUTS = {
    "CLASS/images": lambda file: f"val/{WNIDS_OF_VAL[file]}/images/{file}",
    "CLASS": lambda file: f"val/{WNIDS_OF_VAL[file]}/{file}",
    "half of them sorted": lambda file: f"val/{'images' if '1' in file else WNIDS_OF_VAL[file]}/{file}",
    "by words": lambda file: f"val/{['cat', 'dog', 'n03'][int(WNIDS_OF_VAL[file][2]) - 1]}/{file}",
    "at the top": lambda file: f"val/{file}",
}


def sorted_by(layout: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """The files with the images of val elsewhere."""
    of_val = [name for name in files if name.startswith("val/images/")]
    places = {name: LAYOUTS[layout](name.rpartition("/")[2]) for name in of_val}
    return {places.get(name, name): content for name, content in files.items()}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("annotations", ["kept", "deleted"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_of_val_may_be_sorted_into_folders(
    layout, annotations, packed, tmp_path, tiny_files, write_zip, write_folder, tiny_zip, user_error
):
    files = sorted_by(layout, tiny_files)
    if annotations == "deleted":
        del files["val/val_annotations.txt"]
    path = (write_zip if packed else write_folder)(tmp_path / "sorted", files)
    if annotations == "deleted" and not layout.startswith("CLASS"):
        with user_error(path, "val/val_annotations.txt"):
            contents(TinyImageNet(path))
        return
    assert contents(TinyImageNet(path)) == contents(TinyImageNet(tiny_zip))


def test_what_was_sorted_or_copied_is_packed_to_the_same_bytes(tmp_path, tiny_files, write_folder, tiny_zip):
    by_class = sorted_by("CLASS/images", tiny_files)
    sources = {"official": tiny_zip, "copied": write_folder(tmp_path / "copied", tiny_files | by_class)}
    del by_class["val/val_annotations.txt"]
    sources["sorted"] = write_folder(tmp_path / "sorted", by_class)
    for name, path in sources.items():
        pack(TinyImageNet(path), tmp_path / "shards" / name, "tiny", shard_size=5, workers=1)
    official, *others = ({f.name: f.read_bytes() for f in (tmp_path / "shards" / name).iterdir()} for name in sources)
    assert others == [official] * 2


def test_images_that_a_folder_and_the_annotations_call_otherwise_are_named(tmp_path, tiny_files, write_zip, user_error):
    files = sorted_by("CLASS", tiny_files)
    files["val/n02/val_0.JPEG"] = files.pop("val/n01/val_0.JPEG")
    path = write_zip(tmp_path / "tiny.zip", files)
    with user_error(path, "val/n02/val_0.JPEG is n01"):
        contents(TinyImageNet(path))


def test_files_of_the_same_name_in_folders_of_classes_have_keys_with_the_class(tmp_path, tiny_files, write_folder):
    files = {name: content for name, content in tiny_files.items() if not name.startswith("val/")}
    files |= {f"val/n0{1 + i % 3}/{i // 3}.JPEG": tiny_files[f"val/images/val_{i}.JPEG"] for i in range(12)}
    source = TinyImageNet(write_folder(tmp_path / "named", files))
    assert contents(source)["test"] == [
        (f"n0{c}_{i}", c - 1, tiny_files[f"val/images/val_{3 * i + c - 1}.JPEG"]) for c in (1, 2, 3) for i in range(4)
    ]


@pytest.mark.parametrize("packed", [True, False])
def test_what_systems_leave_beside_files_is_passed_over(
    packed, tmp_path, tiny_files, write_zip, write_folder, tiny_zip
):
    names = (
        "train/n01/images/n01_0.JPEG",
        "val/images/val_0.JPEG",
        "val/n02/val_0.JPEG",
        "wnids.txt",
        "val/val_annotations.txt",
    )
    litter = {f"{name.rpartition('/')[0]}/._{name.rpartition('/')[2]}".lstrip("/"): b"\0\5\x16\7" for name in names}
    litter |= {f"__MACOSX/{name}": b"\0" for name in litter} | {f"__MACOSX/tiny/{name}": b"\0" for name in names}
    litter |= {f"{folder}/{name}": b"\0" for folder in ("train", "val/images") for name in (".DS_Store", "Thumbs.db")}
    litter |= {"train/n01/images/.checkpoints/n01_0.JPEG": b"\0"}
    path = (write_zip if packed else write_folder)(tmp_path / "littered", litter | tiny_files)
    assert contents(TinyImageNet(path)) == contents(TinyImageNet(tiny_zip))


def test_marks_of_text_files_are_no_part_of_names(tmp_path, tiny_files, write_zip, stl10, tiny_zip):
    mark = b"\xef\xbb\xbf"
    texts = {n: mark + content.replace(b"\n", b"\r\n") for n, content in tiny_files.items() if n.endswith(".txt")}
    marked = TinyImageNet(write_zip(tmp_path / "marked.zip", tiny_files | texts))
    assert contents(marked) == contents(TinyImageNet(tiny_zip))
    assert marked.classes == ["n01 cat", "n02 dog", "n03"]
    names = stl10 / "class_names.txt"
    names.write_bytes(mark + names.read_bytes())
    assert STL10(stl10).classes == ["airplane", "bird", "car"]


def test_folders_of_other_names_than_wnids_are_named(tmp_path, tiny_files, write_zip, user_error):
    files = {name.replace("/n0", "/class"): content for name, content in tiny_files.items()}
    path = write_zip(tmp_path / "tiny.zip", files)
    with user_error(path, "train/", "wnids.txt"):
        contents(TinyImageNet(path))


@pytest.mark.parametrize("dataset", [TinyImageNet, STL10])
def test_more_classes_than_there_are_is_refused(dataset, tiny_zip, stl10, user_error):
    path = tiny_zip if dataset is TinyImageNet else stl10
    with user_error("4", path, "3"):
        contents(dataset(path, num_classes=4))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("missing", ["wnids.txt", "words.txt", "val/val_annotations.txt", "val/images/val_7.JPEG"])
def test_a_missing_file_is_named(*, missing, packed, tmp_path, tiny_files, write_zip, write_folder, user_error):
    del tiny_files[missing]
    path = (write_zip if packed else write_folder)(tmp_path / "damaged", tiny_files)
    with user_error(path, missing):
        source = TinyImageNet(path)
        assert source.classes
        contents(source)


@pytest.mark.parametrize(
    "content",
    [b"", b"not a zip file" * 100, None],
    ids=["empty", "text", "absent"],
)
def test_a_file_that_is_no_zip_is_named(content, tmp_path, user_error):
    path = tmp_path / "tiny.zip"
    if content is not None:
        path.write_bytes(content)
    with user_error(path):
        contents(TinyImageNet(path))


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_truncated_zip_is_named(part, tiny_zip, user_error):
    whole = tiny_zip.read_bytes()
    tiny_zip.write_bytes(whole[: int(part * len(whole))])
    with user_error(tiny_zip):
        contents(TinyImageNet(tiny_zip))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_a_damaged_member_of_a_zip_is_named(compression, tmp_path, tiny_files, write_zip, user_error):
    path, name = tmp_path / "tiny.zip", "val/images/val_3.JPEG"
    write_zip(path, tiny_files, compression)
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"tiny/{name}")
    start = member.header_offset + 30 + len(member.filename)
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * 20)
    with user_error(path, name):
        contents(TinyImageNet(path))


@pytest.mark.skipif(not REAL_ZIP.is_file(), reason="the real archive is not on this machine")
def test_the_real_archive():
    source = TinyImageNet(REAL_ZIP, num_classes=3)
    train, test = source.splits["train"], source.splits["test"]
    assert np.bincount(train.labels).tolist() == [250] * 3
    assert np.bincount(test.labels).tolist() == [25] * 3
    assert source.classes[0] == "n01443537 goldfish"
    for i in range(0, 750, 75):
        assert train.keys[i].split("_")[0] == source.classes[train.labels[i]].split()[0]
        assert pixels(source.read("train", i)).shape == (64, 64, 3)


# STL-10


@pytest.mark.parametrize("above", [False, True])
def test_stl10_images_are_read_column_by_column(above, stl10):
    row, column, channel = np.mgrid[0:96, 0:96, 0:3]
    image = (3 * row + 7 * column + 50 * channel + row * column // 50).astype(np.uint8)
    stored = bytes(int(image[r, c, ch]) for ch in range(3) for c in range(96) for r in range(96))
    file = stl10 / "train_X.bin"
    file.write_bytes(file.read_bytes()[: 3 * len(stored)] + stored + file.read_bytes()[4 * len(stored) :])
    read = np.load(io.BytesIO(STL10(stl10.parent if above else stl10).read("train", 3)))
    assert read.dtype == np.uint8
    assert np.array_equal(read, image)


def test_stl10_labels_count_from_one_and_unlabeled_images_have_none(stl10):
    source = STL10(stl10)
    assert source.classes == ["airplane", "bird", "car"]
    assert source.extension == "npy"
    labels = {split: listing.labels.tolist() for split, listing in source.splits.items()}
    assert labels == {"train": [0, 1, 2, 0, 1], "test": [2, 0], "unlabeled": [-1, -1, -1]}
    keys = [key for listing in source.splits.values() for key in listing.keys]
    assert len(set(keys)) == 10
    assert all(listing.keys == sorted(listing.keys) for listing in source.splits.values())


def test_only_the_first_classes_of_stl10_and_all_unlabeled_images(stl10):
    everything, two = contents(STL10(stl10)), STL10(stl10, num_classes=2)
    assert two.classes == ["airplane", "bird"]
    assert contents(two) == {split: [s for s in samples if s[1] < 2] for split, samples in everything.items()}


@pytest.mark.parametrize("size", [0, 1, 27_647, 27_648 + 5], ids=["empty", "1 byte", "a byte short", "5 bytes over"])
def test_truncated_stl10_images_are_named(size, stl10, user_error):
    file = stl10 / "test_X.bin"
    file.write_bytes(bytes(size))
    with user_error(file):
        contents(STL10(stl10))


@pytest.mark.parametrize(
    "labels", [[], [3], [3, 1, 1], [0, 1], [1, 4]], ids=["none", "few", "many", "0", "no such class"]
)
def test_stl10_labels_that_cannot_be_are_named(labels, stl10, user_error):
    file = stl10 / "test_y.bin"
    file.write_bytes(bytes(labels))
    with user_error(file):
        contents(STL10(stl10))


@pytest.mark.parametrize("missing", ["train_X.bin", "class_names.txt"])
def test_a_missing_file_of_stl10_is_named(missing, stl10, user_error):
    (stl10 / missing).unlink()
    with user_error(stl10, missing):
        source = STL10(stl10)
        assert source.classes
        contents(source)


# stl10_binary.tar.gz


def write_tar(path: Path, files: dict[str, bytes], link: str | None = None) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        if link is not None:
            member = tarfile.TarInfo("stl10_binary/link.bin")
            member.type, member.linkname = tarfile.SYMTYPE, link
            tar.addfile(member)


@pytest.fixture
def members() -> dict[str, bytes]:
    rng = np.random.default_rng(2)
    names = ("train_X.bin", "train_y.bin", "test_X.bin", "class_names.txt", "unlabeled_X.bin")
    return {name: rng.bytes(50_000 + i) for i, name in enumerate(names)}


def files_below(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def unpacked(out: Path) -> dict[str, bytes]:
    """What a source sees of it."""
    return {name: content for name, content in files_below(out).items() if name != ".whole"}


def test_an_archive_is_unpacked_once_and_another_never_mixes_with_it(tmp_path, members):
    first, second, folder = tmp_path / "a.tar.gz", tmp_path / "b.tar.gz", tmp_path / "data"
    write_tar(first, members)
    write_tar(second, {"train_X.bin": b"other"})
    out = unpack_stl10(first, folder)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert unpacked(unpack_stl10(second, folder)) == {"train_X.bin": b"other"}
    assert unpack_stl10(first, folder) == out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    write_tar(first, {"test_X.bin": b"new"})
    assert unpacked(unpack_stl10(first, folder)) == {"test_X.bin": b"new"}


def test_unpacking_gives_the_members(tmp_path, members):
    write_tar(tmp_path / "stl10.tar.gz", {f"stl10_binary/{name}": content for name, content in members.items()})
    out = unpack_stl10(tmp_path / "stl10.tar.gz", tmp_path / "data")
    assert out == tmp_path / "data" / "stl10.tar.gz.unpacked"
    assert unpacked(out) == members


def test_unpacking_writes_nothing_outside_its_folder_and_only_what_is_wanted(tmp_path, members):
    box = tmp_path / "a" / "b"
    box.mkdir(parents=True)
    archive = box / "stl10.tar.gz"
    outside = ["../../evil.bin", str(tmp_path / "absolute.bin"), "stl10_binary/../../../up.txt"]
    hostile = [*outside, "stl10_binary/run.sh", "x.py"]
    write_tar(archive, {**members, **dict.fromkeys(hostile, b"evil")}, link=str(tmp_path / "target"))
    unpack_stl10(archive, box / "data")
    made = set(files_below(tmp_path)) - {"a/b/stl10.tar.gz"}
    assert made >= {f"a/b/data/stl10.tar.gz.unpacked/{name}" for name in members}
    assert all(Path(name).parent == Path("a/b/data/stl10.tar.gz.unpacked") for name in made)
    assert {Path(name).suffix for name in made if not name.endswith(".whole")} == {".bin", ".txt"}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("part", [0.01, 0.3, 0.5, 0.9])
def test_a_truncated_tar_is_named_and_what_is_there_is_whole(part, tmp_path, members, user_error):
    archive, folder = tmp_path / "stl10.tar.gz", tmp_path / "data"
    write_tar(archive, members)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(part * len(whole))])
    with user_error(archive):
        unpack_stl10(archive, folder)
    for name, content in files_below(folder).items():
        assert Path(name).name.startswith(".") or members[Path(name).name] == content
    archive.write_bytes(whole)
    assert unpacked(unpack_stl10(archive, folder)) == members


def damage_a_block(archive: Path) -> None:
    content, deflate = gzip.decompress(archive.read_bytes()), zlib.compressobj(wbits=31)
    half = deflate.compress(content[: len(content) // 2]) + deflate.flush(zlib.Z_FULL_FLUSH)
    archive.write_bytes(half + b"\xff" * 1000)  # no such kind of block


def damage_a_byte(archive: Path) -> None:
    content = bytearray(gzip.compress(gzip.decompress(archive.read_bytes()), 0))
    content[10_000] ^= 1
    archive.write_bytes(content)


@pytest.mark.parametrize("damage", [damage_a_block, damage_a_byte])
def test_a_damaged_tar_is_named_and_leaves_no_wrong_bytes_behind(damage, tmp_path, members, user_error):
    archive, folder = tmp_path / "stl10.tar.gz", tmp_path / "data"
    write_tar(archive, members)
    whole = archive.read_bytes()
    damage(archive)
    with user_error(archive):
        unpack_stl10(archive, folder)
    archive.write_bytes(whole)
    assert unpacked(unpack_stl10(archive, folder)) == members


@pytest.mark.parametrize("content", [b"", b"no tar " * 1000], ids=["empty", "text"])
def test_a_file_that_is_no_tar_is_named(content, tmp_path, user_error):
    archive = tmp_path / "stl10.tar.gz"
    archive.write_bytes(content)
    with user_error(archive):
        unpack_stl10(archive, tmp_path / "data")


# downloads

BODY = np.random.default_rng(3).bytes(300_000)


@pytest.fixture
def serve() -> Iterator[Callable]:
    """Start a server on this machine whose GET is answered by a function of the handler; returns a file's URL."""
    servers = []

    def start(answer: Callable[[BaseHTTPRequestHandler], None]) -> str:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.close_connection = True
                answer(self)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/data.zip"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def send(handler: BaseHTTPRequestHandler, name: str, value: str, body: bytes) -> None:
    handler.send_response(200)
    handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def whole(handler):
    send(handler, "Content-Length", str(len(BODY)), BODY)


def whole_in_chunks(handler):
    chunks = [b"%x\r\n%s\r\n" % (len(c), c) for c in (BODY[:1000], BODY[1000:])]
    send(handler, "Transfer-Encoding", "chunked", b"".join(chunks) + b"0\r\n\r\n")


def cut(handler):
    send(handler, "Content-Length", str(len(BODY)), BODY[: len(BODY) // 2])


def cut_chunks(handler):
    send(handler, "Transfer-Encoding", "chunked", b"%x\r\n" % len(BODY) + BODY[: len(BODY) // 2])


def not_found(handler):
    handler.send_error(404)


def no_http(handler):
    handler.wfile.write(b"hello\r\n\r\n")


def nothing(handler):
    pass


@pytest.mark.parametrize("answer", [whole, whole_in_chunks])
@pytest.mark.parametrize("checksum", ["", md5(BODY).hexdigest()], ids=["unchecked", "checked"])
def test_fetch_gives_the_file_and_tells_how_far_it_is(answer, checksum, tmp_path, serve):
    seen = []
    archive = Archive(serve(answer), "data.zip", checksum)
    path = fetch(archive, tmp_path / "downloads", lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "downloads" / "data.zip"
    assert path.read_bytes() == BODY
    assert [p.name for p in path.parent.iterdir()] == ["data.zip"]
    assert seen == sorted(seen)
    assert seen[-1] == (len(BODY), len(BODY) if answer is whole else 0)


def test_a_file_that_is_there_is_not_fetched_again(tmp_path):
    (tmp_path / "data.zip").write_bytes(b"here")
    assert fetch(Archive("http://127.0.0.1:1/", "data.zip", ""), tmp_path, print).read_bytes() == b"here"


@pytest.mark.parametrize("answer", [cut, cut_chunks, not_found, no_http, nothing])
def test_a_failed_download_leaves_nothing_and_names_the_url(answer, tmp_path, serve, user_error):
    url = serve(answer)
    with user_error(url, tmp_path / "data.zip"):
        fetch(Archive(url, "data.zip", md5(BODY).hexdigest()), tmp_path, lambda done, total: None)
    assert list(tmp_path.iterdir()) == []


class Flaky:
    """A server that ends each answer after `step` bytes, and goes on from there when asked to, as RFC 9110 has it."""

    def __init__(self, step: int, body: bytes = BODY, version: str = '"1"', header: str = "ETag") -> None:
        self.step, self.body, self.version, self.header, self.asked = step, body, version, header, []

    def __call__(self, handler):
        asked, condition = handler.headers.get("Range"), handler.headers.get("If-Range")
        self.asked.append(asked)
        first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and condition == self.version else 0
        handler.send_response(206 if first else 200)
        if first:
            handler.send_header("Content-Range", f"bytes {first}-{len(self.body) - 1}/{len(self.body)}")
        if self.header:
            handler.send_header(self.header, self.version)
        handler.send_header("Content-Length", str(len(self.body) - first))
        handler.end_headers()
        handler.wfile.write(self.body[first : first + self.step])


@pytest.mark.parametrize(("header", "version"), [("ETag", '"1"'), ("Last-Modified", "Tue, 01 Jan 2013 00:00:00 GMT")])
def test_a_download_that_is_cut_goes_on_where_it_stopped(header, version, tmp_path, serve):
    server, seen = Flaky(110_000, header=header, version=version), []
    archive = Archive(serve(server), "data.zip", "")
    path = fetch(archive, tmp_path, lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == BODY
    assert server.asked == [None, "bytes=110000-", "bytes=220000-"]
    assert seen == sorted(seen)
    assert seen[-1] == (len(BODY), len(BODY))
    assert [p.name for p in tmp_path.iterdir()] == ["data.zip"]


def interrupt(done, total):
    raise KeyboardInterrupt


def test_another_call_goes_on_with_what_the_last_one_left(tmp_path, serve):
    server = Flaky(200_000)
    archive = Archive(serve(server), "data.zip", "")
    with pytest.raises(KeyboardInterrupt):
        fetch(archive, tmp_path, interrupt)
    assert not (tmp_path / "data.zip").exists()
    assert fetch(archive, tmp_path, lambda done, total: None).read_bytes() == BODY
    first, second, *_ = server.asked
    assert (first, int(second.removeprefix("bytes=").removesuffix("-")) > 0) == (None, True)


@pytest.mark.parametrize("weak", [False, True], ids=["changed", "not to be compared"])
def test_a_file_that_may_have_changed_is_fetched_from_its_start(weak, tmp_path, serve):
    server = Flaky(200_000, body=BODY[::-1], version='W/"1"' if weak else '"0"')
    archive = Archive(serve(server), "data.zip", "")
    with pytest.raises(KeyboardInterrupt):
        fetch(archive, tmp_path, interrupt)
    server.body, server.step = BODY, len(BODY)
    server.version = 'W/"1"' if weak else '"1"'
    assert fetch(archive, tmp_path, lambda done, total: None).read_bytes() == BODY


def test_a_server_that_ends_every_answer_is_not_asked_for_ever(tmp_path, serve, user_error):
    server = Flaky(0)
    with user_error("0 of 300000 bytes came"):
        fetch(Archive(serve(server), "data.zip", ""), tmp_path, lambda done, total: None)
    assert len(server.asked) == 1


def test_an_answer_shorter_than_its_own_range_is_not_the_end(tmp_path, serve):
    """A proxy that hands out ranges in pieces: each says truly how long it is, and how long the whole file is."""

    def pieces(handler):
        asked = handler.headers.get("Range")
        first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        last = min(first + 120_000, len(BODY))
        handler.send_response(206 if asked else 200)
        handler.send_header("ETag", '"1"')
        if asked:
            handler.send_header("Content-Range", f"bytes {first}-{last - 1}/{len(BODY)}")
        handler.send_header("Content-Length", str(last - first if asked else len(BODY)))
        handler.end_headers()
        handler.wfile.write(BODY[first:last])

    assert fetch(Archive(serve(pieces), "data.zip", ""), tmp_path, lambda done, total: None).read_bytes() == BODY


def test_a_partial_file_that_is_whole_already_is_fetched_again(tmp_path, serve):
    def satisfied(handler):
        if handler.headers.get("Range"):
            handler.send_error(416)
        else:
            whole(handler)

    (tmp_path / ".data.zip.partial").write_bytes(BODY)
    (tmp_path / ".data.zip.version").write_text('"1"')
    archive = Archive(serve(satisfied), "data.zip", "")
    assert fetch(archive, tmp_path, lambda done, total: None).read_bytes() == BODY


def test_a_server_that_gives_a_byte_at_a_time_is_given_up(tmp_path, serve, user_error):
    server = Flaky(1)
    with user_error("of 300000 bytes came"):
        fetch(Archive(serve(server), "data.zip", ""), tmp_path, lambda done, total: None)
    assert len(server.asked) <= 10


def test_a_second_fetch_into_the_same_folder_is_refused(tmp_path, serve, user_error):
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with user_error(tmp_path, "another process"):
        fetch(Archive(serve(whole), "data.zip", ""), tmp_path, lambda done, total: None)
    os.close(folder)


@pytest.mark.parametrize("error", [EOFError, lzma.LZMAError])
def test_any_error_of_a_damaged_member_is_one_line(error, tiny_zip, user_error, monkeypatch):
    source = TinyImageNet(tiny_zip)
    _ = source.splits

    def read(name):
        raise error("Corrupt input data")

    monkeypatch.setattr(source._archive, "read", read)
    with user_error(tiny_zip, "Corrupt input data"):
        source.read("train", 0)


def test_a_download_of_another_checksum_leaves_nothing_and_names_both(tmp_path, serve, user_error):
    url, wanted = serve(whole), "0" * 32
    with user_error(url, wanted, md5(BODY).hexdigest()):
        fetch(Archive(url, "data.zip", wanted), tmp_path, lambda done, total: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["http://{}/data.zip", "http://{}/my data.zip", "nowhere://{}/data.zip"])
def test_a_url_that_cannot_be_opened_is_named(url, tmp_path, user_error):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = url.format(f"127.0.0.1:{free.getsockname()[1]}")  # bound, but nobody listens
        with user_error(url):
            fetch(Archive(url, "data.zip", ""), tmp_path, lambda done, total: None)
    assert list(tmp_path.iterdir()) == []


# shapes


@pytest.mark.parametrize("label", range(len(shapes.CLASSES)))
def test_a_drawing_is_a_pure_function_of_class_and_seed(label):
    image = shapes.draw(label, 5, 24)
    np.random.seed(0)
    assert np.array_equal(image, shapes.draw(label, 5, 24))
    assert image.shape == (24, 24, 3)
    assert image.dtype == np.uint8
    assert not np.array_equal(image, shapes.draw(label, 6, 24))
    assert not np.array_equal(image, shapes.draw((label + 1) % len(shapes.CLASSES), 5, 24))


@pytest.mark.parametrize("label", range(len(shapes.CLASSES)))
def test_the_figure_of_every_class_is_drawn(label, monkeypatch):
    drawn = np.stack([shapes.draw(label, seed, 24) for seed in range(5)]).astype(int)
    monkeypatch.setattr(shapes, "_inside", lambda name, u, v: np.zeros(u.shape, bool))
    without = np.stack([shapes.draw(label, seed, 24) for seed in range(5)]).astype(int)
    covered = (np.abs(drawn - without).max(axis=-1) > 40).mean(axis=(1, 2))
    assert (covered > 0.01).all()
    assert (covered < 0.5).all()


def test_shapes_in_the_layout_of_tiny_imagenet(tmp_path):
    shapes.write_tiny_imagenet(tmp_path / "shapes.zip", train_per_class=3, test_per_class=2, size=24)
    source = TinyImageNet(tmp_path / "shapes.zip")
    assert [name.split(maxsplit=1)[1] for name in source.classes] == list(shapes.CLASSES)
    assert np.bincount(source.splits["train"].labels).tolist() == [3] * 10
    assert np.bincount(source.splits["test"].labels).tolist() == [2] * 10
    all_bytes = [data for samples in contents(source).values() for _, _, data in samples]
    assert len(set(all_bytes)) == 50
    assert {pixels(data).shape for data in all_bytes} == {(24, 24, 3)}
    shapes.write_tiny_imagenet(tmp_path / "again.zip", train_per_class=3, test_per_class=2, size=24)
    assert contents(TinyImageNet(tmp_path / "again.zip")) == contents(source)


def test_shapes_in_the_layout_of_stl10(tmp_path):
    shapes.write_stl10(tmp_path / "stl10_binary", train_per_class=2, test_per_class=1, num_unlabeled=3)
    source = STL10(tmp_path)
    assert source.classes == list(shapes.CLASSES)
    assert np.bincount(source.splits["train"].labels).tolist() == [2] * 10
    assert np.bincount(source.splits["test"].labels).tolist() == [1] * 10
    assert source.splits["unlabeled"].labels.tolist() == [-1] * 3
    all_bytes = [data for samples in contents(source).values() for _, _, data in samples]
    assert len(set(all_bytes)) == 33
    first = np.load(io.BytesIO(source.read("train", 0)))
    assert any(np.array_equal(first, shapes.draw(0, seed, 96)) for seed in range(33))
    folds = (tmp_path / "stl10_binary" / "fold_indices.txt").read_text().split("\n")
    assert sorted(int(i) for fold in folds for i in fold.split()) == list(range(20))
