import csv
import gzip
import hashlib
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from expertune.data.sources import find_source
from expertune.errors import DataError
from tests.processes import BENEATH, run_program


def read_source(spec, stream=False):
    return find_source(spec).read(stream)


def values(spec):
    return [example.values for example in read_source(str(spec)).examples]


def test_jsonl_with_line_separator_inside_text_keeps_its_examples(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = ["before\u2028after", "next\u0085line\u2029", "form\x0cfeed"]
    path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf-8")
    assert [example["text"] for example in values(path)] == texts


def test_real_example_with_escaped_line_separator_is_one_example(files):
    examples = values(files / "gsm8k-with-u2028.jsonl")
    assert len(examples) == 3
    assert "\u2028" in examples[1]["question"]


def test_examples_are_named_by_their_line_even_behind_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n  \r\n{"text": "b"}\r\n', encoding="utf-8")
    assert [example.place for example in read_source(str(path)).examples] == ["rows.jsonl: row 1", "rows.jsonl: row 4"]


def test_json_may_be_a_list_or_one_object(files):
    assert len(values(files / "llamafactory-identity-first3.json")) == 3
    (example,) = values(files / "axolotl-conversation.json")
    assert list(example) == ["conversations"]


def test_csv_keeps_commas_and_line_breaks_inside_quotes(files, tmp_path):
    examples = values(files / "viggo-train-first5.csv")
    assert len(examples) == 5
    assert examples[0]["mr"].startswith("inform(name[Dirt: Showdown], release_year[2012]")
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,completion\r\n"two\nlines","a, b"\r\n')
    assert values(path) == [{"prompt": "two\nlines", "completion": "a, b"}]


def test_byte_order_mark_of_a_spreadsheet_is_not_part_of_the_first_column(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbfprompt,completion\n1,2\n")
    assert values(path) == [{"prompt": "1", "completion": "2"}]


def test_parquet_examples_come_with_nested_columns(tmp_path):
    examples = [
        {"messages": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "assistant", "content": "ho"}]},
    ]
    pq.write_table(pa.Table.from_pylist(examples), tmp_path / "rows.parquet")
    assert values(tmp_path / "rows.parquet") == examples


def test_text_file_has_an_example_per_line_that_is_not_blank(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("one\r\n\r\ntwo\u2028still two\n".encode())
    assert values(path) == [{"text": "one"}, {"text": "two\u2028still two"}]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "ROWS.JSONL.GZ"])
def test_text_kinds_may_be_gzipped(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b'{"text": "a"}'))
    assert values(path) == [{"text": "a"}]


def test_hash_is_of_the_file_as_it_lies_on_disk(files):
    source = read_source(str(files / "dolly-first5.jsonl[1:3]"))
    expected = hashlib.sha256((files / "dolly-first5.jsonl").read_bytes()).hexdigest()
    assert source.sha256 == {"dolly-first5.jsonl": expected}


@pytest.mark.parametrize(
    ("piece", "expected"), [("[1:3]", [2, 3]), ("[:2]", [1, 2]), ("[3:]", [4, 5]), ("[:]", [1, 2, 3, 4, 5])]
)
def test_slice_counts_examples_from_zero(files, piece, expected):
    examples = read_source(str(files / "dolly-first5.jsonl") + piece).examples
    assert [example.place for example in examples] == [f"dolly-first5.jsonl: row {number}" for number in expected]


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ("[0:6]", r"ends at row 6, but there are 5 examples; write \[0:\]"),
        ("[5:]", "holds no examples; there are 5"),
        ("[3:2]", "holds no examples"),
        ("[-2:]", r"a slice is written \[a:b\]"),
        ("[2]", r"a slice is written \[a:b\]"),
    ],
)
def test_slice_that_cannot_be_cut_is_an_error(files, piece, message):
    with pytest.raises(DataError, match=message):
        read_source(str(files / "dolly-first5.jsonl") + piece)


