"""`ldm data report`: what a set of shards holds, as numbers (report.json) and as one page (index.html)."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.filters import Filter
from ldm.data.index_file import open_index
from ldm.data.parallel import map_in_order
from ldm.data.rows import check_metadata
from ldm.data.shards import resolve_shards
from ldm.data.similar import near_duplicates
from ldm.data.statistics import ColumnValues, Measured, Task, measure_shard, spread
from ldm.files import write_bytes
from ldm.pages import page

REPORT, PAGE = "report.json", "index.html"
NUM_BINS = 40
# A picture counts as bordered from this share of its area on.
BORDERED = 0.02
# How many of the most frequent texts of a column, and of the largest groups of near-duplicates, are shown.
MAX_SHOWN = 15


def report_shards(
    shards: str | os.PathLike[str] | Sequence[str],
    out: str | os.PathLike[str],
    *,
    filters: Mapping[str, Filter] | None = None,
    rows: int = 100_000,
    pictures: int = 2000,
    thumbnails: int = 48,
    distance: int = 4,
    metadata: str = "json",
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure shards and write report.json and index.html into `out`; return the former.

    Args:
        filters: by name, whose survival is counted.
        rows, pictures: how many samples' metadata are read and pictures decoded, evenly spread; the rest is counted.
        thumbnails: pictures on the contact sheet.
        distance: bits, of 64, in which the hashes of near-duplicates may differ.
        progress: is told shards done and in all.

    A shard that cannot be read is left out, and told. Raises ValueError or FileNotFoundError where none can be, or
    where a number is negative.
    """
    for name, value in (("rows", rows), ("pictures", pictures), ("thumbnails", thumbnails), ("distance", distance)):
        if value < 0:
            raise ValueError(f"{name}: got {value}, expected 0 or more")
    check_metadata(metadata)
    paths, unreadable = readable(resolve_shards(shards))
    tasks = plan(paths, rows=rows, pictures=pictures, thumbnails=thumbnails)
    found = Measured()
    look = partial(measure_shard, filters=filters or {}, metadata=metadata)
    for done, part in enumerate(map_in_order(look, tasks, workers=workers), start=1):
        found.merge(part)
        progress(done, len(tasks))
    duplicates = _duplicates(found, distance)
    told = {"shards": [str(path) for path in paths], "shards_unreadable": unreadable}
    summary = {**told, **summarize(found, filters or {}), "near_duplicates": duplicates}
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / PAGE, render(found, summary).encode("utf-8", errors="replace"))
    write_bytes(folder / REPORT, json.dumps(summary, indent=1).encode())
    return summary


