"""Figures of the report: data in, a matplotlib Figure out; no pyplot, no window, and none of the reader's own rc settings.

Every text that comes from a bank or run goes through `plain`, which keeps `$` from being read as mathematics.
"""

from sbiplat.report.figures.common import DARK, LIGHT, WARM, Image, image, plain, style, with_unit
from sbiplat.report.figures.coverage import MOST_PANELS, Map, coverage_curves, maps, rank_histograms
from sbiplat.report.figures.observed import PREDICTIVE, Dots, Panel, Picture, Series, Words, observed
from sbiplat.report.figures.posterior import BINS_2D, MOST_BESIDE, MOST_CORNER, beside, corner, highest_density_levels, smoothed
from sbiplat.report.figures.robustness import Robust, robustness
from sbiplat.report.figures.training import learning_curve, loss_curves

__all__ = [
    "BINS_2D", "DARK", "LIGHT", "MOST_BESIDE", "MOST_CORNER", "MOST_PANELS", "PREDICTIVE", "WARM", "Dots", "Image", "Map", "Panel",
    "Picture", "Robust", "Series", "Words", "beside", "corner", "coverage_curves", "highest_density_levels", "image", "learning_curve",
    "loss_curves", "maps", "observed", "plain", "rank_histograms", "robustness", "smoothed", "style", "with_unit",
]
