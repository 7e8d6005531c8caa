"""What is read is what a person sees, whatever the mode, the depth and the way it is given."""

import io
import struct
import zlib

import numpy as np
import pytest
from dynamic_dino.data import file_kinds
from dynamic_dino.data.image_files import FORMATS, find_images
from dynamic_dino.data.images import as_array, image_size, open_bytes
from dynamic_dino.data.jpeg import pixels_of_jpeg
from dynamic_dino.data.pixels import pixels_of_image
from helpers.seeds import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

CHANNELS = {"1": 1, "L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "I;16": 1, "I;16B": 1}
seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def values_of(mode, size, seed):
    """Content of a mode, as its array; alpha is 0 and 255 often."""
    rng = np.random.default_rng(seed)
    shape = size if CHANNELS[mode] == 1 else (*size, CHANNELS[mode])
    if mode == "1":
        return rng.random(shape) < 0.5
    top, dtype = (65536, np.uint16) if mode.startswith("I") else (256, np.uint8)
    values = rng.integers(0, top, shape).astype(dtype)
    if mode.endswith("A"):
        values[..., -1] = rng.choice([0, 0, 128, 255, 255], size)
    return values


def on_white(values):
    """float [H, W, 3]: the definition, of gray, gray and alpha, RGB, or RGBA in 8 bits."""
    values = values.reshape(*values.shape[:2], -1).astype(float)
    colour, alpha = values, np.full((*values.shape[:2], 1), 255.0)
    if values.shape[2] in (2, 4):
        colour, alpha = values[..., :-1], values[..., -1:]
    return np.broadcast_to((colour * alpha + 255 * (255 - alpha)) / 255, (*values.shape[:2], 3))


def reopened(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return Image.open(buffer)


def png(values, colour_type, key=None):
    """A PNG file of 16 bits, which Pillow doesn't write in colour."""

    def chunk(name, content):
        return (
            struct.pack(">I", len(content))
            + (body := name + content)
            + struct.pack(">I", zlib.crc32(body))
        )

    height, width = values.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    hidden = b"" if key is None else chunk(b"tRNS", np.asarray(key).astype(">u2").tobytes())
    body = chunk(b"IHDR", head) + hidden + chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


@settings(max_examples=examples(60), deadline=None)
@given(mode=st.sampled_from(sorted(CHANNELS)), size=sizes, seed=seeds)
def test_a_file_a_pil_image_and_an_array_of_one_content_are_one(tmp_path_factory, mode, size, seed):
    values = values_of(mode, size, seed)
    expected = values >> 8 if mode.startswith("I") else values * 255 if mode == "1" else values
    image = Image.fromarray(values)
    if mode == "I;16B":
        image = Image.frombytes(mode, image.size, values.astype(">u2").tobytes())
    assert image.mode == mode
    seen = as_array(image)
    assert seen.dtype == np.uint8 and seen.shape == (*size, 3) and seen.flags.writeable
    assert np.abs(seen - on_white(expected)).max() <= 1, "what alpha composites is rounded"
    path = tmp_path_factory.getbasetemp() / "content"
    for kind in ("TIFF", "PNG") if mode != "I;16B" else ("TIFF",):
        image.save(path, kind)
        assert np.array_equal(as_array(path), seen), f"the file, {kind}"
    assert np.array_equal(as_array(np.asarray(image)), seen), "the array, of any byte order"
    if values.ndim == 2:
        assert np.array_equal(as_array(values[..., None]), seen)
    if values.dtype == np.uint16:
        assert np.array_equal(as_array(Image.fromarray(values.astype(np.int32))), seen), "mode I"


@settings(max_examples=examples(40), deadline=None)
@given(
    mode=st.sampled_from(["LA", "La", "PA", "RGBA", "RGBa", "P", "L", "RGB", "1", "I;16"]),
    size=sizes,
    seed=seeds,
)
def test_what_nobody_sees_is_not_read(mode, size, seed):
    """Two contents that differ only where they are transparent, by alpha, a palette or a key."""
    if mode[-1] in "Aa":
        values = values_of("RGBA" if mode != "LA" else "LA", size, seed)
        other = values_of("RGBA" if mode != "LA" else "LA", size, seed + 1)
        hidden = values[..., -1] == 0
        other[~hidden], other[..., -1] = values[~hidden], values[..., -1]
        first, second = (Image.fromarray(v) for v in (values, other))
        if mode == "PA":
            first, second = first.convert("LA").convert("PA"), second.convert("LA").convert("PA")
        elif mode == "La":
            first, second = first.convert("LA").convert("La"), second.convert("LA").convert("La")
        elif mode == "RGBa":
            first, second = first.convert("RGBa"), second.convert("RGBa")
        pair = as_array(first), as_array(second)
    else:
        image = Image.fromarray(values_of(mode if mode != "P" else "L", size, seed))
        if mode == "P":
            image = image.convert("RGB").quantize(8)
        key = image.getpixel((0, 0))
        hidden = np.asarray(image) == (np.asarray(key) if mode != "1" else key > 0)
        hidden = hidden if hidden.ndim == 2 else hidden.all(axis=-1)
        saved = reopened(image, "PNG", transparency=key)
        pair = as_array(saved), as_array(image)
        pair[1][hidden] = 255
        loaded = image.copy()
        loaded.info["transparency"] = key
        assert np.array_equal(as_array(loaded), pair[0])
    assert np.array_equal(*pair)
    assert (pair[0][hidden] == 255).all()


@settings(max_examples=examples(20), deadline=None)
@given(size=sizes, seed=seeds, colour_type=st.sampled_from([0, 2, 4, 6]), keyed=st.booleans())
def test_files_and_arrays_of_16_bits_give_their_upper_8(
    tmp_path_factory, size, seed, colour_type, keyed
):
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    values = np.random.default_rng(seed).integers(0, 65536, (*size, channels)).astype(np.uint16)
    key = values[0, 0] if keyed and channels % 2 else None
    path = tmp_path_factory.getbasetemp() / "deep.png"
    path.write_bytes(png(values, colour_type, key))
    seen, expected = as_array(path), as_array(values)
    if key is not None:
        expected = expected.copy()
        depth = 0 if colour_type == 0 else 8  # in colour, Pillow has thrown the rest away
        expected[(values >> depth == key >> depth).all(axis=-1)] = 255
    assert np.array_equal(seen, expected)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_other_colour_spaces_are_read_as_the_colours_that_they_mean(mode):
    flags = [(200, 30, 40), (20, 160, 60), (30, 60, 190), (250, 250, 250), (10, 10, 10)]
    rgb = Image.fromarray(np.array([flags], dtype=np.uint8))
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.applyTransform(rgb, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    else:
        image = rgb.convert(mode)
    seen = as_array(image).astype(int)
    assert np.abs(seen - flags).max() <= 10, "a rounding in 8 bits"
    if mode in ("CMYK", "YCbCr", "LAB"):
        assert np.array_equal(as_array(reopened(image, "TIFF")), seen)


@settings(max_examples=examples(60), deadline=None)
@given(
    mode=st.sampled_from(["RGB", "RGB", "L", "CMYK"]),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    seed=seeds,
    options=st.fixed_dictionaries(
        {"quality": st.integers(5, 100)},
        optional={
            "progressive": st.just(True),
            "subsampling": st.integers(0, 2),
            "restart_marker_rows": st.just(1),
        },
    ),
    damage=st.sampled_from([None, "cut", "changed"]),
)
def test_a_jpeg_file_is_what_pillow_decodes(mode, size, seed, options, damage):
    """To the bit, and with its errors, although it is decoded by torchvision."""
    rng = np.random.default_rng(seed)
    smooth = rng.integers(0, 256, (3, 4, 4 if mode == "CMYK" else 3), dtype=np.uint8)
    image = Image.fromarray(smooth, "CMYK" if mode == "CMYK" else None).resize(size).convert(mode)
    buffer = io.BytesIO()
    keep_rgb = mode == "RGB" and "subsampling" not in options and bool(rng.integers(2))
    image.save(buffer, "JPEG", keep_rgb=keep_rgb, **options)
    content = bytearray(buffer.getvalue())
    if damage == "cut":
        del content[int(rng.integers(4, len(content))) :]
    elif damage == "changed":
        content[int(rng.integers(2, len(content)))] = int(rng.integers(256))

    def read(decode):
        try:
            return decode(open_bytes(bytes(content), "it"))
        except (ValueError, OSError, SyntaxError) as error:
            return str(error).partition("(")[2].partition(")")[0] or str(error)

    seen, expected = read(as_array), read(pixels_of_image)
    assert type(seen) is type(expected)
    if isinstance(seen, np.ndarray):
        assert np.array_equal(seen, expected) and seen.flags.c_contiguous and seen.flags.writeable
        if damage is None:
            opened = open_bytes(bytes(content), "it")
            assert (pixels_of_jpeg(opened) is None) == (mode == "CMYK")
            opened.load()
            assert pixels_of_jpeg(opened) is None and np.array_equal(as_array(opened), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_turn_of_exif(tmp_path, rng, kind):
    pixels = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        pixels.save(tmp_path / "turned", kind, exif=exif)
        shown = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "turned")).convert("RGB"))
        assert np.array_equal(as_array(tmp_path / "turned"), shown), (kind, turn)
        assert np.array_equal(as_array(Image.open(tmp_path / "turned")), shown)
        assert (
            image_size(tmp_path / "turned")
            == shown.shape[1::-1]
            == (9, 6)[:: 1 if turn < 5 else -1]
        )


@pytest.mark.parametrize(
    "image, message",
    [
        (Image.new("F", (2, 2)), "mode F"),
        (Image.fromarray(np.array([[70000, 0]], np.int32)), "mode I holds numbers from 0 to 70000"),
        (Image.fromarray(np.array([[-1, 0]], np.int32)), "from -1 to 0"),
        (np.zeros((4, 4, 3), np.float32), r"not float32 \[4, 4, 3\]: scale"),
        (np.zeros((4, 4), np.int64), r"not int64 \[4, 4\]"),
        (np.zeros((3, 40, 50), np.uint8), r"\[height, width, 3\].*\[3, 40, 50\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"\[2, 4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
        ([1], "not list"),
    ],
)
def test_what_has_no_agreed_colours_is_refused_by_name(image, message):
    with pytest.raises(ValueError, match=message):
        as_array(image)


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    """A small file of each format."""
    files = {}
    for kind in FORMATS:
        Image.effect_noise((24, 16), 60).convert("RGB").save(file := io.BytesIO(), kind)
        files[kind] = file.getvalue()
    return files


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of odd metadata
@settings(max_examples=examples(100), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_damaged_file_of_any_format_is_read_or_refused_by_name(pictures, data):
    kind = data.draw(st.sampled_from([*pictures]))
    content = bytearray(pictures[kind])
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    try:
        image = open_bytes(bytes(content[:cut]), "of the camera")
        if image.width * image.height < 10**6:
            as_array(image)
    except ValueError as error:
        assert "image of the camera" in str(error) and "object at" not in str(error)


def test_a_file_that_is_no_picture_is_called_what_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(file_kinds, "FORMATS", ("JPEG",))  # as without pillow-heif
    contents = {
        "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0",
        "video": b"\0\0\0\x18ftypisom\0\0\0\0",
        "web page": b"\n<!DOCTYPE html><html>",
        "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid",
        "JSON": b'{"error": 404}',
        "empty": b"",
        "macOS": b"\0\5\x16\7" + bytes(60),
        "archive": b"PK\3\4",
    }
    for words, content in contents.items():
        (tmp_path / "photo.jpg").write_bytes(content)
        kind = file_kinds.what_it_is(io.BytesIO(content))
        assert words in " ".join(kind), (words, kind)
        with pytest.raises(ValueError, match="photo.jpg can't be read"):
            as_array(tmp_path / "photo.jpg")
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.jpg", "PCX")
    with pytest.raises(ValueError, match="it is PCX, a format that isn't read here: convert"):
        as_array(tmp_path / "photo.jpg")
    with pytest.raises(FileNotFoundError, match="https://a.org/b.jpg is an address.*download"):
        as_array("https://a.org/b.jpg")


def test_what_is_not_read_is_not_opened(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.jpg", "EPS")
    opened = []
    begins = Image.OPEN["EPS"][1]
    monkeypatch.setitem(Image.OPEN, "EPS", (lambda *file: opened.append(file), begins))
    with pytest.raises(ValueError, match="it is EPS, a format that isn't read here: convert"):
        as_array(tmp_path / "photo.jpg")
    assert not opened  # it would start Ghostscript


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    def part(kind: bytes, content: bytes) -> bytes:
        whole = kind + content
        return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))

    for width, height in ((13_000, 13_000), (60_000, 60_000)):  # the second is too much for Pillow
        head = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        content = b"\x89PNG\r\n\x1a\n" + head + part(b"IDAT", zlib.compress(bytes(9)))
        (tmp_path / "bomb.png").write_bytes(content)
        for read in (image_size, as_array):
            with pytest.raises(ValueError, match=r"bomb.png has .*128 million.*_MAX_PIXELS"):
                read(tmp_path / "bomb.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "small.png")
    monkeypatch.setenv("DYNAMIC_DINO_MAX_PIXELS", "0.001")
    with pytest.raises(ValueError, match=r"small.png has 40 x 30 pixels, more than 0.001 million"):
        as_array(tmp_path / "small.png")
    monkeypatch.setenv("DYNAMIC_DINO_MAX_PIXELS", "0.0012")
    assert as_array(tmp_path / "small.png").shape == (30, 40, 3)
    for wrong in ("many", "-1", "0", ""):
        monkeypatch.setenv("DYNAMIC_DINO_MAX_PIXELS", wrong)
        with pytest.raises(ValueError, match=f"DYNAMIC_DINO_MAX_PIXELS={wrong}: it needs a number"):
            as_array(tmp_path / "small.png")


def test_photos_of_phones(tmp_path):
    pytest.importorskip("pillow_heif", reason="the extra heic")
    exif = Image.Exif()
    exif[0x0112] = 6  # a HEIC file says its turn elsewhere, and this is not to be read
    Image.new("RGB", (64, 32), (200, 40, 60)).save(tmp_path / "a.heic", exif=exif)
    assert np.abs(as_array(tmp_path / "a.heic").astype(int) - (200, 40, 60)).max() < 10
    assert as_array(tmp_path / "a.heic").shape == (32, 64, 3)
    assert image_size(tmp_path / "a.heic") == (64, 32)
    assert [path.name for path in find_images([tmp_path])] == ["a.heic"]
