"""metrics.csv survives a kill and grows with what is logged."""

import csv
from pathlib import Path

from ldm.training.loggers import MetricsCSV


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_row_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 0.5}, step=0)
    assert rows(tmp_path) == [{"step": "0", "loss": "0.5"}]


def test_a_new_metric_becomes_a_new_column(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 0.5}, step=0)
    logger.log_metrics({"val": 0.25}, step=1)
    assert rows(tmp_path) == [{"step": "0", "loss": "0.5", "val": ""}, {"step": "1", "loss": "", "val": "0.25"}]


def test_what_is_logged_for_one_step_shares_a_row(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 0.5}, step=0)
    logger.log_metrics({"speed": 9.0}, step=0)
    logger.log_metrics({"loss": 0.25}, step=1)
    logger.log_metrics({"speed": 8.0}, step=1)
    logger.log_metrics({"speed": 7.0}, step=1)
    assert rows(tmp_path) == [
        {"step": "0", "loss": "0.5", "speed": "9.0"},
        {"step": "1", "loss": "0.25", "speed": "8.0"},
        {"step": "1", "loss": "", "speed": "7.0"},
    ]


def test_a_resumed_run_appends_and_drops_the_rows_it_trains_again(tmp_path: Path) -> None:
    first = MetricsCSV(tmp_path)
    for step in range(5):
        first.log_metrics({"loss": float(step)}, step=step)
    resumed = MetricsCSV(tmp_path)
    for step in range(3, 6):
        resumed.log_metrics({"loss": 10.0 + step}, step=step)
    assert [row["loss"] for row in rows(tmp_path)] == ["0.0", "1.0", "2.0", "13.0", "14.0", "15.0"]


def test_a_half_written_last_row_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n0,1.5\n1,2.")
    MetricsCSV(tmp_path).log_metrics({"loss": 3.0}, step=2)
    assert rows(tmp_path) == [{"step": "0", "loss": "1.5"}, {"step": "2", "loss": "3.0"}]


def test_its_name_and_version_are_the_run_folders(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path / "quickstart" / "1a2b3c4d")
    assert (logger.name, logger.version) == ("quickstart", "1a2b3c4d")
