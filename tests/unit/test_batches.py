"""From a pack to tensors: a pure function of (data, plan, seed, step, pack)."""

import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from videos import FRAMES, LEAST, MOST, prepared_videos

from modeling import batches
from modeling.batches import Batch, Batcher, empty_batch, sample_checksum
from modeling.epochs import StepPlan, plan_steps
from modeling.errors import DataError
from modeling.frames import FrameChoices
from modeling.loss import total_weight
from modeling.shards import ShardReader
from modeling.tiles import frame_indices, to_pixels
from stages.plan_packs import Lengths, step_weight

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plan(prepared) -> StepPlan:
    index = ShardReader(prepared).index
    return plan_steps(
        index["tokens"], index["tiles"], index["repeat"], max_tokens=100, max_tiles=4, global_batch=2, seed=0, epochs=2
    )


def batcher(micro, folder, plan, **more) -> Batcher:
    settings = dict(
        tile_size=32, tokens_per_tile=micro.resolved.tokens_per_tile, system="", reduction="square",
        unit="conversation", seed=0, depth=2,
    )  # fmt: skip
    return Batcher(ShardReader(folder), plan, micro.tokenizer, **settings | more)


def places(plan):
    return [(step, pack) for step in range(plan.steps) for pack in plan.step(step)]


def same(one: Batch, two: Batch) -> bool:
    tensors = ("input_ids", "position_ids", "positions", "targets", "weights", "pixels", "uniforms")
    pairs = [(getattr(one, name), getattr(two, name)) for name in tensors]
    return one.ids == two.ids and one.counts == two.counts and all(
        (a is None and b is None) or torch.equal(a, b) for a, b in pairs
    )  # fmt: skip


def occurrence_of(plan, sample: int, nth: int = 0) -> int:
    return int(np.flatnonzero(plan.sample == sample)[nth])


def test_the_same_bytes_whoever_builds_them_and_in_what_order(micro, prepared, plan):
    first, second = batcher(micro, prepared, plan), batcher(micro, prepared, plan)
    rows = [first.batch(*place) for place in places(plan)]
    again = [second.batch(*place) for place in reversed(places(plan))]
    assert all(same(a, b) for a, b in zip(rows, reversed(again), strict=True))
    assert any(row.pixels is not None for row in rows)


def test_a_samples_tensors_do_not_depend_on_its_pack(micro, prepared, plan):
    build = batcher(micro, prepared, plan).batch
    members = [occurrence_of(plan, i) for i in (1, 3, 2)]
    together, alone = build(4, members), [build(4, [o]) for o in members]
    pixels, uniforms = [b.pixels for b in alone if b.pixels is not None], [b.uniforms for b in alone]
    assert torch.equal(together.input_ids, torch.cat([b.input_ids for b in alone], dim=1))
    assert torch.equal(together.pixels, torch.cat(pixels)) and torch.equal(together.uniforms, torch.cat(uniforms))
    assert torch.equal(together.weights, torch.cat([b.weights for b in alone]))
    assert together.counts.checksum == sum(b.counts.checksum for b in alone)


@pytest.mark.parametrize("change", ["seed", "step", "occurrence"])
def test_randomness_is_keyed_by_seed_step_and_occurrence(micro, prepared, plan, change):
    """A sample that is augmented differs in its pixels and numbers, never in its tokens."""
    seed, step, occurrence = 0, 3, occurrence_of(plan, 1)
    before = batcher(micro, prepared, plan, seed=seed).batch(step, [occurrence])
    seed, step = seed + (change == "seed"), step + (change == "step")
    if change == "occurrence":
        occurrence = occurrence_of(plan, 1, nth=1)
    after = batcher(micro, prepared, plan, seed=seed).batch(step, [occurrence])
    assert torch.equal(before.input_ids, after.input_ids)
    assert not torch.equal(before.uniforms, after.uniforms) and not torch.equal(before.pixels, after.pixels)


def test_only_what_the_meta_says_is_augmented(micro, prepared, plan, monkeypatch):
    """Quality uniform over 75..100, one draw per tile."""
    drawn = []
    original = batches.jpeg
    monkeypatch.setattr(batches, "jpeg", lambda tile, quality: drawn.append(quality) or original(tile, quality))
    build = batcher(micro, prepared, plan)
    build.batch(0, [occurrence_of(plan, i) for i in (0, 3, 4)])
    assert drawn == []
    for step in range(200):
        build.batch(step, [occurrence_of(plan, 1)])
    assert len(drawn) == 200 * 3 and set(drawn) == set(range(75, 101))
    assert max(Counter(drawn).values()) < 3 * 600 / 26


