"""`report.html`: evaluations on one page, each beside the others, that needs no network and no other file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.generation.report import gallery
from ldm.generation.report.cards import Comparison
from ldm.generation.report.curves import Curve, called, varied
from ldm.generation.report.neighbours import Nearest, nearest_pixels, nearest_real, nearest_trained, rows_to_show
from ldm.generation.report.reading import EvaluationFolder, picture_of
from ldm.generation.report.strips import read_strips
from ldm.generation.report.tables import by_card, figures, protocols, published
from ldm.generation.report.vote_page import shared_samples, spread
from ldm.pages.chart import STYLE as CHART_STYLE
from ldm.pages.page import page, paragraph, plots

if TYPE_CHECKING:
    from ldm.generation.evaluation.images import Images

# Side by side on one page; more would be too narrow to be looked at.
MAX_COLUMNS = 8
# What samples are held beside, and what nearness to it means.
TRAINED, REFERENCE = "training images", "real images of the reference"
MEANING = {
    TRAINED: "A sample that equals its neighbour was learned by heart.",
    REFERENCE: "Where the model was not trained on these, nearness says how alike the sets are, not what was copied.",
}


@dataclass(frozen=True)
class Amounts:
    """How many pictures a page shows.

    Args:
        samples: of each evaluation, at the same seeds and prompts.
        ranked: of the best and of the worst by each score.
        neighbours: samples beside their nearest real images, twice; per_sample: these.
        strips: denoising strips of each evaluation.
        training: images to look for neighbours in; None takes those that the evaluation kept features of, or else the
            reference.

    Raises:
        ValueError: a negative one.
    """

    samples: int = 32
    ranked: int = 8
    neighbours: int = 6
    per_sample: int = 4
    strips: int = 4
    training: str | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "training" and (not isinstance(value, int) or value < 0):
                raise ValueError(f"{name}: got {value}, expected a whole number of 0 or more")


def report_page(
    evaluations: Sequence[EvaluationFolder],
    *,
    curves: Sequence[Curve] = (),
    comparisons: Sequence[Comparison] = (),
    amounts: Amounts | None = None,
) -> str:
    """The page of one evaluation, or of several side by side.

    Args:
        comparisons: with a paper card, one an evaluation.

    Raises:
        ValueError: no evaluation, or more than one that go by the same name.
    """
    names = [one.name for one in evaluations]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"got evaluations {names}, expected at least one, each of a name of its own")
    amounts = amounts or Amounts()
    shown = evaluations[:MAX_COLUMNS]
    told = {one.name: [one.name, *_in_short(one)] for one in evaluations}
    sections = [
        ("Figures", figures(evaluations)),
        ("Published and measured", "".join(published(of_one) for of_one in by_card(comparisons))),
        ("Curves", plots([f"<figure>{curve.chart.svg()}</figure>" for curve in curves]) if curves else ""),
        (_heading(shown), _pictures(shown, amounts.samples)),
        ("Best and worst by score", _each(shown, [ranked(one, amounts.ranked) for one in shown])),
        (
            f"Nearest {'training' if any(one.training for one in shown) else 'real'} images",
            _each(shown, [_neighbours(one, amounts) for one in shown]),
        ),
        ("Denoising", _strips(shown, amounts.strips)),
        ("How it was measured", protocols(evaluations)),
    ]
    title = names[0] if len(names) == 1 else f"{len(names)} evaluations"
    head = "" if len(evaluations) <= MAX_COLUMNS else f"Pictures are of the first {MAX_COLUMNS} evaluations."
    kept = [(heading, content) for heading, content in sections if content]
    lead = [
        (
            "What was evaluated",
            "".join(paragraph("  ·  ".join(parts)) for parts in told.values()) + (paragraph(head) if head else ""),
        )
    ]
    return page(f"Evaluation: {title}", [*lead, *kept], style=gallery.STYLE + CHART_STYLE)


def ranked(evaluation: EvaluationFolder, count: int) -> str:
    """The samples of the highest and of the lowest score, for each score."""
    parts = []
    for name, scores in evaluation.scores.items() if count and len(evaluation) else ():
        known = {index: score for index, score in scores.items() if index < len(evaluation) and math.isfinite(score)}
        if len(set(known.values())) < 2:
            continue
        ordered = sorted(known, key=lambda index: (known[index], index))
        lower_is_better = (evaluation.metrics.get(name) or {}).get("higher_is_better") is False
        lowest, highest = ordered[:count], ordered[: -count - 1 : -1]
        best, worst = (lowest, highest) if lower_is_better else (highest, lowest)
        for word, chosen in (("best", best), ("worst", worst)):
            captions = [f"{gallery.said(known[index])}  {evaluation.sample(index).told}" for index in chosen]
            parts.append(gallery.heading(f"{word} by {called(name)}"))
            parts.append(
                gallery.sheet([_figure(evaluation, i, text) for i, text in zip(chosen, captions, strict=True)])
            )
    return "".join(parts)


def _heading(evaluations: Sequence[EvaluationFolder]) -> str:
    if evaluations[0].reconstructs:
        return "Originals and reconstructions"
    return "Pictures of the same prompts and seeds" if len(evaluations) > 1 else "Pictures"


def _pictures(evaluations: Sequence[EvaluationFolder], count: int) -> str:
    """One evaluation's pictures on a sheet; in columns those of several, or reconstructions beside their originals."""
    first, *others = evaluations
    originals = first.originals()
    if not count or not len(first):
        return ""
    if not others and originals is None:
        chosen = spread(range(len(first)), count)
        return gallery.sheet([_figure(first, index, _caption(first, index)) for index in chosen])
    places = [dict(shared_samples(first, other)) for other in others]
    shared = [index for index in range(len(first)) if all(index in place for place in places)]
    if not shared:
        return paragraph("These evaluations share no prompt and seed.")
    rows = []
    for index in spread(shared, count):
        cells = [gallery.words(_caption(first, index))]
        cells += [gallery.figure(picture_of(originals[index]), f"original {index}")] if originals is not None else []
        cells += [_figure(first, index, "")]
        cells += [_figure(other, place[index], "") for other, place in zip(others, places, strict=True)]
        rows.append(cells)
    names = [one.name for one in evaluations] if others else ["reconstruction"]
    heads = ["prompt and seed", *names] if originals is None else ["", "original", *names]
    return gallery.aligned(heads, rows)


