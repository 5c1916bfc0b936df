"""Chats with images and videos: their tokens, positions and pixels, and the ranks that decode them.

The reference is the model's processor, called with the whole chat, and the model's own positions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from helpers.pictures import QWEN3_VL, asked, picture, tiny_processor, write_chats, write_video
from titan_ulysses.config.schema import Config
from titan_ulysses.data import cache, decoding
from titan_ulysses.data.corpus import Corpus
from titan_ulysses.data.decoding import open_decoder
from titan_ulysses.data.encoding import Encoder
from titan_ulysses.data.loader import Batch, Loader
from titan_ulysses.data.pipeline import open_sequences
from titan_ulysses.data.processor import VisionProcessor, open_vision
from titan_ulysses.data.records import BadRow, read_record

pytest.importorskip("PIL")
pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with chats of images, one with a video among them, and the processor."""
    folder = tmp_path_factory.mktemp("vision")
    path = write_chats(folder, chats=8)
    image = {"type": "image", "path": "00-0.png"}
    rows = [asked("look ", image, image, " they are the same", answer="aye")]
    try:
        write_video(folder / "v.mp4", frames=25)
        video = {"type": "video", "video": "v.mp4"}
        rows += [asked("see ", video, " and ", image, "?", answer="both")]
    except ImportError:
        pass
    with open(path, "a") as file:
        file.writelines(json.dumps({"messages": row}) + "\n" for row in rows)
    tiny_processor().save_pretrained(folder / "processor")
    return folder


def configured(folder: Path, **settings: Any) -> Config:
    """Return the config of a run on the chats of `folder`."""
    data = {"source": "chat", "path": str(folder / "chats.jsonl"), "packing": "best_fit"}
    model = {"config": QWEN3_VL, "tokenizer": str(folder / "processor"), "vision": "train"}
    table = {"model": model, "data": data, "training": {"seq_len": 128}}
    for section, values in settings.items():
        table[section] = {**table.get(section, {}), **values}
    return Config.model_validate(table)


def vision_of(config: Config) -> VisionProcessor:
    vision = open_vision(config, AutoConfig.for_model(**QWEN3_VL))
    assert vision is not None
    return vision


def plain_inputs(vision: VisionProcessor, messages: list[dict], folder: Path) -> dict[str, Any]:
    """Return what the processor makes of a chat, with the decoder that this project takes."""
    from transformers.video_utils import load_video

    videos, metadata = [], []
    for item in (x for m in messages if isinstance(m["content"], list) for x in m["content"]):
        for key in ("image", "path"):
            if item["type"] == "image" and key in item:
                item[key] = str(folder / item[key])
        if item["type"] == "video":
            sample = vision.processor.video_processor.sample_frames
            frames, about = load_video(str(folder / item["video"]), sample_indices_fn=sample)
            videos.append(frames)
            metadata.append(about)
    text = vision.processor.apply_chat_template(messages)
    images, _, _, _ = vision.processor._multimodal_inputs_from_conversations([messages], {})
    options = {"do_sample_frames": False, "video_metadata": metadata}
    return vision.processor(
        text=[text],
        images=images if images[0] else None,
        videos=videos or None,
        return_tensors="pt",
        **({"videos_kwargs": options} if videos else {}),
    )


def check_corpus(corpus: Corpus, vision: VisionProcessor, material: Path) -> None:
    """Compare each document with what the processor and the model make of its chat."""
    from titan_ulysses.model.hf import build_on_meta

    model = build_on_meta(vision.config, torch.float32)
    lines = (material / "chats.jsonl").read_text().splitlines()
    assert len(corpus) == len(lines)
    for number, line in enumerate(lines):
        plain = plain_inputs(vision, json.loads(line)["messages"], material)
        assert corpus[number].tolist() == plain["input_ids"][0].tolist(), number
        begin, end = int(corpus.begins[number]), int(corpus.ends[number])
        wanted, _ = model.model.get_rope_index(
            plain["input_ids"],
            plain["mm_token_type_ids"],
            plain.get("image_grid_thw"),
            plain.get("video_grid_thw"),
        )
        positions = corpus.visuals.positions_of(begin, end)
        assert positions.tolist() == wanted[:, 0].tolist(), number
        found = corpus.visuals.between(begin, end)
        for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            pixels = [vision.pixels(media, one)[key] for one, media in found if one.kind == kind]
            assert bool(pixels) == (key in plain), number
            assert not pixels or torch.equal(torch.cat(pixels), plain[key]), number
        # The answer and the end of its turn are trained on, and no placeholder is.
        trained = corpus[number][corpus.trained[begin:end]].tolist()
        answer = json.loads(line)["messages"][-1]["content"]
        assert trained == [*answer.encode(), 258], number