def test_without_augmentation_the_pixels_are_the_pictures_own(micro, prepared, plan):
    reader = ShardReader(prepared)
    row = batcher(micro, prepared, plan).batch(0, [occurrence_of(plan, 0)])
    assert torch.equal(row.to(CPU).pixels, to_pixels(reader.sample(0)[1]))
    augmented = batcher(micro, prepared, plan).batch(0, [occurrence_of(plan, 2)])
    changed = (augmented.to(CPU).pixels - to_pixels(reader.sample(2)[1])).abs()
    assert 0 < changed.mean() < 0.5, "a JPEG round trip of high quality"


def test_position_p_predicts_token_p_plus_1(micro, prepared, plan):
    from modeling.template import encode_conversation

    reader = ShardReader(prepared)
    members = [occurrence_of(plan, i) for i in (0, 3, 1)]
    row = batcher(micro, prepared, plan).batch(0, members)
    assert torch.equal(row.input_ids[0, row.positions + 1], row.targets)
    text = micro.tokenizer.decode(row.targets)
    assert text == "7<|im_end|>four<|im_end|>4 2<|im_end|>yes, quite sure<|im_end|>"
    offset, ids = 0, row.input_ids[0].tolist()
    for i in (0, 3, 1):
        index = reader.row(i)
        encoded = encode_conversation(
            reader.conversation(i), micro.tokenizer, index["tiles_per_image"], micro.resolved.tokens_per_tile, system=""
        )
        n = index["tokens"]
        assert ids[offset : offset + n] == encoded.input_ids
        assert row.position_ids[0, offset : offset + n].tolist() == list(range(n))
        offset += n
    assert len(ids) == offset and len(row.segments.back) == offset
    assert not set(row.targets.tolist()) & {micro.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")}


@pytest.mark.parametrize("unit", ["conversation", "response"])
@pytest.mark.parametrize("reduction", ["token", "sample", "square"])
def test_the_weights_of_a_step_sum_to_its_denominator(micro, prepared, plan, reduction, unit):
    """step_weight knows from lengths alone what the rows of a step will add up to."""
    build = batcher(micro, prepared, plan, reduction=reduction, unit=unit)
    lengths = Lengths.of(build.reader, reduction, unit, micro.resolved.tokens_per_tile)
    for step in range(plan.steps):
        rows = [build.batch(step, pack) for pack in plan.step(step)]
        assert all(len(row.weights) == len(row.targets) == len(row.positions) for row in rows)
        total = sum(row.weights.double().sum().item() for row in rows)
        assert step_weight(plan, lengths, step) == pytest.approx(total, rel=1e-6)
    answers = build.reader.index["answers"][1]
    assert lengths.weight[1] == pytest.approx(total_weight(answers.tolist(), reduction, unit))


def test_counts_say_what_was_consumed(micro, prepared, plan):
    row = batcher(micro, prepared, plan).batch(0, [occurrence_of(plan, i) for i in (0, 1, 3, 4)])
    index, counts = ShardReader(prepared).index, row.counts
    assert row.ids == ("s0", "s1", "s3", "s4")
    assert counts.checksum == sum(map(sample_checksum, row.ids)) and counts.per_dataset == {"one": 3, "text": 1}
    assert counts.samples == 4 and counts.lost == 0
    assert counts.tokens == row.input_ids.shape[1] == sum(index["tokens"][[0, 1, 3, 4]])
    assert counts.supervised == len(row.targets)
    assert counts.tiles == len(row.pixels) == len(row.uniforms) == sum(index["tiles"][[0, 1, 3, 4]])


def test_an_epochs_checksum_is_that_of_its_samples(micro, prepared, plan):
    """What shows, from the metrics alone, that every sample was consumed as often as planned."""
    build = batcher(micro, prepared, plan)
    rows = [build.batch(*place) for place in places(plan)]
    assert sum(row.counts.checksum for row in rows) == 2 * sum(sample_checksum(f"s{i}") for i in range(5))
    assert Counter(name for row in rows for name in row.ids) == {f"s{i}": 2 for i in range(5)}


@pytest.fixture(scope="module")
def videos(tmp_path_factory, micro):
    return prepared_videos(tmp_path_factory.mktemp("videos") / "prepared", micro)


@pytest.fixture(scope="module")
def video_plan(videos) -> StepPlan:
    index = ShardReader(videos).index
    return plan_steps(
        index["tokens"], index["tiles"], index["repeat"], max_tokens=400, max_tiles=20, global_batch=2, seed=0,
        epochs=10, choices=FrameChoices.of(index),
    )  # fmt: skip


def shown_as(plan, sample: int, frames: int) -> int:
    """An occurrence of a video that shows so many frames."""
    return int(np.flatnonzero((plan.sample == sample) & (plan.frames == frames))[0])


def test_a_resumed_run_sees_the_same_videos(micro, videos, video_plan):
    first, second = batcher(micro, videos, video_plan), batcher(micro, videos, video_plan)
    whole = [first.batch(*place) for place in places(video_plan)]
    half = len(whole) // 2
    assert all(same(a, second.batch(*place)) for a, place in zip(whole[half:], places(video_plan)[half:], strict=True))
    assert sum(row.counts.tiles for row in whole) == video_plan.frames[video_plan.packs.values].sum()
    for row, (_, pack) in zip(whole, places(video_plan), strict=True):
        counts, request = row.counts, first.request(0, pack)
        assert counts.lost == 0 and counts.tokens == row.input_ids.shape[1] <= 400
        tiles = 0 if row.pixels is None else len(row.pixels)
        assert counts.tiles == tiles == video_plan.frames[pack].sum() == len(row.uniforms)
        assert first.builder.size(request) == tiles * 32 * 32 * 3


@pytest.mark.parametrize("frames", [LEAST, MOST])
def test_a_video_shows_the_frames_of_its_occurrence(micro, videos, video_plan, frames):
    """One frame of each interval, drawn by (seed, step, occurrence); in the text each has its number."""
    build, reader = batcher(micro, videos, video_plan), ShardReader(videos)
    occurrence = shown_as(video_plan, 2, frames)
    row = build.batch(5, [occurrence])
    chosen = frame_indices(frames, FRAMES, np.random.default_rng((0, 5, occurrence)))
    _, pictures = reader.samples.video(reader.row(2), chosen, 32)
    assert torch.equal(row.to(CPU).pixels, to_pixels(pictures))
    text = micro.tokenizer.decode(row.input_ids[0])
    assert text.count("<img>") == text.count("Frame-") == frames and f"Frame-{frames}: <img>" in text
    assert "</img>\nWhich digits?" in text
    other = build.batch(6, [occurrence])
    assert torch.equal(row.input_ids, other.input_ids) and not torch.equal(row.pixels, other.pixels)


def test_a_container_a_gif_and_a_folder_show_the_same(micro, videos):
    reader = ShardReader(videos)
    for indices in ([0, 5, 23], [7, 7, 2]):
        mp4, gif, folder = (np.stack(reader.samples.video(reader.row(i), indices, 32)[1]).astype(int) for i in range(3))
        assert np.array_equal(gif, folder)
        assert np.abs(mp4 - folder).mean() < 6 < np.abs(mp4 - folder[::-1]).mean()
    for i in range(3):
        conversation, pictures = reader.sample(i)
        middle = reader.samples.video(reader.row(i), frame_indices(MOST, FRAMES))
        assert len(pictures) == MOST == len(middle[1]) and pictures[0].size == (40, 40)
        assert conversation == reader.conversation(i) and all(a == b for a, b in zip(pictures, middle[1]))


def test_a_short_video_repeats_its_last_frame(micro, videos, video_plan):
    row = batcher(micro, videos, video_plan).batch(0, [shown_as(video_plan, 3, 6)])
    pixels = row.pixels
    assert len(pixels) == 6 and not torch.equal(pixels[0], pixels[1])
    assert all(torch.equal(pixels[1], frame) for frame in pixels[2:])


def test_videos_are_never_augmented(micro, videos, video_plan, monkeypatch):
    """The index says `augment` for all of them."""
    assert ShardReader(videos).index["augment"].all()
    monkeypatch.setattr(batches, "jpeg", lambda *_: pytest.fail("a frame was compressed"))
    for i in range(4):
        batcher(micro, videos, video_plan).batch(0, [occurrence_of(video_plan, i)])


def test_augmented_bytes_are_those_of_jpegs_of_75_to_100_and_come_again(micro, prepared, plan):
    """Keyed by (seed, step, occurrence): what a resumed run sees is what it would have seen."""
    reader, occurrence = ShardReader(prepared), occurrence_of(plan, 2)
    plain = reader.sample(2)[1]
    seen = set()
    for step in range(25):
        pixels = batcher(micro, prepared, plan).batch(step, [occurrence]).pixels
        assert torch.equal(pixels, batcher(micro, prepared, plan).batch(step, [occurrence]).pixels)
        for image, tile in zip(plain, pixels, strict=True):
            matches = [q for q in range(1, 101) if np.array_equal(np.asarray(batches.jpeg(image, q)), tile.numpy())]
            assert matches and max(matches) >= 75
            seen.update(matches if len(matches) == 1 else ())
    assert len(seen) > 8 and min(seen) >= 75


@pytest.mark.parametrize("sample", [0, 2])
def test_a_damaged_video_costs_its_weight_and_nothing_else(micro, videos, tmp_path, video_plan, sample):
    folder = tmp_path / "damaged"
    shutil.copytree(videos, folder)
    row = ShardReader(folder).row(sample)
    path = folder / "shards" / row["shard"]
    content = bytearray(path.read_bytes())
    for offset in row["image_offsets"]:
        content[offset + 40] ^= 1
    path.write_bytes(content)
    members = [shown_as(video_plan, sample, 5), shown_as(video_plan, 1, 4)]
    whole, lost = (batcher(micro, f, video_plan).batch(0, members) for f in (videos, folder))
    assert lost.counts.lost == 1 and replace(lost.counts, lost=0) == whole.counts
    for name in ("input_ids", "positions", "targets", "uniforms"):
        assert torch.equal(getattr(lost, name), getattr(whole, name)), name
    assert not lost.pixels[:5].any() and torch.equal(lost.pixels[5:], whole.pixels[5:])
    first = lost.positions < ShardReader(folder).index["frame_tokens"][sample][5 - LEAST]
    assert not lost.weights[first].any() and torch.equal(lost.weights[~first], whole.weights[~first])


@pytest.mark.parametrize("reduction", ["token", "square"])
def test_the_weights_of_a_step_of_videos_sum_to_its_denominator(micro, videos, video_plan, reduction):
    build = batcher(micro, videos, video_plan, reduction=reduction)
    lengths = Lengths.of(build.reader, reduction, "conversation", micro.resolved.tokens_per_tile)
    for step in range(video_plan.steps):
        total = sum(build.batch(step, pack).weights.double().sum().item() for pack in video_plan.step(step))
        assert step_weight(video_plan, lengths, step) == pytest.approx(total, rel=1e-6)


@pytest.fixture
def damaged(prepared, tmp_path):
    """The same folder, with a byte flipped in the picture of sample 1."""
    folder = tmp_path / "damaged"
    shutil.copytree(prepared, folder)
    row = ShardReader(folder).row(1)
    path = folder / "shards" / row["shard"]
    content = bytearray(path.read_bytes())
    content[row["image_offsets"][0] + 40] ^= 1
    path.write_bytes(content)
    return folder


def test_a_damaged_picture_costs_its_weight_and_nothing_else(micro, prepared, damaged, plan):
    members = [occurrence_of(plan, i) for i in (0, 1, 3)]
    whole = batcher(micro, prepared, plan).batch(0, members)
    row = batcher(micro, damaged, plan).batch(0, members)
    assert (row.counts.lost, whole.counts.lost) == (1, 0)
    assert replace(row.counts, lost=0) == whole.counts
    for name in ("input_ids", "position_ids", "positions", "targets"):
        assert torch.equal(getattr(row, name), getattr(whole, name)), name
    assert row.pixels.shape == whole.pixels.shape and row.uniforms.shape == whole.uniforms.shape
    lengths = ShardReader(damaged).index["tokens"]
    lost = (row.positions >= lengths[0]) & (row.positions < lengths[0] + lengths[1])
    assert lost.any() and (row.weights[lost] == 0).all()
    assert torch.equal(row.weights[~lost], whole.weights[~lost]) and (row.weights[~lost] > 0).all()
    assert torch.equal(row.pixels[0], whole.pixels[0])


def test_a_damaged_conversation_is_told(micro, prepared, tmp_path, plan):
    folder = tmp_path / "damaged"
    shutil.copytree(prepared, folder)
    row = ShardReader(folder).row(3)
    path = folder / "shards" / row["shard"]
    content = bytearray(path.read_bytes())
    content[row["json_offset"] + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="s3"):
        batcher(micro, folder, plan).batch(0, [occurrence_of(plan, 3)])


def test_lengths_other_than_planned_are_told(micro, prepared, plan):
    with pytest.raises(DataError, match="tokens, planned") as caught:
        batcher(micro, prepared, plan, system="another system prompt").batch(0, [occurrence_of(plan, 3)])
    assert "sample s3" in caught.value.where


def test_a_row_of_text_has_no_tiles(micro, prepared, plan):
    row = batcher(micro, prepared, plan).batch(0, [occurrence_of(plan, 3)])
    assert row.pixels is None and len(row.uniforms) == 0
    assert batcher(micro, prepared, plan, depth=0).batch(0, [occurrence_of(plan, 0)]).uniforms is None


def test_the_empty_row_counts_and_weighs_nothing():
    row = empty_batch(5, depth=2)
    assert row.weights.tolist() == [0.0] and vars(row.counts) == vars(batches.Counts())
    moved = row.to(torch.device("cpu"))
    assert same(moved, row) and torch.equal(moved.segments.back, row.segments.back)
