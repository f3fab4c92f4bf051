"""Who answers the questions of scoring.py: a language model of this process (here), or an endpoint (endpoint.py).

Invariant: an answer is given as soon as it is there, so that what fails after it cannot lose it. A prompt that alone
cannot be answered has the answer "", and stops nobody. Nothing that comes with a model is run: safetensors, GGUF and
JSON are read, templates in the library's sandbox.
"""

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from modeling.digests import language_digest
from modeling.errors import CheckpointError, UserError
from stages.curation import START, LocalModel, Scores
from stages.prepare.endpoint import PROBE, EndpointScorer
from stages.prepare.scoring import CUT, ScoreCache, Scored, Scorer, Text, score_samples

log = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def build_scorer(params: Scores) -> Scorer:
    """The scorer of this process; a local model is loaded when it is first asked. Raises UserError."""
    if params.local is not None:
        return LocalScorer(params.local)
    assert params.endpoint is not None  # one of both, by its validator
    return EndpointScorer(params.endpoint)


class Scoring:
    """Built once per process and called with batches, as pools of actors want it."""

    def __init__(self, params: Scores, cache: ScoreCache):
        self.params, self.cache, self.scorer = params, cache, build_scorer(params)

    def __call__(self, samples: Sequence[Text]) -> list[Scored]:
        return score_samples(samples, self.params, self.scorer, self.cache)


class LocalScorer(Scorer):
    """Greedy answers in batches padded on the left, longest prompts first: what does not fit memory fails at once."""

    def __init__(self, params: LocalModel):
        self.params, self.path = params, Path(params.model)
        digest = language_digest(self.path)
        if digest is None:
            raise UserError(
                "no language model is there", where=f"curate.scores.local.model: {self.path}",
                remedy="give a folder in Hugging Face layout (config.json, safetensors, tokenizer) or a .gguf file",
            )  # fmt: skip
        self.identity = {"local": digest, **params.identity()}
        self._model: Any = None

    def answers(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        if not prompts:
            return
        if self._model is None:
            self._load()
        room = self._room()
        encoded = [self._encode(prompt) for prompt in prompts]
        order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]), reverse=True)
        too_long = [index for index in order if room is not None and len(encoded[index]) > room]
        if too_long:
            log.warning(
                "%s: %d of %d prompts have no answer: they have up to %d tokens, the model sees %s of a prompt; "
                "curate.scores.max_characters makes them shorter",
                self.path, len(too_long), len(prompts), len(encoded[too_long[0]]), room,
            )  # fmt: skip
        yield from ((index, "") for index in too_long)
        order = order[len(too_long) :]
        for start in range(0, len(order), self.params.batch):
            batch = order[start : start + self.params.batch]
            yield from zip(batch, self._generate([encoded[index] for index in batch]))

    def _load(self) -> None:
        import torch
        from transformers import GenerationConfig
        from transformers.utils import logging as library

        from modeling.generate import device

        library.disable_progress_bar()
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.params.precision]
        model, self._tokenizer = (_from_gguf if self.path.is_file() else _from_folder)(self.path, dtype)
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        ends = {self._tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        pad = self._tokenizer.pad_token_id
        self._ends, self._pad = sorted(ends), pad if pad is not None else min(ends, default=0)
        # the model's own settings may sample or punish repeated tokens
        model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=self.params.max_new_tokens, eos_token_id=self._ends or None,
            pad_token_id=self._pad,
        )  # fmt: skip
        self._before, self._after = self._frame()
        self._model = model.to(device()).eval()

    def _frame(self) -> tuple[list[int], list[int]]:
        """The ids around a prompt: the chat template's, where there is one."""
        if not self._tokenizer.chat_template:
            return self._tokenizer("").input_ids, self._tokenizer(f"\n{START}", add_special_tokens=False).input_ids
        mark = "\ufff0PROMPT\ufff0"
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        before, _, after = text.partition(mark)
        ids = self._tokenizer([before, after + START], add_special_tokens=False).input_ids
        return ids[0], ids[1]

    def _encode(self, prompt: str) -> list[int]:
        # what looks like a special token inside a sample is text
        ids = self._tokenizer(prompt, add_special_tokens=False, split_special_tokens=True).input_ids
        return [*self._before, *ids, *self._after]

    def _room(self) -> int | None:
        """Tokens that a prompt may have; None: any number. Raises UserError where none fits."""
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if context is None:
            return None
        room, least = context - self.params.max_new_tokens, len(self._encode(PROBE))
        if room < least:
            raise UserError(
                f"the model sees {context} tokens: an answer of {self.params.max_new_tokens} leaves {room}, and the "
                f"shortest prompt has {least}", where=f"curate.scores.local: {self.path}",
                remedy="lower max_new_tokens or take a model with a longer context",
            )  # fmt: skip
        return room

    def _generate(self, batch: list[list[int]]) -> list[str]:
        import torch

        longest = max(map(len, batch))
        where = self._model.device
        input_ids = torch.tensor([[self._pad] * (longest - len(ids)) + ids for ids in batch], device=where)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch], device=where)
        with torch.inference_mode():
            output = self._model.generate(input_ids=input_ids, attention_mask=mask)
        return [self._said(ids) for ids in output[:, longest:].tolist()]

    def _said(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True).lstrip()
        line, newline, _ = text.partition("\n")
        cut = not newline and not set(ids) & set(self._ends)
        return f"{START} {line}{CUT if cut else ''}"


def _from_folder(folder: Path, dtype: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    from modeling import official, parts
    from modeling.tensors import read_json
    from modeling.tokenizer import read_tokenizer

    config = read_json(folder / "config.json")
    if (tokenizer := read_tokenizer(folder, config)) is None:
        remedy = "put the model's tokenizer.json and tokenizer_config.json there"
        raise CheckpointError("the folder has no tokenizer", where=str(folder), remedy=remedy)
    if config.get("model_type") == official.INTERNLM2:
        return parts.language_model(folder).to(dtype), tokenizer
    return parts.pretrained(AutoModelForCausalLM, folder, dtype), tokenizer


def _from_gguf(file: Path, dtype: Any) -> tuple[Any, Any]:
    absent = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if absent:
        message = f"a GGUF file is read by packages that are not installed: {', '.join(absent)}"
        raise UserError(message, where=str(file), remedy=f"pip install {' '.join(absent)}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: Any = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
        return AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **options), tokenizer
    except Exception as error:  # whatever the library meets in a file that others wrote
        remedy = "take another GGUF file, or the model as a folder in Hugging Face layout"
        raise CheckpointError(f"the GGUF file cannot be read: {error}", where=str(file), remedy=remedy) from error
