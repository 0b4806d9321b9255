"""A table of pictures: a CSV or parquet whose rows name files, or hold their bytes, beside captions and more."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data.expressions import is_null
from ldm.data.making.sources import Extent, Item, find_column, find_files, pyarrow_module

SUFFIXES = (".csv", ".tsv", ".parquet")
# Rows that are in memory at a time: with pictures in them, some MB.
ROWS = 32

Names = str | Sequence[str] | None


@dataclass(frozen=True)
class Table:
    """The rows of CSV, TSV or parquet files.

    Args:
        table: a file, a folder, a glob, a brace expression, or a list of these.
        path_column: the column of the pictures' paths, absolute or under `root`; in a parquet also of their bytes, or
            of {bytes, path} as Hugging Face writes it. Columns are found in any case.
        caption_columns: the column of the caption, or several: the first that is not empty is the caption, and all of
            them are kept as columns; None = no captions.
        root: where relative paths begin; None = the folder of each table.
        columns: the columns to keep, under these names; None = all.
    """

    table: str | Sequence[str]
    path_column: str = "path"
    caption_columns: Names = "caption"
    root: str | None = None
    columns: Sequence[str] | None = None

    def files(self) -> list[str]:
        """Return the tables, not the pictures; raises ValueError where there is none."""
        return find_files(self.table, suffixes=SUFFIXES, option="table")

    def parts(self) -> list[str]:
        """Return the tables."""
        return self.files()

    def items(self, part: str) -> Iterator[Item]:
        """Yield an item for each row; raises ValueError for a column that is not there, or a table of URLs."""
        names, rows = read_rows(part)
        view = RowView.of(names, self.path_column, self.caption_columns, self.columns, where=part)
        root = Path(part).parent if self.root is None else Path(self.root)
        for number, row in enumerate(rows):
            yield view.item(row, name=f"{Path(part).name}:{number}", root=root)


@dataclass(frozen=True)
class RowView:
    """Where in the rows of a table a picture, its caption and what to keep of it are."""

    image: str
    captions: tuple[str, ...]
    keep: tuple[str, ...] | None
    labels: Mapping[str, Sequence[str]]
    option: str

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        image: str,
        captions: Names,
        columns: Sequence[str] | None,
        *,
        where: str,
        option: str = "path_column",
        labels: Mapping[str, Sequence[str]] | None = None,
    ) -> "RowView":
        """Find the columns among a table's names; raises ValueError for one that is not there."""
        wanted = [captions] if isinstance(captions, str) else list(captions or [])
        for name in columns or []:
            find_column(name, names, option="columns", where=where)
        return cls(
            find_column(image, names, option=option, where=where),
            tuple(find_column(name, names, option="caption_columns", where=where) for name in wanted),
            None if columns is None else tuple(columns),
            labels or {},
            option,
        )

    def item(self, row: Mapping[str, Any], *, name: str, root: Path) -> Item:
        """Return the item of a row; `name` is what it is called where it has no path of its own."""
        value, texts = row[self.image], [self._text(row, column) for column in self.captions]
        path, content = (value.get("path"), value.get("bytes")) if isinstance(value, Mapping) else (value, None)
        if isinstance(path, bytes):
            path, content = None, path
        if not isinstance(path, str | None):
            raise ValueError(
                f"{self.option}: got {self.image}, which holds {str(path)[:60]!r}, expected paths or pictures; "
                f"set dataset.source.{self.option}=NAME"
            )
        if isinstance(path, str) and "://" in path and content is None:
            raise ValueError(
                f"{self.option}: got the URL {path}, expected a file; fetch them with img2dataset, whose output "
                "`ldm shard dataset=img2dataset` reads"
            )
        image: bytes | Extent | None = content
        if content is None and path:
            image, name = Extent(str(root / path)), str(path)
        return Item(
            name=name,
            image=image,
            caption=next((text for text in texts if text), ""),
            columns={column: row[column] for column in row if column != self.image},
            keep=self.keep,
        )

    def _text(self, row: Mapping[str, Any], column: str) -> str:
        value = row[column]
        if is_null(value):
            return ""
        if column in self.labels:  # where -1 is none
            value = self.labels[column][value] if value >= 0 else ""
        return str(value).strip()


def read_rows(path: str) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """Return the columns of a CSV, TSV, parquet or arrow file and an iterator of its rows, some in memory at a time.

    Raises ValueError for a file that cannot be read.
    """
    pyarrow = pyarrow_module("pyarrow", option="table")
    try:
        if path.endswith(".parquet"):
            file = pyarrow_module("pyarrow.parquet", option="table").ParquetFile(path)
            return list(file.schema_arrow.names), _plain_rows(file.iter_batches(batch_size=ROWS))
        if path.endswith(".arrow"):
            stream = pyarrow.ipc.open_stream(pyarrow.memory_map(path))
            return list(stream.schema.names), _plain_rows(stream)
        csv = pyarrow_module("pyarrow.csv", option="table")
        options = csv.ParseOptions(delimiter="\t" if path.endswith(".tsv") else ",", newlines_in_values=True)
        table = csv.read_csv(path, parse_options=options)
        return list(table.column_names), _plain_rows(table.to_batches(max_chunksize=ROWS))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"table: got {path}, which cannot be read ({error}); write it again") from error


def read_labels(path: str) -> dict[str, list[str]]:
    """Return the names of the classes of each column of labels, which Hugging Face notes in the schema of a file."""
    pyarrow = pyarrow_module("pyarrow", option="table")
    if path.endswith(".parquet"):
        schema = pyarrow_module("pyarrow.parquet", option="table").read_schema(path)
    else:
        schema = pyarrow.ipc.open_stream(pyarrow.memory_map(path)).schema
    noted = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(noted).get("info", {}).get("features", {}) if noted else {}
    is_label = {name: isinstance(each, dict) and each.get("_type") == "ClassLabel" for name, each in features.items()}
    return {name: features[name]["names"] for name in features if is_label[name]}


def _plain_rows(batches: Any) -> Iterator[dict[str, Any]]:
    for batch in batches:
        for start in range(0, len(batch), ROWS):
            yield from batch.slice(start, ROWS).to_pylist()
