"""The exported folder belongs to everyone: plain transformers loads it and answers as `stageline ask` does."""

import json
import subprocess
import sys

import torch
from harness import SMALL, Experiment
from safetensors.torch import load_file

# a stranger's program: transformers for the model, our tiles and template for the prompt, no other code of ours
STRANGER = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer
from modeling.template import encode_prompt
from modeling.tiles import split_image, to_pixels

folder, questions = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForImageTextToText.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
size = model.config.vision_config.image_size[0]
for text, pictures, max_tiles in questions:
    split = [split_image(Image.open(path).convert("RGB"), max_tiles, tile_size=size) for path in pictures]
    turns = [{"from": "human", "value": text}]
    ids = encode_prompt(turns, tokenizer, [len(tiles) for tiles in split], model.config.image_seq_length, system="")
    pixels = to_pixels([tile for tiles in split for tile in tiles])
    with torch.no_grad():
        out = model.generate(input_ids=torch.tensor([ids]), pixel_values=pixels, max_new_tokens=12, do_sample=False)
    print(json.dumps(tokenizer.decode(out[0, len(ids):], skip_special_tokens=True).strip()))
"""


def test_plain_transformers_answers_as_ask_does(undisturbed, data):
    meta = json.loads((data / "heldout.json").read_text())
    questions, asked = [], []
    for name, entry in meta.items():
        sample = json.loads((data / entry["annotation"]).read_text().splitlines()[0])
        pictures = sample["image"] if isinstance(sample["image"], list) else [sample["image"]]
        pictures = [str(data / entry["root"] / picture) for picture in pictures]
        text = sample["conversations"][0]["value"]
        per_picture = max(1, entry["max_dynamic_patch"] // len(pictures))
        questions.append((text, pictures, per_picture))
        arguments = [part for picture in pictures for part in ("--image", picture)]
        limit = str(entry["max_dynamic_patch"])
        done = undisturbed.command(
            "ask", "full_finetune", text, *arguments, "--max-tiles", limit, "--max-new-tokens", "12"
        )
        assert done.returncode == 0, (name, done.stderr)
        asked.append(done.stdout.rstrip("\n"))
    stranger = subprocess.run(
        [sys.executable, "-c", STRANGER, str(undisturbed.result("export")), json.dumps(questions)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert stranger.returncode == 0, stranger.stderr
    answers = [json.loads(line) for line in stranger.stdout.splitlines()]
    assert answers == asked
    assert any(asked), "an empty answer shows nothing"


# as on a machine that has none of this project
WITHOUT_US = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling", "stages", "orchestrator", "cluster"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


def test_the_program_of_the_model_card_answers_as_ask_does(undisturbed, data, tmp_path):
    """Word for word, but for the folder and the question, with the system prompt of training and tiles as in training;
    it imports nothing of this project."""
    entry = json.loads((data / "heldout.json").read_text())["heldout_row"]
    sample = json.loads((data / entry["annotation"]).read_text().splitlines()[0])
    (picture,) = sample["image"] if isinstance(sample["image"], list) else [sample["image"]]
    picture, text = data / entry["root"] / picture, sample["conversations"][0]["value"].replace("<image>", "").strip()
    folder = undisturbed.result("export")
    program = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    for old, new in (
        ('"THIS_FOLDER"', repr(str(folder))), ('"picture.png"', repr(str(picture))),
        ('"What is in the picture?"', repr(text)),
    ):  # fmt: skip
        assert program.count(old) == 1
        program = program.replace(old, new)
    stranger = subprocess.run(
        [sys.executable, "-c", WITHOUT_US + program], capture_output=True, text=True, cwd=tmp_path
    )
    assert stranger.returncode == 0, stranger.stderr
    asked = undisturbed.command("ask", "full_finetune", text, "--image", str(picture), "--max-new-tokens", "64")
    assert asked.returncode == 0, asked.stderr
    assert stranger.stdout == asked.stdout and asked.stdout.strip()


def test_the_card_has_the_figures_of_the_evaluation_it_needs(undisturbed):
    from stages.evaluate.figures import with_interval

    scores = json.loads((undisturbed.result("evaluate") / "scores.json").read_text())
    card = (undisturbed.result("export") / "README.md").read_text()
    assert scores and all(f"| {with_interval(row)} |" in card for row in scores.values())


def test_the_export_is_the_trained_model_with_what_a_stranger_needs(undisturbed):
    folder = undisturbed.result("export")
    assert undisturbed.weights("export") == undisturbed.weights("full_finetune")
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "README.md"}
    assert not [path for path in undisturbed.storage.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]


TRAINED_ON = (
    SMALL
    + """
name: cluster
storage: storage
seed: 0
model: {{folder: WHOLE}}
stages:
  mix_data: {{kind: prepare, data: mix}}
  full_finetune: {{needs: [mix_data], steps: 3, lr: 1e-9, drop_path: 0}}
"""
)


def test_another_experiment_trains_on_the_exported_folder(undisturbed, data, tmp_path):
    """Its first losses are those of a trained model, and with next to no learning rate it stays that model."""
    whole = undisturbed.result("export")
    experiment = Experiment(tmp_path / "on", data, TRAINED_ON.replace("WHOLE", str(whole)))
    experiment.run()
    before, after = (load_file(folder / "model.safetensors") for folder in (whole, experiment.result("full_finetune")))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)
    assert experiment.losses().mean() < 0.8 * undisturbed.losses()[:3].mean()
