"""Export a trained stage in Hugging Face layout or in the official one, with what a stranger needs beside it.

A training stage already ends in Hugging Face layout (modeling/internvl.py); export checks every key against the
configuration and adds chat template and card. The official layout is modeling/weights.py's.
"""

import json
from pathlib import Path

from modeling.template import DEFAULT_SYSTEM
from modeling.weights import Layout, Source, open_source, write
from stages.io import StageIO
from stages.plan_packs import parent

# The official `internvl2_5` template in Jinja; a leading system message replaces the official system prompt.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}<|im_start|>system\n" + DEFAULT_SYSTEM + "<|im_end|>\n{% endif -%}"
    "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{%- for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{%- endfor %}{% endif %}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}"
)
USE = {
    "hf": "```python\nfrom transformers import AutoModelForImageTextToText, AutoTokenizer\n\n"
    'model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER")\n'
    'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n```',
    "official": "The folder has the layout of the official `internvl_chat` code (github.com/OpenGVLab/InternVL), whose "
    "`InternVLChatModel.from_pretrained` reads it.",
}


def export_folder(source: Source, folder: Path, layout: Layout) -> int:
    """Write a model folder for others to use; its number of parameters. Raises as `modeling.weights.write` does."""
    parameters = write(source, folder, layout)
    if layout == "hf" and source.tokenizer is not None:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return parameters


def export(io: StageIO) -> None:
    """The parent's model in the layout asked for, checked key by key, with the chat template and a model card."""
    trained = parent(io, "train")
    assert trained is not None, "the spec lets no export pass without a trained stage"
    folder, layout = io.scratch / "export", io.params.layout
    parameters = export_folder(open_source(trained.folder), folder, layout)
    (folder / "README.md").write_text(
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n\n"
        f"# {io.stage}\n\nAn InternVL-2.5-style model of {parameters:,} parameters, the result of stage "
        f"`{trained.name}` (fingerprint `{trained.fingerprint}`), trained with Stageline.\n\n{USE[layout]}\n\n"
        f"Training parameters:\n\n```json\n{json.dumps(trained.params, indent=1)}\n```\n"
    )
    io.log(f"exported {parameters:,} parameters of stage {trained.name}")
    io.complete(folder, {"stage": trained.name, "parameters": parameters, "layout": layout})
