r"""The words behind a question that ask for a form of answer: those of the official code, or one's own.

Invariant: a prompt's own `suffix` is taken as it is, also the empty one; otherwise the words follow from the prompt's
name (direct, cot), the kind of question and its language. Words for a direct answer that the data already have behind
their questions are not said twice, and not to somebody who is to think first.

Sources. Direct: eval/mmmu/evaluate_mmmu.py and tools/reasoning_data_pipeline/utils/constants.py VALID_INSTRUCTIONS; in
Chinese VLMEvalKit's vlm/internvl/utils.py and its twins. Step by step: INSTRUCTION_BOXED_EN and _ZH of constants.py,
behind the question; for choices `build_mcq_cot_prompt` of VLMEvalKit, which has the paper's words (Fig. 9, recipe
§8.1). The Chinese form for choices and the Chinese sentence of grounding are ours, after the English ones. Grounding:
eval/refcoco/evaluate_grounding.py.
"""

from modeling.errors import UserError
from stages.evaluate.items import AnswerKind, Item
from stages.evaluation import Prompt

DIRECT_CHOICE = {
    "en": "Answer with the option's letter from the given choices directly.",
    "zh": "请直接回答选项字母。",
}
DIRECT_OPEN = {"en": "Answer the question using a single word or phrase.", "zh": "请用单个词或短语回答问题。"}
_TAIL_EN = (
    "If you are uncertain or the problem is too complex, make a reasoned guess based on the information provided. "
    "Avoid repeating steps indefinitely—provide your best guess even if unsure. Think step by step logically, "
    "considering all relevant information before answering."
)
_TAIL_ZH = (
    "如果你不确定答案或问题过于复杂，请基于已有信息做出有理有据的猜测。避免无限重复推理步骤——即使不完全确定，也请给出你认为最"
    "合理的答案。请一步一步进行逻辑思考，充分考虑所有相关信息后再作答。"
)
COT_CHOICE = {
    "en": "Answer the preceding multiple choice question. The last line of your response should follow this format: "
    "'Answer: \\boxed{$LETTER}' (without quotes), where LETTER is one of the options. " + _TAIL_EN,
    "zh": "请回答上述选择题。你的回答最后一行应遵循以下格式：“答案：\\boxed{$LETTER}”（不包含引号），其中“LETTER”是"
    "选项字母之一。" + _TAIL_ZH,
}
COT_OPEN = {
    "en": "Answer the preceding question. The last line of your response should follow this format: "
    "'Answer: \\boxed{$FINAL_ANSWER}' (without quotes), where 'FINAL_ANSWER' is your conclusion based on the reasoning "
    "provided. " + _TAIL_EN,
    "zh": "请回答上述问题。你的回答最后一行应遵循以下格式：“答案：\\boxed{$FINAL_ANSWER}”（不包含引号），"
    "其中“FINAL_ANSWER”是你根据推理得出的最终结论。" + _TAIL_ZH,
}
GROUNDING = {
    "en": "Please provide the bounding box coordinate of the region this sentence describes: <ref>{}</ref>",
    "zh": "请给出这句话所描述的区域的边界框坐标：<ref>{}</ref>",
}
_SAID = (*DIRECT_CHOICE.values(), *DIRECT_OPEN.values())


def asked(item: Item, name: str, prompt: Prompt) -> str:
    """The human turn: the item's question, and behind it, on a line of its own, the words of this prompt."""
    if prompt.suffix is not None:
        return "\n".join(filter(None, (item.question, prompt.suffix)))
    question, words = item.question, official(name, item.kind, item.language)
    if ending := next((said for said in _SAID if question.endswith(said)), None):
        question = question.removesuffix(ending).rstrip()
    return "\n".join(filter(None, (question, words)))


def official(name: str, kind: AnswerKind, language: str) -> str:
    """The official words of a prompt; none for a direct question about a region, which says itself what it wants.

    Raises UserError where no words belong to the name.
    """
    if name not in ("direct", "cot"):
        raise UserError(
            "has no words of its own, and only `direct` and `cot` have official ones", where=f"prompts.{name}",
            remedy="give it a `suffix:`",
        )  # fmt: skip
    if name == "cot":
        return (COT_CHOICE if kind == "choice" else COT_OPEN)[language]
    if kind == "box":
        return ""
    return (DIRECT_CHOICE if kind == "choice" else DIRECT_OPEN)[language]


def grounding(sentence: str, language: str) -> str:
    """The question for the region that a sentence describes; one that has `<ref>` already is one."""
    return sentence if "<ref>" in sentence else GROUNDING[language].format(sentence)
