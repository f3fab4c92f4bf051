"""Videos: counted by what decodes, frame i always the same picture, hostile files refused."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from videos import CONTAINERS, apart, digit_frames, encode, encode_gif, hollow_gif

from modeling import video
from modeling.errors import UserError
from modeling.tiles import frame_indices, split_image
from modeling.video import VideoError, frame_order, probe, read_frames

FRAMES = 40


@pytest.fixture(scope="module")
def digits() -> list[Image.Image]:
    return digit_frames(FRAMES)


@pytest.fixture(scope="module", params=list(CONTAINERS))
def file(request, digits) -> bytes:
    return encode(digits, request.param)


def decoded(monkeypatch) -> list[int]:
    """Grows by one with every frame that is decoded from now on."""
    seen, original = [], video._Track._decoded

    def counting(track, start):
        for item in original(track, start):
            seen.append(item[1])
            yield item

    monkeypatch.setattr(video._Track, "_decoded", counting)
    return seen


def test_every_frame_is_counted_and_shows_its_digit(file, digits):
    info = probe(file)
    assert (info.frames, info.first, info.width, info.height) == (FRAMES, 0, 64, 64)
    assert info.fps == pytest.approx(10, rel=0.01) and probe(file, verify=True) == info
    for shown, digit in zip(read_frames(file, range(FRAMES)), digits, strict=True):
        assert shown.mode == "RGB" and apart(shown, digit) < 6 < apart(digits[0], digits[1])


def test_a_frame_is_the_same_whichever_others_are_asked_for(file):
    together = read_frames(file, range(FRAMES))
    rng = np.random.default_rng(0)
    for wanted in [[i] for i in range(FRAMES)] + [rng.integers(0, FRAMES, 7).tolist() for _ in range(10)]:
        assert read_frames(file, wanted) == [together[i] for i in wanted]


@pytest.mark.parametrize("kind", ["mp4", "open gop", "webm", "vp8", "mkv", "ts", "flv", "asf"])
def test_only_what_is_needed_is_decoded(kind, digits, monkeypatch):
    data = encode(digits, kind)
    seen = decoded(monkeypatch)
    read_frames(data, [38])
    assert len(seen) <= 16, "one group of pictures and what the decoder holds back"


def test_gif_and_folder_show_the_very_pixels_and_a_codec_nearly(digits):
    gif = read_frames(encode_gif(digits), range(FRAMES), 32)
    folder = [split_image(digit, 1, 32)[0] for digit in digits]
    assert all(apart(*pair) == 0 for pair in zip(gif, folder, strict=True))
    for kind in ("mp4", "webm"):
        assert max(map(apart, read_frames(encode(digits, kind), range(FRAMES), 32), gif)) < 6


def test_frames_come_in_the_order_asked_for_and_as_tiles(digits):
    data = encode(digits)
    one, two, three = read_frames(data, [20, 3, 20])
    assert one == three and apart(one, digits[20]) < 6 and apart(two, digits[3]) < 6
    assert [tile.size for tile in read_frames(data, [20, 3], 28)] == [(28, 28)] * 2
    assert read_frames(data, [20], 28) == split_image(one, 1, 28)
    for make in (encode, encode_gif):
        with pytest.raises(VideoError, match="no frame 40"):
            read_frames(make(digits), [3, FRAMES])
    for nonsense in ([], [-1, 3]):
        with pytest.raises(ValueError, match="numbers of frames"):
            read_frames(data, nonsense)


@pytest.mark.parametrize(
    ("clip", "first", "frames"),
    [
        ((0, 4), 0, 40), ((1, 2), 10, 10), ((0.3, 0.6), 3, 3), ((1.05, 2), 10, 10), ((3.9, 9), 39, 1),
        ((2, 100), 20, 20), ((1.01, 1.02), 10, 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts", "gif"])
def test_a_clip_is_a_range_of_frames(digits, kind, clip, first, frames):
    data = encode_gif(digits) if kind == "gif" else encode(digits, kind)
    for verify in (False, True):
        info = probe(data, clip, verify)
        assert (info.first, info.frames) == (first, frames)
    assert apart(read_frames(data, [info.first])[0], digits[first]) < 6


@pytest.mark.parametrize("clip", [(4.0, 5), (50, 60), (2, 1), (1, 1), (-1, 2), (0, float("nan")), (0, float("inf"))])
def test_a_clip_outside_is_refused(digits, clip):
    for data in (encode(digits), encode_gif(digits)):
        with pytest.raises(VideoError, match="clip"):
            probe(data, clip)


def test_a_clip_is_verified_without_decoding_what_is_outside(digits, monkeypatch):
    data = encode(digits)
    seen = decoded(monkeypatch)
    assert probe(data, verify=False).frames == FRAMES and not seen
    assert probe(data, (2.5, 3), verify=True).frames == 5
    assert len(seen) < 12


def test_a_variable_frame_rate_is_clipped_by_time(digits):
    times = [*(i * 0.1 for i in range(20)), *(2 + i * 0.5 for i in range(20))]
    data = encode(digits, times=times)
    info = probe(data, verify=True)
    assert info.frames == FRAMES and info.fps == pytest.approx(39 / 11.5, rel=0.01)
    info = probe(data, (2, 4))
    assert (info.first, info.frames) == (20, 4)
    assert all(map(lambda *pair: apart(*pair) < 6, read_frames(data, range(FRAMES)), digits))


def test_a_picture_taken_upright_is_shown_upright():
    """As phones store it: frames that lie on their side, and by how much to turn them."""
    wide = Image.new("RGB", (64, 32))
    wide.paste((255, 255, 255), (0, 0, 32, 32))  # the left half
    (shown,) = read_frames(encode([wide], rotation=90), [0])  # counterclockwise: left goes down
    assert shown.size == (32, 64)
    assert shown.getpixel((16, 8))[0] < 40 and shown.getpixel((16, 56))[0] > 215


@pytest.mark.parametrize("kind", ["mkv", "webm", "ts", "flv", "asf", "avi", "gif"])
@pytest.mark.parametrize("share", [0.5, 0.75])
def test_a_file_that_was_cut_off_has_the_frames_before_that(digits, kind, share):
    data = encode_gif(digits) if kind == "gif" else encode(digits, kind)
    cut = data[: int(len(data) * share)]
    info = probe(cut, verify=True)
    assert 0 < info.frames < FRAMES, "whatever its headers say"
    shown = read_frames(cut, range(info.frames))
    assert sum(apart(*pair) < 6 for pair in zip(shown, digits)) >= info.frames - 1


def test_an_mp4_that_was_cut_off_is_no_video(digits):
    data = encode(digits)
    for share in (0.3, 0.9):
        with pytest.raises(VideoError, match=r"damaged|no video"):
            probe(data[: int(len(data) * share)])


def test_frames_that_are_not_shown_are_not_counted(digits):
    """VP8 has frames that only help to decode others, each a packet of its own."""
    data = bytearray(encode(digits, "vp8"))
    before = read_frames(bytes(data), range(FRAMES))
    with video._opened(bytes(data)) as track:
        packet = bytes(track.packets[5])
    place = data.find(packet)
    assert packet[0] & video.VP8_SHOWN and data.find(packet, place + 1) < 0
    data[place] &= ~video.VP8_SHOWN & 0xFF
    assert probe(bytes(data)).frames == probe(bytes(data), verify=True).frames == FRAMES - 1
    assert read_frames(bytes(data), range(FRAMES - 1)) == [*before[:5], *before[6:]]


def audio_only() -> bytes:
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=16000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        samples.rate = 16000
        file.mux(stream.encode(samples))
        file.mux(stream.encode(None))
    return out.getvalue()


def still() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64)).save(out, "JPEG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"), (bytes(5000), "damaged"), (b"not a video" * 500, "damaged"), (still(), "known format"),
        (audio_only(), "no video"), (b"GIF89a", "GIF|image|frame"), (b"RIFF" + bytes(4000), "damaged"),
    ],
    ids=["empty", "zeros", "text", "jpeg", "audio", "gif header", "riff"],
)  # fmt: skip
def test_what_is_no_video_is_refused(data, reason):
    for read in (probe, lambda data: probe(data, verify=True), lambda data: read_frames(data, [0])):
        with pytest.raises(VideoError, match=reason):
            read(data)


def test_a_cover_picture_is_no_video(digits):
    """An album cover is a video stream of one frame, of a kind that players do not show."""
    import av
    from av.stream import Disposition

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        audio = file.add_stream("aac", rate=16000, layout="mono")
        stream = file.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        stream.disposition = Disposition.attached_pic
        file.mux(stream.encode(av.VideoFrame.from_image(digits[0]).reformat(format="yuvj420p")))
        file.mux(stream.encode(None))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        samples.rate = 16000
        file.mux(audio.encode(samples))
        file.mux(audio.encode(None))
    with av.open(io.BytesIO(out.getvalue())) as file:
        assert file.streams.video
    with pytest.raises(VideoError, match="no video"):
        probe(out.getvalue())


@pytest.mark.parametrize("damage", range(20))
@pytest.mark.parametrize("kind", ["mp4", "webm", "ts", "avi", "gif"])
def test_damage_is_told_or_shown_and_never_anything_else(digits, kind, damage):
    data = bytearray(encode_gif(digits[:12]) if kind == "gif" else encode(digits[:12], kind))
    rng = np.random.default_rng(damage)
    for place in rng.integers(0, len(data), 12):
        data[place] ^= int(rng.integers(1, 256))
    try:
        info = probe(bytes(data), verify=True)
        assert len(read_frames(bytes(data), range(info.first, info.first + info.frames), 28)) == info.frames
    except VideoError as error:
        assert str(error)


def test_a_stream_that_begins_in_the_middle_is_passed_over(digits):
    """One damaged byte of MPEG-TS, the number of the last frame's stream: PyAV raises an IndexError."""
    data = bytearray(encode(digits, "ts"))
    frames = [place for place in range(0, len(data), 188) if data[place + 1 : place + 3] == b"\x41\0"]
    data[frames[-1] + 2] = 0xFF
    frames = probe(bytes(data), verify=True).frames
    assert FRAMES - 2 <= frames == len(read_frames(bytes(data), range(frames))) < FRAMES