def test_tokens_positions_and_pixels_are_those_of_a_plain_call(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(material)
    vision = vision_of(config)
    tokenizer = vision.processor.tokenizer
    tokenizer.chat_template = vision.processor.chat_template
    encoder = Encoder(tokenizer, "assistant", vision)
    corpus, _ = cache.read_corpus(config.data, encoder)
    check_corpus(corpus, vision, material)
    monkeypatch.setattr(cache, "SMALL_CHARACTERS", 10)
    monkeypatch.setattr(cache, "usable_cores", lambda: 1)
    kept, _ = cache.read_corpus(config.data, encoder, cache_folder=str(tmp_path))
    check_corpus(kept, vision, material)
    sizes = [file.stat().st_size for file in tmp_path.rglob("*.bin")]
    assert sum(sizes) < 40_000  # tokens and references; the pixels are several times as many
    # All of a chat is trained on, but no placeholder.
    everything = Encoder(tokenizer, "all", vision)
    first, *_ = cache.open_rows(config.data)
    read = everything(first)
    assert not isinstance(read, BadRow) and read.trained is not None
    assert (read.trained == (read.ids != 261)).all()


def loaders_of(config: Config, ranks: int, batch: int) -> list[Loader]:
    vision = vision_of(config)
    tokenizer = vision.processor.tokenizer
    tokenizer.chat_template = vision.processor.chat_template
    training, _ = open_sequences(config, tokenizer, vision)
    return [
        Loader(
            training,
            batch_size=batch,
            sp_rank=rank,
            sp_degree=ranks,
            decoder=open_decoder(vision, [training]),
        )
        for rank in range(ranks)
    ]


def test_each_image_is_decoded_once_by_the_rank_that_it_is_dealt_to(material: Path) -> None:
    """Three batches of two ranks, against a loader of one."""
    (alone,), sharing = (loaders_of(configured(material), ranks, 2) for ranks in (1, 2))
    for _ in range(3):
        whole = alone.next_batch()
        parts = [loader.next_batch() for loader in sharing]
        assert torch.equal(torch.cat([x.input_ids for x in parts], dim=1), whole.input_ids)
        assert torch.equal(torch.cat([x.position_ids for x in parts], -1), whole.position_ids)
        assert whole.position_ids.ndim == 3
        check_own(whole, parts)
    names = [loader.decoder.decoded for loader in (alone, *sharing)]
    assert sorted(names[1] + names[2]) == sorted(names[0]) and min(map(len, names)) > 0


@pytest.mark.slow  # decoding in a thread gives the same pixels: the two tests above
def test_many_images_are_decoded_in_worker_processes(
    material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (threaded,) = loaders_of(configured(material), 1, 2)
    monkeypatch.setattr(decoding, "FEW", 0)
    monkeypatch.setattr(decoding, "usable_cores", lambda: 1)
    (loader,) = loaders_of(configured(material), 1, 2)
    wanted, found = threaded.next_batch(), loader.next_batch()
    loader.decoder.close()
    for one, other in zip(found.pixels, wanted.pixels, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one | other)


def check_own(whole: Batch, parts: list[Batch]) -> None:
    """Each rank has the pixels of its own images, which together are those of the whole batch."""
    visuals = whole.visuals
    assert visuals is not None and len(whole.pixels) == len(visuals.items)
    for rank, part in enumerate(parts):
        assert part.visuals == visuals
        for index, pixels in zip(visuals.own(rank, len(parts)), part.pixels, strict=True):
            assert pixels.keys() == whole.pixels[index].keys()
            for name, tensor in pixels.items():
                assert torch.equal(tensor, whole.pixels[index][name])
        for item in visuals.items:  # every placeholder stands where it is said to
            row = whole.input_ids[item.row]
            token = 261 if item.kind == "image" else 262
            assert all((row[a:b] == token).all() for a, b in item.spans)


def test_a_run_resumes_with_the_same_images(material: Path) -> None:
    (first,) = loaders_of(configured(material), 1, 1)
    first.next_batch()
    state = first.state_dict()
    wanted = first.next_batch()
    (second,) = loaders_of(configured(material), 1, 1)
    second.load_state_dict(state)
    found = second.next_batch()
    assert torch.equal(found.input_ids, wanted.input_ids) and found.visuals == wanted.visuals
    for one, other in zip(found.pixels, wanted.pixels, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_images_of_columns_and_of_datasets(tmp_path: Path) -> None:
    """In parquet, and in a saved data set with its own kind of image, which stays undecoded."""
    import io

    import datasets

    image, buffer = picture(3, 24, 16), io.BytesIO()
    image.save(buffer, "PNG")
    rows = [
        {
            "messages": asked("see ", {"type": "image"}, {"type": "image"}, answer=answer),
            "images": [{"bytes": buffer.getvalue(), "path": None}] * 2,
        }
        for answer in ("yes", "no")
    ]
    for row in rows:
        row["messages"][1]["content"] = [{"type": "text", "text": row["messages"][1]["content"]}]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    kinds = datasets.Features(table.features | {"images": datasets.List(datasets.Image())})
    table.cast(kinds).save_to_disk(tmp_path / "saved")
    found = []
    for name in ("rows.parquet", "saved"):
        config = configured(tmp_path, data={"path": str(tmp_path / name)})
        vision = VisionProcessor(tiny_processor(), AutoConfig.for_model(**QWEN3_VL))
        vision.processor.tokenizer.chat_template = vision.processor.chat_template
        corpus, _ = cache.read_corpus(
            config.data, Encoder(vision.processor.tokenizer, "assistant", vision)
        )
        visuals = corpus.visuals.between(0, int(corpus.ends[-1]))
        assert [media.data for _, media in visuals] == [buffer.getvalue()] * 4
        found.append([one for one, _ in visuals])
    assert found[0] == found[1]
    unused = encoded_chat(asked("see ", {"type": "image"}), {"images": rows[0]["images"]})
    assert isinstance(unused, BadRow)
    assert '"images" has 2, and the messages have a place' in unused.reason


def processors() -> dict[str, Any]:
    """Return processors of other families: one that reads values, rows with ends, and tiles."""
    from transformers import (
        CLIPImageProcessor,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
        LlavaProcessor,
        PixtralImageProcessor,
        PixtralProcessor,
    )

    from titan_ulysses.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("bytes")
    special = ["<image>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    square = {"height": 16, "width": 16}
    clip = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=square)
    tiles = LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size=square, image_grid_pinpoints=[[16, 32], [32, 32]]
    )
    rows = PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 4, "width": 4})
    options = {"patch_size": 4, "vision_feature_select_strategy": "full"}
    return {
        "<image>": LlavaProcessor(clip, tokenizer, **options),
        "<image> ": LlavaNextProcessor(tiles, tokenizer, **options),
        "[IMG]": PixtralProcessor(rows, tokenizer, patch_size=4),
    }


