"""What decoding adds to the memory of a rank: 10 images against 1,000 with as many patches.

python scripts/bench/images.py --images 10 1000 --limit-mib 64

A sequence with `--patches` patches of 16 x 16 pixels is made of so many images, and the batches of
a rank are made as in a run, with the pixels of the next one decoded ahead. The peak of the rank's
anonymous memory is taken, from when a sequence is decoded until the next one is, less the memory
before and less the pixels of that next one. Processes that decode many images have their own. With
--limit-mib the exit code is 1 if that is more for any number of images.
"""

from __future__ import annotations

import json
import sys
import tempfile
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
from common import ALLOCATOR, child, parser_of, peak_memory

_PATCH, _MERGE = 16, 2


def processor_of(side: int) -> Any:
    """Return a processor of qwen3_vl with a token for each byte, for images of side x side."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    from titan_ulysses.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("bytes")
    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for x in m.content %}<|vision_start|><|image_pad|><|vision_end|>{% endfor %}"
        "{% endif %}{% endfor %}"
    )
    patches = {"patch_size": _PATCH, "merge_size": _MERGE}
    limits = {"shortest_edge": side * side, "longest_edge": side * side}
    images = Qwen2VLImageProcessor(**patches, size=limits)
    template = tokenizer.chat_template
    return Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=template)


def loader_of(folder: Path, images: int, side: int) -> Any:
    """Return the loader of a rank, whose sequences have so many images of side x side."""
    from PIL import Image
    from transformers import AutoConfig

    from titan_ulysses.config.schema import Config
    from titan_ulysses.data.decoding import open_decoder
    from titan_ulysses.data.loader import Loader
    from titan_ulysses.data.pipeline import open_sequences
    from titan_ulysses.data.processor import VisionProcessor

    draw = np.random.default_rng(0)
    for number in range(images):
        colours = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(colours).save(folder / f"{number}.jpg")
    items = [{"type": "image", "image": f"{number}.jpg"} for number in range(images)]
    chat = [{"role": "user", "content": items}, {"role": "assistant", "content": "yes"}]
    (folder / "chats.jsonl").write_text(2 * (json.dumps({"messages": chat}) + "\n"))
    tokens = images * ((side // _PATCH // _MERGE) ** 2 + 2) + 16
    data = {"source": "chat", "path": str(folder / "chats.jsonl"), "packing": "none"}
    config = Config.model_validate(
        {"model": {"path": "x"}, "data": data, "training": {"seq_len": tokens}}
    )
    model = AutoConfig.for_model("qwen3_vl", image_token_id=257, video_token_id=258)
    vision = VisionProcessor(processor_of(side), model)
    # Positions of the model take the memory of a model of 8B on meta, which a rank has anyway.
    vision.__dict__["_positions"] = None
    training, _ = open_sequences(config, vision.processor.tokenizer, vision)
    assert training is not None
    return Loader(training, batch_size=1, decoder=open_decoder(vision, [training]))


def wait_for_pixels(loader: Any) -> None:
    """Wait until all that is decoded ahead is there."""
    wait([future for opened in loader._ahead.values() for _, future in opened.pixels])


def measured(images: int, patches: int) -> dict[str, int]:
    side = round((patches / images) ** 0.5) * _PATCH
    with tempfile.TemporaryDirectory() as folder:
        loader = loader_of(Path(folder), images, side)
        loader.next_batch()  # what is imported and started once
        wait_for_pixels(loader)
        with peak_memory() as peaks:
            batch = loader.next_batch()
            wait_for_pixels(loader)
        pixels = sum(x.numel() * x.element_size() for one in batch.pixels for x in one.values())
        added = peaks["anonymous"] - peaks["before_anonymous"]
        loader.decoder.close()
    return {"images": images, "side": side, "pixels": pixels, "added": added}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--patches", type=int, default=16_000)
    parser.add_argument("--limit-mib", type=float)
    args = parser.parse_args()
    beyond = []
    for images in args.images:
        given, what = (images, args.patches), f"{images} images"
        found = child(measured, *given, minutes=10, env=ALLOCATOR, what=what)
        beyond.append((found["added"] - found["pixels"]) / 2**20)
        print(
            f"{images:6,} images of {found['side']} x {found['side']}: pixels "
            f"{found['pixels'] / 2**20:.1f} MiB; beyond them {beyond[-1]:.1f} MiB"
        )
    if args.limit_mib and max(beyond) > args.limit_mib:
        sys.exit(f"{max(beyond):.1f} MiB is more than --limit-mib {args.limit_mib:g}")


if __name__ == "__main__":
    main()
