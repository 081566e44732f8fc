"""How the features of two networks are made comparable, without parameters and whatever their shapes.

Each comparison maps the stages of a network to [stages, B, entries] with entries of order 1, so that two networks can
be subtracted stage from stage.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from lkd.losses.stages import as_map, pool

EPSILON = 1e-8


def attend_places(features: Sequence[Tensor], grid: int) -> Tensor:
    """Where a stage is active: mean squares over channels, on a grid × grid, of root mean square 1 over the grid.

    The attention map of Zagoruyko and Komodakis (ICLR 2017), averaged to one grid for all sizes (repeated if smaller).

    Args:
        features: Of each stage, [B, c, h, w] or tokens [B, n, c].
        grid: Height and width of the grid.

    Returns:
        [stages, B, grid²].
    """
    maps = [adaptive_avg_pool2d(as_map(f).square().mean(1, keepdim=True), (grid, grid)).flatten(1) for f in features]
    return torch.stack([m * (m.square().mean(1, keepdim=True) + EPSILON).rsqrt() for m in maps])


def relate_images(features: Sequence[Tensor]) -> Tensor:
    """How alike two images are: cosines between their pooled features, centred over the batch, [stages, B, B].

    Similarity-preserving distillation (Tung, Mori, ICCV 2019) on centred, pooled features.
    """
    directions = [scale_rows(centre_pooled(f)) for f in features]
    return torch.stack([d @ d.T for d in directions])


def project_channels(features: Sequence[Tensor], projections: Sequence[Tensor]) -> Tensor:
    """Which channels respond: pooled features, centred over the batch, projected, of root mean square 1.

    Args:
        features: Of each stage.
        projections: Of each stage, [m, c].

    Returns:
        [stages, B, m].
    """
    pooled = [centre_pooled(f) for f in features]
    projected = [x @ projection.to(x).T for x, projection in zip(pooled, projections, strict=True)]
    return torch.stack([scale_rows(x) * x.shape[1] ** 0.5 for x in projected])


def centre_pooled(feature: Tensor) -> Tensor:
    """Global average less its mean over the batch, [B, c]."""
    pooled = pool(feature)
    return pooled - pooled.mean(0, keepdim=True)


def scale_rows(rows: Tensor) -> Tensor:
    """Rows of unit length; shorter ones than 1e-4 are left shorter."""
    return rows * (rows.square().sum(1, keepdim=True) + EPSILON).rsqrt()


@lru_cache
def draw_projection(channels: int, size: int, role: str) -> Tensor:
    """A random matrix [size, channels] with orthonormal rows, or columns if channels < size; the same on every call.

    Args:
        channels: Of the feature.
        size: Of the projection.
        role: student or teacher: each has its own.
    """
    generator = np.random.default_rng([channels, size, role == "teacher"])
    q, r = np.linalg.qr(generator.standard_normal((max(channels, size), min(channels, size))))
    orthonormal = q * np.sign(np.diag(r))  # the one factor that every LAPACK agrees on
    return torch.from_numpy(orthonormal.T if size < channels else orthonormal).float()
