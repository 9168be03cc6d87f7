"""Archives: whole ones come out as they went in; evil, damaged and cut-off ones leave nothing behind."""

import gzip
import io
import os
import random
import resource
import shutil
import signal
import stat
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from m3vit.data.tools import archives
from m3vit.data.tools.archives import extract
from m3vit.errors import InputError

CONTENT = {
    "NYUD_MT/images/0001.jpg": os.urandom(3000),
    "NYUD_MT/gt_sets/train.txt": b"0001\n",
    "NYUD_MT/depth/0001.npy": b"",
    "NYUD_MT/a name with spaces and ö": b"x" * 700,
}


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(data))


def write_tar(path: Path, build: Callable[[tarfile.TarFile], None], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        add(tar, "set", type=tarfile.DIRTYPE, mode=0o755)
        add(tar, "set/a.txt", b"fine")
        build(tar)
        add(tar, "set/z.txt", b"fine too")
    return path


def whole(path: Path) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, data in CONTENT.items():
                packed.writestr(name, data)
        return path
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as tar:
        for name, data in CONTENT.items():
            add(tar, f"./{name}", data, mode=0o4777)
    return path


def assert_nothing_left(folder: Path, *allowed: str) -> None:
    assert {path.name for path in folder.iterdir()} == set(allowed)


@pytest.mark.parametrize("name", ["a.tgz", "a.tar.gz", "a.tar", "a.zip", "download"])
def test_a_whole_archive_comes_out_as_it_went_in(tmp_path: Path, name: str) -> None:
    archive = whole(tmp_path / name)
    calls: list[tuple[int, int]] = []
    root = extract(archive, tmp_path / "new" / "out", lambda done, total: calls.append((done, total)))
    assert root == tmp_path / "new" / "out" / "NYUD_MT"
    found = {str(path.relative_to(root.parent)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert found == CONTENT
    modes = {stat.S_IMODE(path.stat().st_mode) for path in root.rglob("*") if path.is_file()}
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o666 & ~mask}, "the archive's permissions, set-uid among them, are not taken over"
    assert calls and calls[-1][0] <= calls[-1][1]
    assert_nothing_left(root.parent.parent, "out")
    with pytest.raises(InputError, match="out is not empty"):
        extract(archive, tmp_path / "new" / "out")


def test_several_folders_at_the_top_make_the_target_the_root(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("images/1.jpg", "x")
        packed.writestr("gt_sets/", "")
    out = tmp_path / "out"
    out.mkdir()
    assert extract(tmp_path / "a.zip", out) == out
    assert (out / "gt_sets").is_dir() and (out / "images" / "1.jpg").read_text() == "x"


def pack(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as packed:
        for name in names:
            packed.writestr(name, "x")
    return path


def test_the_root_is_found_beside_and_below_other_folders(tmp_path: Path) -> None:
    beside = pack(tmp_path / "a.zip", "__MACOSX/._x", "NYUD_MT/images/1.jpg", "NYUD_MT/gt_sets/train.txt")
    assert extract(beside, tmp_path / "a") == tmp_path / "a" / "NYUD_MT"
    assert (tmp_path / "a" / "__MACOSX" / "._x").is_file()
    below = pack(tmp_path / "b.zip", "export/home/PASCAL_MT/ImageSets/Context/val.txt", "export/home/readme")
    assert extract(below, tmp_path / "b") == tmp_path / "b" / "export" / "home" / "PASCAL_MT"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["holiday/1.jpg", "holiday/2.jpg"], "is no data set: it holds 1.jpg, 2.jpg, expected a folder with gt_sets/"),
        (["1/2/3/4/gt_sets/train.txt"], "is no data set: it holds 4/, expected"),  # too deep
        (["gt_sets"], "is no data set: it holds gt_sets, expected"),
        (["A/gt_sets/a", "B/ImageSets/Context/a"], r"more than one data set: A \(nyud\), B \(pascal\)"),
        (["A/gt_sets/a", "A/ImageSets/Context/a"], r"more than one data set: A \(nyud and pascal\)"),
    ],
)
def test_an_archive_of_something_else_is_refused(tmp_path: Path, names: list[str], words: str) -> None:
    archive = pack(tmp_path / "a.zip", *names)
    with pytest.raises(InputError, match=words):
        extract(archive, tmp_path / "new" / "inner" / "out")
    assert_nothing_left(tmp_path, "a.zip")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=words):
        extract(archive, tmp_path / "out")
    assert_nothing_left(tmp_path, "a.zip", "out")
    assert_nothing_left(tmp_path / "out")


