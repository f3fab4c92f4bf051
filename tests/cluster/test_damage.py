"""Storage that was damaged: each kind is told, the run falls back to the newest whole checkpoint and finishes."""

import json
import shutil
import time

from harness import EVERY, LONGER, PATIENCE_S, assert_lineage


def test_damage_of_every_kind_at_once(before_finetune, longer, start):
    """From the newest checkpoint back: its manifest cut off, a shard missing, a byte flipped, a good one, one deleted;
    and a ledger entry that a newer Stageline wrote."""
    settings = (*LONGER, "stages.full_finetune.checkpoint.keep=5")
    driver = start(before_finetune, *settings)
    driver.wait_for_checkpoint(5 * EVERY)
    until = time.monotonic() + PATIENCE_S
    while len(before_finetune.state("full_finetune").checkpoints) < 5:
        assert driver.process.poll() is None and time.monotonic() < until, driver.output
        time.sleep(0.02)
    driver.kill()
    kept = before_finetune.state("full_finetune").checkpoints
    assert len(kept) in (5, 6), "one that is older, where it was killed before it could be retired"
    checkpoints = kept[:5]
    steps = [checkpoint.step for checkpoint in checkpoints]
    cut, missing, flipped, _good, deleted = ((before_finetune.storage / c.manifest).parent for c in checkpoints)
    manifest = cut / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-40])
    next(missing.glob("shard-00001-*")).unlink()
    shard = next(flipped.glob("shard-00000-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    shutil.rmtree(deleted)
    entries = before_finetune.entries("full_finetune")
    newer = {"version": 99, "type": "audited", "token": list(entries[-1].token), "nonce": "n", "time": 0.0, "by": "me"}
    folder = before_finetune.prefix("full_finetune") / "ledger"
    (folder / f"{len(entries):08d}.json").write_text(json.dumps(newer))

    done = before_finetune.run(*settings)
    assert "a ledger entry of version 99, and this Stageline reads up to" in done.stderr
    log = before_finetune.logs("full_finetune")["e0002a0001.log"]
    told = [line for line in log.splitlines() if "cannot be used, trying the one before" in line]
    assert len(told) == 3
    for line, folder, problem in zip(
        told, (cut, missing, flipped), ("its manifest is missing or damaged", "is missing or cut off", "is damaged")
    ):  # fmt: skip
        assert folder.parent.name in line and problem in line
    assert f"resumed from the checkpoint of step {steps[3]}" in log
    assert_lineage(before_finetune)
    assert before_finetune.weights() == longer.weights()
