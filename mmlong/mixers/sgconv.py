"""SGConv: a long filter of sub-filters that grow with the lag, each from as many parameters, and decay.

Follows Li, Cai, Zhang, Chen & Dey 2022, "What Makes Convolutional Models Great on Long Sequence Modeling?" (arXiv 2210.09298). With ``n`` parameters
``w_i`` a scale, for every channel:

    k = 1/Z concat(k_0, k_1, ..., k_{N-1}),    k_i = alpha^i upsample(w_i, 2^max(i - 1, 0)),    N = 1 + ceil(log2(max_length / n))

where upsampling by ``s`` is linear between the centres of blocks of ``s`` lags, constant beyond the outer ones, and ``Z`` is the norm that the filter has at the
start, so that noise keeps its size; it stays as it is. The layer around the filter is :mod:`mmlong.mixers.long_filter`'s. Departures: causal only; a filter is cut
at ``max_length``, as the authors' is at the length at hand; the decay is the formula's ``alpha`` and not the power of the lag that some of the authors' recipes have in its place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmlong.mixers.contract import register_mixer
from mmlong.mixers.long_filter import LongFilter


@register_mixer(
    "sgconv",
    paper="Li et al. 2022, arXiv 2210.09298",
    state="growing",
    cost="n log n",
    note="filters of the absolute lag, zero from max_length on; proved against torch's interpolation and direct convolution in float64",
)
class SGConv(LongFilter):
    """The Structured Global Convolution layer.

    Args:
        dim: width D.
        causal: always true; see both sides with direction ``both`` or ``alternate``.
        max_length: lags that a filter has. Longer sequences run; what is further back contributes nothing.
        kernel_dim: parameters n of a scale.
        decay_min, decay_max: ``1 / alpha`` of the first and the last channel; those between are evenly spaced.

    Raises:
        ValueError: a size below 1, or decays that are not 1 <= decay_min <= decay_max.
    """

    kernel_norm: Tensor

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = True,
        max_length: int = 1 << 17,
        kernel_dim: int = 64,
        decay_min: float = 2.0,
        decay_max: float = 2.0,
    ) -> None:
        super().__init__(dim, causal=causal, max_length=max_length, name="sgconv")
        if kernel_dim < 1:
            raise ValueError(f"sgconv: kernel_dim must be at least 1, got {kernel_dim}")
        if not 1 <= decay_min <= decay_max:
            raise ValueError(
                f"sgconv: decays must satisfy 1 <= decay_min <= decay_max, got {decay_min} and {decay_max}"
            )
        self.kernel_dim, self.decay_min, self.decay_max = kernel_dim, decay_min, decay_max
        self.scales = 1 + (-(-max_length // kernel_dim) - 1).bit_length()
        self.kernel = nn.Parameter(torch.empty(self.scales, kernel_dim, dim))
        self.register_buffer("kernel_norm", torch.empty(dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Parameters and D are standard normal; filters, before they are cut, have norm 1."""
        nn.init.normal_(self.D)
        nn.init.normal_(self.kernel)
        dtype = torch.promote_types(self.kernel.dtype, torch.float32)
        kernel, decay = self.kernel.to(dtype), self._decay(dtype)
        # Without making the filters, which are long: of each scale, the squares of what its neighbours sum to.
        energy = torch.zeros_like(decay)
        for i, w in enumerate(kernel):
            shares, near = _shares(self._times(i), w), _neighbours(w)
            energy += decay ** (-2 * i) * torch.einsum("and,ab,bnd->d", near, shares @ shares.T, near)
        self.kernel_norm.copy_(energy.sqrt())

    def _decay(self, dtype: torch.dtype) -> Tensor:
        """``1 / alpha`` of each channel."""
        return torch.linspace(self.decay_min, self.decay_max, self.dim, dtype=dtype, device=self.kernel.device)

    def _times(self, scale: int) -> int:
        """Lags a parameter."""
        return 1 << max(scale - 1, 0)

    def sources(self) -> list[Tensor]:
        return [self.kernel, self.kernel_norm]

    def filters(self, lags: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = torch.promote_types(self.kernel.dtype, torch.float32) if dtype is None else dtype
        decay, size = self._decay(dtype), 1 / self.kernel_norm.to(dtype)
        unknown = torch.compiler.is_exporting() and not isinstance(lags, int)
        parts = []
        for i in range(self.scales):
            if i and not unknown and self.kernel_dim << (i - 1) >= lags:
                break
            parts.append(_upsample(self.kernel[i].to(dtype) * (size * decay**-i), self._times(i)))
        return torch.cat(parts).narrow(0, 0, lags)


def _neighbours(w: Tensor) -> Tensor:
    """``w (n, D)`` before, at and after each row, the outer rows repeated: ``(3, n, D)``."""
    return torch.stack([torch.cat([w[:1], w[:-1]]), w, torch.cat([w[1:], w[-1:]])])


def _shares(times: int, like: Tensor) -> Tensor:
    """What those three have in each of the ``times`` lags of a row: ``(3, times)``."""
    off = (torch.arange(times, dtype=like.dtype, device=like.device) + 0.5) / times - 0.5
    return torch.stack([(-off).clamp_min(0), 1 - off.abs(), off.clamp_min(0)])


def _upsample(w: Tensor, times: int) -> Tensor:
    """``w (n, D)`` to ``(n times, D)``, linear between the centres of the blocks that the rows become."""
    if times == 1:
        return w
    before, here, after = _shares(times, w)[..., None]
    lower, middle, upper = _neighbours(w)[:, :, None]
    return torch.addcmul(torch.addcmul(middle * here, lower, before), upper, after).flatten(0, 1)
