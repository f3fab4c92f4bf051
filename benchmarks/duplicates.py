"""How many planted copies are found, how many different samples are called copies, and what a million samples take.

    python benchmarks/duplicates.py [--originals 2000] [--samples 1000000] [--output duplicates.json]

In every kind of picture all samples have the same question and answer, so that pictures alone decide; the material and
the edits are described in benchmarks/duplicates_material.py.

Aims, set before measuring: of each edit in each material at least 98 % found as a copy of their original; of different
samples at most .1 % called copies; a million samples searched in 120 s, if they all share one prompt in 300 s, on one
core, with less than 2 GB in all. Also shown, without an aim, is what lies between copy and difference: one digit of six
exchanged, one line of thirty, the slot of a template. Ends with 1 where an aim is missed.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
from duplicates_material import PICTURE_EDITS, Material, exchanged, text_edits
from PIL import Image

from stages.curation import Contamination, Duplicates
from stages.prepare.duplicates import find_contaminated, find_duplicates
from stages.prepare.signatures import PICTURE, SAMPLE, SKETCH, Signatures, signature

RECALL, FALSE, SECONDS, CROWD_SECONDS, GIGABYTES = 0.98, 0.001, 120, 300, 2.0
PAPER = 16_300_000  # samples of the fine-tuning mixture, paper §4.1
QUESTION = "<image>\nWhat is shown?"


def ask(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


# -- planted copies -----------------------------------------------------------------------------------------------


def pictured(pictures: list[Image.Image], question: str = QUESTION, answer: str = "As shown.") -> Signatures:
    turns = ask(question, answer)
    return Signatures.concat([signature(turns, [p], [p.tobytes(), str(at).encode()]) for at, p in enumerate(pictures)])


def texted(texts: list[str], edit: Callable[[str], str] = str) -> Signatures:
    """The text's first third as the question, the rest, edited, as the answer."""
    out = []
    for at, text in enumerate(texts):
        cut = len(text) // 3
        out.append(signature(ask(text[:cut], edit(text[cut:])), [], [str(at).encode(), edit.__name__.encode()]))
    return Signatures.concat(out)


def recall(originals: Signatures, copies: Signatures, of: np.ndarray) -> float:
    """Share of the copies that are called a copy of what their original is kept as."""
    found = find_duplicates(Signatures.concat([originals, copies]), Duplicates())
    kept = np.where(found[: len(originals)] >= 0, found[: len(originals)], np.arange(len(originals)))
    return float((found[len(originals) :] == kept[of]).mean())


def false_alarms(signatures: Signatures) -> float:
    return float((find_duplicates(signatures, Duplicates()) >= 0).mean())


def found_and_false(signatures: Signatures, edits: dict[str, Signatures], out: SimpleNamespace, kind: str) -> None:
    """The copies of each edit are of the first samples, in their order."""
    shares = {name: recall(signatures, copies, np.arange(len(copies))) for name, copies in edits.items()}
    out.told(kind, false_alarms(signatures), len(signatures), shares, len(next(iter(edits.values()))))


