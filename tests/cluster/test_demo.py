"""The demo page as a person uses it: a real browser, pictures, a question, samples, their vote; and what goes wrong.

Needs what is no dependency of the project: gradio (orchestrator/demo/requirements.txt), playwright and a Chromium.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlparse

import debian
import pytest
from PIL import Image, ImageDraw

pytest.importorskip("gradio", reason="gradio is not installed (orchestrator/demo/requirements.txt)")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

PATIENCE_S = 240
SHOTS = os.environ.get("STAGELINE_SCREENSHOTS")  # a folder, to look at them


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An exported folder of an untrained model."""
    from modeling.internvl import build_model, save_model
    from modeling.presets import resolve
    from modeling.weights import open_source
    from stages.export import export_folder
    from stages.params import ModelParams

    if given := os.environ.get("STAGELINE_DEMO_FOLDER"):  # a trained one, to look at
        return Path(given)
    place = tmp_path_factory.mktemp("model")
    resolved = resolve(ModelParams(vision="tiny-vit", language="tiny-qwen2"))
    tokenizer = resolved.tokenizer()
    save_model(build_model(resolved, tokenizer, 0), tokenizer, place / "trained", resolved.tile_size)
    export_folder(open_source(place / "trained"), place / "exported", "hf", "")
    return place / "exported"


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    """(address, process, the folder of its temporary files) of a running demo."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    place = tmp_path_factory.mktemp("served")
    command = [sys.executable, "-m", "orchestrator.cli.main", "demo", str(folder), "--port", str(port)]
    environment = os.environ | {"TMPDIR": str(place), "PYTHONUNBUFFERED": "1"}
    with (place / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=Path(__file__).parents[2],
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    until = time.monotonic() + PATIENCE_S
    while "Ctrl-C" not in (place / "output.txt").read_text():
        assert process.poll() is None and time.monotonic() < until, (place / "output.txt").read_text()
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}", process, place
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=debian.chromium(), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, served):
    """A fresh page. At the end: no error of its scripts, no word from its console, no request beyond this machine."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(1000 * PATIENCE_S)
    errors, hosts = [], set()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: hosts.add(urlparse(request.url).hostname))
    page.goto(served[0])
    page.locator("#ask").wait_for()
    yield page
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{time.monotonic_ns()}.png", full_page=True)
    page.close()
    assert errors == [] and hosts - {None} == {"127.0.0.1"}


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "digits.png"
    image = Image.new("RGB", (96, 32))
    for i, digit in enumerate("417"):
        ImageDraw.Draw(image).text((32 * i + 8, 2), digit, fill="white", font_size=26)
    image.save(path)
    return path


def upload(page, *paths):
    """And wait until the pictures are shown."""
    page.locator("#pictures input[type=file]").set_input_files([str(path) for path in paths])
    page.locator("#pictures .gallery-item, #pictures .preview").first.wait_for()


def said(page, question):
    """The answer's place after asking this."""
    page.locator("#question textarea").fill(question)
    page.locator("#ask").click()
    page.locator("#answer .stage-answer, #answer .stage-error").wait_for()
    return page.locator("#answer")


def test_a_picture_is_asked_step_by_step_and_the_vote_of_eight_is_shown(page, picture):
    upload(page, picture)
    page.get_by_label("step by step").check()
    page.locator("#samples input[type=number]").fill("8")
    page.locator("#samples input[type=number]").press("Tab")
    page.get_by_role("button", name="More").click()
    page.get_by_label("Tokens of an answer").fill("24")
    page.get_by_label("Tokens of an answer").press("Tab")
    answer = said(page, "Read the digits in the image from left to right.")
    assert "of 8 votes" in answer.inner_text()
    page.locator("#votes tr").first.wait_for()
    rows = page.locator("#votes tr").all()
    counts = [int(row.locator("td").last.inner_text()) for row in rows]
    assert sum(counts) == 8
    read = [row for row in rows if "stage-unread" not in (row.get_attribute("class") or "")]
    if read:
        assert answer.locator(".stage-answer").inner_text() == read[0].locator("td").first.inner_text()
        assert f"{counts[0]} of 8 votes" in answer.inner_text()
    widths = [row.locator(".stage-bar").bounding_box()["width"] for row in rows]
    assert all(abs(a * counts[0] - widths[0] * b) < 2 * counts[0] for a, b in zip(widths, counts, strict=True))
    responses = page.locator("#responses details")
    responses.first.wait_for()
    assert responses.count() == 8 and not responses.first.locator("pre").is_visible()
    responses.first.locator("summary").click()
    responses.first.locator("pre").wait_for()


def test_a_question_alone_has_one_greedy_answer(page):
    answer = said(page, "two plus two")
    assert answer.locator(".stage-error").count() == 0
    page.locator("#responses details").first.wait_for()
    assert page.locator("#responses details").count() == 1 and page.locator("#responses pre").is_visible()
    assert page.locator("#votes tr").count() == 0


def test_mistakes_are_one_message_in_the_answers_place(page, picture):
    assert "there is no question" in said(page, "  ").inner_text()
    upload(page, picture, picture)
    found = said(page, "<image> <image> <image> which?")
    page.get_by_text("more placeholders than images").wait_for()
    assert "3 <image>" in found.inner_text() and "one <image> for each picture" in found.inner_text()
    assert page.locator("#responses details").count() == 0


def test_a_file_that_is_no_picture_is_named(browser, served, tmp_path):
    """The browser itself grumbles about such a picture, so its console is not looked at."""
    (tmp_path / "letter.png").write_bytes(b"no picture")
    page = browser.new_page()
    page.set_default_timeout(1000 * PATIENCE_S)
    page.goto(served[0])
    upload(page, tmp_path / "letter.png")
    text = said(page, "What is it?").inner_text()
    page.close()
    assert "letter.png: cannot be read: not an image of a known format" in text


def test_it_is_served_to_this_machine_alone_and_ends_on_sigterm(served):
    """The last one of this file: afterwards nothing is served, and uploads are gone."""
    address, process, place = served
    port = urlparse(address).port
    ours = subprocess.run(["ss", "-Hltn"], capture_output=True, text=True) if shutil.which("ss") else None
    if ours is not None:
        listening = [line.split()[3] for line in ours.stdout.splitlines()]
        assert [one for one in listening if one.endswith(f":{port}")] == [f"127.0.0.1:{port}"]
    process.terminate()
    assert process.wait(timeout=PATIENCE_S) == 0  # the interpreter takes torch down in seconds, on a busy machine more
    assert [path.name for path in place.iterdir()] == ["output.txt"]
    assert "Traceback" not in (place / "output.txt").read_text()
