"""Export: the published rows, all of them, as files that other tools read, whole or not at all."""

from dataclasses import replace

import polars
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from test_pipeline_table import RECIPE, apply, rows

from jobs.export import run_export
from model.errors import InputError
from pipeline.keys import Keys, hash_ids
from pipeline.table import EmbeddingTable, write_fragment


@pytest.fixture
def table(tmp_path):
    made = EmbeddingTable.create(str(tmp_path / "table.lance"), RECIPE, model="m")
    apply(made, {"a": "one", "b": "three"}, [])
    apply(made, {}, ["a"])
    made.publish()
    apply(made, {"unpublished": "text"}, [])
    return made


def read(path, format: str) -> pa.Table:
    return pq.read_table(path) if format == "parquet" else pyarrow.ipc.open_file(path).read_all()


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_published_rows_and_recipe(table, tmp_path, format):
    path = tmp_path / "new" / f"out.{format}"
    report = run_export(table.uri, str(path), format=format)
    assert (report.rows, report.version, report.bytes) == (2, table.published_version(), path.stat().st_size)
    found = read(path, format)
    assert found.schema.metadata[b"nightloom.fingerprint"].decode() == RECIPE.fingerprint()
    assert found.schema.metadata[b"nightloom.recipe"].decode() == RECIPE.settled().to_json()
    assert found["document_id"].to_pylist() == ["b", "b"]
    assert found["vector"].to_pylist() == [[5, 0, 0, 1], [5, 1, 0, 1]]
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    frame = polars.read_parquet(path) if format == "parquet" else polars.read_ipc(path)
    assert frame["vector"].to_list() == [[5, 0, 0, 1], [5, 1, 0, 1]]
    assert run_export(table.uri, str(path), format=format).rows == 2  # replaces


@pytest.mark.parametrize("vector_type", ["float16", "int8"])
@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_small_vectors_keep_their_type(tmp_path, vector_type, format):
    made = EmbeddingTable.create(str(tmp_path / "t"), replace(RECIPE, vector_type=vector_type), model="m")
    kind = made.schema.field("vector").type
    given = rows({"a": "one"}).set_column(8, "vector", rows({"a": "one"})["vector"].cast(kind))
    made.commit([write_fragment(made.uri, given, "r")], hash_ids(pa.array([], pa.string())), Keys.empty(), run="r")
    made.publish()
    run_export(made.uri, str(tmp_path / "out"), format=format)
    found = read(tmp_path / "out", format)
    assert found.schema.field("vector").type.value_type == kind.value_type
    assert found["vector"].to_pylist() == [[3, 0, 0, 1], [3, 1, 0, 1]]


def test_wrong_requests(table, tmp_path):
    with pytest.raises(InputError, match="format 'csv' is not known"):
        run_export(table.uri, str(tmp_path / "x"), format="csv")
    with pytest.raises(InputError, match="is a folder; name a file"):
        run_export(table.uri, str(tmp_path))
    with pytest.raises(InputError, match="there is no table"):
        run_export(str(tmp_path / "none"), str(tmp_path / "x"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        run_export(table.uri, str(tmp_path / "file" / "x.parquet"))
    assert not list(tmp_path.glob("**/*.partial"))
