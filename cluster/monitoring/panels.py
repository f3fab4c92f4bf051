"""What the Grafana dashboard shows: one entry a panel, each with its queries and unit.

Invariant: every query names metrics of catalogue.py or of Ray itself. $experiment and $stage are the dashboard's
variables. A restarted driver reports under another WorkerId, and for some seconds both do: hence `max by`.
"""

from dataclasses import dataclass

MINE = 'experiment=~"$experiment", stage=~"$stage"'
_BYTES = 1024 * 1024  # Ray tells GPU memory in MiB


@dataclass(frozen=True)
class Query:
    """expr: PromQL. legend: with {{label}} of the result."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """unit: Grafana's name of it. logarithmic: the y axis. gpus: Ray or the stage tells this on GPUs only."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    logarithmic: bool = False
    ratio: bool = False  # from 0 to 1
    gpus: bool = False


def _stage(name: str, legend: str = "{{stage}}") -> Query:
    return Query(f"max by (experiment, stage) (ray_stageline_{name}{{{MINE}}})", legend)


def _share(name: str, legend: str) -> Query:
    part, whole = (f"sum by (experiment, stage) (rate(ray_stageline_{of}_seconds_total{{{MINE}}}[$__rate_interval]))"
                   for of in (name, "training"))  # fmt: skip
    return Query(f"({part} or 0 * {whole}) / ({whole} > 0)", legend)  # a counter that never grew does not exist


ROWS: dict[str, tuple[Panel, ...]] = {
    "Training": (
        Panel("Loss", "Of the newest step.", "short", (_stage("loss"),), logarithmic=True),
        Panel(
            "Progress", "Steps done of all steps; where the newest committed checkpoint is.", "percentunit",
            (Query(f"max by (experiment, stage) (ray_stageline_step{{{MINE}}})"
                   f" / (max by (experiment, stage) (ray_stageline_steps{{{MINE}}}) > 0)", "{{stage}}"),
             Query(f"max by (experiment, stage) (ray_stageline_checkpoint_step{{{MINE}}})"
                   f" / (max by (experiment, stage) (ray_stageline_steps{{{MINE}}}) > 0)", "{{stage}} committed")),
            ratio=True,
        ),
        Panel("Learning rate", "Of the newest step.", "sci", (_stage("learning_rate"),)),
        Panel("Gradient norm", "Before clipping.", "short", (_stage("gradient_norm"),), logarithmic=True),
        Panel("Time left", "At the pace of the running attempt.", "s", (_stage("eta_seconds"),)),
    ),
    "Speed": (
        Panel(
            "Tokens a second", "Without padding: of the newest step, and the mean, saves and restarts included.",
            "short",
            (_stage("tokens_per_second"),
             Query(f"sum by (experiment, stage) (rate(ray_stageline_tokens_total{{{MINE}}}[$__rate_interval]))",
                   "{{stage}} mean")),
        ),
        Panel("Tokens a second per GPU", "Per worker.", "short", (_stage("tokens_per_second_per_gpu"),)),
        Panel("FLOP/s per GPU", "What the model needs; nothing recomputed counts.", "flops",
              (_stage("flops_per_second_per_gpu"),)),
        Panel("MFU", "Of the GPU's peak in bf16.", "percentunit", (_stage("mfu_ratio"),), ratio=True, gpus=True),
        Panel(
            "Share of time lost", "Waiting for the next batch; standing still for a snapshot.", "percentunit",
            (_share("data_wait", "{{stage}} data wait"), _share("checkpoint_stall", "{{stage}} checkpoint stall")),
        ),
        Panel("Step", "Duration of the newest step.", "s", (_stage("step_seconds"),)),
    ),
    "Preemptions and failures": (
        Panel("Goodput", "Time of the steps that survive, over wall time since the stage began.", "percentunit",
              (_stage("goodput_ratio"),), ratio=True),
        Panel(
            "Preemptions and failures", "So far, of all drivers, from the ledger.", "short",
            (_stage("preemptions", "{{stage}} preempted"),
             Query(f"sum by (stage) (max by (experiment, stage, class) (ray_stageline_failures{{{MINE}}}))",
                   "{{stage}} failed")),
        ),
        Panel("Steps lost", "Trained again after a failure.", "short", (_stage("steps_lost"),)),
        Panel("Attempts", "So far.", "short", (_stage("attempts"),)),
    ),
    "Cluster": (
        Panel("Workers", "Of the running attempt.", "short", (_stage("workers"),)),
        Panel("Nodes", "That report to Prometheus.", "short",
              (Query("count(count by (instance) (ray_node_cpu_count))", "nodes"),)),
        Panel(
            "CPUs", "What Ray has given away, and has.", "short",
            (Query('sum(ray_resources{Name="CPU", State="USED"})', "used"),
             Query('sum(ray_resources{Name="CPU"})', "there are")),
        ),
        Panel("GPU utilisation", "Of each GPU.", "percent",
              (Query("max by (instance, GpuIndex) (ray_node_gpus_utilization)", "{{instance}} {{GpuIndex}}"),),
              gpus=True),
        Panel(
            "GPU memory", "Used of each GPU.", "bytes",
            (Query(f"max by (instance, GpuIndex) (ray_node_gram_used) * {_BYTES}", "{{instance}} {{GpuIndex}}"),
             Query("max(ray_node_gram_used + on (instance, GpuIndex) group_left () ray_node_gram_available)"
                   f" * {_BYTES}", "there is")),
            gpus=True,
        ),
        Panel("Host memory", "Used on each node.", "bytes",
              (Query("max by (instance) (ray_node_mem_used)", "{{instance}}"),)),
        Panel(
            "Object store", "Of Ray, by where it lies.", "bytes",
            (Query("sum by (Location) (ray_object_store_memory)", "{{Location}}"),
             Query('sum(ray_resources{Name="object_store_memory"})', "there is")),
        ),
    ),
}  # fmt: skip


def all_panels() -> list[Panel]:
    return [panel for panels in ROWS.values() for panel in panels]
