"""`stageline import` and `stageline export`: exit codes, one message for a mistake, what is printed."""

import json
import shutil

import pytest
from conftest import OFFICIAL
from safetensors.torch import load_file, save_file

from orchestrator.cli.main import main


@pytest.fixture
def run(capsys):
    """run(words...) -> (exit code, stdout, stderr); a traceback is never shown."""

    def call(*words):
        code = main([str(word) for word in words])
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        # the library's bars, which the command turns off where it is the first to import it
        lines = told.err.replace("\r", "\n").splitlines(keepends=True)
        err = "".join(line for line in lines if line.strip() and "it/s]" not in line)
        return code, told.out, err

    return call


@pytest.fixture
def bare(tmp_path):
    """The official tiny checkpoint without its tokenizer."""
    shutil.copytree(OFFICIAL, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "case*"))
    return tmp_path / "bare"


def test_out_and_in_again(run, tmp_path):
    from modeling.internvl import load_model

    code, out, err = run("import", OFFICIAL, "--output", tmp_path / "hf")
    assert (code, err) == (0, "")
    assert out == f"imported 276,032 parameters (official layout) into {tmp_path / 'hf'}\n"
    assert load_model(tmp_path / "hf")[1].convert_tokens_to_ids("<IMG_CONTEXT>") == 262
    assert not (tmp_path / "hf" / "chat_template.jinja").exists()
    code, out, err = run("export", tmp_path / "hf", "--layout", "official", "--output", tmp_path / "deep" / "official")
    assert (code, err) == (0, "") and "exported 276,032 parameters (official layout)" in out
    written, given = (load_file(folder / "model.safetensors") for folder in (tmp_path / "deep" / "official", OFFICIAL))
    assert written.keys() == given.keys() and all((written[name] == given[name]).all() for name in given)
    code, _, _ = run("export", tmp_path / "deep" / "official", "--layout", "hf", "--output", tmp_path / "back")
    assert code == 0 and (tmp_path / "back" / "chat_template.jinja").is_file()


def test_no_tokenizer_is_a_warning(run, bare, tmp_path):
    from modeling.internvl import load_model

    code, _, err = run("import", bare, "--output", tmp_path / "hf", "--image-token-id", 262)
    assert code == 0 and err.startswith(f"stageline: warning: {bare}: no tokenizer: token 262 stands for <IMG_CONTEXT>")
    model, tokenizer = load_model(tmp_path / "hf")
    assert tokenizer is None and model.config.image_token_id == 262
    code, _, err = run("import", bare, "--output", tmp_path / "other")
    assert code == 0 and "token 151667" in err and "--image-token-id" in err
    code, _, err = run("import", bare, "--output", tmp_path / "third", "--tokenizer", OFFICIAL)
    assert (code, err) == (0, "") and load_model(tmp_path / "third")[1] is not None
    code, _, err = run("import", OFFICIAL, "--output", tmp_path / "no", "--tokenizer", bare)
    assert code == 2 and "the folder has no tokenizer" in err


def test_keys_that_do_not_fit_are_listed(run, bare, tmp_path):
    weights = load_file(bare / "model.safetensors")
    lost = [name for name in weights if name.startswith("mlp1.3")]
    for name in lost:
        del weights[name]
    save_file(weights | {"stranger": weights["mlp1.0.bias"].clone()}, bare / "model.safetensors")
    code, out, err = run("import", bare, "--output", tmp_path / "hf", "--image-token-id", 262)
    assert code == 2 and out == ""
    told = f"{bare}: weights do not fit the configuration: 2 missing keys: mlp1.3.bias, mlp1.3.weight; "
    assert told + "1 unexpected keys: stranger →" in err
    assert not (tmp_path / "hf").exists()


def refuse_absent(folder):
    shutil.rmtree(folder)


def refuse_json(folder):
    (folder / "config.json").write_text("{")


def refuse_value(folder):
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["hidden_size"] = "large"
    (folder / "config.json").write_text(json.dumps(config))


def refuse_heads(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = 5
    (folder / "config.json").write_text(json.dumps(config))


def refuse_damage(folder):
    (folder / "model.safetensors").write_bytes(b"not safetensors")


def refuse_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def refuse_empty(folder):
    (folder / "model.safetensors").unlink()


def refuse_index(folder):
    (folder / "model.safetensors.index.json").write_text("[]")


def refuse_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (refuse_absent, "config.json: cannot be read"),
        (refuse_json, "config.json: cannot be read"),
        (refuse_value, "config.json cannot be used"),
        (refuse_heads, "the configuration makes no model"),
        (refuse_damage, "the weights cannot be read"),
        (refuse_pickle, "can run code"),
        (refuse_empty, "the folder has no model.safetensors"),
        (refuse_index, "is not a JSON object"),
        (refuse_tokenizer, "the tokenizer cannot be read"),
    ],
)
@pytest.mark.parametrize("verb", [("import",), ("export", "--layout", "official")])
def test_a_damaged_folder_is_one_message(run, bare, tmp_path, verb, damage, named):
    damage(bare)
    code, out, err = run(*verb, bare, "--output", tmp_path / "out")
    err = "".join(line for line in err.splitlines(keepends=True) if "warning" not in line)
    assert code == 2 and out == "" and named in err and str(bare) in err
    assert err.startswith("stageline: ") and err.count("stageline: ") == 1
    assert not (tmp_path / "out").exists()


def test_parts(run, tmp_path):
    from modeling.internvl import load_model

    code, out, err = run("import", "--vision", "micro-vit", "--language", "micro-qwen2", "--output", tmp_path / "hf")
    assert (code, err) == (0, "") and "(separate parts)" in out
    assert load_model(tmp_path / "hf")[1] is not None
    code, _, err = run("import", "--vision", "absent", "--language", "micro-qwen2", "--output", tmp_path / "no")
    assert code == 2 and "model.vision" in err and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "takes one model folder"),
        (["--vision", "micro-vit"], "takes one model folder"),
        ([OFFICIAL, "--vision", "micro-vit", "--language", "micro-qwen2"], "takes one model folder"),
        (["--vision", "micro-vit", "--language", "micro-qwen2", "--image-token-id", 3], "--image-token-id is for a"),
    ],
)
def test_what_import_takes(run, tmp_path, words, named):
    code, _, err = run("import", *words, "--output", tmp_path / "out")
    assert code == 2 and named in err and not (tmp_path / "out").exists()


def test_an_output_that_holds_something_is_left_alone(run, tmp_path):
    (tmp_path / "note").write_text("mine")
    code, _, err = run("import", OFFICIAL, "--output", tmp_path)
    assert code == 2 and "there is something already" in err and "name a new folder" in err
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