def _neighbours(evaluation: EvaluationFolder, amounts: Amounts) -> str:
    """Samples beside the real images nearest to them: first those nearest of all, then some evenly spread ones.

    Of reconstructions the nearest are their originals.
    """
    if not amounts.neighbours or not amounts.per_sample or not len(evaluation) or evaluation.reconstructs:
        return ""
    found = _searched(evaluation, amounts)
    if found is None:
        return ""
    nearest, real, kind = found
    space = nearest.network if nearest.network.startswith("pixels") else f"features of {nearest.network}"
    note = paragraph(f"By Euclidean distance between {space}, among {nearest.num_real:,} {kind}. {MEANING[kind]}")
    if real is None:
        return note + paragraph("These images are not there any more, or are others than were measured.")
    closest, evenly = rows_to_show(nearest, amounts.neighbours)
    parts = [("The samples nearest to one of them", closest), ("Samples evenly spread", evenly)]
    word = kind.partition(" ")[0]
    return note + "".join(gallery.heading(text) + _rows(evaluation, nearest, real, rows, word) for text, rows in parts)


def _searched(evaluation: EvaluationFolder, amounts: Amounts) -> tuple[Nearest, Images | None, str] | None:
    """(the nearest images, these images, what they are): of the training images, or else of the reference."""
    k, known = amounts.per_sample, evaluation.training
    if amounts.training is not None and str(Path(amounts.training).absolute()) != known.get("path"):
        from ldm.generation.evaluation.images import open_images

        images = open_images(amounts.training, resolution=max(evaluation.picture(0).size))
        return nearest_pixels(evaluation, images, k=k), images, TRAINED
    if known:
        trained = evaluation.training_pictures()
        if found := nearest_trained(evaluation, k=k):
            return found, trained, TRAINED
        return None if trained is None else (nearest_pixels(evaluation, trained, k=k), trained, TRAINED)
    real = nearest_real(evaluation, k=k)
    return None if real is None else (real, evaluation.reference_pictures(), REFERENCE)


