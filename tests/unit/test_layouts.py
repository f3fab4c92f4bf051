"""Names and rows of the two layouts: one to one, both ways, for every shape."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling.layouts import canonical_name, fuse, fused_shape, official_name, plan, split

WQKV = "language_model.model.layers.0.attention.wqkv.weight"
QKV = "vision_model.encoder.layers.0.attn.qkv.bias"


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.sampled_from([(), (1,), (7,)]))
def test_wqkv_is_read_as_the_official_code_lays_it_out(kv_heads, group, dim, rest):
    """Row by row from the definition: for each key-value head its query heads, then its key, then its value."""
    text = SimpleNamespace(num_key_value_heads=kv_heads, head_dim=dim)
    fused = torch.randn(kv_heads * (group + 2) * dim, *rest)
    query, key, value = split(WQKV, fused, text)
    for head in range(kv_heads):
        for d in range(dim):
            start = head * (group + 2) * dim + d
            for member in range(group):
                assert torch.equal(query[(head * group + member) * dim + d], fused[start + member * dim])
            assert torch.equal(key[head * dim + d], fused[start + group * dim])
            assert torch.equal(value[head * dim + d], fused[start + (group + 1) * dim])
    assert torch.equal(fuse(WQKV, [query, key, value], text), fused)
    assert fused_shape([tuple(part.shape) for part in (query, key, value)]) == tuple(fused.shape)
    pointers = {part.untyped_storage().data_ptr() for part in (query, key, value, fused)}
    assert len(pointers) == 4, "parts do not keep the whole in memory"


@given(st.integers(1, 9))
def test_the_vits_qkv_is_three_blocks(width):
    fused = torch.arange(3 * width)
    assert [part.tolist() for part in split(QKV, fused, None)] == [
        list(range(k * width, (k + 1) * width)) for k in range(3)
    ]
    assert torch.equal(fuse(QKV, split(QKV, fused, None), None), fused)


TABLE = {
    "model.vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
    "model.vision_tower.embeddings.patch_embeddings.projection.bias": "vision_model.embeddings.patch_embedding.bias",
    "model.vision_tower.embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
    "model.vision_tower.encoder.layer.11.attention.q_proj.weight": "vision_model.encoder.layers.11.attn.qkv.weight",
    "model.vision_tower.encoder.layer.1.attention.v_proj.bias": "vision_model.encoder.layers.1.attn.qkv.bias",
    "model.vision_tower.encoder.layer.1.attention.projection_layer.bias": "vision_model.encoder.layers.1.attn.proj"
    ".bias",
    "model.vision_tower.encoder.layer.1.attention.k_norm.weight": "vision_model.encoder.layers.1.attn.k_norm.weight",
    "model.vision_tower.encoder.layer.1.layernorm_before.weight": "vision_model.encoder.layers.1.norm1.weight",
    "model.vision_tower.encoder.layer.1.layernorm_after.bias": "vision_model.encoder.layers.1.norm2.bias",
    "model.vision_tower.encoder.layer.1.lambda_1": "vision_model.encoder.layers.1.ls1",
    "model.vision_tower.encoder.layer.1.lambda_2": "vision_model.encoder.layers.1.ls2",
    "model.vision_tower.encoder.layer.1.mlp.fc1.weight": "vision_model.encoder.layers.1.mlp.fc1.weight",
    "model.multi_modal_projector.layer_norm.weight": "mlp1.0.weight",
    "model.multi_modal_projector.linear_1.bias": "mlp1.1.bias",
    "model.multi_modal_projector.linear_2.weight": "mlp1.3.weight",
    "model.language_model.norm.weight": "language_model.model.norm.weight",
}
LLAMA = {
    "lm_head.weight": "language_model.output.weight",
    "model.language_model.embed_tokens.weight": "language_model.model.tok_embeddings.weight",
    "model.language_model.layers.3.self_attn.k_proj.weight": "language_model.model.layers.3.attention.wqkv.weight",
    "model.language_model.layers.3.self_attn.o_proj.weight": "language_model.model.layers.3.attention.wo.weight",
    "model.language_model.layers.3.mlp.gate_proj.weight": "language_model.model.layers.3.feed_forward.w1.weight",
    "model.language_model.layers.3.mlp.down_proj.weight": "language_model.model.layers.3.feed_forward.w2.weight",
    "model.language_model.layers.3.mlp.up_proj.weight": "language_model.model.layers.3.feed_forward.w3.weight",
    "model.language_model.layers.3.input_layernorm.weight": "language_model.model.layers.3.attention_norm.weight",
    "model.language_model.layers.3.post_attention_layernorm.weight": "language_model.model.layers.3.ffn_norm.weight",
}


@pytest.mark.parametrize("ours", TABLE | LLAMA)
def test_the_table_of_names(ours):
    """The official converters' table (tools/internvl_custom2hf.py; transformers' convert_internvl_weights_to_hf.py)."""
    assert official_name(ours, internlm2=True) == (TABLE | LLAMA)[ours]
    if ours in LLAMA:  # other language models keep their names
        own = ours.removeprefix("model.language_model.")
        assert official_name(ours, internlm2=False) == "language_model." + ("" if ours == own else "model.") + own


def test_a_plan_puts_query_key_and_value_in_this_order():
    at = "model.language_model.layers.0.self_attn."
    names = [f"{at}{part}_proj.weight" for part in "vkq"]
    assert plan(names, internlm2=True) == {WQKV: tuple(f"{at}{part}_proj.weight" for part in "qkv")}
    assert len(plan(names, internlm2=False)) == 3


@pytest.mark.parametrize(
    "ours", ["model.vision_tower.a", "model.multi_modal_projector.a", "model.language_model.a", "lm_head.a"]
)
def test_names_as_transformers_wrote_them_to_disk(ours):
    """Since 4.52 as in memory; before, and again since 5.0, with the language model whole."""
    older = ours.removeprefix("model.")
    older = older.replace("language_model.", "language_model.model.").replace("lm_head.", "language_model.lm_head.")
    assert canonical_name(ours) == canonical_name(older) == canonical_name(ours.removeprefix("model.")) == ours
