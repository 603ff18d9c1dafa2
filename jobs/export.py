"""`nightloom export`: the published version as one Parquet or Arrow file that any tool reads without this code.

Batches stream through: memory does not grow with the table. The recipe and its fingerprint stand in the schema's
metadata. A local file appears whole or not at all; on S3 an object does anyway.
"""

import json
import time
from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem, FileType, LocalFileSystem

from jobs.report import clock, line
from model.errors import InputError
from pipeline import storage
from pipeline.table import PUBLISHED, EmbeddingTable

FORMATS = ("parquet", "arrow")
ROWS_PER_BATCH = 8192


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written where."""

    job: str
    status: str
    table: str
    version: int
    fingerprint: str
    destination: str
    format: str
    rows: int
    bytes: int
    seconds: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def summary(self) -> str:
        head = f"{self.rows:,} rows of version {self.version} written to {self.destination}."
        return "\n".join([head, "", line("size", f"{self.bytes:,} bytes"), line("time", clock(self.seconds))])


def run_export(uri: str, destination: str, *, format: str = "parquet") -> ExportReport:
    """Write the published version of a table to one file.

    Raises:
        InputError: no published table, an unknown format, a destination that cannot be written.
    """
    started = time.monotonic()
    if format not in FORMATS:
        raise InputError(f"format {format!r} is not known; use {' or '.join(FORMATS)}")
    table = EmbeddingTable.open(uri, PUBLISHED)
    files, path = storage.filesystem(destination)
    if files.get_file_info(path).type == FileType.Directory:
        raise InputError(f"{destination} is a folder; name a file, as in {destination.rstrip('/')}/table.{format}")
    local = isinstance(files, LocalFileSystem)
    target = f"{path}.{uuid4().hex[:8]}.partial" if local else path
    try:
        if local:
            files.create_dir(path.rpartition("/")[0] or "/", recursive=True)
        rows = write(files, target, table, format)
        if local:
            files.move(target, path)
    except OSError as error:
        raise InputError(f"{destination} cannot be written: {error}") from None
    finally:
        if local and files.get_file_info(target).type != FileType.NotFound:
            files.delete_file(target)
    return ExportReport(
        job="export",
        status="done",
        table=uri,
        version=table.version,
        fingerprint=table.fingerprint,
        destination=destination,
        format=format,
        rows=rows,
        bytes=files.get_file_info(path).size,
        seconds=round(time.monotonic() - started, 3),
    )


def write(files: FileSystem, path: str, table: EmbeddingTable, format: str) -> int:
    """Stream all rows to a file; returns their number."""
    schema = table.schema
    rows = 0
    with files.open_output_stream(path) as stream, open_writer(stream, schema, format) as writer:
        for batch in table.dataset.to_batches(batch_size=ROWS_PER_BATCH, batch_readahead=4):
            writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
            rows += len(batch)
    return rows


def open_writer(stream: Any, schema: pa.Schema, format: str) -> Any:
    """A Parquet writer, or one of Arrow's IPC file format (which readers map into memory)."""
    if format == "parquet":
        return pq.ParquetWriter(stream, schema, compression="zstd", use_dictionary=["source", "run"])
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    return pyarrow.ipc.new_file(stream, schema, options=options)