def readable(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return the shards that can be read, and why the others cannot; raises ValueError where none can."""
    good, bad = [], []
    for path in paths:
        try:
            open_index(path)
            good.append(path)
        except ValueError as error:
            bad.append(str(error))
    if not good:
        raise ValueError(f"shards: {bad[0]}")
    return good, bad


def plan(paths: Sequence[Path], *, rows: int, pictures: int, thumbnails: int) -> list[Task]:
    """Spread the samples that are looked at evenly over all shards; raises ValueError for no sample at all."""
    ends = np.cumsum([len(open_index(path)) for path in paths])
    total = int(ends[-1])
    if not total:
        raise ValueError(f"shards: got {len(paths)} shards without a sample, expected at least one sample")
    chosen = [spread(total, rows), spread(total, pictures)]
    shown = chosen[1][spread(len(chosen[1]), thumbnails)]
    tasks = []
    for path, end, start in zip(paths, ends.tolist(), [0, *ends[:-1].tolist()], strict=True):
        inside = [part[(part >= start) & (part < end)] - start for part in (*chosen, shown)]
        tasks.append(Task(path, inside[0].tolist(), inside[1].tolist(), frozenset(inside[2].tolist())))
    return tasks


def summarize(found: Measured, filters: Mapping[str, Filter]) -> dict[str, Any]:
    """Return what was measured as json can hold it."""
    pictures = found.pictures
    sizes: dict[str, Sequence[float]] = {
        "width": [picture.width for picture in pictures],
        "height": [picture.height for picture in pictures],
        "aspect_ratio": [picture.width / picture.height for picture in pictures],
        "image_bytes": [picture.num_bytes for picture in pictures],
        "white_border": [picture.white for picture in pictures],
        "caption_words": found.caption_words,
        "caption_letters": found.caption_letters,
    }
    return {
        "num_samples": found.num_samples,
        "num_members": found.num_members,
        "num_bytes": found.num_bytes,
        "num_rows_read": found.num_rows,
        "num_images_decoded": len(pictures),
        "num_images_unreadable": len(found.unreadable),
        "images_unreadable": found.unreadable[:100],
        "num_without_caption": sum(letters == 0 for letters in found.caption_letters),
        "num_bordered": sum(picture.white >= BORDERED for picture in pictures),
        "most_bordered": _most_bordered(found),
        "histograms": {name: bins(values) for name, values in sizes.items() if values},
        "columns": {name: _column(values) for name, values in sorted(found.columns.items())},
        "filters": {name: _survival(name, chosen, found) for name, chosen in filters.items()},
    }


def _most_bordered(found: Measured) -> dict[str, float]:
    """Return the pictures with the widest white borders by shard and key, and the border's share of each."""
    bordered = sorted(found.pictures, key=lambda picture: -picture.white)[:MAX_SHOWN]
    return {f"{picture.shard}: {picture.key}": picture.white for picture in bordered if picture.white >= BORDERED}


def bins(values: Sequence[float]) -> dict[str, Any]:
    """Return a histogram of finite numbers with their least, median, mean and greatest."""
    array = np.asarray(values, dtype=np.float64)
    array = array[np.isfinite(array)]
    if not len(array):
        return {"edges": [0.0, 1.0], "counts": [0], "num_not_finite": len(values)}
    low, high = float(array.min()), float(array.max())
    whole = bool((array == np.round(array)).all()) and high - low < NUM_BINS
    edges = np.arange(low, high + 2) - 0.5 if whole else np.histogram_bin_edges(array, bins=NUM_BINS)
    counts, _ = np.histogram(array, bins=edges)
    facts = {"min": low, "median": float(np.median(array)), "mean": float(array.mean()), "max": high}
    return {**facts, "edges": edges.tolist(), "counts": counts.tolist(), "num_not_finite": len(values) - len(array)}


def _column(values: ColumnValues) -> dict[str, Any]:
    facts: dict[str, Any] = {"num_nulls": values.num_nulls, "num_others": values.num_others}
    if values.numbers:
        facts["numbers"] = bins(values.numbers)
    if values.num_texts:
        facts["num_texts"] = values.num_texts
        facts["most_frequent"] = dict(values.texts.most_common(MAX_SHOWN))
    return facts


def _survival(name: str, chosen: Filter, found: Measured) -> dict[str, Any]:
    if name in found.refusals:
        return {**chosen.described(), "refused": found.refusals[name]}
    survival = found.survivals.get(name)
    counts = {"kept": survival.kept, "failed": survival.failed, "unknown": survival.unknown} if survival else {}
    return {**chosen.described(), "num_samples": survival.num_samples if survival else 0, **counts}


def _duplicates(found: Measured, distance: int) -> dict[str, Any]:
    hashes = np.array([picture.hash for picture in found.pictures], dtype=np.uint64)
    groups = near_duplicates(hashes, distance=distance) if len(hashes) else []
    named = [[f"{found.pictures[i].shard}: {found.pictures[i].key}" for i in group] for group in groups]
    return {"distance": distance, "num_groups": len(groups), "num_pictures": sum(map(len, groups)), "groups": named}


def render(found: Measured, summary: Mapping[str, Any]) -> str:
    """Return the page."""
    sections = [
        ("Counts", _counts(summary)),
        ("Pictures and captions", _histograms(summary)),
        ("Filters", _filters(summary)),
        ("Metadata", _columns(summary)),
        ("White borders", _borders(summary)),
        ("Near-duplicates", _groups(summary)),
        ("Contact sheet", _sheet(found)),
    ]
    return page.page(f"{len(summary['shards'])} shards, {summary['num_samples']} samples", sections)


def _counts(summary: Mapping[str, Any]) -> str:
    shards = summary["shards"]
    rows: list[tuple[object, ...]] = [
        ("shards", len(shards), f"{shards[0]} to {shards[-1]}"),
        ("shards that cannot be read", len(summary["shards_unreadable"]), " ".join(summary["shards_unreadable"][:3])),
        ("samples", summary["num_samples"], ""),
        ("metadata read", summary["num_rows_read"], "samples, evenly spread"),
        ("images decoded", summary["num_images_decoded"], "samples, evenly spread"),
        ("images that cannot be read", summary["num_images_unreadable"], " ".join(summary["images_unreadable"][:3])),
        ("without a caption", summary["num_without_caption"], "of the metadata read"),
        ("with white borders", summary["num_bordered"], f"of {BORDERED:.0%} of the area and more, of those decoded"),
    ]
    members = [(f".{name}", count, summary["num_bytes"][name]) for name, count in summary["num_members"].items()]
    return page.table(["", "number", ""], rows) + page.table(["member", "number", "bytes"], members)


def _histograms(summary: Mapping[str, Any]) -> str:
    figures = [
        page.histogram(_titled(name.replace("_", " "), facts), facts["edges"], facts["counts"])
        for name, facts in summary["histograms"].items()
    ]
    return page.plots(figures)


def _columns(summary: Mapping[str, Any]) -> str:
    parts, every_other = [], []
    for name, facts in summary["columns"].items():
        nulls = f", {facts['num_nulls']} null" if facts["num_nulls"] else ""
        if "numbers" in facts:
            numbers = facts["numbers"]
            parts.append(page.histogram(_titled(name, numbers) + nulls, numbers["edges"], numbers["counts"]))
        texts = facts.get("most_frequent", {})
        if len(texts) == MAX_SHOWN and max(texts.values()) == 1:  # such as a URL
            every_other.append(name)
        elif texts:
            title = f"{name}: {facts['num_texts']} texts, the most frequent{nulls}"
            parts.append(page.bars(title, list(texts), list(texts.values())))
    only_nulls = [name for name, facts in summary["columns"].items() if not {"numbers", "num_texts"} & facts.keys()]
    note = page.paragraph(f"Without a number or a text: {', '.join(only_nulls)}") if only_nulls else ""
    differing = page.paragraph(f"Another text in each sample: {', '.join(every_other)}") if every_other else ""
    return page.plots(parts) + differing + note


def _filters(summary: Mapping[str, Any]) -> str:
    rows: list[tuple[object, ...]] = []
    for name, facts in summary["filters"].items():
        if "refused" in facts:
            rows.append((name, " and ".join(facts["where"]), "", "", facts["refused"], facts["source"]))
            continue
        share = f"{facts['kept'] / facts['num_samples']:.1%}" if facts["num_samples"] else ""
        reasons = "; ".join(
            f"{text}: {failed} fail, {unknown} null"
            for text, failed, unknown in zip(facts["where"], *_reasons(facts), strict=True)
        )
        rows.append((name, " and ".join(facts["where"]), facts.get("kept", 0), share, reasons, facts["source"]))
    if not rows:
        return page.paragraph("None was asked for.")
    return page.table(["filter", "condition", "kept", "of those read", "why not", "source"], rows)


def _reasons(facts: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return how many samples failed each condition, and were unknown to it; zeros where none was judged."""
    none = [0] * len(facts["where"])
    return facts.get("failed") or none, facts.get("unknown") or none


def _borders(summary: Mapping[str, Any]) -> str:
    told = f"{summary['num_bordered']} of {summary['num_images_decoded']} decoded pictures have them."
    rows = [(f"{white:.0%}", name) for name, white in summary["most_bordered"].items()]
    return page.paragraph(told) + (page.table(["of the area", "the widest"], rows) if rows else "")


def _groups(summary: Mapping[str, Any]) -> str:
    facts = summary["near_duplicates"]
    told = (
        f"{facts['num_pictures']} of {summary['num_images_decoded']} decoded pictures lie in {facts['num_groups']} "
        f"groups whose difference hashes are at most {facts['distance']} of 64 bits apart."
    )
    rows = [(len(group), ", ".join(group[:8])) for group in facts["groups"][:MAX_SHOWN]]
    return page.paragraph(told) + (page.table(["pictures", "the first of them"], rows) if rows else "")


def _sheet(found: Measured) -> str:
    shown = [picture for picture in found.pictures if picture.thumbnail]
    return page.contact_sheet(
        [(picture.thumbnail, f"{picture.width} x {picture.height}  {picture.caption}") for picture in shown]
    )


def _titled(name: str, facts: Mapping[str, Any]) -> str:
    if "median" not in facts:
        return f"{name}: no finite number"
    return f"{name}: median {page.number(facts['median'])}, mean {page.number(facts['mean'])}"