def test_command_refuses_what_is_no_data_set(cli: Callable[..., subprocess.CompletedProcess], tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.zip", "holiday/1.jpg")
    for given, words in (
        (archive, "is no data set: it holds 1.jpg"),
        (tmp_path, "not found or not a file: give an archive"),
    ):
        result = cli("data", "extract", given, "--out", tmp_path / "new" / "out")
        assert result.returncode == 2 and words in result.stderr and result.stdout == ""
        assert result.stderr.splitlines()[-1].startswith("m3vit: error: ") and "Traceback" not in result.stderr
        assert_nothing_left(tmp_path, "a.zip")


def link(tar: tarfile.TarFile) -> None:
    add(tar, "set/link", type=tarfile.SYMTYPE, linkname="/etc")
    add(tar, "set/link/passwd", b"evil")


TARS: dict[str, tuple[Callable[[tarfile.TarFile], None], str]] = {
    "parent": (lambda tar: add(tar, "../evil", b"x"), r"'\.\./evil' leads out of the folder"),
    "inner parent": (lambda tar: add(tar, "set/../../evil", b"x"), "leads out of the folder"),
    "harmless parent": (lambda tar: add(tar, "set/b/../c", b"x"), "leads out of the folder"),
    "absolute": (lambda tar: add(tar, "/tmp/evil", b"x"), "absolute"),
    "windows": (lambda tar: add(tar, r"..\evil", b"x"), "Windows path"),
    "drive": (lambda tar: add(tar, "c:/evil", b"x"), "Windows path"),
    "symlink": (lambda tar: add(tar, "set/l", type=tarfile.SYMTYPE, linkname="../../x"), r"is a link to '\.\./\.\./x'"),
    "inner symlink": (lambda tar: add(tar, "set/l", type=tarfile.SYMTYPE, linkname="a.txt"), "is a link"),
    "hard link": (lambda tar: add(tar, "set/l", type=tarfile.LNKTYPE, linkname="set/a.txt"), "is a link"),
    "link, then a file through it": (link, "is a link to '/etc'"),
    "character device": (lambda tar: add(tar, "set/d", type=tarfile.CHRTYPE), "is a device"),
    "block device": (lambda tar: add(tar, "set/d", type=tarfile.BLKTYPE), "is a device"),
    "fifo": (lambda tar: add(tar, "set/d", type=tarfile.FIFOTYPE), "special file"),
    "twice": (lambda tar: add(tar, "set/a.txt", b"other"), "is there twice"),
    "file as folder": (lambda tar: add(tar, "set/a.txt/b", b"x"), "is there twice, or a folder and a file"),
    "folder as file": (lambda tar: add(tar, "set/a.txt", type=tarfile.DIRTYPE), "is a folder where a file was"),
    "the target itself": (lambda tar: add(tar, "./", b"x"), "is there twice, or a folder and a file"),
    "long part": (lambda tar: add(tar, "set/" + "n" * 300, b"x"), "impossible name"),
    "long name": (lambda tar: add(tar, "set/" + "n/" * 2000 + "x", b"x"), "impossible name"),
}


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("case", TARS)
def test_evil_tars_are_refused_with_and_without_pythons_filter(
    tmp_path: Path, case: str, filtered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not filtered:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    build, message = TARS[case]
    archive = write_tar(tmp_path / "a.tgz", build)
    with pytest.raises(InputError, match=f"{message}|refused by tarfile"):
        extract(archive, tmp_path / "out")
    assert_nothing_left(tmp_path, "a.tgz")
    if not filtered:
        with pytest.raises(InputError, match=message):
            extract(archive, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        ("../evil", 0, "leads out of the folder"),
        ("set/../../evil", 0, "leads out of the folder"),
        ("/tmp/evil", 0, "absolute"),
        ("..\\evil", 0, "Windows path"),
        ("set/link", 0o120777, "is a link, a device"),
        ("set/device", 0o020666, "is a link, a device"),
        ("set/a.txt", 0, "is there twice"),
    ],
)
def test_evil_zips_are_refused(tmp_path: Path, name: str, mode: int, message: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("set/a.txt", "fine")
        member = zipfile.ZipInfo(name)
        member.filename = member.orig_filename = name
        member.create_system, member.external_attr = 3, mode << 16
        with pytest.warns(UserWarning) if name == "set/a.txt" else _nothing():
            packed.writestr(member, "/etc/passwd")
    with pytest.raises(InputError, match=message):
        extract(tmp_path / "a.zip", tmp_path / "out")
    assert_nothing_left(tmp_path, "a.zip")


class _nothing:  # noqa: N801 - contextlib.nullcontext, in the shape of pytest.warns
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


def test_declared_sizes_beyond_the_disk_are_refused(tmp_path: Path) -> None:
    huge = tarfile.TarInfo("set/huge")
    huge.size = 1 << 60
    (tmp_path / "a.tgz").write_bytes(gzip.compress(huge.tobuf() + b"x" * 512))
    with pytest.raises(InputError, match=r"unpacks to more than the .* GB that are free"):
        extract(tmp_path / "a.tgz", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("set/huge", "x")
    content = bytearray((tmp_path / "a.zip").read_bytes())
    place = content.index(b"PK\x01\x02") + 24  # the size in the central directory
    content[place : place + 4] = struct.pack("<I", 0xFFFFFFF0)
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(InputError, match=r"unpacks to more than|is cut off|is damaged"):
        extract(tmp_path / "a.zip", tmp_path / "out")
    assert_nothing_left(tmp_path, "a.tgz", "a.zip")


def test_a_bomb_of_small_members_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def many(tar: tarfile.TarFile) -> None:
        for index in range(20):
            add(tar, f"set/{index}", b"x" * 100)

    archive = write_tar(tmp_path / "a.tgz", many)
    monkeypatch.setattr(archives, "MAX_MEMBERS", 10)
    with pytest.raises(InputError, match="more than 10 members"):
        extract(archive, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1000})())
    with pytest.raises(InputError, match="unpacks to more than"):
        extract(archive, tmp_path / "out")
    assert_nothing_left(tmp_path, "a.tgz")


BOMBS: dict[str, Callable[[], bytes]] = {
    "gnu sparse": lambda: gzip.compress(sparse_header(500_000_000) + bytes(10240)),
    "gnu sparse map without end": lambda: gzip.compress(sparse_header(1000) + (bytes(504) + b"\1" + bytes(7)) * 4000),
    "pax sparse": lambda: pax_archive([(b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.size", b"500000000")], b"x"),
    "pax sparse, by its name": lambda: pax_archive(
        [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"500000000")],
        b"1\n0\n1\n".ljust(512, b"\0") + b"x",
    ),
    "zeros": lambda: tar_of(("set/a", bytes(60_000_000))),
    "claimed in tar": lambda: gzip.compress(claiming("set/a", 500_000_000).tobuf() + bytes(10240)),
    "empty files in deep folders": lambda: tar_of(*((f"set/{index}/{'d/' * 200}x", b"") for index in range(400))),
    "zip of zeros": lambda: zip_of(zipfile.ZIP_DEFLATED, bytes(60_000_000)),
    "bzip2 of zeros": lambda: zip_of(zipfile.ZIP_BZIP2, bytes(60_000_000)),
}


def claiming(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    return member


def sparse_header(size: int) -> bytes:
    """A GNU sparse member of one byte that unpacks to `size`, its map going on in the next block."""
    member = tarfile.TarInfo("set/a")
    member.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (0, 0)
    header[482], header[483:495] = 1, b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def pax_archive(records: list[tuple[bytes, bytes]], data: bytes = b"") -> bytes:
    """A tar, packed, of one file with pax records as they are given."""
    body = b""
    for key, value in records:
        text = b" " + key + b"=" + value + b"\n"
        length = len(text) + 1
        while length != len(str(length)) + len(text):
            length = len(str(length)) + len(text)
        body += str(length).encode() + text
    header = claiming("P", len(body))
    header.type = tarfile.XHDTYPE
    blocks = header.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)
    blocks += claiming("set/x", len(data)).tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)
    return gzip.compress(blocks + bytes(10240))


def tar_of(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, data in members:
            add(tar, name, data)
    return file.getvalue()


def zip_of(method: int, data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as packed:
        packed.writestr("set/a", data)
    return file.getvalue()


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_archive_does_not_unpack_to_a_large_one(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    writing = archives._Writer.file

    def counted(self: archives._Writer, name: str, size: int, source: IO[bytes]) -> Iterator[None]:
        for piece in writing(self, name, size, source):
            written.append(size)
            yield piece

    monkeypatch.setattr(archives._Writer, "file", counted)
    monkeypatch.setattr(archives, "SLACK_BYTES", 1 << 20)
    (tmp_path / "a").write_bytes(BOMBS[name]())
    with pytest.raises(InputError, match=r"a sparse file|than an archive of its size can hold"):
        extract(tmp_path / "a", tmp_path / "out")
    assert sum(written) <= archives.SLACK_BYTES
    assert_nothing_left(tmp_path, "a")


def test_archives_that_python_stumbles_over(tmp_path: Path) -> None:
    def zip_with(at: int, value: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
        data = bytearray(zip_of(method, b"x" * 5000))
        start = data.find(b"PK\1\2") if at >= 0 else 0
        data[start + abs(at) : start + abs(at) + len(value)] = value
        return bytes(data)

    chain = claiming("x", 0)
    chain.type = tarfile.GNUTYPE_LONGNAME
    stumbling = {
        "a NUL in a name": (pax_archive([(b"path", b"a\0b")]), "impossible name"),
        "a sparse map that is none": (pax_archive([(b"GNU.sparse.map", b"a,b"), (b"GNU.sparse.size", b"9")]), "sparse"),
        "headers without end": (gzip.compress(chain.tobuf(tarfile.GNU_FORMAT) * 3000 + bytes(1024)), "is damaged"),
        "a later version": (zip_with(6, b"\x63\0"), "version 9.9.*with another tool"),
        "an unknown method": (zip_with(10, b"\x63\0"), "compression.*with another tool|is damaged"),
        "a name that is no text": (zip_with(8, b"\0\x08").replace(b"set/a", b"set/\xff"), "utf-8|is damaged"),
        "damaged lzma": (zip_with(-56, b"\xff\xff\xff", zipfile.ZIP_LZMA), "is damaged"),
        "a disk number": (zip_with(34, b"\xff\xff"), "."),
    }
    for name, (data, words) in stumbling.items():
        (tmp_path / "a").write_bytes(data)
        try:
            with pytest.raises(InputError, match=words) as caught:
                extract(tmp_path / "a", tmp_path / "out")
        except BaseException as error:
            raise AssertionError(name) from error
        assert str(caught.value).startswith(f"{tmp_path / 'a'}") and "\n" not in str(caught.value)
        assert_nothing_left(tmp_path, "a")


@pytest.mark.parametrize("kind", ["a.tar", "a.tgz", "stored", "deflated", "lzma", "bzip2", "pax"])
def test_mutated_archives_end_in_one_line(tmp_path: Path, kind: str) -> None:
    """Bytes changed, swapped, cut and inserted, most of them in headers: 100 of each kind."""
    rng = random.Random(kind)
    methods = {
        "stored": zipfile.ZIP_STORED,
        "deflated": zipfile.ZIP_DEFLATED,
        "lzma": zipfile.ZIP_LZMA,
        "bzip2": zipfile.ZIP_BZIP2,
    }
    if kind in methods:
        good = zip_of(methods[kind], b"some bytes " * 40)
    elif kind == "pax":
        good = gzip.decompress(
            pax_archive([(b"path", b"gt_sets/train.txt"), (b"mtime", b"1.5"), (b"size", b"4")], b"0001")
        )
    else:
        good = whole(tmp_path / "good.tar").read_bytes() if kind == "a.tar" else b""
        if kind == "a.tgz":
            good = gzip.decompress(whole(tmp_path / "good.tgz").read_bytes())
    for path in tmp_path.iterdir():
        path.unlink()
    headers = [at for at, value in enumerate(good) if value] or [0]
    for _ in range(100):
        data = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            at = rng.choice(headers) if rng.random() < 0.8 else rng.randrange(len(good))
            data[at] = rng.choice([0, 255, rng.randrange(256), data[at] ^ (1 << rng.randrange(8)), ord("9")])
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        if rng.random() < 0.2:
            at = rng.randrange(len(data) + 1)
            data[at:at] = rng.randbytes(rng.randrange(600))
        if kind in ("a.tgz", "pax") and rng.random() < 0.8:  # behind the checksum of the packing
            data = bytearray(gzip.compress(bytes(data), 1))
        (tmp_path / "a").write_bytes(data)
        try:
            extract(tmp_path / "a", tmp_path / "out")
        except InputError as error:
            assert str(error).startswith(str(tmp_path / "a")) and "\n" not in str(error)
            assert_nothing_left(tmp_path, "a")
        else:
            shutil.rmtree(tmp_path / "out")


def test_a_full_disk_is_not_the_archives_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole(tmp_path / "a.tgz")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(InputError, match=r"0001.jpg' cannot be written below .* \(File too large\).*make room"):
            extract(tmp_path / "a.tgz", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert_nothing_left(tmp_path, "a.tgz")


def test_an_archive_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tgz")
    (tmp_path / "zero.tgz").symlink_to("/dev/zero")
    (tmp_path / "gone.tgz").symlink_to(".git/annex/objects/KEY")
    for name, words in (("pipe", "it is a pipe"), ("zero", "it is a device"), ("gone", "git annex get")):
        with pytest.raises(InputError, match=f"not found or not a file .*{words}"):
            extract(tmp_path / f"{name}.tgz", tmp_path / "out")


def test_an_endless_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        header = tarfile.TarInfo("x")
        header.type, header.size = kind, 1 << 40
        (tmp_path / "a.tgz").write_bytes(gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(4096)))
        with pytest.raises(InputError, match="an extended header of 1099511627776 bytes"):
            extract(tmp_path / "a.tgz", tmp_path / "out")


@pytest.mark.parametrize("name", ["a.tgz", "a.tar", "a.zip"])
def test_an_archive_cut_off_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    content = whole(tmp_path / name).read_bytes()
    # For the bare tar: inside the first file, at a member's border, and before either of the two blocks of zeros.
    end = len(content.rstrip(b"\0")) if name == "a.tar" else len(content)
    cuts = {600, 512 * 7, 512 * 8, end // 2, end - 1, -(-end // 512) * 512 if name == "a.tar" else end - 4}
    cuts |= {end - 9} if name != "a.tar" else {-(-end // 512) * 512 + 512}
    for cut in sorted(cut for cut in cuts if cut < len(content)):
        (tmp_path / name).write_bytes(content[:cut])
        with pytest.raises(InputError, match=r"is cut off|is damaged|not a tar or zip"):
            extract(tmp_path / name, tmp_path / "out")
        assert_nothing_left(tmp_path, name)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    for name in ("a.tgz", "a.zip"):
        content = bytearray(whole(tmp_path / name).read_bytes())
        content[1500] ^= 1  # in the incompressible file
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=r"is damaged"):
            extract(tmp_path / name, tmp_path / "out")


def test_what_is_not_an_archive_is_explained(tmp_path: Path) -> None:
    page = tmp_path / "NYUD_MT.tgz"
    page.write_text("\n<!DOCTYPE html><html>Google Drive - Quota exceeded</html>")
    with pytest.raises(InputError, match="is a web page, not an archive"):
        extract(page, tmp_path / "out")
    page.write_bytes(b"")
    with pytest.raises(InputError, match="is not a tar or zip archive"):
        extract(page, tmp_path / "out")
    page.write_bytes(gzip.compress(b"only one file, not a tar" * 100))
    with pytest.raises(InputError, match="is damaged"):
        extract(page, tmp_path / "out")
    with pytest.raises(InputError, match="not found or not a file"):
        extract(tmp_path, tmp_path / "out")
    with tarfile.open(page, "w:gz") as tar:
        add(tar, "set", type=tarfile.DIRTYPE, mode=0o755)
    with pytest.raises(InputError, match="holds no file"):
        extract(page, tmp_path / "out")
    with pytest.raises(InputError, match="is a file, but must be a folder"):
        extract(whole(tmp_path / "a.zip"), page)
