"""HiPPO-LegS, the matrix that keeps a sequence's past as coefficients of Legendre polynomials, and the eigenvalues that state spaces begin with.

Gu, Dao, Ermon, Rudra & Re 2020, "HiPPO" (arXiv 2008.07669). With ``p_n = sqrt(n + 1/2)``, ``A + p p^T`` is -1/2 plus a skew matrix ("HiPPO-N", Gu, Gupta,
Goel & Re 2022, arXiv 2206.11893, section 4), so it has orthonormal eigenvectors and eigenvalues in conjugate pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hippo_legs(size: int) -> tuple[Tensor, Tensor]:
    """The matrix A and the input's column B: ``(size, size)`` and ``(size,)``, float64.

    ``A_nk = -sqrt(2n + 1) sqrt(2k + 1)`` for ``n > k``, ``-(n + 1)`` for ``n = k``, else 0; ``B_n = sqrt(2n + 1)``.
    """
    root = (2 * torch.arange(size, dtype=torch.float64) + 1).sqrt()
    below = torch.outer(root, root).tril(-1)
    return -below - torch.diag(torch.arange(size, dtype=torch.float64) + 1), root


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


def hippo_low_rank(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """``A = V (Lambda - P P*) V*`` and ``B`` of HiPPO-LegS in the basis of HiPPO-N's eigenvectors ``V``; one of each conjugate pair.

    Args:
        size: of the matrix, even.

    Returns:
        ``Lambda``, ``P = V* p`` and ``V* B``, each ``(size / 2,)``, complex128.
    """
    values, vectors = hippo_modes(size)
    _, b = hippo_legs(size)
    into = vectors.mH @ b.to(vectors.dtype)
    return values, into / 2**0.5, into  # p is B over the root of 2
