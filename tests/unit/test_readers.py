"""Evaluation sets in their exact file formats become questions as they are asked; a malformed record is told."""

import base64
import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from s3_service import moto, s3_store

from modeling import files
from modeling.errors import DataError
from modeling.template import encode_prompt
from modeling.tokenizer import build_tokenizer
from stages.evaluate.readers import _content, read_set, set_digest
from stages.evaluation import EvalSet


def png(color: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(out, "PNG")
    return out.getvalue()


RED, GREEN, BLUE = png("red"), png("green"), png("blue")
# the columns of MMMU as published (huggingface.co/datasets/MMMU/MMMU)
MMMU = pa.schema([
    *((name, pa.string()) for name in ("id", "question", "options", "explanation")),
    *((f"image_{k}", pa.struct([("bytes", pa.binary()), ("path", pa.string())])) for k in range(1, 8)),
    *((name, pa.string()) for name in ("img_type", "answer", "topic_difficulty", "question_type", "subfield")),
])  # fmt: skip


def picture(data: bytes) -> dict:
    return {"bytes": data, "path": "some.png"}


def mmmu(id="validation_Art_Theory_1", question="Which? <image 1>", options: Any = "['a cat', 'a dog']", answer="B",
         question_type="multiple-choice", **more) -> dict:  # fmt: skip
    record = dict.fromkeys(MMMU.names) | {
        "id": id, "question": question, "options": options, "answer": answer, "question_type": question_type,
        "explanation": "", "img_type": "['Paintings']", "topic_difficulty": "Easy", "subfield": "Theory",
    }  # fmt: skip
    return record | {"image_1": picture(RED)} | more


def write_mmmu(path: Path, *records: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(records), MMMU), path)
    return path