@pytest.mark.parametrize("error", [IndexError, AssertionError, ValueError, ZeroDivisionError])
def test_whatever_pyav_says_of_a_contradiction_is_told_as_damage(digits, monkeypatch, error):
    def contradictory(_track, _start):
        raise error("somewhere inside")

    monkeypatch.setattr(video._Track, "_decoded", contradictory)
    with pytest.raises(VideoError, match=r"damaged.*somewhere inside"):
        probe(encode(digits), verify=True)


def test_a_gif_whose_frames_contradict_each_other_has_those_before(digits):
    """Grey at first, then a palette: Pillow gives a picture of indices without one."""
    data = hollow_gif(64, 3, local=b"\xff\0\0\0\xff\0")
    assert probe(data).frames == len(read_frames(data, [0])) == 1
    with pytest.raises(VideoError, match="no frame 1"):
        read_frames(data, [1])


@pytest.mark.parametrize("name", ["hls", "concat", "sdp", "dash", "image pattern"])
def test_a_playlist_opens_no_other_file(tmp_path, digits, name):
    target = tmp_path / "other.mp4"
    target.write_bytes(encode(digits[:3]))
    segment = tmp_path / "other.ts"
    segment.write_bytes(encode(digits[:3], "ts"))
    hostile = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{segment}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile '{target}'\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
        "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
        f'<Representation id="1"><BaseURL>file://{target}</BaseURL></Representation></AdaptationSet></Period></MPD>',
        "image pattern": str(target),
    }[name]
    with pytest.raises(VideoError, match="known format"):
        probe(hostile.encode())


