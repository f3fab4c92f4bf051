"""The verb `ask`: a video is shown by its middle frames, and what is no video is told in one message."""

import pytest
from videos import apart, digit_frames, encode, encode_gif

from modeling import generate
from modeling.internvl import save_model
from modeling.tiles import frame_indices, split_image
from orchestrator.cli.main import main
from orchestrator.fingerprint import fingerprint
from orchestrator.ledger import Ledger
from orchestrator.plan import record_mapping, stage_prefix
from orchestrator.store import FileStore

SPEC = """name: x
storage: runs
model: {vision: tiny-vit, language: tiny-qwen2}
data: {a: {meta: a.json}}
stages:
  a_data: {kind: prepare, data: a, min_frames: 3, max_frames: 5}
  mlp_warmup: {needs: [a_data], lr: 1e-3, global_batch: 4, steps: 10}
"""


@pytest.fixture(scope="module")
def folder(micro, tmp_path_factory):
    """An experiment whose training stage is completed, with a micro model as its result."""
    folder = tmp_path_factory.mktemp("ask")
    (folder / "x.yaml").write_text(SPEC)
    store, identity = FileStore(folder / "runs"), {"kind": "train"}
    prefix = stage_prefix("train", fingerprint(identity))
    record_mapping(store, "x", "mlp_warmup", identity, fingerprint(identity))
    ledger = Ledger(store, prefix)
    token = ledger.start_attempt(ledger.claim({"host": "h"}), 1)
    result = f"{prefix}/result/e0001a0001"
    save_model(micro.build(seed=1), micro.tokenizer, folder / "runs" / result, 32)
    ledger.append("completed", token, manifest={"folder": result, "files": []}, summary={}, train_s=1.0)
    return folder


@pytest.fixture
def asked(monkeypatch):
    """The questions that reach the model, which answers them."""
    questions, original = [], generate.answer

    def noting(model, tokenizer, given, **options):
        questions.extend(given)
        return original(model, tokenizer, given, **options)

    monkeypatch.setattr(generate, "answer", noting)
    return questions


def ask(folder, *arguments):
    return main(["ask", str(folder / "x.yaml"), "mlp_warmup", "Which digits?", *map(str, arguments)])


@pytest.mark.parametrize(("arguments", "shown"), [((), 5), (("--frames", 2), 2), (("--frames", 30), 30)])
@pytest.mark.parametrize("make", [encode, encode_gif])
def test_a_video_is_shown_by_its_middle_frames(folder, asked, capsys, make, arguments, shown):
    digits = digit_frames(24)
    (folder / "v").write_bytes(make(digits))
    assert ask(folder, "--video", folder / "v", "--max-new-tokens", 3, *arguments) == 0
    (question,) = asked
    assert question.video and len(question.images) == shown and capsys.readouterr().out.count("\n") == 1
    for image, i in zip(question.images, frame_indices(shown, 24), strict=True):
        assert apart(image, split_image(digits[i], 1, 32)[0]) < 6


def test_what_is_no_video_is_told_before_the_model_is_loaded(folder, capsys, monkeypatch):
    monkeypatch.setattr("modeling.internvl.load_model", lambda *_: pytest.fail("it was loaded"))
    (folder / "text").write_bytes(b"no video" * 1000)
    for path in (folder / "text", folder / "absent", folder):
        assert ask(folder, "--video", path) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"stageline: {path}: cannot be read: ") and told.count("\n") == 1


@pytest.mark.parametrize("arguments", [("--frames", 3), ("--frames", 0, "--video", "v")])
def test_a_number_of_frames_needs_a_video(folder, capsys, arguments):
    assert ask(folder, *arguments) == 2
    assert "--frames" in capsys.readouterr().err


def test_pictures_beside_a_video_are_refused(folder, capsys):
    with pytest.raises(SystemExit) as caught:
        ask(folder, "--video", "v", "--image", "a.png")
    assert caught.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_pictures_are_asked_as_before(folder, asked):
    digits = digit_frames(2)
    for i, digit in enumerate(digits):
        digit.save(folder / f"{i}.png")
    assert ask(folder, "--image", folder / "0.png", "--image", folder / "1.png", "--max-new-tokens", 3) == 0
    assert not asked[0].video and [apart(*pair) for pair in zip(asked[0].images, digits, strict=True)] == [0, 0]
    assert asked[0].conversation[0]["value"].startswith("Image-1: <image>\nImage-2: <image>\n")