def write_tsv(path: Path, columns: list[str], *rows: list) -> Path:
    """As pandas writes it for VLMEvalKit."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, dialect="excel-tab", lineterminator="\n").writerows([columns, *rows])
    return path


def write_jsonl(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def read(format: str, path: Path | str, name: str = "set", **more):
    return read_set(name, EvalSet(format=format, path=str(path), **more))


# -- MMMU ----------------------------------------------------------------------------------------------


def test_mmmu_from_a_folder_as_published_is_its_validation_split(tmp_path):
    write_mmmu(
        tmp_path / "Art_Theory" / "validation-00000-of-00001.parquet", mmmu(), mmmu(id="validation_Art_Theory_2")
    )
    write_mmmu(tmp_path / "Art_Theory" / "test-00000-of-00001.parquet", mmmu(id="test_Art_Theory_1", answer="?"))
    write_mmmu(tmp_path / "Music" / "validation-00000-of-00001.parquet", mmmu(id="validation_Music_7"))
    write_mmmu(tmp_path / "Music" / "dev-00000-of-00001.parquet", mmmu(id="dev_Music_1"))
    items = read("mmmu", tmp_path, "MMMU")
    assert [(item.id, item.category) for item in items] == [
        ("validation_Art_Theory_1", "Art_Theory"), ("validation_Art_Theory_2", "Art_Theory"),
        ("validation_Music_7", "Music"),
    ]  # fmt: skip
    first = items[0]
    assert first.question == "Which? <image>\nA. a cat\nB. a dog" and first.images == (RED,)
    assert (first.task, first.kind, first.metric, first.references) == ("MMMU", "choice", "choice", ("B",))
    assert first.options == {"A": "a cat", "B": "a dog"}


@pytest.mark.parametrize(
    ("question", "options", "asked", "images"),
    [
        ("<image 2> or <image 1>?", "['x', 'y']", "<image> or <image>?\nA. x\nB. y", (GREEN, RED)),
        ("Which one?", "['<image 1>', '<image 2>']", "Which one?\nA. <image>\nB. <image>", (RED, GREEN)),
        ("Which one?", "['x', 'y']", "Image-1: <image>\nImage-2: <image>\nWhich one?\nA. x\nB. y", (RED, GREEN)),
        ("See <image 2>.", "['x', 'y']", "Image-1: <image>\nSee <image>.\nA. x\nB. y", (RED, GREEN)),
        ("<image 1> <image 2> <image 1>", "['x', 'y']", "<image> <image> <image>\nA. x\nB. y", (RED, GREEN, RED)),
    ],
)
def test_pictures_stand_where_the_question_or_an_option_names_them(tmp_path, question, options, asked, images):
    record = mmmu(question=question, options=options, image_2=picture(GREEN))
    (item,) = read("mmmu", write_mmmu(tmp_path / "a.parquet", record))
    assert (item.question, item.images) == (asked, images)


@pytest.mark.parametrize(
    ("answer", "kind", "metric", "references"),
    [
        ("3.429", "number", "number", ("3.429",)),
        ("['24/7', '3.429']", "number", "number", ("24/7", "3.429")),
        ("deciduous", "text", "vqa", ("deciduous",)),
        ("['Au', 'gold']", "text", "vqa", ("Au", "gold")),
        ("['Au', '79']", "text", "vqa", ("Au", "79")),
        ("[unknown", "text", "vqa", ("[unknown",)),
    ],
)
def test_open_questions_of_mmmu(tmp_path, answer, kind, metric, references):
    path = write_mmmu(tmp_path / "a.parquet", mmmu(question_type="open", options="[]", answer=answer))
    (item,) = read("mmmu", path)
    assert (item.kind, item.metric, item.references, item.options) == (kind, metric, references, {})
    assert item.question == "Which? <image>"


def test_mmmu_records_as_json_and_the_vision_setting_of_mmmu_pro(tmp_path):
    (tmp_path / "p.png").write_bytes(BLUE)
    record = mmmu(image_1={"path": "p.png"}, options=["a", "b"]) | {"image_2": {"bytes": b64(GREEN)}}
    pro = {
        "id": "test_History_9",
        "image": "p.png",
        "options": "['a', 'b', 'None']",
        "answer": "C",
        "subject": "History",
    }
    (tmp_path / "a.json").write_text(json.dumps([record, pro]))
    one, other = read("mmmu", tmp_path / "a.json")
    assert one.images == (GREEN, str(tmp_path / "p.png")) and one.options == {"A": "a", "B": "b"}
    assert other.question == "<image>\n" and other.images == (str(tmp_path / "p.png"),)
    assert (other.category, other.options["C"], other.references) == ("History", "None", ("C",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": "__import__('os').system('true')"}, r"`options` is no list of texts"),
        ({"options": "[]"}, "`options` is empty"),
        ({"answer": "?"}, r"`answer` is '\?', which is none of the options → .* test splits have no answers"),
        ({"answer": "E"}, "`answer` is 'E'"),
        ({"answer": None}, "`answer` is absent"),
        ({"question": None}, "`question` is absent"),
        ({"question": "See <image 3>"}, "`question` names <image 3>"),
        ({"question": "<image> and <image 1>"}, "`question` has both"),
        ({"question": "Look: <IMG_CONTEXT>"}, "`question` holds <IMG_CONTEXT>"),
        ({"image_1": {"bytes": None, "path": "x.png"}}, r"`image_1` has no bytes \(path 'x.png'\)"),
        ({"question_type": "essay"}, "`question_type` is 'essay'"),
    ],
)
def test_a_malformed_record_of_mmmu_is_told_with_row_and_field(tmp_path, change, message):
    path = write_mmmu(tmp_path / "a.parquet", mmmu(), mmmu(id="validation_Art_2", **change))
    with pytest.raises(DataError, match=rf"a\.parquet: row 2 \(validation_Art_2\): {message}"):
        read("mmmu", path)


# -- VLMEvalKit ----------------------------------------------------------------------------------------


def test_choices_of_a_tsv_share_pictures_and_keep_an_option_named_none(tmp_path):
    big = base64.b64encode(os.urandom(200_000)).decode()  # beyond the csv module's own limit of a cell
    path = write_tsv(
        tmp_path / "MMBench_DEV_EN.tsv",
        ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category", "split"],
        [241, 'Which "one"?', "Read\nboth lines.", "left", "None", "", "", "B", "spatial", big, "logic", "dev"],
        [1000241, "Again?", "", "up", "down", "NA", "both", "both", "spatial", "241", "logic", "dev"],
    )
    one, other = read("tsv", path, "mmbench")
    assert one.question == '<image>\nRead\nboth lines.\nWhich "one"?\nA. left\nB. None'
    assert one.options == {"A": "left", "B": "None"} and one.references == ("B",)
    assert other.images == one.images == (base64.b64decode(big),)
    assert (other.id, other.task, other.references, other.category) == ("1000241", "mmbench", ("D",), "spatial")
    assert csv.field_size_limit() == 131072


def test_several_pictures_splits_and_chinese_in_a_tsv(tmp_path):
    large = os.urandom(1_000_000)
    path = write_tsv(
        tmp_path / "MMMU_DEV_VAL.tsv", ["index", "question", "A", "B", "answer", "image", "split"],
        [1, "<image 1> or <image 2>?", "x", "y", "AB", str([b64(RED), b64(large)]), "dev"],
        [2, "图中有几只猫？", "", "", "2", b64(RED), "validation"],
    )  # fmt: skip
    one, other = read("tsv", path, "m")
    assert (one.question, one.images) == ("<image> or <image>?\nA. x\nB. y", (RED, large))
    assert (one.references, one.multiple, one.language) == (("AB",), True, "en")
    assert (other.kind, other.metric, other.language) == ("number", "number", "zh")
    assert (one.task, other.task) == ("m/dev", "m/validation")


@pytest.mark.parametrize(
    ("file", "answers", "kinds", "metrics"),
    [
        ("DocVQA_VAL", ["['A. Smith', 'Smith']", "3"], ["text", "text"], ["anls", "anls"]),
        ("InfoVQA_VAL", ["x", "3"], ["text", "text"], ["anls", "anls"]),
        ("ChartQA_TEST", ["Brazil", "50%"], ["text", "number"], ["relaxed", "relaxed"]),
        ("TextVQA_VAL", ["['a'] ", "yes"], ["text", "text"], ["vqa", "vqa"]),
        ("OCRVQA_TESTCORE", ["Yes", "Penguin"], ["text", "text"], ["vqa", "vqa"]),
        ("POPE", ["Yes", "No"], ["yes_no", "yes_no"], ["yes_no", "yes_no"]),
    ],
)
def test_kind_and_metric_follow_from_the_benchmark_and_its_answers(tmp_path, file, answers, kinds, metrics):
    rows = [[i, "What?", answer, b64(RED)] for i, answer in enumerate(answers)]
    items = read("tsv", write_tsv(tmp_path / f"{file}.tsv", ["index", "question", "answer", "image"], *rows))
    assert [item.kind for item in items] == kinds and [item.metric for item in items] == metrics
    if file == "DocVQA_VAL":
        assert items[0].references == ("A. Smith", "Smith")
    items = read("tsv", tmp_path / f"{file}.tsv", kind="text", metric="exact")
    assert {(item.kind, item.metric) for item in items} == {("text", "exact")}


def test_a_tsv_that_names_files_videos_and_plain_questions(tmp_path):
    path = write_tsv(
        tmp_path / "v.tsv", ["index", "question", "answer", "image_path", "video", "prefix", "candidates"],
        [0, "Who?", "a man", "['1.jpg', 'sub/2.jpg']", "", "", ""],
        [1, "What?", "B", "", "clip.mp4", "./vids", "['A. up.', 'B. down.']"],
        [2, "Capital of France?", "Paris", "", "", "", ""],
    )  # fmt: skip
    pictures, video, plain = read("tsv", path)
    assert pictures.images == (str(tmp_path / "1.jpg"), str(tmp_path / "sub/2.jpg"))
    assert pictures.question == "Image-1: <image>\nImage-2: <image>\nWho?"
    assert video.video == str(tmp_path / "vids/clip.mp4") and video.options == {"A": "up.", "B": "down."}
    assert video.question == "<video>\nWhat?\nA. up.\nB. down." and video.images == ()
    assert (plain.question, plain.images, plain.video) == ("Capital of France?", (), None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([2, "Q", "a", "b", "A", "77"], r"`image` is '77': no row of that index has a picture"),
        ([2, "Q", "a", "b", "A", "*" * 99], "`image` is no base64"),
        ([2, "Q", "a", "b", "C", "1"], "`answer` is 'C', which is none of the options"),
        ([2, "Q", "", "", "", "1"], "`answer` is ''"),
        ([2, "", "a", "b", "A", "1"], "`question` is empty"),
        (["", "Q", "a", "b", "A", "1"], "`index` is empty"),
        ([2, "Q", "a", "b", "A", "1", "more"], "has more cells than the 6 columns"),
        ([1, "Q", "a", "b", "A", "1"], "`index` is that of another row too"),
    ],
)
def test_a_malformed_row_is_told(tmp_path, row, message):
    columns = ["index", "question", "A", "B", "answer", "image"]
    path = write_tsv(tmp_path / "a.tsv", columns, [1, "Q", "a", "b", "A", b64(RED)], row)
    with pytest.raises(DataError, match=rf"a\.tsv: row 2.*{message}"):
        read("tsv", path)


def test_a_tsv_without_answers_or_cut_off_is_told(tmp_path):
    path = write_tsv(tmp_path / "a.tsv", ["index", "question"], [1, "Q"])
    with pytest.raises(DataError, match=r"a\.tsv: has no column `answer`, but index, question"):
        read("tsv", path)
    path.write_text('index\tquestion\tanswer\n1\t"Q')
    with pytest.raises(DataError, match=r"a\.tsv: row 1: no TSV file that can be read"):
        read("tsv", path)


# -- a team's own --------------------------------------------------------------------------------------


def test_each_kind_of_a_teams_own_questions(tmp_path):
    path = write_jsonl(
        tmp_path / "own.jsonl",
        {"id": "m", "question": "Same?", "image": ["a.png", "b.png"], "options": ["yes", "no"], "answer": "no"},
        {"question": "Is it?", "image": "a.png", "answer": "yes", "category": "adversarial", "task": "halluc"},
        {"question": "How many?", "image": "/abs/c.png", "answer": 12},
        {"question": "Name?", "image": "s3://bucket/d.png", "answer": ["Ann", "Anna"], "metric": "anls"},
        {"question": "What happens?", "video": "clips/v.mp4", "answer": "a fall"},
        {"question": "the red ball", "image": "a.png", "box": [32, 12, 64, 48], "size": [128, 96]},
        {"question": "首都？", "answer": "北京", "language": "zh", "history": [
            {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"question": "Both?", "options": {"A": "x", "B": "y", "C": "z"}, "answer": ["A", "C"], "multiple": True},
        {"question": "红球", "image": "a.png", "box": [1, 2, 3, 4], "language": "zh"},
        {"question": "Either?", "options": {"A": "x", "B": "y", "C": "z"}, "answer": ["A", "C"]},
    )  # fmt: skip
    many, halluc, number, text, video, region, plain, both, ball, either = read("jsonl", path, "own")
    assert many.question == "Image-1: <image>\nImage-2: <image>\nSame?\nA. yes\nB. no" and many.references == ("B",)
    assert (halluc.kind, halluc.task, halluc.category, halluc.id) == ("yes_no", "halluc", "adversarial", "2")
    assert (number.kind, number.metric, number.references) == ("number", "number", ("12",))
    assert number.images == ("/abs/c.png",) and text.images == ("s3://bucket/d.png",)
    assert (text.kind, text.metric, text.references) == ("text", "anls", ("Ann", "Anna"))
    assert (video.question, video.video) == ("<video>\nWhat happens?", str(tmp_path / "clips/v.mp4"))
    assert region.references == ("[250.0, 125.0, 500.0, 500.0]",) and (region.kind, region.metric) == ("box", "iou")
    assert region.question == (
        "<image>\nPlease provide the bounding box coordinate of the region this sentence describes: "
        "<ref>the red ball</ref>"
    )
    assert ball.question == "<image>\n请给出这句话所描述的区域的边界框坐标：<ref>红球</ref>"
    assert (plain.language, plain.images, plain.task, len(plain.history)) == ("zh", (), "own", 2)
    assert both.multiple and both.references == ("AC",)
    assert not either.multiple and either.references == ("A", "C")


def test_what_readers_give_is_what_the_chat_template_takes(tmp_path):
    tokenizer = build_tokenizer("bytes")
    path = write_jsonl(
        tmp_path / "a.jsonl", {"question": "Q", "video": "v.mp4", "answer": "a"},
        {"question": "Look: <video> well", "video": "v.mp4", "answer": "a"},
        {"question": "<image 2> behind <image 1>", "image": ["a.png", "b.png"], "answer": "a"},
    )  # fmt: skip
    context: Any = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    for item in read("jsonl", path):
        shown = 3 if item.video else len(item.images)
        turns = [{"from": "human", "value": item.question}]
        ids = encode_prompt(turns, tokenizer, [1] * shown, 4, video=item.video is not None or None)
        assert ids.count(context) == 4 * shown


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "Q", "anwser": "a"}, "`anwser` is not known → did you mean `answer`"),
        ({"question": "Q"}, "`answer` is absent"),
        ({"question": " ", "answer": "a"}, "`question` is ' '"),
        ({"question": "Q", "answer": "a", "kind": "guess"}, "`kind` is 'guess'"),
        ({"question": "Q", "answer": "a", "metric": "bleu"}, "`metric` is 'bleu'"),
        ({"question": "Q", "answer": "a", "kind": "choice"}, "`options` is empty"),
        ({"question": "Q <image>", "answer": "a"}, "`question` has 1 <image> for 0 pictures"),
        ({"question": "Q <image>", "answer": "a", "video": "v.mp4"}, "`question` has <image>, or <video> twice"),
        ({"question": "Q", "answer": "a", "image": "http://x/y.png"}, "`image` is 'http://x/y.png' → save the file"),
        ({"question": "Q", "answer": "a", "image": [1]}, "`image` is"),
        ({"question": "Q", "answer": "a", "image": "a.png", "video": "v.mp4"}, "`video` is"),
        ({"question": "Q", "box": [1, 2, 1001, 4]}, r"`box` is \[1, 2, 1001, 4\] → .*in thousandths"),
        ({"question": "Q", "box": [5, 2, 1, 4]}, r"`box` is \[5, 2, 1, 4\]"),
        ({"question": "Q", "answer": "a", "language": "fr"}, "`language` is 'fr'"),
        ({"question": "Q", "answer": {"a": 1}}, "`answer` is"),
        ({"question": "Q", "answer": "a", "history": [{"from": "user", "value": ""}]}, "`history` has"),
        ({"question": "Q", "answer": "a", "max_tiles": 0}, "`max_tiles` is 0"),
        ({"question": "Q", "answer": "a", "history": [{"from": "human", "value": "Hi"}]}, "`history` ends with a turn"),
    ],
)
def test_a_malformed_line_is_told_with_line_and_field(tmp_path, record, message):
    path = write_jsonl(tmp_path / "a.jsonl", {"question": "Q", "answer": "a"}, record)
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {message}"):
        read("jsonl", path)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("question", '{"question": "Q \\ud800", "answer": "a"}'),
        ("options", '{"question": "Q", "answer": "A", "options": ["x", "\\udc00"]}'),
        ("history", '{"question": "Q", "answer": "a", "history": [{"from": "gpt", "value": "\\ud800"}]}'),
    ],
)
def test_half_a_character_is_told_with_line_and_field(tmp_path, field, text):
    fine = '{"question": "\\ud83d\\ude00", "answer": "a"}\n'
    (tmp_path / "a.jsonl").write_text(fine + text)
    with pytest.raises(DataError, match=rf"a\.jsonl:2: `{field}` holds half a character") as caught:
        read("jsonl", tmp_path / "a.jsonl")
    str(caught.value).encode()
    (tmp_path / "a.jsonl").write_text(fine)
    assert read("jsonl", tmp_path / "a.jsonl")[0].question == "\U0001f600"


def test_a_list_of_figures_as_text_is_one_answer(tmp_path):
    answers = ("[0, 1]", "['a', 'b']", [0, 1])
    path = write_jsonl(tmp_path / "a.jsonl", *({"question": "Q", "answer": answer} for answer in answers))
    assert [item.references for item in read("jsonl", path)] == [("[0, 1]",), ("['a', 'b']",), ("0", "1")]
    columns = ["index", "question", "answer"]
    path = write_tsv(tmp_path / "a.tsv", columns, [1, "Range?", "[0, 1]"], [2, "Names?", "['a', '1']"], [3, "?", "[]"])
    assert [item.references for item in read("tsv", path)] == [("[0, 1]",), ("a", "1"), ("[]",)]


def test_files_of_one_name_in_several_folders_are_told_apart(tmp_path):
    for folder in ("art", "music"):
        (tmp_path / folder).mkdir()
        write_tsv(tmp_path / folder / "val.tsv", ["index", "question", "answer"], [1, "Q", "a"])
        write_jsonl(tmp_path / folder / "val.jsonl", {"question": "Q", "answer": "a"})
    for format in ("tsv", "jsonl"):
        items = read(format, tmp_path / "*" / f"val.{format}")
        assert [(item.id, item.task) for item in items] == [
            ("art/val/1", "set/art/val"),
            ("music/val/1", "set/music/val"),
        ]


def test_the_validation_split_is_chosen_among_files_of_json(tmp_path):
    for split in ("dev", "validation", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", mmmu(id=f"{split}_Art_1", question="Q", image_1=None))
    assert [item.id for item in read("mmmu", tmp_path)] == ["validation_Art_1"]


@pytest.mark.parametrize(
    ("format", "file", "text", "message"),
    [
        ("jsonl", "a.jsonl", '{"question": "Q", "answer": "a"}\n{"question"', r"a\.jsonl:2: not JSON"),
        ("jsonl", "a.json", '{"question": "Q"}', r"a\.json: element 1: no list of objects"),
        ("jsonl", "a.jsonl", "\n\n", "has no questions"),
        ("mmmu", "a.parquet", "PAR1 and no more", r"a\.parquet: no Parquet file"),
        ("tsv", "a.tsv", "", "has no column `index`"),
        ("jsonl", "a.txt", "x", "not JSON"),
    ],
)
def test_files_that_are_not_of_their_format_are_told(tmp_path, format, file, text, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(DataError, match=message):
        read(format, tmp_path / file)


def test_a_set_that_is_absent_is_told_when_read_and_unknown_when_planned(tmp_path):
    with pytest.raises(DataError, match=r"eval\.set\.path: .*nowhere: nothing of format mmmu is there"):
        read("mmmu", tmp_path / "nowhere")
    assert set_digest(EvalSet(format="mmmu", path=str(tmp_path / "nowhere"))) is None


def test_the_files_of_a_folder_are_tasks_of_their_own_and_patterns_choose(tmp_path):
    folder = tmp_path / ".data" / "sets"
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        write_jsonl(folder / f"{name}.jsonl", {"id": 1, "question": "Q", "answer": "x"})
    (folder / "readme.txt").write_text("nothing")
    assert [(item.id, item.task) for item in read("jsonl", folder)] == [("a/1", "set/a"), ("b/1", "set/b")]
    assert [(item.id, item.task) for item in read("jsonl", folder / "b*.jsonl")] == [("1", "set")]


def test_a_reader_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "own_reader_of_ours.py"
    source.write_text(
        "from stages.evaluate.items import Item\n"
        "def items(path):\n"
        "    for line in open(path):\n"
        "        yield Item(line.strip(), 'lines', line.strip(), 'text', 'exact', ('x',))\n"
        "def wrong(path):\n"
        "    yield {'id': 1}\n"
    )
    (tmp_path / "q.txt").write_text("one\ntwo\n")
    assert [item.id for item in read("own_reader_of_ours:items", tmp_path / "q.txt")] == ["one", "two"]
    params = EvalSet(format="own_reader_of_ours:items", path=str(tmp_path / "q.txt"))
    before = set_digest(params)
    source.write_text(source.read_text() + "# edited\n")
    assert before is not None and set_digest(params) != before
    for name, message in (
        ("own_reader_of_ours:wrong", "item 1: is a dict"), ("own_reader_of_ours:none", "has no function 'none'"),
        ("no_such_module:f", "there is no module 'no_such_module'.*PYTHONPATH"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            read(name, tmp_path / "q.txt")


# -- identity ------------------------------------------------------------------------------------------


def test_a_set_is_the_same_by_content_wherever_it_lies(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.png").write_bytes(RED)
        write_jsonl(tmp_path / place / "s.jsonl", {"question": "Q", "image": "a.png", "answer": "x"})
    here, there = (EvalSet(format="jsonl", path=str(tmp_path / place / "s.jsonl")) for place in ("here", "there"))
    first = set_digest(here)
    assert first is not None and first == set_digest(there) and first["media_files"] == 1
    (tmp_path / "there" / "a.png").write_bytes(GREEN)
    assert set_digest(there) != first
    (tmp_path / "there" / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png: cannot be read, and the set names it"):
        set_digest(there)
    write_jsonl(tmp_path / "here" / "s.jsonl", {"question": "Q?", "image": "a.png", "answer": "x"})
    assert set_digest(here) != first
    write_tsv(tmp_path / "t.tsv", ["index", "question", "answer", "image"], [1, "Q", "a", b64(RED)])
    embedded = set_digest(EvalSet(format="tsv", path=str(tmp_path / "t.tsv")))
    assert embedded is not None and embedded["media_files"] == 0


def test_pictures_that_a_tsv_names_beside_embedded_ones_are_part_of_the_set(tmp_path):
    (tmp_path / "a.png").write_bytes(RED)
    columns = ["index", "question", "answer", "image", "image_path"]
    rows = [[1, "Q", "a", b64(RED), "as-it-was.png"], [2, "Q", "a", "1", ""], [3, "Q", "a", "", "a.png"]]
    path = write_tsv(tmp_path / "t.tsv", columns, *rows)
    params = EvalSet(format="tsv", path=str(path))
    first = set_digest(params)
    assert first is not None and first["media_files"] == 1
    (tmp_path / "a.png").write_bytes(GREEN)
    assert set_digest(params) != first
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png: cannot be read, and the set names it"):
        set_digest(params)


def test_addresses_in_a_local_set_are_its_digest_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "state", lambda path, endpoint=None: (1, "tag"))
    write_jsonl(tmp_path / "s.jsonl", {"question": "Q", "image": "s3://bucket/a.png", "answer": "x"})
    params, digests = EvalSet(format="jsonl", path=str(tmp_path / "s.jsonl")), []
    for folder in (tmp_path, Path("/")):
        monkeypatch.chdir(folder)
        digests.append(set_digest(params))
    assert digests[0] == digests[1] and digests[0] is not None


def test_a_picture_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    def state(path, endpoint=None):
        raise PermissionError("Forbidden")

    write_jsonl(tmp_path / "s.jsonl", {"question": "Q", "image": "s3://bucket/a.png", "answer": "x"})
    params = EvalSet(format="jsonl", path=str(tmp_path / "s.jsonl"))
    monkeypatch.setattr("stages.evaluate.readers.found", lambda *_: [params.path])
    monkeypatch.setattr(files, "state", state)
    monkeypatch.setattr("stages.evaluate.readers._contents", lambda paths, *_: [_content(p, None) for p in paths])
    with pytest.raises(DataError, match=r"s3://bucket/a\.png: the set names it, and it may not be read: .*→ .*keys"):
        set_digest(params)


def test_what_the_items_of_ones_own_reader_show_and_its_name_are_part_of_the_set(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "reader_with_pictures.py").write_text(
        "from pathlib import Path\n"
        "from stages.evaluate.items import Item\n"
        "def items(path):\n"
        "    inside = Path(path).with_name('inside.png').read_bytes()\n"
        "    named = str(Path(path).with_name('named.png'))\n"
        "    yield Item('1', 't', '<image><image>', 'text', 'exact', ('x',), images=(inside, named))\n"
        "others = items\n"
    )
    for name in ("q.txt", "inside.png", "named.png"):
        (tmp_path / name).write_bytes(RED)
    params = EvalSet(format="reader_with_pictures:items", path=str(tmp_path / "q.txt"))
    digests = [set_digest(params), set_digest(params.model_copy(update={"format": "reader_with_pictures:others"}))]
    for name in ("inside.png", "named.png"):
        (tmp_path / name).write_bytes(GREEN)
        digests.append(set_digest(params))
    assert all(one not in digests[:i] for i, one in enumerate(digests))
    (tmp_path / "named.png").unlink()
    with pytest.raises(DataError, match=r"named\.png: cannot be read"):
        set_digest(params)


@pytest.mark.parametrize("name", ["os:system", "os.path:exists", "os:sep", "..os:path", ":f", "os:"])
def test_what_is_no_reader_is_told_and_not_run(tmp_path, name):
    (tmp_path / "q.txt").write_text("exit 1")
    with pytest.raises(DataError, match=f"format: {name}: "):
        read(name, tmp_path / "q.txt")
    with pytest.raises(DataError, match=f"format: {name}: "):
        set_digest(EvalSet(format=name, path=str(tmp_path / "q.txt")))


def test_many_pictures_on_s3_are_asked_for_a_thousand_at_a_time(monkeypatch):
    store = s3_store(monkeypatch)
    try:
        address = f"s3://{store.address.bucket}/{store.address.prefix}"
        lines = [json.dumps({"question": "Q", "image": f"p/{i}.png", "answer": "x"}) for i in range(40)]
        for i in range(40):
            store.put(f"p/{i}.png", b"%d" % i)
        store.put("s.jsonl", "\n".join(lines).encode())
        params = EvalSet(format="jsonl", path=f"{address}/s.jsonl", endpoint_url=moto())
        asked, state = [], files.state
        monkeypatch.setattr(files, "state", lambda path, endpoint=None: asked.append(path) or state(path, endpoint))
        listed = set_digest(params)
        assert not [path for path in asked if path.endswith(".png")]
        monkeypatch.setattr("stages.evaluate.readers._MANY", 100)
        assert set_digest(params) == listed and len([path for path in asked if path.endswith(".png")]) == 40
    finally:
        files.forget()


def test_sets_on_s3(tmp_path, monkeypatch):
    store = s3_store(monkeypatch)
    try:
        address, endpoint = f"s3://{store.address.bucket}/{store.address.prefix}", moto()
        store.put("s.jsonl", b'{"question": "Q", "image": "pics/a.png", "answer": "x"}\n')
        store.put("pics/a.png", RED)
        table = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([mmmu()], MMMU), table)
        store.put("mm/Art/validation-00000-of-00001.parquet", table.getvalue())
        params = EvalSet(format="jsonl", path=f"{address}/s.jsonl", endpoint_url=endpoint)
        (item,) = read_set("s", params)
        assert item.images == (f"{address}/pics/a.png",) and files.read(str(item.images[0]), endpoint) == RED
        first = set_digest(params)
        assert first is not None and set_digest(params) == first
        store.put("pics/a.png", GREEN)
        assert set_digest(params) != first
        (item,) = read("mmmu", f"{address}/mm", endpoint_url=endpoint)
        assert item.images == (RED,)
        assert set_digest(replace_path(params, f"{address}/none.jsonl")) is None
    finally:
        files.forget()


def replace_path(params: EvalSet, path: str) -> EvalSet:
    return params.model_copy(update={"path": path})
