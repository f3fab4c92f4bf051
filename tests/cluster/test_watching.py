"""What people look at: plain lines, `status` from storage alone, the freeze table, metrics.jsonl."""

import math
import re


def test_plain_lines_where_there_is_no_terminal(undisturbed):
    output = (undisturbed.folder / "output.txt").read_text()
    assert "\x1b" not in output
    step = r"full_finetune: [\d,]+/100 \(\d+%\)  loss \d\.\d{4}  [\d,]+ tokens/s"
    assert re.search(step, output), output
    last = undisturbed.state("full_finetune").checkpoints[0].step  # 90, or later where a save was still in flight
    assert last >= 90 and f"full_finetune: checkpoint of step {last} committed" in output
    assert re.search(r"full_finetune: completed after ", output)


def test_status_reads_storage_alone(undisturbed):
    done = undisturbed.without_ray("status")
    assert done.returncode == 0
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.split()}
    for stage in ("mix_data", "heldout_data", "mlp_warmup", "full_finetune", "evaluate", "export"):
        assert " completed " in lines[stage]
    assert "100/100" in lines["full_finetune"]
    assert f"{undisturbed.losses()[-1]:.4f}" in lines["full_finetune"]


def test_status_before_anything_ran(undisturbed, data, tmp_path):
    from harness import Experiment

    done = Experiment(tmp_path / "new", data).without_ray("status")
    assert done.returncode == 0
    assert done.stdout.count("not run yet") == 6
    assert not (tmp_path / "new" / "storage").exists()


def test_logs_hold_the_freeze_table(undisturbed):
    warmup = undisturbed.without_ray("logs", "mlp_warmup").stdout
    assert re.search(r"vit +23,968 +0 +frozen", warmup)
    assert re.search(r"mlp +([\d,]+) +\1 +trains", warmup)
    assert re.search(r"language +[\d,]+ +0 +frozen", warmup)
    finetune = undisturbed.without_ray("logs", "full_finetune").stdout
    assert len(re.findall(r"(vit|mlp|language) +([\d,]+) +\2 +trains", finetune)) == 3


def test_metrics_have_the_names_people_know(undisturbed):
    rows = undisturbed.rows()
    names = {
        "loss", "grad_norm", "learning_rate", "tokens_per_second_per_gpu", "real_tokens_per_second",
        "tiles_per_second", "packing/token_fill", "packing/tile_fill", "balance/max_over_mean", "time/data_wait",
        "time/checkpoint_stall", "data/consumed/row", "data/consumed/words",
    }  # fmt: skip
    for row in rows:
        assert names <= set(row)
        assert all(math.isfinite(row[name]) for name in names)
        assert 0 < row["packing/token_fill"] <= 1
        assert row["balance/max_over_mean"] >= 1 - 1e-9
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"], "it learns"
    assert [rows[i]["learning_rate"] for i in range(5)] == [0.0, 0.00125, 0.0025, 0.00375, 0.005]


def test_the_warmup_changed_the_projector_alone(undisturbed):
    from safetensors.numpy import load_file

    before = load_file(undisturbed.result("mlp_warmup") / "model.safetensors")
    after = load_file(undisturbed.result("full_finetune") / "model.safetensors")
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert len(changed) > 0.9 * len(before), "full finetune trains everything"
