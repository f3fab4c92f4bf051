"""The chat template `internvl2_5` as Jinja, for whoever talks to a model folder with transformers, vLLM or the like.

Invariant: what it renders is what `encode_prompt` (template.py) tokenises: the same turns, the model's own system
prompt where a conversation brings none, a BOS where the tokenizer wants one. An image is one <IMG_CONTEXT> and a
newline; InternVLProcessor puts <img> and </img> around it and repeats it once for each token of the picture.
"""

import json
from typing import Any

from modeling.template import DEFAULT_SYSTEM

_MARKS = "<|im_start|>system\n", "<|im_end|>\n"


def chat_template(system: str | None = None, bos: bool = False) -> str:
    """system: the prompt of a conversation without one; None: the official one. bos: starts with the BOS token."""
    words = json.dumps(DEFAULT_SYSTEM if system is None else system, ensure_ascii=False)  # a literal of Jinja's too
    return (
        ("{{ bos_token }}" if bos else "")
        + "{%- if messages[0]['role'] != 'system' %}<|im_start|>system\n{{ " + words + " }}<|im_end|>\n{% endif -%}"
        "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{%- for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% elif part['type'] == 'text' %}{{ part['text'] }}"
        "{% else %}{{ raise_exception('parts of type image and text are known; show a video as its frames') }}"
        "{% endif %}{%- endfor %}{% endif %}<|im_end|>\n{% endfor -%}"
        "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}"
    )  # fmt: skip


def system_prompt(tokenizer: Any) -> str | None:
    """The system prompt that a tokenizer's own chat template puts first; None where it has none, or another form."""
    if not tokenizer.chat_template:
        return None
    text = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    _, start, rest = text.partition(_MARKS[0])
    system, end, _ = rest.partition(_MARKS[1])
    return system if start and end else None
