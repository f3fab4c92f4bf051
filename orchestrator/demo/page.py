"""The page of `stageline demo`, in Gradio: pictures, a question, a form of answer, k samples and their vote.

Invariants: it is served from this machine alone (no analytics, no share, fonts of the system: no request leaves), on
loopback unless asked otherwise; what a model or a user wrote is shown as text, never as HTML; a user's mistake is one
message in the place of the answer; uploads end with the server.
"""

import html
import importlib
import importlib.util
import os
import signal
import socket
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from modeling.errors import UserError
from orchestrator.demo.asking import MOST, Reply, Served, ask

NEEDS = Path(__file__).with_name("requirements.txt")
LABELS = {"direct": "direct", "cot": "step by step"}
KINDS = [("a text", "text"), ("a number", "number"), ("a letter", "choice"), ("yes or no", "yes_no")]
CSS = """
.stage-answer {font-size: 1.6rem; font-weight: 600; overflow-wrap: anywhere; margin: .2rem 0}
.stage-note {opacity: .75; margin: .2rem 0}
.stage-error {border-left: 4px solid #c2410c; padding: .4rem .8rem; overflow-wrap: anywhere}
.stage-votes {width: 100%; border-collapse: collapse; table-layout: fixed; border: 0 !important}
.stage-votes tr {border: 0 !important}
.stage-votes td {padding: .25rem .5rem .25rem 0; vertical-align: middle; border: 0 !important}
.stage-votes td:first-child {width: 40%; overflow-wrap: anywhere}
.stage-votes td:last-child {width: 4.5rem; text-align: right; font-variant-numeric: tabular-nums}
.stage-bar {display: block; height: .9rem; border-radius: 2px; background: var(--color-accent)}
.stage-unread .stage-bar {background: var(--border-color-primary)}
.stage-responses details {border-bottom: 1px solid var(--border-color-primary); padding: .3rem 0}
.stage-responses pre {white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0; font-size: .9rem}
"""


def build(served: Served) -> Any:
    """The page (gradio.Blocks), not served yet."""
    gr = _gradio()

    def asked(gallery, question, form, samples, temperature, kind, longest, seed):
        try:
            found = ask(
                served, question or "", [Path(path) for path, _ in gallery or ()], form=form, kind=kind,
                samples=int(samples), temperature=float(temperature), max_new_tokens=int(longest or 0) or None,
                seed=int(seed or 0),
            )  # fmt: skip
        except UserError as error:
            return f'<div class="stage-error" role="alert">{html.escape(str(error))}</div>', "", ""
        return answer_html(found), votes_html(found), responses_html(found)

    forms = [(LABELS.get(name, name), name) for name in served.forms]
    with gr.Blocks(title=f"Stageline: {served.title}", analytics_enabled=False) as page:
        gr.HTML(f"<h1>{html.escape(served.title)}</h1>")
        with gr.Row():
            with gr.Column():
                pictures = gr.Gallery(
                    label="Pictures (or none)", file_types=["image"], sources=["upload", "clipboard"], columns=3,
                    height=240, object_fit="contain", fit_columns=False, buttons=[], elem_id="pictures",
                )  # fmt: skip
                question = gr.Textbox(label="Question", lines=2, elem_id="question")
                form = gr.Radio(forms, value=forms[0][1], label="Answer", elem_id="form")
                samples = gr.Slider(1, MOST, value=1, step=1, label="Samples", info="1 is the greedy answer",
                                    elem_id="samples")  # fmt: skip
                temperature = gr.Slider(0.1, 1.5, value=0.7, step=0.05, label="Temperature", info="of several samples")
                with gr.Accordion("More", open=False):
                    kind = gr.Radio(KINDS, value="text", label="Votes are on", elem_id="kind")
                    longest = gr.Number(0, precision=0, minimum=0, label="Tokens of an answer", info="0: by its form")
                    seed = gr.Number(0, precision=0, minimum=0, label="Seed")
                button = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column():
                answer = gr.HTML('<p class="stage-note">The answer appears here.</p>', elem_id="answer")
                votes = gr.HTML(elem_id="votes")
                responses = gr.HTML(elem_id="responses")
        inputs = [pictures, question, form, samples, temperature, kind, longest, seed]
        gr.on([button.click, question.submit], asked, inputs, [answer, votes, responses], api_name=False,
              api_visibility="private")  # fmt: skip
    return page