def planted(material: Material, options: argparse.Namespace, out: SimpleNamespace) -> None:
    n, copies = options.originals, options.copies

    def some(count: int, below: int) -> list[int]:
        return material.random.sample(range(below), min(count, below))

    rows = [some(6, len(material.digits)) for _ in range(n)]
    pages = [material.lines() for _ in range(n)]
    kinds = {
        "garments": [material.garment(i) for i in some(n, len(material.fashion))],
        "digits": [material.digit(64, i) for i in some(n, len(material.digits))],
        "rows": [material.row(row) for row in rows],
        "composed": [material.composed() for _ in range(n)],
        "pages": [material.page(page) for page in pages],
        "charts": [material.chart() for _ in range(n)],
    }
    signed = {kind: pictured(pictures) for kind, pictures in kinds.items()}
    for kind, pictures in kinds.items():
        edited = {name: pictured([edit(p) for p in pictures[:copies]]) for name, edit in PICTURE_EDITS.items()}
        found_and_false(signed[kind], edited, out, kind)

    texts = {"help": material.help[:n], "Chinese": [material.chinese() for _ in range(n)], "code": material.code[:n]}
    for kind, those in texts.items():
        edited = {name: texted(those[:copies], edit) for name, edit in text_edits(material, kind).items()}
        found_and_false(texted(those), edited, out, kind)

    word, worst = exchanged(1, material), PICTURE_EDITS["× 0.5 and JPEG 50"]
    pairs = list(zip(texts["help"], kinds["composed"]))
    originals = [signature(ask("<image>\n" + t, t), [p], [p.tobytes()]) for t, p in pairs]
    edited = [signature(ask("<image>\n" + t.upper(), word(t)), [worst(p)], [b""]) for t, p in pairs[:copies]]
    found_and_false(
        Signatures.concat(originals), {"all at once": Signatures.concat(edited)}, out, "composed pictures with help"
    )

    short = list(dict.fromkeys([str(i) for i in range(n)] + [material.phrase(2).casefold() for _ in range(n)]))
    signatures = Signatures.concat([signature(ask("And?", answer), [], [answer.encode()]) for answer in short])
    out.told("short answers", false_alarms(signatures), len(short))
    others = pictured(kinds["composed"], "<image>\nHow many garments are there, and which of them is the darkest one?")
    share = find_duplicates(Signatures.concat([signed["composed"], others]), Duplicates())[n:] >= 0
    out.told("another question to a picture", float(share.mean()), n)

    contaminated(material, texts["help"], kinds, signed, copies, out)
    between(material, rows, pages, signed, copies, out)


def contaminated(
    material: Material, help_: list[str], kinds: dict, signed: dict, copies: int, out: SimpleNamespace
) -> None:
    """Evaluation: the first of each kind. Training: edits of them with another answer, and the other samples."""
    both, by_image = Contamination(against=("e",)), Contamination(against=("e",), match="image")
    for kind in ("garments", "composed", "pages", "charts"):
        evaluation = pictured(kinds[kind][:copies])
        rest = find_contaminated(signed[kind], evaluation, both)[copies:] >= 0
        shares, others = {}, []
        for name in ("× 0.5", "JPEG 50", "darker 10 %"):
            edited = [PICTURE_EDITS[name](picture) for picture in kinds[kind][:copies]]
            found = find_contaminated(pictured(edited, QUESTION, "Something else."), evaluation, both)
            shares[name] = float((found == np.arange(copies)).mean())
            asked = pictured(edited, "<image>\nIs it dark?")
            others.append(find_contaminated(asked, evaluation, both) >= 0)
            found = find_contaminated(asked, evaluation, by_image)
            shares[f"{name} by image, another question"] = float((found == np.arange(copies)).mean())
        out.told(f"contamination, {kind}", float(rest.mean()), len(rest), shares, copies)
        share = float(np.concatenate(others).mean())
        out.told(f"contamination, {kind}, another question", share, len(others) * copies)
    evaluation = Signatures.concat([signature(ask(text, "?"), [], []) for text in help_[:copies]])
    rest = [signature(ask(text, text), [], []) for text in help_[copies:]]
    false = find_contaminated(Signatures.concat(rest), evaluation, both) >= 0
    shares = {}
    for name, edit in text_edits(material, "help").items():
        training = Signatures.concat([signature(ask(edit(text), text), [], []) for text in help_[:copies]])
        found = find_contaminated(training, evaluation, both)
        shares[name] = float((found == np.arange(len(training))).mean())
    out.told("contamination, help", float(false.mean()), len(rest), shares, len(evaluation))


