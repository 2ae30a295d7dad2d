"""Layers over ranks: every rank runs every layer on its piece at the same time, and only the mixers speak with other ranks.

The loss over ranks (:mod:`mmlong.parallel.loss`) treats a model as one thing with one state, and a single row then keeps only one rank busy at a time. A block's norm and feed-forward need no neighbour, and
of the mixers some can do better than wait for a state:

    diagonal recurrence (s4d)     runs from nothing, combines states by a prefix scan over ranks in log steps, and adds what the incoming state contributes
    scalar decay (mamba2)         the same scan; what follows the recurrence is not linear, so the piece is run a second time from the state that came in
    sliding window (local)        a halo: the last ``window`` tokens of the piece before
    softmax attention             a ring: keys and values of the pieces before, one piece at a time (:mod:`mmlong.parallel.ring`)
    long convolution (hyena)      overlap: the inputs of the pieces before, as far as the filter reaches
    any other streaming mixer     its state, layer by layer: rank r + 1 works on layer l while rank r works on layer l + 1 (a bubble of (R - 1) / (R - 1 + layers))

A class of mixers gets a form of its own by :func:`parallel_form`; a form may decline a case (a window longer than a piece), which then takes the general way.

    with over_ranks(backbone, group):
        y, _ = backbone(x_piece, None, layout_piece)

The graph of the piece is kept, so memory is divided by the number of ranks and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmlong.backbone.part import PARTS, Part
from mmlong.backbone.replay import refuse_sharded
from mmlong.backbone.segmented import Step
from mmlong.layout import Layout
from mmlong.mixers import S4D, Attention, Hyena, Local, Mamba2, Mixer, State, require_streaming
from mmlong.mixers.hyena import TAPS
from mmlong.ops.diagonal import diagonal_recurrence
from mmlong.parallel.links import Links, sum_over_ranks
from mmlong.parallel.loss import seed_of
from mmlong.parallel.ring import ring_attention

Form = Callable[[Any, Tensor, Links, Layout | None], Tensor | None]
FORMS: dict[type[Mixer], Form] = {}
"""By class of mixer; a subclass is another mechanism and needs its own."""


def parallel_form(*kinds: type[Mixer]) -> Callable[[Form], Form]:
    """Decorator: a function ``(mixer, x, links, layout) -> y`` that runs mixers of these classes over ranks, or ``None`` where it cannot.

    What it decides by must be the same on every rank (``links.shortest`` is).
    """

    def add(form: Form) -> Form:
        FORMS.update(dict.fromkeys(kinds, form))
        return form

    return add


def layered_loss(
    module: nn.Module,
    layers: nn.Module,
    step: Step,
    inputs: list[Tensor],
    group: dist.ProcessGroup | None,
    layout: Layout | None = None,
    state: State = None,
    start: int = 0,
) -> Tensor:
    """The summed loss of sequences that lie on several ranks, the same on each, their layers running at once.

    A collective: every rank of the group must call it, and its backward.

    Args:
        module: holds every parameter that ``step`` uses.
        layers: the part of it whose mixers speak with other ranks, its backbone; see :func:`over_ranks`.
        step: ``(pieces, state, layout) -> (loss, state)``, the loss a scalar *sum* over the positions.
        inputs: this rank's piece of each input, ``(B, l, ...)``, l >= 1.
        group: the ranks that share the sequences, in order; ``None``: this process alone.
        layout: of this rank's piece.
        state: what ``step`` needs of what comes before the piece, except for ``layers``.
        start: where the piece begins, which together with one number of the global generator (the same on every rank) seeds its dropout.

    Returns:
        the loss. The parameters' gradients are this rank's part, times the number of ranks, for a reducer that averages over all ranks, as DDP's does.

    Raises:
        ValueError: see :func:`over_ranks`.
    """
    seed = int(torch.randint(2**62, ())) if module.training else 0
    devices = [inputs[0].device] if inputs[0].is_cuda else []
    with torch.random.fork_rng(devices, enabled=module.training), over_ranks(layers, group):
        if module.training:
            torch.manual_seed(seed_of(seed, start))
        loss, _ = step(inputs, state, layout)
    return sum_over_ranks(loss, [p for p in module.parameters() if p.requires_grad], group)


@contextmanager
def over_ranks(module: nn.Module, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Within it, a call of a causal backbone (block, mixer) on this rank's piece of the sequences sees the pieces of the ranks before.

    A collective: every rank of the group calls the same module on its own piece, once at a time, with ``state=None``; and every rank runs the backward. The state that is returned is ``None``.
    Parameters' gradients are of this rank's piece only: add them up over the group.

    Args:
        module: must be streaming.
        group: the ranks that share the sequences, in order; ``None``: this process alone.

    Raises:
        ValueError: the module does not stream, has parts with a state of their own (:mod:`mmlong.backbone.parts`), is sharded, recomputes its blocks in the backward, or (when called) is given a state or an empty piece.
    """
    require_streaming(module, "running layers over ranks")
    refuse_sharded(module, "running layers over ranks")
    # Those that are written with nothing inside are registered, and no more than that.
    kinds: tuple[type[nn.Module], ...] = (Part, *(PARTS[key] for key in PARTS.names()))
    for part in module.modules():
        if isinstance(part, kinds):
            raise ValueError(
                f"running layers over ranks: {type(part).__name__} carries a state of its own past its mixers: use sequence_parallel_loss, which hands on any state"
            )
        if getattr(part, "grad_checkpointing", False) or getattr(getattr(part, "config", None), "reversible", False):
            raise ValueError(
                "running layers over ranks: blocks that are run again in the backward would ask their neighbours again: switch checkpoint and reversible off, or use sequence_parallel_loss with segment"
            )
    mixers = [part for part in module.modules() if isinstance(part, Mixer)]
    links: list[Links] = []

    # Before anything looks at the piece: where a rank has none, all ranks must learn of it, or the others wait for it.
    def meet(_: nn.Module, args: tuple[Any, ...]) -> None:
        _met(links, group, args[0])

    hook = module.register_forward_pre_hook(meet)
    try:
        for mixer in mixers:
            mixer.forward = partial(_forward, mixer, group, links)  # type: ignore[method-assign]
        yield
    finally:
        hook.remove()
        for mixer in mixers:
            del mixer.forward
        for each in links:
            each.finish()