def test_placeholders_of_other_families(tmp_path: Path) -> None:
    """They are those of a call with pixels, and the positions count from 0."""
    from types import SimpleNamespace

    from titan_ulysses.data.media import Media

    images = [picture(0, 24, 16), picture(1, 9, 30)]
    media = []
    for number, image in enumerate(images):
        path = tmp_path / f"{number}.png"
        image.save(path)
        media.append(Media("image", path.name, path=str(path)))
    for token, processor in processors().items():
        name = type(processor).__name__
        text = f"a{token}b{token}c"
        ids = processor.tokenizer.convert_tokens_to_ids(token.strip())
        vision = VisionProcessor(processor, SimpleNamespace(image_token_id=ids, model_type=name))
        vision.__dict__["_positions"] = None
        read, offsets = vision.read(text, tuple(media))
        plain = processor(text=[text], images=[images], return_tensors="pt")
        assert read.ids.tolist() == plain["input_ids"][0].tolist(), name
        assert sum(one.features for one in read.visuals) == int((read.ids == ids).sum()) > 8, name
        assert len(read.visuals) == 2 and read.positions is None
        pixels = [vision.pixels(*pair) for pair in zip(media, read.visuals, strict=True)]
        assert all("pixel_values" in one for one in pixels), name
        # The letters stand for themselves, and every placeholder for its own.
        borders = [text[a:b] for a, b in offsets.tolist()]
        assert borders[0] == "a" and borders[-1] == "c" and borders[1] == token.strip()


# --- what cannot be used --------------------------------------------------------------------------


def encoded(image: Any, **limits: Any) -> Any:
    """Return what becomes of a chat with one image or video."""
    return encoded_chat(asked("see ", image), **limits)


def encoded_chat(messages: list[dict], columns: dict | None = None, **limits: Any) -> Any:
    from titan_ulysses.config.schema import SourceSettings

    vision = VisionProcessor(tiny_processor(), AutoConfig.for_model(**QWEN3_VL), **limits)
    tokenizer = vision.processor.tokenizer
    tokenizer.chat_template = vision.processor.chat_template
    row = read_record(
        {"messages": messages, **(columns or {})}, SourceSettings(source="chat"), "chats.jsonl:7"
    )
    return Encoder(tokenizer, "assistant", vision)(row)