def test_bad_json_line_is_kept_as_a_problem_with_its_example(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n[1, 2]\n' + "[" * 100_000 + "\n", encoding="utf-8")
    examples = read_source(str(path)).examples
    assert examples[0].values == {"text": "a"}
    assert [example.place for example in examples if example.problem] == [
        f"rows.jsonl: row {number}" for number in (2, 3, 4)
    ]
    assert "not valid JSON" in examples[1].problem
    assert "is list, not an object" in examples[2].problem
    assert "not valid JSON" in examples[3].problem


def test_bad_encoding_names_the_example_and_the_byte_offset(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    problem = read_source(str(path)).examples[1].problem
    assert "byte 0xe9 at byte offset 27" in problem
    assert path.read_bytes()[27] == 0xE9
    assert "iconv" in problem


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.csv", "prompt;completion\nOne, two?;Three\n", {"prompt": "One, two?", "completion": "Three"}),
        ("rows.csv", '\ufeffprompt;completion\n"a;b";c\n', {"prompt": "a;b", "completion": "c"}),
        ("rows.csv", "prompt\tcompletion\na;b\tc\n", {"prompt": "a;b", "completion": "c"}),
        ("rows.tsv", "prompt\tcompletion\na, b\tc\n", {"prompt": "a, b", "completion": "c"}),
        ("rows.csv", "prompt,what;ever\na,b\n", {"prompt": "a", "what;ever": "b"}),
        ("rows.csv", "text\na;b\n", {"text": "a;b"}),
        ("rows.csv", "Read this; then answer\na\n", {"Read this; then answer": "a"}),
        ("rows.csv", "Read\tthis\na;b\n", {"Read\tthis": "a;b"}),
    ],
)
def test_columns_are_separated_by_what_the_first_line_shows(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert values(path) == [expected]


def test_field_with_a_semicolon_too_many_is_told_to_be_quoted(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt;completion\na;b\na;b;c\n")
    problem = list(read_source(str(path)).examples)[1].problem
    assert problem.endswith("quote fields that hold semicolons")


def test_bad_encoding_of_a_csv_stops_at_the_file(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt,completion\nq,caf\xe9\n")
    with pytest.raises(DataError, match=r"rows\.csv: line 2: not UTF-8: byte 0xe9 at byte offset 23"):
        read_source(str(path))


def test_csv_example_with_too_many_fields_is_a_problem_of_that_example(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\nq,a,b\nq,a\n", encoding="utf-8")
    first, second = read_source(str(path)).examples
    assert "3 fields where the header names 2 (ends on line 2)" in first.problem
    assert second.values == {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", "the file is empty"),
        ("rows.jsonl", b" \n\n", "the file is empty"),
        ("rows.json", b"[]", "holds no examples"),
        ("rows.csv", b"prompt,completion\n", "holds no examples"),
        ("rows.csv", b"prompt,prompt\n1,2\n", "must name each column once"),
        ("rows.csv", b'prompt\n"never closed\n', "not valid CSV"),
        ("rows.json", b'{"a": 1}\n{"a": 2}\n', r"name the file \.jsonl"),
        ("rows.json", b"{", "not valid JSON"),
        ("rows.jsonl.gz", b"not gzip", "not a whole gzip file"),
        ("rows.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99)[:-9], "not a whole gzip file"),
        ("rows.parquet", b"PAR1", "not a whole Parquet file"),
        ("examples.xlsx", b"PK", r"unknown kind of file; use one of \.jsonl, \.json, \.csv, \.tsv, \.parquet, \.txt"),
        ("rows.parquet.gz", b"x", "unknown kind of file"),
    ],
)
def test_unreadable_file_is_one_error_that_names_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_source(str(tmp_path / name))
    assert name in str(caught.value)


def test_missing_file_names_the_nearest_one(files):
    with pytest.raises(DataError, match=r"no such file; did you mean .*dolly-first5\.jsonl\?"):
        read_source(str(files / "dolly-first.jsonl"))


def test_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        read_source(str(tmp_path))


def test_hub_name_without_a_connection_is_one_clear_error():
    code = (
        "from expertune.data.sources import find_source\n"
        "from expertune.errors import DataError\n"
        "try:\n"
        "    find_source('databricks/databricks-dolly-15k:train[0:800]')\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    said = run_program(code).out  # in which the hub is out of reach, as in all tests
    assert "databricks/databricks-dolly-15k:train: neither a local file nor a dataset" in said
    assert "(HF_HUB_OFFLINE is set, and its cache on this machine does not have it)" in said
    assert "hf download --repo-type dataset databricks/databricks-dolly-15k" in said
    assert len(said.strip().split("\n")) == 1


def test_hub_examples_come_through_the_real_client_with_split_and_place(tmp_path):
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    (folder / "test.jsonl").write_text('{"text": "c"}\n', encoding="utf-8")
    code = (
        "import datasets\nfrom expertune.data.hub import HubRows\n"
        f"datasets.config.HF_DATASETS_CACHE = {str(tmp_path / 'cache')!r}\n"
        "print(list(HubRows('owner/name')), list(HubRows('owner/name:test')))"
    )
    assert run_program(code, folder=tmp_path).out.strip() == (
        "[('owner/name:train: row 1', {'text': 'a'}), ('owner/name:train: row 2', {'text': 'b'})] "
        "[('owner/name:test: row 1', {'text': 'c'})]"
    )


def test_importing_the_data_room_loads_neither_datasets_nor_pandas():
    code = "import sys, expertune.data; print([m for m in ('datasets', 'pandas', 'matplotlib') if m in sys.modules])"
    assert run_program(code, imports=BENEATH).out.strip() == "[]"


def write_rows(folder, name, *texts):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_several_files_follow_one_another_each_with_its_slice_and_hash(tmp_path):
    first = write_rows(tmp_path, "b.jsonl", "b1", "b2", "b3")
    second = write_rows(tmp_path, "a.jsonl", "a1", "a2")
    source = read_source([f"{first}[1:3]", str(second)])
    assert [example.values["text"] for example in source.examples] == ["b2", "b3", "a1", "a2"]
    assert [example.place for example in source.examples][1:3] == ["b.jsonl: row 3", "a.jsonl: row 1"]
    assert source.num_rows == {"b.jsonl": 2, "a.jsonl": 2}
    assert source.sha256 == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (first, second)}
    assert source.name == f"{first}[1:3], {second}"


def test_glob_reads_files_in_order_and_a_slice_cuts_each(tmp_path):
    for name in ("x/2.jsonl", "x/1.jsonl", "x/deep/3.jsonl"):
        write_rows(tmp_path, name, *(f"{name} {number}" for number in range(3)))
    assert [example["text"] for example in values(tmp_path / "x" / "*.jsonl[:1]")] == ["x/1.jsonl 0", "x/2.jsonl 0"]
    assert len(values(tmp_path / "**" / "*.jsonl")) == 9
    with pytest.raises(DataError, match=r"1\.jsonl \(of .*\): the slice ends at row 4, but there are 3 examples"):
        values(tmp_path / "x" / "?.jsonl[:4]")


def test_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    write_rows(tmp_path, "examples[1].jsonl", "one")
    write_rows(tmp_path, "rows1.jsonl", "other")
    assert values(tmp_path / "examples[1].jsonl") == [{"text": "one"}]


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    write_rows(tmp_path, "en/rows.jsonl", "a")
    write_rows(tmp_path, "de/rows.jsonl", "b")
    source = read_source(str(tmp_path / "*" / "rows.jsonl"))
    assert [example.place for example in source.examples] == ["de/rows.jsonl: row 1", "en/rows.jsonl: row 1"]
    assert list(source.sha256) == ["de/rows.jsonl", "en/rows.jsonl"]


def test_glob_that_finds_nothing_is_an_error_that_names_it(tmp_path):
    with pytest.raises(DataError, match=r"\*\.jsonl: no file matches this pattern"):
        values(tmp_path / "*.jsonl")


def test_files_with_different_columns_are_an_error_that_names_both(tmp_path):
    write_rows(tmp_path, "a.jsonl", "a")
    (tmp_path / "b.csv").write_text("question,answer\nq,a\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl has text, and b\.csv has answer, question; give all the same"):
        read_source([str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv")])


def test_key_that_only_some_examples_have_is_a_column_of_the_file(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        examples = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "c", "note": "n"}]
        (tmp_path / name).write_text(
            "\n".join(map(json.dumps, examples if name < "b" else examples[::-1])), encoding="utf-8"
        )
    assert len(values(tmp_path / "*.jsonl")) == 4


def test_csv_field_may_be_longer_than_a_reader_of_python_takes(tmp_path):
    path = tmp_path / "rows.csv"
    before = csv.field_size_limit()
    path.write_text('prompt,completion\nq,"' + "word " * 60_000 + '"\nq,a\n', encoding="utf-8")
    first, second = values(path)
    assert len(first["completion"]) == 300_000
    assert second["completion"] == "a"
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"\xef\xbb\xbf", "the file is empty"),
        ("rows.csv", b"\n\nprompt,completion\nq,a\n", "the first line must name each column once"),
        ("rows.json", b'{"text": "a", "text": "b"}', "the key 'text' is there twice"),
        ("rows.json", b'{"text": ' + b"[" * 200 + b"]" * 200 + b"}", "nested more than 100 levels deep"),
        ("rows.jsonl.gz", gzip.compress(b"\n" * 2**25), "unpack to more than 200 times as many"),
        ("rows.csv", "prompt,completion\nq,a\n".encode("utf-16"), "convert the file, e.g. iconv -f utf-16"),
    ],
)
def test_file_that_means_something_else_is_one_error_that_names_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_source(str(tmp_path / name))
    assert name in str(caught.value)


@pytest.mark.parametrize("kind", ["rows", "columns", "bytes"])
def test_parquet_file_that_claims_more_than_it_can_hold_is_an_error(tmp_path, kind):
    text = "x" * (10 if kind == "rows" else 2**20)
    table = pa.table({"text": pa.array([text] * (300_000 if kind == "rows" else 300))})
    if kind == "columns":
        table = pa.table([["a"], ["b"]], names=["text", "text"])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet: .*(claims 300000 examples|each be there once|unpack to more)"):
        values(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("examples\0.jsonl", "cannot be read"),
        ("x" * 300 + ".jsonl", "cannot be read"),
        ("rows.jsonl[" + "9" * 5000 + ":]", r"a slice is written \[a:b\]"),
        ("/dev/zero", "unknown kind of file"),
        ("pipe.jsonl", "is a device or a pipe"),
    ],
)
def test_name_that_is_no_file_of_examples_is_one_error(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=message):
        read_source(spec)
