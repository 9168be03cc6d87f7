"""What a folder holds is found by content; what looks like a picture and is left out is named, with the reason."""

import os
import socket
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3vit.cli import main
from m3vit.errors import InputError
from m3vit.export.runtime.predict import predict_files
from m3vit.export.runtime.sources import STREAM, Found, find_sources, summaries
from tests.export.films import pictures, write_film
from tests.export.test_runtime import make_image, make_package

PICTURE = Image.fromarray(make_image(9, 14))
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package(tmp_path_factory.mktemp("package") / "onnx")


def save(path: Path, kind: str = "JPEG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.save(path, format=kind)
    return path


def found_in(folder: Path, out: str = "/nowhere") -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Return {name: kind} of what a folder gives, {name: reason} of what is left out, and the other files' names."""
    found = find_sources([folder], Path(out))
    left_out = {str(Path(name).relative_to(folder)): reason for name, reason in found.left_out}
    others = [str(Path(name).relative_to(folder)) for name in found.others]
    return {str(source.name): source.kind for source in found.sources}, left_out, others


def test_images_of_any_name_are_found_by_content(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jfif", "c.jpe", "d.mpo", "e", "f.JPEG", "g.dat", "h.2024-05-01", "i.txt"):
        save(tmp_path / name)
    for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        save(tmp_path / f"without ending {kind}", kind)
    expected = ["a", "b", "c", "d", "e", "f", "g.dat", "h.2024-05-01", "i.txt"]  # an ending that says nothing stays
    expected += sorted(f"without ending {kind}" for kind in ("PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"))
    assert found_in(tmp_path) == (dict.fromkeys(expected, "image"), {}, [])
    for name in expected:  # and the same file by its own name
        path = next(path for path in tmp_path.iterdir() if path.stem == name or path.name == name)
        assert find_sources([path], Path("/nowhere")).sources[0].kind == "image"


def test_videos_of_any_name_are_found_by_content(tmp_path: Path) -> None:
    containers = {
        "clip": "mp4",
        "film.dat": "matroska",
        "film.old": "avi",
        "cam": "mpegts",
        "q.bin": "mov",
        "ps": "vob",
    }
    for name, container in containers.items():
        codec = "mpeg2video" if container == "vob" else "libx264" if container != "avi" else "mjpeg"
        write_film(tmp_path / name, pictures(30), codec=codec, container=container)
    write_film(tmp_path / "row.mjpeg", pictures(3), codec="mjpeg", container="mjpeg")  # begins as a JPEG does
    write_film(tmp_path / "film.jpg", pictures(3), container="mp4")
    expected = dict.fromkeys([*containers, "row", "film"], "video")
    assert found_in(tmp_path) == (expected, {}, [])


def test_sound_is_no_video(tmp_path: Path) -> None:
    import av

    save(tmp_path / "a.jpg")
    for name, container, codec in (
        ("song.mka", "matroska", "aac"),
        ("song.m4a", "ipod", "aac"),
        ("song", "mp4", "aac"),
    ):
        with av.open(str(tmp_path / name), "w", format=container) as target:
            stream = target.add_stream(codec, rate=44100)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
            frame.rate = 44100
            for packet in [*stream.encode(frame), *stream.encode()]:
                target.mux(packet)
    assert found_in(tmp_path) == ({"a": "image"}, {}, ["song", "song.m4a", "song.mka"])


UNREAD = {
    "a.heic": (HEIC, "format HEIC, which is not read: convert it, for example with heif-convert"),
    "b": (HEIC, "format HEIC"),
    "c.jpg": (HEIC, "format HEIC"),
    "d.avif": (b"\0\0\0\x1cftypavif\0\0\0\0mif1avifmiaf", "format AVIF"),
    "e.jxl": (b"\xff\x0a" + bytes(30), "format JPEG XL"),
    "f.jp2": (b"\0\0\0\x0cjP  \r\n\x87\n", "format JPEG 2000"),
    "g.svg": (b"<svg xmlns='...'></svg>", "format SVG"),
    "h.psd": (b"8BPS" + bytes(30), "format PSD"),
    "i.tga": (bytes(50), r"of a kind that is not read \(.tga\)"),
    "j.HEIC": (b"", r"of a kind that is not read \(.heic\)"),  # by its name alone
    "k.cr3": (b"\0\0\0\x18ftypcrx \0\0\0\x01crx isom", "format camera raw"),
    "l.png": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "m.jpg": (b"/annex/objects/SHA256E-s9--4d7a.jpg\n", "git annex get"),
}
OTHERS = {
    "notes.txt": b"hello",
    "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(40),
    "list.json": b"{}",
    "empty": b"",
    "index.ts": b"export const a = 1;\n",
    "BMW.txt": b"BM is what this text begins with, and more of it",
    "P3 draft": b"P3 draft, second version",
    "big.bin": b"version https://git-lfs.github.com/spec/v1\n",
    "photo.jpg.dvc": b"outs:\n- md5: 4d7a\n",
    "GGG": b"G" * 100,
    "song.mp3": b"ID3\3\0" + bytes(50),
    "paper.pdf": b"%PDF-1.7\n",
}


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    save(tmp_path / "photo.jpg")
    save(tmp_path / "raw.nef", "TIFF")  # reading it would give its preview
    for name, (data, _) in UNREAD.items():
        (tmp_path / name).write_bytes(data)
    for name, data in OTHERS.items():
        (tmp_path / name).write_bytes(data)
    sources, left_out, others = found_in(tmp_path)
    assert sources == {"photo": "image"} and sorted(others) == sorted(OTHERS)
    assert set(left_out) == {*UNREAD, "raw.nef"} and "raw file" in left_out["raw.nef"]
    for name, (_, words) in UNREAD.items():
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(left_out[name])


def test_damaged_ones_are_predicted_and_so_reported(package: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, data in (("a.jpg", b"\xff\xd8\xff\xe0"), ("b.png", b""), ("c.mp4", b""), ("d", b"\xff\xd8\xff\xe0")):
        (photos / name).write_bytes(data)
    assert found_in(photos) == ({"a": "image", "b": "image", "c": "video", "d": "image"}, {}, [])
    outcome = predict_files(package, "depth", [photos], tmp_path / "out")
    assert [Path(name).name for name, _ in outcome.failures] == ["a.jpg", "b.png", "c.mp4", "d"]


def test_a_film_of_an_unknown_coding_is_reported(package: Path, tmp_path: Path) -> None:
    film = write_film(tmp_path / "a.mp4", pictures(3), codec="libx264")
    film.write_bytes(film.read_bytes().replace(b"avc1", b"zzz9").replace(b"isomiso2zzz9mp41", b"isomiso2avc1mp41"))
    ((_, reason),) = predict_files(package, "depth", [film], tmp_path / "out").failures
    assert reason == "cannot be read as a video: its pictures are coded in a way that is not known"


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    save(photos / "z" / "a.jpg")
    save(elsewhere / "deep" / "e.jpg")
    (photos / "b").symlink_to(elsewhere)
    (photos / "c").symlink_to(elsewhere / "deep")  # the same files again
    (photos / "a").symlink_to(photos / "z")  # the folder's own name is the better one
    (photos / "loop").symlink_to(photos)
    (elsewhere / "back").symlink_to(photos)
    (elsewhere / "deep" / "self").symlink_to("self")  # cannot be followed at all
    sources, left_out, others = found_in(photos)
    assert sources == {"b/deep/e": "image", "z/a": "image"} and not left_out and others == ["b/deep/self"]
    (photos / "up").symlink_to("..")
    assert found_in(photos)[1] == {
        "up": "leads to a folder that holds this one: name that one, or what is wanted of it"
    }
    # A maze of links: 2^40 paths, 40 folders.
    for level in range(40):
        (tmp_path / "maze" / str(level)).mkdir(parents=True)
        for name in ("left", "right"):
            (tmp_path / "maze" / str(level) / name).symlink_to(tmp_path / "maze" / str(level + 1))
    save(tmp_path / "maze" / "39" / "end.jpg")
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "in").symlink_to(tmp_path / "maze" / "0")
    assert len(found_in(tmp_path / "start")[0]) == 1


def test_deep_folders_and_our_own_output(tmp_path: Path) -> None:
    deep = tmp_path / "photos"
    for _ in range(600):
        deep /= "d"
        deep.mkdir(parents=True)
    save(deep / "a.jpg")
    save(tmp_path / "photos" / "out" / "a_depth.png", "PNG")
    save(tmp_path / "photos" / ".trash" / "b.jpg")
    save(tmp_path / "photos" / "._c.jpg")
    found = find_sources([tmp_path / "photos"], tmp_path / "photos" / "out")
    assert len(found.sources) == 1 and found.hidden == 2
    assert summaries(found) == ["passed over 2 hidden files or folders"]


def test_links_that_lead_nowhere_and_special_files(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to(".git/annex/objects/1/2/KEY/KEY")
    (tmp_path / "c.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "d.png")
    (tmp_path / "e.jpg").symlink_to("/dev/zero")
    (tmp_path / "f").symlink_to("/dev/null")
    (tmp_path / "h").symlink_to("nowhere")  # without an ending it may be anything
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(tmp_path / "g.mp4"))
        sources, left_out, others = found_in(tmp_path)
    finally:
        listener.close()
    assert sources == {"a": "image"} and others == ["c.txt", "f"]
    gone = "which is not there"
    expected = {"b.jpg": gone, "d.png": "pipe", "e.jpg": "device", "g.mp4": "socket", "h": gone}
    assert all(words in left_out[name] for name, words in expected.items()) and set(left_out) == set(expected)
    with pytest.raises(InputError, match=r"d\.png: it is a pipe, not a regular file: pipe its bytes into"):
        find_sources([tmp_path / "d.png"], tmp_path / "out")
    with pytest.raises(InputError, match=r"b\.jpg not found: it is a link to \.git/annex.*git annex get"):
        find_sources([tmp_path / "b.jpg"], tmp_path / "out")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.jpg")
    save(tmp_path / "locked" / "b.jpg")
    scan = os.scandir

    def deny(path: Path) -> object:
        if Path(path).name == "locked":  # root is not stopped by modes
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", deny)
    assert found_in(tmp_path)[:2] == ({"a": "image"}, {"locked": "cannot be searched: Permission denied"})
    with pytest.raises(InputError, match="locked cannot be searched: Permission denied"):
        find_sources([tmp_path / "locked"], tmp_path / "out")


def test_folders_without_anything_to_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no images or videos that can be read$"):
        find_sources([tmp_path], Path("/nowhere"))
    (tmp_path / "a.heic").write_bytes(HEIC)
    with pytest.raises(InputError, match=r"that can be read: left out 1 .*a\.heic: .*HEIC.*heif-convert"):
        find_sources([tmp_path], Path("/nowhere"))


def test_lines_group_by_reason() -> None:
    found = Found(
        left_out=[*((f"{index}.heic", "is HEIC") for index in range(5)), ("x.svg", "is SVG")],
        others=["notes.txt"],
    )
    assert summaries(found) == [
        "left out 6 that look like pictures or videos: 0.heic, 1.heic, 2.heic and 2 more: is HEIC; x.svg: is SVG",
        "passed over 1 files that are neither pictures nor videos (notes.txt)",
    ]
    assert summaries(Found()) == [] and str(STREAM) == "-"


def test_the_command_says_so(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    for name in ("a.jpg", "b.jfif", "c"):
        save(photos / name)
    save(tmp_path / "elsewhere" / "e.jpg")
    (photos / "linked").symlink_to("../elsewhere")
    (photos / "notes.txt").write_text("hello")
    words = ["predict", str(package), str(photos), "--task", "depth", "--out"]
    assert main([*words, str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 4
    assert shown.err == (
        f"m3vit predict: passed over 1 files that are neither pictures nor videos ({photos / 'notes.txt'})\n"
    )
    (photos / "IMG_1.HEIC").write_bytes(HEIC)
    assert main([*words, str(tmp_path / "again")]) == 1
    first, _ = capsys.readouterr().err.splitlines()
    assert first.startswith("m3vit predict: left out 1 that look like pictures or videos: ") and "heif-convert" in first
    assert stat.S_ISREG((tmp_path / "again" / "linked" / "e_depth.png").stat().st_mode)
    assert main([*words[:2], str(photos / "IMG_1.HEIC"), *words[3:], str(tmp_path / "named")]) == 1
    assert "heif-convert" in capsys.readouterr().err
