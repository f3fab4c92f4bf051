"""Which modules train, and that the table says it."""

import pytest

from modeling.freeze import PREFIXES, freeze_table, module_of, set_trainable


@pytest.mark.parametrize("train", [(), ("mlp",), ("vit", "mlp"), ("language",), ("vit", "mlp", "language")])
def test_the_named_modules_train_and_no_other(micro, train):
    model = micro.build()
    set_trainable(model, train)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (module_of(name) in train), name
    table = freeze_table(model)
    rows = {line.split()[0]: line.split() for line in table.splitlines()}
    for module in PREFIXES:
        assert rows[module][-1] == ("trains" if module in train else "frozen")
        assert rows[module][2] == (rows[module][1] if module in train else "0")
    assert rows["all"][1] == f"{sum(p.numel() for p in model.parameters()):,}"
    assert rows["all"][2] == f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}"


def test_every_parameter_has_a_module_and_every_module_parameters(micro):
    assert {module_of(name) for name, _ in micro.build().named_parameters()} == set(PREFIXES)
    with pytest.raises(KeyError, match="stranger"):
        module_of("stranger.weight")


def test_a_module_that_trains_in_part_is_shouted(micro):
    model = micro.build()
    set_trainable(model, ("mlp",))
    model.lm_head.weight.requires_grad_(True)
    assert "PARTLY FROZEN" in freeze_table(model)
