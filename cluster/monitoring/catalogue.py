"""Every metric that a driver tells Ray of a running stage: its name, what it counts, where it comes from.

Invariant: units are in the names (prometheus.io/docs/practices/naming). Ray puts `ray_` before each name and `_total`
behind a counter's. A gauge that is not set again within two report intervals of Ray (20 s) is gone from Ray's endpoint:
so a stage that ended has no metrics, and a series is never an old value that looks alive. The attempt is a value, not
a label: a preempted stage stays one series.
"""

LABELS = ("experiment", "stage", "kind")  # of all metrics; failures have FAILURE besides
FAILURE = "class"

# of the newest step: gauge -> (key of a metrics row, what it is); a kind of stage has those that its rows have
FROM_ROW = {
    "stageline_loss": ("loss", "mean loss of the global batch of the newest step"),
    "stageline_gradient_norm": ("grad_norm", "norm of the gradient of the newest step, before clipping"),
    "stageline_learning_rate": ("learning_rate", "largest learning rate of the newest step"),
    "stageline_tokens_per_second": ("real_tokens_per_second", "tokens without padding, all workers, newest step"),
    "stageline_tokens_per_second_per_gpu": ("tokens_per_second_per_gpu", "the same of each worker"),
    "stageline_tiles_per_second": ("tiles_per_second", "image tiles, all workers, newest step"),
    "stageline_flops_per_second_per_gpu": ("flops_per_second_per_gpu", "floating-point operations that count"),
    "stageline_mfu_ratio": ("mfu", "model FLOPs utilisation; only on a GPU whose peak is known"),
    "stageline_step_seconds": ("time/step", "duration of the newest step"),
    "stageline_packing_ratio": ("packing/token_fill", "part of the packed rows that is no padding"),
}
# of the running attempt and of the whole stage: gauge -> what it is
FROM_LEDGER = {
    "stageline_stage_running": "1 while a driver works on the stage",
    "stageline_step": "the newest step: an optimizer step; for stages that do not train, samples or answers",
    "stageline_steps": "steps of the whole stage",
    "stageline_eta_seconds": "until the last step, at the pace of this attempt",
    "stageline_workers": "workers of the running attempt",
    "stageline_attempts": "attempts so far, of all drivers",
    "stageline_checkpoint_step": "step of the newest committed checkpoint",
    "stageline_goodput_ratio": "time of the steps that survive, over wall time since the stage was first claimed",
    "stageline_steps_lost": "steps that were trained again after a failure or preemption",
    "stageline_preemptions": "announced preemptions so far, of all drivers",
}
FAILURES = ("stageline_failures", "attempts that failed so far, by class, of all drivers")
# sums over the steps of this driver: counter -> (key of a metrics row, what it is)
SUMS = {
    "stageline_training_seconds": ("time/step", "time of all steps"),
    "stageline_data_wait_seconds": ("time/data_wait", "of that, waiting for the next batch"),
    "stageline_checkpoint_stall_seconds": ("time/checkpoint_stall", "training stood still for a snapshot"),
    "stageline_tokens": ("tokens", "tokens trained on, without padding"),
}


def exported() -> set[str]:
    """The names that Prometheus sees."""
    gauges = (*FROM_ROW, *FROM_LEDGER, FAILURES[0])
    return {f"ray_{name}" for name in gauges} | {f"ray_{name}_total" for name in SUMS}
