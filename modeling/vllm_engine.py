"""Samples from vLLM, for GPUs where it is installed: the same question, sample and result as modeling/sampling.py.

Never run against a real vLLM: it has no build for the machines of the project. Written for vLLM 0.10 to 0.32 from its
documentation and source (SamplingParams, LLM.generate, model_executor/models/interns1.py, which serves
InternVLForConditionalGeneration); the tests check the calls against a stand-in.

Invariant: one request for each (question, sample), seeded by (seed, key, sample number), so what shares a batch changes
a sample by no more than the rounding of floats; vLLM's prefix cache computes their common prompt once. Its draws are
not those of the transformers engine: a pool is of one engine.

The prompt is ours, token by token, with each picture as one `<IMG_CONTEXT>`, which vLLM expands to its tiles. Tiles are
cut by vLLM: as separate pictures they would get an `<img>` pair each, which no training has seen. `max_patches` makes
it take our grid (GotOcr2ImageProcessor chooses the same one, and adds the thumbnail), with torchvision's bicubic filter
for Pillow's, so pixels differ a little. tie "inclusive" does not exist there and is refused.
Self-certainty needs the whole distribution of each token, whose tail decides it; vLLM tells the likeliest few. So
`certainty` is None, and rerank.py refuses to re-rank by it.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling.errors import UserError
from modeling.generate import Question, texts_of
from modeling.sampling import Generation, check_settings
from modeling.template import IMG_END, IMG_START, encode_prompt
from modeling.tiles import tiles_per_image_limit
from modeling.tokenizer import read_tokenizer

NAMED = ("start_image_token", "end_image_token", "context_image_token", "video_token")  # what vLLM's processor reads


class VllmEngine:
    """A model folder in Hugging Face layout, loaded by vLLM. settings: more arguments of vllm.LLM.

    Raises UserError where vLLM is not installed, or the folder's tokenizer does not name its image tokens.
    """

    def __init__(self, folder: str | Path, **settings: Any):
        try:
            import vllm  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                f"'engine: vllm' needs vLLM, which cannot be imported: {error}", where="engine",
                remedy="install it on every node (pip install vllm), or take 'engine: transformers'",
            ) from error  # fmt: skip
        self.vllm, self.tokenizer = vllm, read_tokenizer(Path(folder))
        missing = [name for name in NAMED if not getattr(self.tokenizer, name, None)]
        if missing:
            raise UserError(
                f"its tokenizer does not name {', '.join(missing)}, which vLLM asks for", where=str(folder),
                remedy="export the model again, or take 'engine: transformers'",
            )  # fmt: skip
        config = json.loads((Path(folder) / "config.json").read_text())["vision_config"]["image_size"]
        self.side = config[0] if isinstance(config, list) else config  # pixels of a tile
        limits = {"image": 64, "video": 0}  # the frames of a video are pictures here
        self.llm = vllm.LLM(
            model=str(folder), **{"limit_mm_per_prompt": limits, "logprobs_mode": "raw_logprobs"} | settings
        )

    def __call__(self, *args: Any, **settings: Any) -> list[list[Generation]]:
        return self.sample(*args, **settings)

    def sample(
        self, questions: Sequence[Question], keys: Sequence[str], *, system: str | None, max_new_tokens: int,
        temperature: float = 0.0, top_p: float = 1.0, samples: Sequence[int] = (0,), seed: int = 0,
    ) -> list[list[Generation]]:  # fmt: skip
        """As sampling.sample, all questions at once: vLLM makes its own batches. certainty is None."""
        check_settings(questions, keys, max_new_tokens, temperature, top_p)
        drawn = list(samples) if temperature else list(samples)[:1]
        prompts, params = [], []
        for question, key in zip(questions, keys, strict=True):
            prompt = self._prompt(question, system)
            for number in drawn:
                digest = hashlib.sha256(f"{seed}\0{number}\0{key}".encode()).digest()
                prompts.append(prompt)
                params.append(self.vllm.SamplingParams(
                    temperature=temperature, top_p=top_p, max_tokens=max_new_tokens, logprobs=0,
                    seed=int.from_bytes(digest[:4], "little"), stop_token_ids=[self.tokenizer.eos_token_id],
                ))  # fmt: skip
        outputs = self.llm.generate(prompts, params, use_tqdm=False) if prompts else []
        found = [self._generation(output.outputs[0]) for output in outputs]
        rows = [found[i * len(drawn) : (i + 1) * len(drawn)] for i in range(len(questions))]
        return rows if temperature else [row * len(samples) for row in rows]

    def _prompt(self, question: Question, system: str | None) -> dict[str, Any]:
        if question.tile_tie != "strict":
            raise UserError(f"vLLM cuts tiles by the strict rule, not {question.tile_tie!r}", where="engine")
        images, video = [image.convert("RGB") for image in question.images], question.video
        ids = encode_prompt(
            question.conversation, self.tokenizer, [1] * len(images), 1, system, video=video or None
        )  # fmt: skip
        around = self.tokenizer.convert_tokens_to_ids([IMG_START, IMG_END])
        prompt: dict[str, Any] = {"prompt_token_ids": [token for token in ids if token not in around]}
        if images:
            limit = 1 if video else tiles_per_image_limit(question.max_tiles, len(images))
            prompt["multi_modal_data"] = {"image": images}
            prompt["mm_processor_kwargs"] = {"crop_to_patches": limit > 1, "min_patches": 1, "max_patches": limit}
        return prompt

    def _generation(self, output: Any) -> Generation:
        (text,) = texts_of(self.tokenizer, [list(output.token_ids)])
        cut = output.finish_reason == "length"
        return Generation(text, len(output.token_ids), float(output.cumulative_logprob), None, cut)
