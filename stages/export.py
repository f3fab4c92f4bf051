"""Export a trained stage as a Hugging Face folder: model, tokenizer, processor JSON, chat template, card.

A training stage already ends in this layout (modeling/internvl.py); export checks that it loads without a missing or
unexpected key and adds what a stranger needs beside it.
"""

import json
import shutil

from modeling.template import DEFAULT_SYSTEM
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


def export(io: StageIO) -> None:
    """Copy the parent's model, prove that it loads, add the chat template and a model card."""
    from modeling.internvl import load_model

    trained = parent(io, "train")
    assert trained is not None, "the spec lets no export pass without a trained stage"
    model, _ = load_model(trained.folder)
    parameters = sum(p.numel() for p in model.parameters())
    folder = io.scratch / "export"
    shutil.copytree(trained.folder, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "README.md").write_text(
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n\n"
        f"# {io.stage}\n\nAn InternVL-2.5-style model of {parameters:,} parameters, the result of stage "
        f"`{trained.name}` (fingerprint `{trained.fingerprint}`), trained with Stageline.\n\n"
        "```python\nfrom transformers import AutoModelForImageTextToText, AutoTokenizer\n\n"
        'model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n```\n\n'
        f"Training parameters:\n\n```json\n{json.dumps(trained.params, indent=1)}\n```\n"
    )
    io.log(f"exported {parameters:,} parameters of stage {trained.name}")
    io.complete(folder, {"stage": trained.name, "parameters": parameters, "layout": io.params.layout})