def between(material: Material, rows: list, pages: list, signed: dict, copies: int, out: SimpleNamespace) -> None:
    """Neither copies nor clearly different: what share is called a copy."""

    def told(what: str, share: float) -> None:
        out.figures["between"][what] = share
        print(f"{what}: {share:.1%} called copies", flush=True)

    def one(items: list, new: Callable) -> list:
        items = list(items)
        items[material.number(len(items))] = new()
        return items

    of = np.arange(copies)
    changed = [material.row(one(row, lambda: material.number(len(material.digits)))) for row in rows[:copies]]
    told("one digit of six exchanged", recall(signed["rows"], pictured(changed), of))
    changed = [material.page(one(page, lambda: material.phrase(8))) for page in pages[:copies]]
    told("one line of thirty exchanged", recall(signed["pages"], pictured(changed), of))
    template = " ".join(material.help)[:600]
    for answer in ("positive", material.help[3][:300]):
        for words in (2, 5, 10, 20):
            phrases = {material.phrase(words).casefold(): None for _ in range(copies)}
            slots = [f"{template}\nText: {phrase}" for phrase in phrases]
            share = false_alarms(Signatures.concat([signature(ask(slot, answer), [], []) for slot in slots]))
            told(f"600 characters and a slot of {words} words, one answer of {len(answer)} characters", share)


# -- at scale -----------------------------------------------------------------------------------------------------


