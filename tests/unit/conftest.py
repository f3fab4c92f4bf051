"""What several test files share: the micro model, the official tiny model, and a few prepared samples.

Heavy libraries are imported inside the fixtures, so that the tests which need none of them start at once.
"""

import io
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import settings

# No deadline: a busy machine takes a second for what takes 10 ms. With CI set, as hypothesis itself does it, the
# examples are the same every time, so that a run fails for what was changed; elsewhere they are new ones.
settings.register_profile("any-machine", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("any-machine")

OFFICIAL = Path(__file__).parents[1] / "data" / "golden" / "official_tiny"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A node's cache of results (orchestrator/cache.py) that ends with the tests."""
    os.environ["STAGELINE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def micro():
    """params, resolved, tokenizer of the smallest presets, and build(seed) for a fresh model of them."""
    from modeling.presets import resolve
    from stages.params import ModelParams

    params = ModelParams(vision="micro-vit", language="micro-qwen2")
    resolved = resolve(params)
    tokenizer = resolved.tokenizer()

    def build(seed: int = 0):
        from modeling.internvl import build_model

        return build_model(resolved, tokenizer, seed).eval()

    return SimpleNamespace(params=params, resolved=resolved, tokenizer=tokenizer, build=build)


@pytest.fixture(scope="session")
def official(tmp_path_factory):
    """The official tiny checkpoint, imported: model, and case (tensors of tests/data/golden/official_tiny)."""
    from safetensors.torch import load_file

    from modeling.internvl import load_model
    from modeling.weights import open_source, write

    folder = tmp_path_factory.mktemp("official") / "imported"
    write(open_source(OFFICIAL), folder, "hf")
    return SimpleNamespace(model=load_model(folder)[0], case=load_file(OFFICIAL / "case.safetensors"))


def picture(seed: int, width: int, height: int) -> bytes:
    from PIL import Image

    blots = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(blots).resize((width, height), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


# (dataset, augment, image sizes, turns): sample i of `prepared`
SAMPLES = (
    ("one", False, [(32, 32)], [("<image>\nWhat?", "7")]),
    ("one", True, [(64, 32)], [("<image>\nRead it.", "4 2"), ("Sure?", "yes, quite sure")]),
    ("two", True, [(32, 32), (32, 32)], [("<image>\n<image>\nWhich is larger?", "the second")]),
    ("text", False, [], [("two plus two", "four")]),
    ("one", False, [(32, 32)], [("<image>\nSpell it.", "seven")]),
)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, micro) -> Path:
    """A folder as `prepare` leaves it, of SAMPLES, in shards of one sample each; ids s0, s1, ..."""
    from PIL import Image

    from modeling.shards import ShardWriter, pack_sample
    from modeling.template import encode_conversation
    from modeling.tiles import split_image, tiles_per_image_limit

    folder = tmp_path_factory.mktemp("data") / "prepared"
    with ShardWriter(folder, shard_bytes=1) as writer:
        for i, (dataset, augment, sizes, turns) in enumerate(SAMPLES):
            images = [picture(10 * i + k, *size) for k, size in enumerate(sizes)]
            limit = tiles_per_image_limit(6, max(1, len(images)))
            tiles = [len(split_image(Image.open(io.BytesIO(data)), limit, tile_size=32)) for data in images]
            conversation = [
                {"from": role, "value": text} for turn in turns for role, text in zip(("human", "gpt"), turn)
            ]
            encoded = encode_conversation(
                conversation, micro.tokenizer, tiles, micro.resolved.tokens_per_tile, system=""
            )
            record = {"id": f"s{i}", "conversations": conversation}
            blob, place = pack_sample(f"{i:06d}", record, [("png", data) for data in images])
            writer.add(blob, place | {
                "id": f"s{i}", "task": dataset, "dataset": dataset, "key": f"{i:06d}", "tokens": len(encoded.input_ids),
                "answers": [end - start for start, end in encoded.answer_spans], "tiles": sum(tiles),
                "tiles_per_image": tiles, "widths": [w for w, _ in sizes], "heights": [h for _, h in sizes],
                "max_tiles": 6, "augment": augment, "repeat": 1.0, "file": "a.jsonl", "line": i,
            })  # fmt: skip
    return folder