def files(folder: Path) -> dict[str, bytes]:
    """Return images and what is none, damaged and absurd, by name."""
    import io
    import zlib

    from PIL import Image

    def saved(image: Any, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        )

    def png(width: int, height: int, rows: bytes, *more: bytes, mode: bytes = b"\x08\x02") -> bytes:
        size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        parts = [chunk(b"IHDR", size + mode + b"\0\0\0"), *more]
        parts += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(parts)

    image = picture(0, 24, 16)
    jpeg, whole, webp = saved(image, "JPEG"), saved(image, "PNG"), saved(image, "WEBP")
    bmp, tiff, gif = saved(image, "BMP"), saved(image, "TIFF"), saved(image, "GIF")
    frames = [picture(i, 24, 16) for i in range(3)]
    moving = {"save_all": True, "append_images": frames}
    turned = Image.Exif()
    turned[0x0112] = 6
    text = chunk(b"zTXt", b"x\0\0" + zlib.compress(b"a" * 2**27))
    deep = Image.fromarray((torch.arange(384).view(16, 24).numpy() * 170).astype("uint16"))
    return {
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": whole[: len(whole) // 2],
        "cut.webp": webp[: len(webp) // 2],
        "cut.bmp": bmp[: len(bmp) // 2],
        "cut.tif": tiff[: len(tiff) // 2],
        "cut.gif": gif[: len(gif) // 2],
        "header.jpg": jpeg[:20],
        "header.png": whole[:20],
        "head.png": whole[:33],
        "last.png": whole[:-1],
        "empty.png": b"",
        "zeros.png": bytes(1000),
        "text.png": b"not an image",
        "page.png": b"<!DOCTYPE html><html>404</html>",
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "pages.pdf": b"%PDF-1.7 " + bytes(100),
        "pointer.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "phone.heic": b"\0\0\0\x18ftypheic" + bytes(100),
        "crc.png": whole[:60] + bytes([whole[60] ^ 255]) + whole[61:],
        "none.png": png(0, 0, b""),
        "huge.png": png(30_000, 30_000, bytes(100)),
        "wide.png": png(2**31 - 1, 1, bytes(100)),
        "bomb.png": png(4, 4, bytes(52), text),
        "short.png": png(64, 64, bytes(100)),
        "moving.gif": saved(frames[0], "GIF", **moving),
        "moving.png": saved(frames[0], "PNG", **moving),
        "moving.webp": saved(frames[0], "WEBP", **moving),
        "16bit.png": saved(deep, "PNG"),
        "float.tif": saved(image.convert("F"), "TIFF"),
        "strip.png": saved(picture(0, 1000, 1), "PNG"),
        "tower.png": saved(picture(0, 2, 900), "PNG"),
        # These can be used.
        "1x1.png": saved(picture(0, 1, 1), "PNG"),
        "cmyk.jpg": saved(image.convert("CMYK"), "JPEG"),
        "grey.png": saved(image.convert("L"), "PNG"),
        "bits.png": saved(image.convert("1"), "PNG"),
        "palette.png": saved(image.convert("P"), "PNG"),
        "clear.png": saved(image.convert("RGBA"), "PNG"),
        "jpeg.png": jpeg,
        "turned.jpg": saved(image, "JPEG", exif=turned),
        "more.jpg": jpeg + bytes(100),
        "big.png": saved(picture(0, 900, 700), "PNG"),
    }


DAMAGED = "it is damaged or cut short ("
UNKNOWN = "it is no image that pillow can read"
RANGE = "which would lose their range in 8 bits: convert it to RGB"
ASPECT = "the processor refuses it (absolute aspect ratio must be smaller than 200, got "
REFUSED = {
    "cut.jpg": DAMAGED,
    "cut.png": DAMAGED,
    "cut.webp": DAMAGED,
    "cut.bmp": DAMAGED,
    "cut.tif": DAMAGED,
    "cut.gif": UNKNOWN,
    "header.jpg": UNKNOWN,
    "header.png": DAMAGED,
    "head.png": UNKNOWN,
    "empty.png": "it is empty",
    "zeros.png": UNKNOWN,
    "text.png": UNKNOWN,
    "page.png": "it is a web page",
    "drawing.svg": "it is an SVG drawing: give it as PNG",
    "pages.pdf": "it is a PDF: give each page as an image",
    "pointer.png": "it is a pointer of Git LFS: run `git lfs pull`",
    "phone.heic": "it is HEIC, which pillow cannot read alone: give it as JPEG",
    "crc.png": DAMAGED,
    "none.png": UNKNOWN,
    "huge.png": "it has more than 178,956,970 pixels: scale it down",
    "wide.png": "it has more than 178,956,970 pixels: scale it down",
    "bomb.png": "it is a decompression bomb (Decompressed data too large",
    "short.png": DAMAGED,
    "moving.gif": "it is an animation of 3 frames: give one frame, or a video",
    "moving.png": "it is an animation of 4 frames: give one frame, or a video",
    "moving.webp": "it is an animation of 3 frames: give one frame, or a video",
    "16bit.png": f"its pixels are of the kind I;16, {RANGE}",
    "float.tif": f"its pixels are of the kind F, {RANGE}",
    "strip.png": f"{ASPECT}1000.0)",
    "tower.png": f"{ASPECT}450.0)",
}
USED = ["1x1.png", "cmyk.jpg", "grey.png", "bits.png", "palette.png", "clear.png", "jpeg.png"]
USED += ["turned.jpg", "more.jpg", "big.png", "last.png"]


def test_damaged_and_absurd_images_have_a_sentence_each(tmp_path: Path) -> None:
    """They are read as with bad_lines = "skip", which decodes them while the data is prepared."""
    for name, content in files(tmp_path).items():
        (tmp_path / name).write_bytes(content)
        found = encoded({"type": "image", "image": str(tmp_path / name)}, decodes=True)
        if name in USED:
            assert not isinstance(found, BadRow), (name, found)
            assert found.visuals[0].features > 0
            continue
        assert isinstance(found, BadRow), name
        assert found.place == "chats.jsonl:7"
        assert found.reason.startswith(f'image 1 ("{tmp_path / name}"): '), found.reason
        assert REFUSED[name] in found.reason, (name, found.reason)
        assert "\n" not in found.reason and len(found.reason) < 500
    assert len(REFUSED) + len(USED) + len(SOURCES) >= 40


SOURCES = {
    "http://host/a.png": '"http://host/a.png" is a URL, and nothing is downloaded: give the path',
    "s3://bucket/a.png": '"s3://bucket/a.png" is a URL, and nothing is downloaded: give the path',
    "data:image/png;base64,A": "its base64 is damaged (",
    "data:image/png;base64,AAAA": UNKNOWN,
    "/nowhere/a.png": "No such file or directory",
    "/": "it is not a file",
    "a\0b": "embedded null",
}


def test_sources_that_cannot_be_read_are_refused_by_name() -> None:
    for source, why in SOURCES.items():
        for key in ("image", "url"):
            found = encoded({"type": "image", key: source})
            assert isinstance(found, BadRow) and why in found.reason, (source, found)
    for item, why in (
        ({"type": "image"}, 'the image of a message has no source, nor a column "images": give'),
        ({"type": "image", "path": "a", "url": "b"}, 'has "path" and "url": give one'),
        (
            {"type": "image", "path": "a", "max_pixels": 9},
            '"max_pixels", which is not read: set da',
        ),
        ({"type": "image", "image": 7}, "it is given as int: give a path, bytes or base64"),
        ({"type": "audio", "path": "a"}, "a message has audio, which is not read"),
        ({"type": "image_url", "image_url": {"url": "https://a/b"}}, "is a URL"),
        ("<|image_pad|>", "the placeholder <|image_pad|> 2 times, for 1 image(s)"),
    ):
        items = [item, {"type": "image", "image": "data:image/png;base64,AAAA"}]
        found = encoded_chat(asked(*items))
        assert isinstance(found, BadRow) and why in found.reason, (item, found)


def test_damaged_videos_and_pairs_with_images(tmp_path: Path) -> None:
    from titan_ulysses.config.schema import SourceSettings

    pytest.importorskip("av")
    whole = write_video(tmp_path / "v.mp4", frames=12).read_bytes()
    for content, why in (
        (b"", "it is empty"),
        # FFmpeg guesses what it is, and not always the same: damaged, or without pictures.
        (b"no video at all", "): it "),
        (whole[: len(whole) // 2], "): it "),
    ):
        (tmp_path / "v.mp4").write_bytes(content)
        found = encoded({"type": "video", "video": str(tmp_path / "v.mp4")})
        assert isinstance(found, BadRow) and why in found.reason, found
    question, answer = asked("see ", {"type": "image", "image": "a.png"})
    pair = {"prompt": [question], "chosen": [answer], "rejected": [answer]}
    judged = {"prompt": [question], "completion": [answer], "label": True}
    for source, record in (("preference", pair), ("unpaired", judged)):
        row = read_record(record, SourceSettings.model_construct(source=source), "pairs.jsonl:2")
        assert isinstance(row, BadRow) and 'only data.source = "chat" may have' in row.reason
