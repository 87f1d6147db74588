"""Groups that act on parameters and observations together, ready-made or a user's own; none of it imports torch before it acts."""

from sbiplat.symmetry.action import GroupAction
from sbiplat.symmetry.euclidean import Euclidean2
from sbiplat.symmetry.permutation import Permutation
from sbiplat.symmetry.phase import Phase
from sbiplat.symmetry.product import Product
from sbiplat.symmetry.rotation2d import ImageRotation, Rotation2D
from sbiplat.symmetry.rotation3d import Rotation3D
from sbiplat.symmetry.scaling import Scaling, Units
from sbiplat.symmetry.shift import SpectrumShift, TimeShift
from sbiplat.symmetry.translation import Translation

__all__ = [
    "Euclidean2", "GroupAction", "ImageRotation", "Permutation", "Phase", "Product", "Rotation2D", "Rotation3D", "Scaling",
    "SpectrumShift", "TimeShift", "Translation", "Units",
]