def test_large_pictures_and_many_frames_are_refused(digits, monkeypatch):
    files = encode(digits), encode_gif(digits)
    monkeypatch.setattr(video, "MAX_FRAMES", FRAMES)
    assert [probe(data).frames for data in files] == [FRAMES] * 2
    monkeypatch.setattr(video, "MAX_FRAMES", FRAMES - 1)
    for data in files:
        with pytest.raises(VideoError, match="more than 39 frames") as caught:
            probe(data)
        assert caught.value.bomb
    monkeypatch.setattr(video, "MAX_FRAMES", FRAMES)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for data in files:
        with pytest.raises(VideoError) as caught:
            probe(data)
        assert caught.value.bomb


def test_a_missing_package_is_told(digits, monkeypatch):
    data = encode(digits[:3])
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(UserError, match="package av"):
        probe(data)


def test_frames_of_a_folder_are_ordered_by_their_numbers():
    names = ["b/f10.jpg", "b/f9.jpg", "b/f010.jpg", "a/f2_1.jpg", "a/f2.jpg", "7.jpg", "帧3.jpg", "帧12.jpg"]
    assert frame_order(names) == [
        "7.jpg", "a/f2.jpg", "a/f2_1.jpg", "b/f9.jpg", "b/f010.jpg", "b/f10.jpg", "帧3.jpg", "帧12.jpg"
    ]  # fmt: skip


def test_each_interval_gives_one_frame_and_every_frame_is_as_likely():
    rng = np.random.default_rng(0)
    drawn = [frame_indices(8, 50, rng) for _ in range(4000)]
    edges = np.linspace(0, 50, 9).astype(int)
    assert all((edges[:-1] <= row).all() and (row < edges[1:]).all() for row in np.array(drawn))
    counts, lengths = np.bincount(np.concatenate(drawn), minlength=50), np.diff(edges)
    expected = 4000 / np.repeat(lengths, lengths)
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
    assert frame_indices(8, 50, np.random.default_rng(1)) == frame_indices(8, 50, np.random.default_rng(1))


def test_a_short_video_repeats_its_last_frame():
    assert frame_indices(5, 3, np.random.default_rng(0)) == frame_indices(5, 3) == [0, 1, 2, 2, 2]


def test_random_frames_are_as_many_as_the_official_middle_ones():
    golden = json.loads((Path(__file__).parents[1] / "data" / "golden" / "frames.json").read_text())["middle"]
    rng = np.random.default_rng(0)
    for count, length, middle in golden[:100]:
        drawn = frame_indices(count, length, rng)
        assert len(drawn) == len(middle) and sorted(drawn) == drawn
        assert abs(np.array(drawn) - middle).max() <= max(1, length // min(count, length))
