"""Evaluations to look at: a page, curves of a sweep, a blind vote between two, a paper's figures beside a run's."""

from ldm.generation.report.cards import Card, Comparison, compare
from ldm.generation.report.curves import curves, write_curves
from ldm.generation.report.page import Amounts, axes_told, report_page
from ldm.generation.report.reading import EvaluationFolder
from ldm.generation.report.strips import strip_tasks
from ldm.generation.report.vote_page import make_ballot
from ldm.generation.report.votes import count, read_votes

__all__ = [
    "Amounts",
    "Card",
    "Comparison",
    "EvaluationFolder",
    "axes_told",
    "compare",
    "count",
    "curves",
    "make_ballot",
    "read_votes",
    "report_page",
    "strip_tasks",
    "write_curves",
]
