"""Low-rank arithmetic: the singular values of a product without the product."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Truncated:
    """The best approximation of a matrix at a rank (Eckart and Young)."""

    a: Any
    """[rank, in]"""
    b: Any
    """[out, rank]"""
    energy: float
    """‖matrix‖², the sum of all squared singular values."""
    lost: float
    """The squares of the singular values that were left out."""

    @property
    def error(self) -> float:
        """‖matrix - B A‖ / ‖matrix‖."""
        return (self.lost / self.energy) ** 0.5 if self.energy else 0.0


def truncate_product(b: Any, a: Any, rank: int | None, energy: float | None) -> Truncated:
    """The best approximation of `B A` at a smaller rank.

    From two QR decompositions and the SVD of a [rank, rank] core: exact, and thousands of times
    less work than the SVD of the [out, in] product.

    Args:
        b: [out, r]
        a: [r, in]
        rank: of the result; None to choose it by energy.
        energy: the share of ‖B A‖² to keep, when there is no rank.
    """
    q_b, r_b = torch.linalg.qr(b.double())  # [out, r] [r, r]
    q_a, r_a = torch.linalg.qr(a.double().T)  # [in, r] [r, r]
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    return _cut(q_b @ u, s, vh @ q_a.T, rank, energy)


def truncate_matrix(matrix: Any, rank: int | None, energy: float | None) -> Truncated:
    """As `truncate_product`, for any matrix [out, in]: one whole SVD."""
    u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    return _cut(u, s.double(), vh, rank, energy)


def _cut(u: Any, s: Any, vh: Any, rank: int | None, energy: float | None) -> Truncated:
    squares = s.double().square()
    total = float(squares.sum())
    count = min(rank, len(s)) if rank is not None else _rank_for(squares, energy or 1.0)
    # The singular values are shared out evenly, so that neither factor is much larger.
    roots = s[:count].sqrt()
    a = roots[:, None].to(vh.dtype) * vh[:count]
    b = u[:, :count] * roots.to(u.dtype)
    lost = float(squares[count:].sum())
    return Truncated(a.float().contiguous(), b.float().contiguous(), total, lost)


def _rank_for(squares: Any, energy: float) -> int:
    """The smallest rank that keeps a share of the energy; at least 1."""
    kept = squares.cumsum(0)
    total = float(kept[-1])
    # A share of 1 must not ask for singular values that are only rounding.
    wanted = min(energy, 1 - 1e-12) * total
    return min(int((kept < wanted).sum()) + 1, len(squares))
