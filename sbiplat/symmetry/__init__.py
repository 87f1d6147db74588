"""Groups that act on parameters and observations together, ready-made or a user's own; none of it imports torch before it acts."""

from sbiplat.symmetry.action import GroupAction
from sbiplat.symmetry.product import Product
from sbiplat.symmetry.shift import SpectrumShift, TimeShift
from sbiplat.symmetry.translation import Translation

__all__ = ["GroupAction", "Product", "SpectrumShift", "TimeShift", "Translation"]