def _rows(evaluation: EvaluationFolder, nearest: Nearest, real: Images, rows: Sequence[int], word: str) -> str:
    cells = []
    for row in rows:
        index = int(nearest.samples[row])
        line = [gallery.words(_caption(evaluation, index)), _figure(evaluation, index, "sample")]
        for number, distance in zip(nearest.numbers[row].tolist(), nearest.distances[row].tolist(), strict=True):
            text = f"{distance:.3g}"
            line.append(gallery.figure(picture_of(real[number]), f"{word} image {number}, at distance {text}", text))
        cells.append(line)
    heads = ["", "sample", *(f"nearest {i + 1}" for i in range(nearest.numbers.shape[1]))]
    return gallery.aligned(heads, cells)


def _each(evaluations: Sequence[EvaluationFolder], contents: Sequence[str]) -> str:
    """What belongs to each evaluation: of one as it is, of several each below its name, the first unfolded."""
    if len(evaluations) == 1:
        return contents[0]
    there = [(one.name, content) for one, content in zip(evaluations, contents, strict=True) if content]
    return "".join(gallery.folded(name, content, is_open=not place) for place, (name, content) in enumerate(there))


def _strips(evaluations: Sequence[EvaluationFolder], count: int) -> str:
    parts = []
    for one in evaluations:
        found = read_strips(one.path)[:count]
        if found and len(evaluations) > 1:
            parts.append(gallery.heading(one.name))
        for strip in found:
            caption = f"{strip.told}, seed {strip.seed}"
            spoken = f"x_0 predictions after steps {gallery.said(list(strip.steps))} of {strip.num_steps}: {caption}"
            parts.append(gallery.wide(strip.picture, spoken, caption))
        if found:
            steps = gallery.said(list(found[0].steps))
            parts.append(paragraph(f"What the model believed after steps {steps} of {found[0].num_steps}."))
    return "".join(parts)


def _figure(evaluation: EvaluationFolder, index: int, caption: str) -> str:
    alt = f"{evaluation.name}: {_caption(evaluation, index)}"
    return gallery.figure(evaluation.picture(index), alt, caption)


def _caption(evaluation: EvaluationFolder, index: int) -> str:
    if evaluation.reconstructs:
        return f"image {index}"
    sample = evaluation.sample(index)
    seed = f"seed {sample.seed}" if sample.seed is not None else f"picture {index}"
    return f"{sample.told}, {seed}"


def _in_short(evaluation: EvaluationFolder) -> list[str]:
    """A protocol in a few words."""
    protocol = evaluation.protocol
    images, reference = protocol.get("images") or {}, protocol.get("reference") or {}
    if images:
        beside = [f"beside {reference['count']} real images"] if reference.get("count") else []
        return [f"{images.get('count')} images of {images.get('path')}", *beside]
    sampler = (protocol.get("sampler") or {}).get("name")
    guidance = (protocol.get("guidance") or {}).get("scale")
    step = (protocol.get("checkpoint") or {}).get("step")
    kind = "reconstructions" if evaluation.reconstructs else "samples"
    words = [
        f"{protocol['num_samples']} {kind}" if "num_samples" in protocol else None,
        f"{sampler}, {protocol.get('steps')} steps" if sampler else None,
        f"guidance {guidance:g}" if isinstance(guidance, int | float) else None,
        f"trained for {step} steps" if step else None,
        f"beside {reference['count']} real images" if reference.get("count") else None,
    ]
    return [word for word in words if word]


def axes_told(evaluations: Sequence[EvaluationFolder]) -> list[str]:
    """A name of each evaluation that says what is different about it: `guidance scale 1.5, steps 20`."""
    axes = varied(evaluations)
    told = [
        ", ".join(
            f"{axis.label} {gallery.said(axis.values[row])}" if axis.is_number else gallery.said(axis.values[row])
            for axis in axes
        )
        for row in range(len(evaluations))
    ]
    return told if axes and len(set(told)) == len(told) else [one.name for one in evaluations]