def _met(kept: list[Links], group: dist.ProcessGroup | None, x: Tensor) -> Links:
    """The ranks, which meet once and tell each other how long their pieces are."""
    if not kept:
        kept.append(Links(group, x.device, x.shape[1]))
    return kept[0]


def _forward(
    mixer: Mixer,
    group: dist.ProcessGroup | None,
    kept: list[Links],
    x: Tensor,
    state: State = None,
    layout: Layout | None = None,
) -> tuple[Tensor, State]:
    if state is not None:
        raise ValueError("layers over ranks begin from nothing: a state comes from the rank before")
    links = _met(kept, group, x)
    plain = type(mixer).forward
    if links.size == 1:
        return plain(mixer, x, None, layout)[0], None
    form = FORMS.get(type(mixer))
    y = None if form is None else form(mixer, x, links, layout)
    if y is None:
        came = links.receive_state()
        y, after = plain(mixer, x, came, layout)
        y = links.send_state(y, came, after)
    return y, None


def _crosses(layout: Layout | None, length: int) -> Tensor | None:
    """Bool ``(B,)``: rows in which a document begins inside the piece, so that nothing gets through it."""
    if layout is None or layout.resets is None:
        return None
    valid = layout.valid(length)
    return (layout.resets if valid is None else layout.resets & valid).any(1)


@parallel_form(Local)
def _window(mixer: Local, x: Tensor, links: Links, layout: Layout | None) -> Tensor | None:
    window = mixer.slots
    assert window is not None
    if links.shortest < window:
        return None
    x, tokens, marks = links.before(x, window, None if layout is None else layout.resets)
    if links.first:
        return Mixer.forward(mixer, x, None, layout)[0]
    if layout is not None:
        # Rotary positions count from the halo on; only differences matter. Of a row that goes on here the halo is whole, and of others nothing is looked at.
        layout = replace(
            layout,
            lengths=None if layout.lengths is None else layout.lengths + window,
            resets=None if marks is None or layout.resets is None else torch.cat([marks, layout.resets], 1),
            grid=None, order="raster", positions=None,
        )  # fmt: skip
    return Mixer.forward(mixer, torch.cat([tokens, x], 1), None, layout)[0][:, window:]


