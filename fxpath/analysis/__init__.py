"""From a store of pathways to pandas tables: offline, without torch and without figures."""

from .dead import dead_by_sample, dead_share
from .diagnostics import diagnostics
from .linearity import linearity_summary
from .null import intersection_moments, jaccard_moments, random_active, shortfall
from .overlap import chance_jaccard, overlap, overlap_by_sample
from .statistics import bootstrap_interval
from .summary import ablation_correlations, summary

__all__ = [
    "ablation_correlations",
    "bootstrap_interval",
    "chance_jaccard",
    "dead_by_sample",
    "dead_share",
    "diagnostics",
    "intersection_moments",
    "jaccard_moments",
    "linearity_summary",
    "overlap",
    "overlap_by_sample",
    "random_active",
    "shortfall",
    "summary",
]
