"""`stageline import` and `stageline export`: model folders of others in, model folders for others out."""

import argparse
import sys
from pathlib import Path
from typing import Any

from modeling.errors import UserError


def import_(options: argparse.Namespace) -> int:
    """options: source, or vision and language; output, tokenizer, image_token_id, seed."""
    from modeling.presets import resolve
    from modeling.weights import write, write_parts
    from stages.params import ModelParams

    output, parts = Path(options.output), (options.vision, options.language)
    if bool(options.source) == any(parts) or any(parts) != all(parts):
        raise UserError(
            "import takes one model folder, or --vision and --language",
            remedy="stageline import FOLDER --output DIR, or stageline import --vision VIT --language LLM --output DIR",
        )
    if options.source:
        source = _opened(options)
        _warn(options.source, source.notes)
        parameters, what = write(source, output, "hf"), f"{source.layout} layout"
    else:
        if options.image_token_id is not None:
            raise UserError("--image-token-id is for a whole model", remedy="leave it out: the tokenizer tells")
        params = ModelParams(vision=options.vision, language=options.language, tokenizer=options.tokenizer)
        parameters, what = write_parts(resolve(params, weights=True), options.seed, output), "separate parts"
    print(f"imported {parameters:,} parameters ({what}) into {output}")
    return 0


def export(options: argparse.Namespace) -> int:
    """options: source, layout, output, image_token_id, tokenizer."""
    from stages.export import export_folder

    source = _opened(options)
    _warn(options.source, source.notes)
    parameters = export_folder(source, Path(options.output), options.layout)
    print(f"exported {parameters:,} parameters ({options.layout} layout) into {options.output}")
    return 0


def _opened(options: argparse.Namespace) -> Any:
    """The modeling.weights.Source of a local folder, or of one on S3: its endpoint is the environment's."""
    from modeling.files import is_remote
    from modeling.remote import model_folder
    from modeling.weights import open_source

    folder = model_folder(options.source, weights=True)
    if is_remote(options.source) and not folder.is_dir():
        raise UserError("there is no such folder", where=options.source, remedy="correct the path or address")
    return open_source(folder, image_token_id=options.image_token_id, tokenizer=options.tokenizer)


def _warn(where: str, notes: tuple[str, ...]) -> None:
    for note in notes:
        print(f"stageline: warning: {where}: {note}", file=sys.stderr)