def answer_html(reply: Reply) -> str:
    if reply.answer is None:
        said = '<p class="stage-answer">–</p><p class="stage-note">No answer could be read.</p>'
    else:
        said = f'<p class="stage-answer">{html.escape(reply.answer)}</p>'
    n = len(reply.responses)
    if n == 1:
        return said
    votes = f"{reply.votes[0][1]} of {n} votes" if reply.votes else f"0 of {n} votes"
    unread = f", {reply.unreadable} could not be read" if reply.unreadable else ""
    return f'{said}<p class="stage-note">{votes}{unread}</p>'


def votes_html(reply: Reply) -> str:
    """A bar for each answer; nothing for a single sample."""
    n = len(reply.responses)
    if n == 1:
        return ""
    rows = [(answer, votes, "") for answer, votes in reply.votes]
    rows += [("could not be read", reply.unreadable, "stage-unread")] * bool(reply.unreadable)
    lines = "".join(
        f'<tr class="{mark}"><td>{html.escape(answer)}</td>'
        f'<td><span class="stage-bar" style="width:{100 * votes / n:.1f}%"></span></td><td>{votes}</td></tr>'
        for answer, votes, mark in rows
    )
    return f'<table class="stage-votes"><tbody>{lines}</tbody></table>'


def responses_html(reply: Reply) -> str:
    """Every response, folded away where there are several."""
    n, out = len(reply.responses), []
    for i, its in enumerate(reply.responses):
        answer = "could not be read" if its.answer is None else html.escape(its.answer)
        cut = ", cut at its limit" if its.cut else ""
        tokens = f"{its.tokens} token{'s' if its.tokens != 1 else ''}"
        out.append(
            f"<details{' open' if n == 1 else ''}><summary>{f'{i + 1}: {answer}' if n > 1 else 'Response'} "
            f"({tokens}{cut})</summary><pre>{html.escape(its.text)}</pre></details>"
        )
    return f'<div class="stage-responses">{"".join(out)}</div>'


def serve(served: Served, host: str, port: int) -> None:
    """Serves the page until SIGTERM or Ctrl-C. Raises UserError where gradio is missing or the port is taken."""
    check_library()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with TemporaryDirectory() as uploads:
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False"}
        os.environ.pop("GRADIO_ALLOWED_PATHS", None)  # it would serve folders that nobody asked to be served
        gr = _gradio()  # which reads these when it is imported

        page = build(served)
        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        _free(host, port)
        page.queue(default_concurrency_limit=1)  # one model, one question at a time
        page.launch(
            server_name=host, server_port=port, share=False, inbrowser=False, quiet=True, prevent_thread_lock=True,
            css=CSS, theme=gr.themes.Default(**fonts), footer_links=[], run_history=False, ssr_mode=False, pwa=False,
            mcp_server=False, enable_monitoring=False, max_file_size="50mb",
        )  # fmt: skip
        print(f"{served.title} at http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)", flush=True)
        ended.wait()
        page.close(verbose=False)


def _free(host: str, port: int) -> None:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family):
            pass
    except (OSError, OverflowError) as error:
        raise UserError(f"{host}:{port} cannot be served: {error}", remedy="name another with --port") from error


def check_library() -> None:
    """Raises UserError where gradio is not installed; does not import it."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs gradio, which is not installed", remedy=f"pip install --no-deps -r {NEEDS}")


def _gradio() -> Any:
    """No dependency of the project, so unknown to its type checker."""
    return importlib.import_module("gradio")
