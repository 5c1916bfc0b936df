"""A tiny vision-language model, its processor, and pictures for it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from titan_ulysses.data.tokenizer import load_tokenizer

SPECIAL = ["im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for item in message.content %}\
{% if item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif item.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\
{% else %}{{ item.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TEXT = {
    "vocab_size": 263,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
TOWER = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0],
}
QWEN3_VL = {
    "model_type": "qwen3_vl",
    "text_config": TEXT | {"model_type": "qwen3_vl_text"},
    "vision_config": TOWER | {"model_type": "qwen3_vl"},
    "image_token_id": 261,
    "video_token_id": 262,
    "vision_start_token_id": 259,
    "vision_end_token_id": 260,
}


def tiny_processor() -> Any:
    """Return a processor of qwen3_vl with one token a byte, and patches of 4 x 4 pixels."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokenizer = load_tokenizer("bytes")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{x}|>" for x in SPECIAL]})
    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    images = Qwen2VLImageProcessor(
        **patches, size={"shortest_edge": 8 * 8, "longest_edge": 64 * 64}
    )
    videos = Qwen3VLVideoProcessor(
        **patches,
        size={"shortest_edge": 8 * 8, "longest_edge": 4 * 32 * 32},
        cap_pixels_per_frame=False,
        min_frames=2,
    )
    return Qwen3VLProcessor(images, tokenizer, videos, chat_template=TEMPLATE)


def picture(seed: int, width: int, height: int) -> Any:
    """Return an image of random colours."""
    from PIL import Image

    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def write_video(path: Path, *, frames: int, width: int = 24, height: int = 16) -> Path:
    """Write a video of 10 frames a second, each of another grey."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            grey = np.full((height, width, 3), 8 * number % 256, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path


def asked(*items: Any, answer: str = "yes") -> list[dict[str, Any]]:
    """Return a chat: a question of texts and items, and its answer."""
    content = [{"type": "text", "text": x} if isinstance(x, str) else x for x in items]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def write_chats(folder: Path, *, chats: int, seed: int = 0) -> Path:
    """Write `chats` chats with 0 to 3 images each, in files, and those of 1 in bytes as base64."""
    import base64
    import io

    folder.mkdir(parents=True, exist_ok=True)
    draw, lines = random.Random(seed), []
    for number in range(chats):
        items: list[Any] = []
        for i in range(draw.randint(0, 3)):
            image = picture(draw.randrange(10**6), draw.randint(8, 40), draw.randint(8, 40))
            items += ["".join(draw.choices("abcdefgh ", k=draw.randint(1, 12)))]
            if draw.random() < 0.25:
                buffer = io.BytesIO()
                image.save(buffer, "PNG")
                text = base64.b64encode(buffer.getvalue()).decode()
                items += [{"type": "image", "base64": text}]
            else:
                name = f"{number:02d}-{i}.png"
                image.save(folder / name)
                items += [{"type": "image", "image": name}]
        answer = "".join(draw.choices("xyz", k=draw.randint(2, 6)))
        lines.append(json.dumps({"messages": asked("see ", *items, "?", answer=answer)}))
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "chats.jsonl"