def synthetic(samples: int, seed: int, prompt: str) -> tuple[Signatures, np.ndarray]:
    """Seven of ten with a picture; 2 % exact and 2 % near copies, shuffled in. Which are copies: bool [n].

    prompt: "own": every sample's texts are its own; "one": all have the same question and answer and a picture of
    their own; "alike": and pictures as alike as pages are.
    """
    rng = np.random.default_rng(seed)
    out = np.zeros(samples, SAMPLE)
    out["digest"] = rng.integers(0, 256, (samples, 16), np.uint8)
    has = rng.random(samples) < (0.7 if prompt == "own" else 1)
    out["media"] = out["pictures"] = has
    if prompt == "own":
        for name in ("questions", "answers"):
            out[name] = rng.integers(0, 256, (samples, SKETCH), np.uint8)
    pictures = np.zeros(int(has.sum()), PICTURE)
    common = rng.normal(0, 30, PICTURE["code"].shape) if prompt == "alike" else 0
    for start in range(0, len(pictures), 100_000):
        block = pictures[start : start + 100_000]
        block["code"] = np.clip(np.rint(common + rng.normal(0, 25, block["code"].shape)), -127, 127)
        block["luma"] = block["chroma"] = 128
    place = np.cumsum(has) - 1
    chosen = rng.permutation(samples)[: samples // 25 * 2].reshape(-1, 2)
    source, copy = chosen.min(axis=1), chosen.max(axis=1)
    alike = has[source] == has[copy]
    source, copy = source[alike], copy[alike]
    out[copy] = out[source]
    shown = has[source]
    pictures[place[copy[shown]]] = pictures[place[source[shown]]]
    near = np.arange(len(copy)) % 2 == 0
    out["digest"][copy[near]] = rng.integers(0, 256, (int(near.sum()), 16), np.uint8)
    moved = place[copy[near & shown]]
    noise = rng.normal(0, 2, (len(moved), *PICTURE["code"].shape))
    pictures["code"][moved] = np.clip(np.rint(pictures["code"][moved] + noise), -127, 127)
    edited = copy[near & ~shown] if prompt != "own" else copy[near]
    places = rng.random((len(edited), SKETCH)) < 0.08
    out["answers"][edited] = np.where(places, out["answers"][edited] ^ 1, out["answers"][edited])
    is_copy = np.zeros(samples, bool)
    is_copy[copy] = True
    return Signatures(out, pictures), is_copy


def peak() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def searched(samples: int, seed: int, prompt: str) -> dict:
    signatures, copies = synthetic(samples, seed, prompt)
    size = (signatures.samples.nbytes + signatures.pictures.nbytes) / 1e9
    made = peak()
    began = time.perf_counter()
    found = find_duplicates(signatures, Duplicates()) >= 0
    seconds = time.perf_counter() - began
    whole = peak()
    row = {"samples": samples, "prompt": prompt, "GB signatures": size, "GB made": made, "GB peak": whole}
    row |= {"seconds": seconds, "recall": float(found[copies].mean()), "false": float(found[~copies].mean())}
    if prompt == "own":
        held, _ = synthetic(20_000, seed + 1, prompt)
        began = time.perf_counter()
        contaminated = find_contaminated(signatures, held, Contamination(against=("e",)))
        row |= {"contamination s": time.perf_counter() - began, "contaminated": int((contaminated >= 0).sum())}
    return row


def at_scale(options: argparse.Namespace, out: SimpleNamespace) -> None:
    print("\nsynthetic signatures, each run in a process of its own", flush=True)
    for prompt, most in (("own", SECONDS), ("one", CROWD_SECONDS), ("alike", CROWD_SECONDS)):
        for samples in (options.samples // 4, options.samples):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(searched, (samples, options.seed, prompt))
            out.figures["scale"].append(row)
            print(
                f"{samples:,} samples, prompt {prompt}: {row['seconds']:.1f} s, recall {row['recall']:.4f}, false "
                f"{row['false']:.5f}; signatures {row['GB signatures']:.2f} GB, peak {row['GB peak']:.2f} GB"
                + (f"; against 20,000: {row['contamination s']:.1f} s" if prompt == "own" else ""),
                flush=True,
            )
        factor = PAPER / options.samples
        print(f"  16.3 M by extrapolation: {row['seconds'] * factor / 60:.0f} min, {row['GB peak'] * factor:.1f} GB")
        millions = max(1, options.samples / 1e6)
        out.aim(row["seconds"] <= most * millions, f"prompt {prompt}: {row['seconds']:.0f} s")
        out.aim(row["GB peak"] <= GIGABYTES * millions, f"prompt {prompt}: {row['GB peak']:.2f} GB")
        out.aim(row["recall"] >= RECALL, f"prompt {prompt}: recall {row['recall']:.4f}")
        out.aim(row["false"] <= FALSE, f"prompt {prompt}: false alarms {row['false']:.5f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--originals", type=int, default=1700, help="of each kind")
    parser.add_argument("--copies", type=int, default=200, help="of each kind with each edit")
    parser.add_argument("--samples", type=int, default=1_000_000, help="synthetic ones")
    parser.add_argument("--output", type=Path, help="write all figures as JSON")
    options = parser.parse_args()
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, Pillow {PIL.__version__}"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {versions}"
    print(f"{machine}, seed {options.seed}", flush=True)
    out = SimpleNamespace(
        missed=[], figures={"machine": machine, "seed": options.seed, "planted": {}, "between": {}, "scale": []}
    )

    def aim(holds: bool, what: str) -> None:
        if not holds:
            out.missed.append(what)
            print(f"MISSED: {what}", flush=True)

    def told(kind: str, false: float, of: int, shares: dict[str, float] | None = None, copies: int = 0) -> None:
        out.figures["planted"][kind] = {"false": false, "of": of, "found": shares, "of each": copies}
        line = f"{kind}: {false:.2%} of {of:,} different samples called copies"
        if shares:
            line += f"; found of {copies} with each edit: {', '.join(f'{k} {v:.1%}' for k, v in shares.items())}"
        print(line, flush=True)
        aim(false <= FALSE, f"{kind}: {false:.2%} false alarms")
        for name, share in (shares or {}).items():
            aim(share >= RECALL, f"{kind}: {name} found {share:.1%}")

    out.aim, out.told = aim, told
    planted(Material(options.seed), options, out)
    at_scale(options, out)
    if options.output:
        options.output.write_text(json.dumps(out.figures | {"missed": out.missed}, indent=1) + "\n")
    return 1 if out.missed else 0


if __name__ == "__main__":
    sys.exit(main())
