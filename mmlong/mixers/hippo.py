"""HiPPO-LegS, the matrix that keeps a sequence's past as coefficients of Legendre polynomials, and the eigenvalues that state spaces begin with.

Gu, Dao, Ermon, Rudra & Re 2020, "HiPPO" (arXiv 2008.07669). With ``p_n = sqrt(n + 1/2)``, ``A + p p^T`` is -1/2 plus a skew matrix ("HiPPO-N", Gu, Gupta,
Goel & Re 2022, arXiv 2206.11893, section 4), so it has orthonormal eigenvectors and eigenvalues in conjugate pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hippo_modes(size: int) -> tuple[Tensor, Tensor]:
    """One of each conjugate pair of HiPPO-N's eigenvalues, slowest first, and their eigenvectors.

    Args:
        size: of the matrix, even.

    Returns:
        ``(size / 2,)`` and ``(size, size / 2)``, complex128.
    """
    root = (2 * torch.arange(size, dtype=torch.float64) + 1).sqrt()
    skew = torch.outer(root, root) / 2
    skew = skew.triu(1) - skew.tril(-1)
    # -i times a skew matrix is Hermitian, with eigenvalues in pairs of signs.
    frequencies, vectors = torch.linalg.eigh(-1j * skew)
    frequencies, vectors = frequencies[size // 2 :], vectors[:, size // 2 :]
    return torch.complex(torch.full_like(frequencies, -0.5), frequencies), vectors.clone()
