"""m3vit predict on images, folders, videos and streams, with a package made by hand: depth is the red channel."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3vit.errors import InputError, install
from m3vit.export.runtime.package import Package, colourise
from m3vit.export.runtime.predict import ALL, ArrayWriter, Options, predict_files
from tests.export.films import RATE, pictures, read_film, write_film, y4m
from tests.export.test_runtime import CHANNELS, make_image, make_package

Cli = Callable[..., subprocess.CompletedProcess]
TASKS = list(CHANNELS)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package(tmp_path_factory.mktemp("package") / "onnx")


def save(path: Path, height: int = 9, width: int = 14) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(make_image(height, width)).save(path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------------------- images


def test_images_keep_their_names_and_sizes(package: Path, tmp_path: Path) -> None:
    image = make_image(9, 14)
    save(tmp_path / "room.png")
    Image.fromarray(image).convert("L").save(tmp_path / "grey.v2.jpg")
    out = tmp_path / "new" / "out"
    said: list[str] = []
    inputs = [tmp_path / "room.png", tmp_path / "grey.v2.jpg"]
    outcome = predict_files(package, "depth", inputs, out, Options(raw=True), say=said.append)
    expected = ["room_depth.png", "room_depth.npy", "grey.v2_depth.png", "grey.v2_depth.npy"]
    assert [path.name for path in outcome.written] == expected and said == [str(out / name) for name in expected]
    assert outcome.failures == [] and outcome.stopped is None
    assert names(out) == sorted(expected), "nothing half-written stays"
    raw, loaded = np.load(out / "room_depth.npy"), Package.load(package, threads=1)
    np.testing.assert_array_equal(raw, loaded.predict(image, "depth"))
    picture = np.asarray(Image.open(out / "room_depth.png"))
    np.testing.assert_array_equal(picture, colourise(raw, "depth", loaded.manifest))


def test_folders_are_searched_and_names_below_them_kept(package: Path, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "photos" / "predicted"
    for name in ("b.png", "a.JPG", "deep/er/c.webp", ".hidden/d.png", "deep/._e.png", "predicted/old.png"):
        save(photos / name)
    (photos / "notes.txt").write_text("not an image")
    (photos / "loop").symlink_to(photos)
    outcome = predict_files(package, ALL, [photos], out)
    expected = [f"{stem}_{task}.png" for stem in ("a", "b", "deep/er/c") for task in TASKS]
    assert [str(path.relative_to(out)) for path in outcome.written] == expected
    with pytest.raises(InputError, match=r"a_semseg.png, .*and 7 more would be overwritten"):
        predict_files(package, ALL, [photos], out)


def test_overlay_and_depth_range(package: Path, tmp_path: Path) -> None:
    save(tmp_path / "a.png", 40, 400)
    plain = predict_files(package, "depth", [tmp_path / "a.png"], tmp_path / "plain")
    drawn = predict_files(package, "depth", [tmp_path / "a.png"], tmp_path / "drawn", Options(overlay=True))
    fixed = Options(overlay=True, depth_range=(0.0, 100.0))
    ranged = predict_files(package, "depth", [tmp_path / "a.png"], tmp_path / "ranged", fixed)
    sizes = [Image.open(outcome.written[0]).size for outcome in (plain, drawn, ranged)]
    assert sizes[0] == (400, 40) and sizes[1] == sizes[2] and sizes[1][0] == 400 and sizes[1][1] > 60
    # All within a metre: of 100 m the brightest colour, of the picture's own range all of them.
    fixed = Options(depth_range=(0.0, 100.0))
    ranged = predict_files(package, "depth", [tmp_path / "a.png"], tmp_path / "bright", fixed)
    reds = [np.asarray(Image.open(outcome.written[0]))[..., 0] for outcome in (ranged, plain)]
    valid = make_image(40, 400)[..., 0] > 0
    assert reds[0][valid].min() > 240 and reds[1][valid].min() < 10


def test_goes_on_after_what_it_cannot_read(package: Path, tmp_path: Path) -> None:
    good = [save(tmp_path / "a.png"), save(tmp_path / "z.png")]
    bad: dict[str, str] = {
        "torn.png": "cannot be read as an image",
        "text.png": "cannot be read as an image",
        "deep.png": "more than 8 bits",
        "small.png": "at least 4x4",
        "wide.png": "at most 500 are allowed",
        "text.mp4": "cannot be read as a video",
    }
    (tmp_path / "torn.png").write_bytes(good[0].read_bytes()[:-60])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "text.mp4").write_text("not a video")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    save(tmp_path / "small.png", 2, 2)
    save(tmp_path / "wide.png", 4, 126)
    inputs = [good[0], *(tmp_path / name for name in bad), good[1]]
    outcome = predict_files(package, "edge", inputs, tmp_path / "out", Options(max_pixels=500))
    assert [path.name for path in outcome.written] == ["a_edge.png", "z_edge.png"]
    assert names(tmp_path / "out") == ["a_edge.png", "z_edge.png"]
    assert [name for name, _ in outcome.failures] == [str(tmp_path / name) for name in bad]
    for (name, reason), match in zip(outcome.failures, bad.values(), strict=True):
        assert match in reason and name not in reason and "\n" not in reason


def test_refused_before_anything_is_run(package: Path, tmp_path: Path) -> None:
    good, out = save(tmp_path / "a.png"), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    same = save(tmp_path / "sub" / "a.jpg")
    save(tmp_path / "taken" / "a_edge.png")
    (tmp_path / "blocked" / "a_edge.png").mkdir(parents=True)
    picture = save(tmp_path / "a_edge.png")
    for inputs, folder, task, match in (
        ([good], out, "flow", "no task 'flow'"),
        ([], out, "edge", "no inputs"),
        ([good, tmp_path / "none.png"], out, "edge", "none.png not found"),
        ([good, same], out, "edge", r"a.png and .*a.jpg would both become a_edge.png"),
        ([good, good], out, "edge", "would both become"),
        ([good, tmp_path / "empty"], out, "edge", "empty holds no images or videos"),
        ([tmp_path / "sub"], tmp_path / "sub", "edge", "sub holds the inputs: give another folder"),
        ([good], good, "edge", "a.png is a file: give a folder"),
        ([good], good / "deeper", "edge", "a.png is a file: give a folder"),
        ([good], tmp_path / "taken", "edge", "taken/a_edge.png would be overwritten: choose another folder or --force"),
        ([good], tmp_path / "blocked", "edge", "a_edge.png is a folder"),
        ([good, picture], tmp_path, "edge", "would overwrite an input"),
        ([Path("-"), Path("-")], out, "edge", "- is given twice"),
    ):
        with pytest.raises(InputError, match=match):
            predict_files(package, task, inputs, folder)
    with pytest.raises(InputError, match="would overwrite an input"):  # not even with force
        predict_files(package, "edge", [good, picture], tmp_path, Options(force=True))
    assert not out.exists()


def test_force_replaces(package: Path, tmp_path: Path) -> None:
    good, out = save(tmp_path / "a.png"), tmp_path / "out"
    save(out / "a_edge.png", 1, 1)
    (out / "a_edge.npy").symlink_to(tmp_path / "nowhere")  # a dangling link is there too
    with pytest.raises(InputError, match=r"a_edge.png, .*a_edge.npy would be overwritten"):
        predict_files(package, "edge", [good], out, Options(raw=True))
    assert Image.open(out / "a_edge.png").size == (1, 1)
    predict_files(package, "edge", [good], out, Options(raw=True, force=True))
    assert Image.open(out / "a_edge.png").size == (14, 9) and not (tmp_path / "nowhere").exists()


def test_command_line(cli: Cli, package: Path, tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "torn.png").write_bytes(b"torn")
    words = ["predict", package, tmp_path / "torn.png", tmp_path / "a.png", "--task", "all", "--out", tmp_path / "out"]
    result = cli(*words, "--overlay")
    assert result.returncode == 1 and len(result.stdout.splitlines()) == len(TASKS)
    first, second = result.stderr.splitlines()
    assert first == "m3vit predict: 1 of the inputs failed:" and second.startswith(f"  {tmp_path / 'torn.png'}: ")
    again = cli(*words)
    assert again.returncode == 2 and "a_semseg.png" in again.stderr and "--force" in again.stderr
    for option, value, match in (
        ("--depth-range", "5", "NEAR:FAR"),
        ("--depth-range", "5:2", "NEAR:FAR"),
        ("--fps", "0", "frames per second"),
        ("--max-pixels", "-1", "positive whole number"),
    ):
        refused = cli(*words, option, value)
        assert refused.returncode == 2 and match in refused.stderr and len(refused.stderr.splitlines()) == 1


@pytest.mark.process
def test_without_torch_and_without_pyav(package: Path, tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "clip.mp4").write_bytes(b"")
    program = (
        "import sys; sys.modules.update(torch=None, timm=None, onnx=None, av=None, fastapi=None)\n"
        "from m3vit.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )

    def run(name: str) -> subprocess.CompletedProcess:
        words = [
            "predict",
            package,
            tmp_path / "a.png",
            tmp_path / name,
            "--task",
            "normals",
            "--out",
            tmp_path / "out",
        ]
        command = [sys.executable, "-c", program, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    refused = run("clip.mp4")
    assert refused.returncode == 2 and not (tmp_path / "out").exists()
    assert refused.stderr == f"m3vit: error: this command needs av: {install('video')}\n"
    save(tmp_path / "b.png")
    done = run("b.png")
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "out") == ["a_normals.png", "b_normals.png"]


# ---------------------------------------------------------------------------------------------------------- videos


def test_a_video_becomes_a_video_of_the_same_frames(package: Path, tmp_path: Path) -> None:
    frames = pictures(12, 23, 37)  # odd sizes
    write_film(tmp_path / "clip.mkv", frames, codec="ffv1")  # lossless
    outcome = predict_files(package, ALL, [tmp_path / "clip.mkv"], tmp_path / "out", Options(raw=True))
    assert outcome.failures == []
    assert names(tmp_path / "out") == sorted(f"clip_{task}.{end}" for task in TASKS for end in ("mp4", "npy"))
    loaded = Package.load(package, threads=1)
    for task in TASKS:
        expected = np.stack([loaded.predict(frame, task) for frame in frames])
        np.testing.assert_array_equal(np.load(tmp_path / "out" / f"clip_{task}.npy"), expected)
    shown, times, rate = read_film(tmp_path / "out" / "clip_edge.mp4")
    assert len(shown) == 12 and shown[0].shape == (24, 38, 3)
    np.testing.assert_allclose(times, np.arange(12) / float(RATE), atol=1e-3)  # mkv counts milliseconds
    assert abs(float(rate) / float(RATE) - 1) < 0.01
    for frame, picture in zip(frames, shown, strict=True):
        expected = colourise(loaded.predict(frame, "edge"), "edge", loaded.manifest)
        assert np.abs(picture[:23, :37].astype(int) - expected).mean() < 4, "H.264 of the right picture"


@pytest.mark.parametrize(("suffix", "container"), [(".mp4", "mp4"), (".ts", "mpegts"), (".MOV", "mov")])
def test_the_rate_is_kept_exactly(package: Path, tmp_path: Path, suffix: str, container: str) -> None:
    film = write_film(tmp_path / f"clip{suffix}", pictures(9), container=container)
    predict_files(package, "depth", [film], tmp_path / "out")
    shown, times, rate = read_film(tmp_path / "out" / "clip_depth.mp4")
    assert rate == RATE and len(shown) == 9 and times[0] == 0


def test_uneven_times_are_kept_or_replaced(package: Path, tmp_path: Path) -> None:
    film = write_film(tmp_path / "clip.mp4", pictures(5), rate=Fraction(10), times=[0, 1, 5, 6, 20])
    predict_files(package, "depth", [film], tmp_path / "out")
    np.testing.assert_allclose(read_film(tmp_path / "out" / "clip_depth.mp4")[1], [0, 0.1, 0.5, 0.6, 2], atol=1e-3)
    predict_files(package, "depth", [film], tmp_path / "out", Options(force=True, fps=Fraction(25)))
    _, times, rate = read_film(tmp_path / "out" / "clip_depth.mp4")
    assert rate == 25
    np.testing.assert_allclose(times, np.arange(5) / 25, atol=1e-3)


def test_phone_videos_are_upright(package: Path, tmp_path: Path) -> None:
    frames = pictures(3, 24, 40)
    film = write_film(tmp_path / "clip.mp4", frames, codec="libx264")
    one = (1 << 16).to_bytes(4, "big")
    none, minus, unit = bytes(4), (2**32 - (1 << 16)).to_bytes(4, "big"), (1 << 30).to_bytes(4, "big")
    upright = one + none * 3 + one + none * 3 + unit
    clockwise = none + one + none + minus + none * 4 + unit  # the matrix of a phone held upright
    data = film.read_bytes()
    assert data.count(upright) == 2  # of the film, and of its track
    film.write_bytes(data[::-1].replace(upright[::-1], clockwise[::-1], 1)[::-1])
    predict_files(package, "depth", [film], tmp_path / "out", Options(raw=True))
    values = np.load(tmp_path / "out" / "clip_depth.npy")
    assert values.shape == (3, 40, 24)
    # The bar that grows from the left now grows from the top.
    assert values[2, :3].mean() > 0.6 and values[2, 20:].mean() < 0.45


def test_overlaid_video_has_one_size_and_a_steady_scale(package: Path, tmp_path: Path) -> None:
    film = write_film(tmp_path / "clip.mkv", pictures(6, 40, 330), codec="ffv1")
    outcome = predict_files(package, ALL, [film], tmp_path / "out", Options(overlay=True))
    assert len(outcome.written) == len(TASKS) and not outcome.failures
    for path in outcome.written:
        shapes = {picture.shape for picture in read_film(path)[0]}
        assert len(shapes) == 1 and shapes.pop()[0] > 70


def test_damaged_videos_lose_what_is_damaged(package: Path, tmp_path: Path) -> None:
    data = bytearray(write_film(tmp_path / "clip.ts", pictures(30), container="mpegts").read_bytes())
    torn = tmp_path / "torn.mp4"
    torn.write_bytes(write_film(tmp_path / "whole.mp4", pictures(30)).read_bytes()[:700])
    with open(tmp_path / "clip.ts", "wb") as file:
        file.write(data[: len(data) * 2 // 3])
    outcome = predict_files(package, "depth", [torn, tmp_path / "clip.ts"], tmp_path / "out")
    assert [Path(name).name for name, _ in outcome.failures][:1] == ["torn.mp4"]
    assert "torn_depth.mp4" not in names(tmp_path / "out")
    assert 10 < len(read_film(tmp_path / "out" / "clip_depth.mp4")[0]) < 30


def test_broken_packets_are_counted(package: Path, tmp_path: Path) -> None:
    # Pictures that cannot be decoded, in a container that is whole.
    jpegs = [b"\xff\xd8" + bytes(40) + b"\xff\xd9" if index in (3, 4) else None for index in range(8)]
    write_film(tmp_path / "clip.avi", pictures(8), codec="mjpeg", container="avi")
    import av

    with av.open(str(tmp_path / "clip.avi")) as source, av.open(str(tmp_path / "broken.avi"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for packet, broken in zip(packets, jpegs, strict=True):
            replaced = av.Packet(broken) if broken else packet
            replaced.pts, replaced.dts, replaced.time_base = packet.pts, packet.dts, packet.time_base
            replaced.stream = stream
            target.mux(replaced)
    outcome = predict_files(package, "depth", [tmp_path / "broken.avi"], tmp_path / "out")
    ((_, reason),) = outcome.failures
    assert reason == "2 packets cannot be decoded: the predictions hold the 6 frames that could be read"
    _, times, _ = read_film(tmp_path / "out" / "broken_depth.mp4")
    np.testing.assert_allclose(times, np.array([0, 1, 2, 5, 6, 7]) / float(RATE), atol=1e-3)


def test_frames_that_are_too_large_are_refused(package: Path, tmp_path: Path) -> None:
    film = write_film(tmp_path / "clip.mp4", pictures(3, 24, 32))
    outcome = predict_files(package, "depth", [film], tmp_path / "out", Options(max_pixels=24 * 32 - 1))
    assert outcome.failures == [(str(film), "has 24x32 pixels: at most 767 are allowed")]
    assert not predict_files(package, "depth", [film], tmp_path / "out", Options(max_pixels=24 * 32)).failures


def test_playlists_open_nothing_else(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_film(tmp_path / "secret.mkv", pictures(30))
    Path("list.mp4").write_text("ffconcat version 1.0\nfile secret.mkv\n")  # FFmpeg would follow it
    outcome = predict_files(package, "depth", [Path("list.mp4")], tmp_path / "out")
    assert len(outcome.failures) == 1 and not outcome.written
    result = predict_stream(package, Path("list.mp4").read_bytes(), tmp_path / "out")
    assert result.returncode == 1 and b"standard input: " in result.stderr and not names(tmp_path / "out")


def test_arrays_of_unknown_length(tmp_path: Path) -> None:
    for count in (0, 1, 11):
        items = np.random.default_rng(0).normal(size=(count, 3, 5)).astype(np.float32)
        with ArrayWriter(tmp_path / "a.npy", np.dtype(np.float32), (3, 5)) as writer:
            for item in items:
                writer.append(item)
        np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), items)


# --------------------------------------------------------------------------------------------------------- streams


def predict_stream(package: Path, data: bytes, out: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "m3vit.cli", "predict", str(package), "-", "--task", "depth", "--out", str(out)]
    return subprocess.run([*command, *words], input=data, capture_output=True, timeout=60)


@pytest.mark.process
@pytest.mark.parametrize("kind", ["mjpeg", "y4m", "mpegts", "matroska", "png"])
def test_streams_on_standard_input(package: Path, tmp_path: Path, kind: str) -> None:
    frames = pictures(8)
    if kind == "y4m":
        data, rate = y4m(8), Fraction(12)
    elif kind == "png":
        for index, frame in enumerate(frames):
            Image.fromarray(frame).save(tmp_path / f"{index}.png")
        data, rate = b"".join((tmp_path / f"{index}.png").read_bytes() for index in range(8)), Fraction(25)
    else:
        codec = "mjpeg" if kind == "mjpeg" else "libx264"
        data = write_film(tmp_path / "clip", frames, codec=codec, container=kind).read_bytes()
        rate = Fraction(25) if kind == "mjpeg" else RATE  # a bare row of JPEGs says nothing
    result = predict_stream(package, data, tmp_path / "out", "--raw")
    assert result.returncode == 0, result.stderr
    assert names(tmp_path / "out") == ["stdin_depth.mp4", "stdin_depth.npy"]
    shown, _, found = read_film(tmp_path / "out" / "stdin_depth.mp4")
    assert len(shown) == 8 and abs(float(found / rate) - 1) < 0.01
    values = np.load(tmp_path / "out" / "stdin_depth.npy")
    assert values.shape == (8, 24, 32)
    if kind == "png":
        np.testing.assert_allclose(values, np.stack(frames)[..., 0] / 255, rtol=1e-6)
    elif kind == "y4m":
        brightness = values.mean(axis=(1, 2)) * 255  # full range: 10 times the index
        np.testing.assert_allclose(brightness, np.maximum(0, 10 * np.arange(8)), atol=20)
        assert (np.diff(brightness) > 0)[2:].all()


@pytest.mark.process
def test_streams_that_are_none(package: Path, tmp_path: Path) -> None:
    for data in (b"", b"hello", bytes(100_000)):
        result = predict_stream(package, data, tmp_path / "out")
        assert result.returncode == 1, result.stderr
        assert b"standard input: cannot be read as a video" in result.stderr and b"Traceback" not in result.stderr
    assert not (tmp_path / "out").exists() or not names(tmp_path / "out")
    result = predict_stream(package, y4m(8), tmp_path / "out", "--fps", "50")
    assert result.returncode == 0 and read_film(tmp_path / "out" / "stdin_depth.mp4")[2] == 50


@pytest.mark.process
def test_nothing_on_standard_input(package: Path, tmp_path: Path) -> None:
    words = f"'{sys.executable}' -m m3vit.cli predict '{package}' - --task depth --out '{tmp_path / 'out'}' <&-"
    result = subprocess.run(words, shell=True, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "nothing is piped into it" in result.stderr, result.stderr


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


@pytest.mark.process
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_streams_leave_a_playable_file(package: Path, tmp_path: Path, kind: signal.Signals) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "m3vit.cli", "predict", str(package), "-", "--task", "depth", "--out", str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(y4m(20, 64, 96))
        process.stdin.flush()  # and stays open: more may come
        partial = out / ".stdin_depth.mp4.partial.mp4"
        wait_for(partial.exists)
        process.send_signal(kind)
        assert process.wait(20) == 128 + kind, process.stderr.read()
        assert process.stdout.read().decode().strip() == str(out / "stdin_depth.mp4")
        assert f"stopped by {kind.name}" in process.stderr.read().decode()
    assert names(out) == ["stdin_depth.mp4"]
    assert 1 <= len(read_film(out / "stdin_depth.mp4")[0]) <= 20


@pytest.mark.process
def test_interrupted_video_files_leave_nothing(package: Path, tmp_path: Path) -> None:
    film = write_film(tmp_path / "clip.mp4", pictures(40, 240, 320) * 50)
    done, out = save(tmp_path / "a.png"), tmp_path / "out"
    words = ["predict", package, done, film, "--task", "depth", "--out", out]
    with subprocess.Popen(
        [sys.executable, "-m", "m3vit.cli", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        wait_for((out / ".clip_depth.mp4.partial.mp4").exists)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130, process.stderr.read()
    assert names(out) == ["a_depth.png"]


@pytest.mark.slow
def test_memory_holds_one_frame(package: Path, tmp_path: Path) -> None:
    """Peak memory of a process does not grow with the length of the video: 10 against 200 frames of 1 MB each."""
    peaks = []
    for count in (10, 200):
        film = write_film(tmp_path / f"{count}.mp4", pictures(10, 480, 640) * (count // 10))
        program = (
            "import resource, sys; from m3vit.cli import main; code = main(sys.argv[1:])\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
        )
        words = ["predict", package, film, "--task", "depth", "--resize", "--out", tmp_path / "out"]
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, "-c", program, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        peaks.append(int(done.stdout.splitlines()[-1]))
    assert peaks[1] < peaks[0] + 40_000, f"KiB: {peaks}"  # the encoder looks ahead; 190 frames are 175,000