@parallel_form(Attention)
def _ring(mixer: Attention, x: Tensor, links: Links, layout: Layout | None) -> Tensor | None:
    if (mixer.training and mixer.dropout) or not mixer.plain:
        # Which weights are dropped is drawn by the piece; the general way has one draw for a row. The ring knows products alone.
        return None
    B, L, _ = x.shape
    begins = links.begins(layout, B, L)
    here = links.start + torch.arange(L, device=x.device)
    q, k, v = mixer.project(x, here - begins if mixer.placed else None)
    return mixer.finish(x, ring_attention(q, k, v, links, begins).transpose(1, 2).flatten(2))


@parallel_form(Hyena)
def _overlap(mixer: Hyena, x: Tensor, links: Links, layout: Layout | None) -> Tensor | None:
    if links.shortest < TAPS - 1:
        return None
    B, L, _ = x.shape
    x, tokens, marks = links.before(x, TAPS - 1, None if layout is None else layout.resets)
    tail = mixer.convolve(tokens, None, None if marks is None else Layout(resets=marks))[1]
    u, _ = mixer.convolve(x, torch.zeros_like(tail) if links.first else tail, layout)
    reach = min(links.start, mixer.max_length - 1)
    # What stood before the document that goes on here is no past of it.
    began = links.began(layout, B, L)
    old = torch.arange(links.start - reach, links.start, device=x.device) < began[:, None]

    def past(v: Tensor) -> tuple[Tensor, Tensor]:
        v, before = links.past(v, mixer.max_length - 1)
        return v, before.masked_fill(old[..., None], 0)

    return mixer.operate(u, past, reach, layout)[0]


@parallel_form(S4D)
def _diagonal(mixer: S4D, x: Tensor, links: Links, layout: Layout | None) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    lam, c = mixer.discretise(dtype)
    y, added = diagonal_recurrence(x, lam, c[0], None, layout, chunk=mixer.chunk)
    lengths = None if layout is None else layout.lengths
    count = torch.full((len(x),), x.shape[1], device=x.device) if lengths is None else lengths
    decay = torch.exp(torch.view_as_complex(lam.contiguous()) * count[:, None, None].to(dtype))
    if (crossed := _crosses(layout, x.shape[1])) is not None:
        decay = torch.where(crossed[:, None, None], 0, decay)
    came = torch.view_as_real(links.scan(decay, torch.view_as_complex(added.contiguous())))
    # The recurrence is linear: of no tokens but that state.
    y = y + diagonal_recurrence(torch.zeros_like(x), lam, c[0], came, layout, chunk=mixer.chunk)[0]
    y = F.gelu(torch.addcmul(y, x, mixer.D.to(x.dtype)))
    return F.glu(mixer.out_proj(y), dim=-1)


@parallel_form(Mamba2)
def _scalar_decay(mixer: Mamba2, x: Tensor, links: Links, layout: Layout | None) -> Tensor | None:
    from mmlong.mixers.ssd import discretise

    reach = mixer.d_conv - 1
    if links.shortest < max(reach, 1):
        return None
    x, tokens, marks = links.before(x, max(reach, 1), None if layout is None else layout.resets)
    _, tail = Mixer.forward(mixer, tokens, None, None if marks is None else Layout(resets=marks))
    conv = torch.zeros_like(tail["conv"]) if links.first else tail["conv"]
    _, alone = Mixer.forward(mixer, x, {"conv": conv, "ssm": torch.zeros_like(tail["ssm"])}, layout)
    g, _ = discretise(F.linear(x, mixer.in_proj.weight[-mixer.heads :]), mixer.dt_bias, mixer.A_log)
    valid = None if layout is None else layout.valid(x.shape[1])
    decay = (g if valid is None else torch.where(valid[..., None], g, 0)).sum(1).exp()
    if (crossed := _crosses(layout, x.shape[1])) is not None:
        decay = torch.where(crossed[:, None], 0, decay)
    came = links.scan(decay[:, :, None, None], alone["ssm"])
    return Mixer.forward(mixer, x, {"conv": conv, "ssm": came}, layout)[0]
