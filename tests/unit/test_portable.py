"""Which paths of an experiment a cluster's nodes do not see."""

from orchestrator.portable import local_paths
from orchestrator.spec import load_spec

TEXT = """
name: paths
storage: ../storage
models:
  one: {vision: ./vit, language: tiny-qwen2, tokenizer: ./tok}
  whole: {folder: /models/whole}
model: {vision: tiny-vit, language: tiny-qwen2}
data:
  here: {meta: here.json}
  there: {meta: s3://bucket/there.json}
eval:
  mmmu: {format: mmmu, path: mmmu.parquet}
  remote: {format: tsv, path: s3://bucket/set.tsv}
stages:
  here_data: {kind: prepare, data: here}
  there_data: {kind: prepare, data: there}
  mlp_warmup: {needs: [there_data], steps: 2, lr: 1e-3, global_batch: 4, deepspeed: zero.json}
  again: {kind: train, train: [mlp], needs: [there_data, mlp_warmup], steps: 2, lr: 1e-3, global_batch: 4,
          deepspeed: zero.json}
"""


def test_every_field_that_names_a_folder_is_told_once(tmp_path):
    (tmp_path / "zero.json").write_text("{}")
    (tmp_path / "experiment.yaml").write_text(TEXT)
    assert local_paths(load_spec(tmp_path / "experiment.yaml")) == [
        ("storage", str(tmp_path.parent / "storage")),
        ("models.one.vision", str(tmp_path / "vit")),
        ("models.one.tokenizer", str(tmp_path / "tok")),
        ("models.whole.folder", "/models/whole"),
        ("data.here.meta", str(tmp_path / "here.json")),
        ("eval.mmmu.path", str(tmp_path / "mmmu.parquet")),
        ("stages.mlp_warmup.deepspeed", str(tmp_path / "zero.json")),
    ]
