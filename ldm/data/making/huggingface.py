"""A data set of Hugging Face that is on disk, as `save_to_disk` writes it or as its repository on the hub holds it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.data.making.sources import Item
from ldm.data.making.table import Names, RowView, read_labels, read_rows


@dataclass(frozen=True)
class HuggingFace:
    """The rows of one split, read by pyarrow alone.

    Args:
        folder: what `save_to_disk` wrote (a Dataset or a DatasetDict), or a repository with parquet files whose names
            begin with the split's, as in data/train-00000-of-00004.parquet.
        split: which one; without effect where the folder holds a single Dataset.
        image_column: the column of pictures. Columns are found in any case.
        caption_columns: the column of the caption, or several: the first that is not empty is the caption, and all of
            them are kept as columns. Of a column of class labels, the caption is the name of the class. None = none.
        columns: the columns to keep, under these names; None = all.
    """

    folder: str
    split: str = "train"
    image_column: str = "image"
    caption_columns: Names = "caption"
    columns: Sequence[str] | None = None

    def files(self) -> list[str]:
        """Return the arrow or parquet files of the split; raises ValueError where there is none."""
        folder = Path(self.folder)
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            if self.split not in splits:
                raise ValueError(f"split: got {self.split}, expected one of {', '.join(splits)}")
            folder = folder / self.split
        if (folder / "state.json").is_file():
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return [str(folder / file["filename"]) for file in state["_data_files"]]
        found = sorted(str(path) for path in folder.rglob("*.parquet") if self._is_of_split(path))
        if not found:
            raise ValueError(
                f"folder: got {self.folder}, expected what save_to_disk of the package datasets wrote, or a folder "
                f"with {self.split}-*.parquet; see dataset.source.folder and dataset.source.split"
            )
        return found

    def parts(self) -> list[str]:
        """Return the files of the split."""
        return self.files()

    def items(self, part: str) -> Iterator[Item]:
        """Yield an item for each row; raises ValueError for a column that is not there."""
        names, rows = read_rows(part)
        view = RowView.of(
            names,
            self.image_column,
            self.caption_columns,
            self.columns,
            where=part,
            option="image_column",
            labels=read_labels(part),
        )
        for number, row in enumerate(rows):
            yield view.item(row, name=f"{Path(part).name}:{number}", root=Path(self.folder))

    def _is_of_split(self, path: Path) -> bool:
        return path.stem == self.split or path.stem.startswith(f"{self.split}-") or path.parent.name == self.split
