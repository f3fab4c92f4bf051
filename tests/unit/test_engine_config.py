"""The DeepSpeed configuration: what the stage decides, and what a user's own JSON may."""

import json
import subprocess
import sys

import pytest

from modeling.engine import deepspeed_config
from modeling.errors import UserError


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_zero_stage_in_fp32(stage):
    assert deepspeed_config(stage, "fp32") == {"zero_optimization": {"stage": stage, "overlap_comm": False}}


@pytest.mark.parametrize(("stage", "runs_as"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_bf16_keeps_fp32_masters_and_accumulates_in_fp32(stage, runs_as):
    config = deepspeed_config(stage, "bf16")
    assert config["zero_optimization"]["stage"] == runs_as and config["bf16"] == {"enabled": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"} and config["communication_data_type"] == "fp32"


@pytest.fixture
def user(tmp_path):
    def write(**keys):
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(keys))
        return path

    return write


def test_a_users_json_is_kept_but_for_what_is_auto(user):
    path = user(
        zero_optimization={"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": True},
        train_batch_size="auto", optimizer="auto", bf16="auto", wall_clock_breakdown=True,
    )  # fmt: skip
    assert deepspeed_config(path, "fp32") == {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": True},
        "wall_clock_breakdown": True,
    }
    assert deepspeed_config(user(), "fp32")["zero_optimization"]["stage"] == 0


@pytest.mark.parametrize(
    "keys",
    [
        {"gradient_accumulation_steps": 4}, {"optimizer": {"type": "Adam"}}, {"scheduler": {}}, {"fp16": {}},
        {"train_batch_size": 8, "gradient_clipping": 1.0},
    ],
)  # fmt: skip
def test_what_the_stage_decides_is_refused(user, keys):
    with pytest.raises(UserError) as caught:
        deepspeed_config(user(**keys), "fp32")
    assert all(key in caught.value.message for key in keys) and caught.value.where.endswith("ds.json")


@pytest.mark.parametrize("stage", [4, "auto", -1])
def test_a_stage_that_is_not_supported(user, stage):
    with pytest.raises(UserError, match="no ZeRO stage"):
        deepspeed_config(user(zero_optimization={"stage": stage}), "bf16")


def test_deepspeed_is_not_imported_for_it():
    """In a process of its own: other tests may import it, by way of accelerate for one."""
    code = "import sys; from modeling.engine import deepspeed_config; deepspeed_config(1, 'fp32')"
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('deepspeed' in sys.modules)"], check=True)
