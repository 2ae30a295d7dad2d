"""RETRO: tokens read what was found for the chunk before them.

Follows Borgeaud et al. 2021, "Improving language models by retrieving from trillions of tokens" (RETRO, arXiv 2112.04426). A document is cut into chunks of ``m`` tokens. When a chunk ``C_u`` is complete, a retriever gives its ``k`` neighbours, ``r`` tokens each (a chunk like it, and what came after that), which an encoder that sees both sides turns into ``E_u``,
conditioned on the chunk's own activations ``H_u`` by cross-attention. Tokens read it by chunked cross-attention, with the paper's offset (:mod:`mmlong.ops.chunked_cross_attention`):

    E_u = encoder(neighbours(C_u), H_u)          layers of  self-attention, attention to H_u, SwiGLU,  each with its norm and added to what came in
    y_i = x_i + W CCA(norm(x_i) + a_j, E_u(i))   the last token of C_u to the last but one of C_{u+1}; j: the token's place among those

Where nothing was found, ``y = x``. In an autoregressive model of this house a position is given the value of the token before it, the first that of none. So position ``t`` stands for token ``t - 1``, and the positions that read ``E_u`` are those that predict the tokens of chunk ``u + 1``.

The retriever is a callable from tokens of complete chunks to tokens of neighbours. ``index`` names a folder that ``mmlong knn neighbours`` made (:mod:`mmlong.retrieval.neighbours`), opened when the first chunk is complete; :func:`set_retriever` gives any other. So generation retrieves at chunk ends by itself. Which tokens there are the model says in ``layout.codes``; no
gradient goes through the retrieval. The state is the activations and tokens of the open chunk, what was found and its encoding.

Departures: each such part has an encoder of its own, where the paper's share one; places in the chunk and in a neighbour are learned vectors, where the paper has relative positions; every layer of the encoder attends to the chunk. The part stands between blocks, so the paper's order (attention, CCA, feed-forward) is ``[{name: local}, {retro: 64}, ..]`` with the feed-forward before.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmlong.backbone.feedforward import SwiGLU
from mmlong.backbone.hierarchy import Place
from mmlong.backbone.part import codes_of, register_part
from mmlong.layout import Layout, document_index
from mmlong.mixers import State
from mmlong.ops.chunked_cross_attention import chunked_cross_attention
from mmlong.ops.chunks import begun_at
from mmlong.ops.cross_attention import from_heads, to_heads
from mmlong.ops.tails import tail_after


class Retriever(Protocol):
    """What finds neighbours."""

    def __call__(self, chunks: Tensor, training: bool) -> Tensor:
        """Tokens int64 ``(N, m)`` on a CPU to tokens of neighbours int64 ``(N, k, r)``, -1 where there are none.

        ``training``: the chunks may be of documents that are themselves in what is searched; their own chunks must not be found.
        """
        ...


def set_retriever(module: nn.Module, retriever: Retriever) -> None:
    """Give every :class:`Retro` in a model or backbone its retriever.

    Raises:
        ValueError: there is none.
    """
    parts = [part for part in module.modules() if isinstance(part, Retro)]
    if not parts:
        raise ValueError(f"{type(module).__name__} has no part {{retro: ...}} that could use a retriever")
    for part in parts:
        part.retriever = retriever


@register_part("retro")
class Retro(nn.Module):
    """Chunked cross-attention to encoded neighbours; causal, and streams.

    Args:
        chunk: m.
        dim: width D.
        index: folder of neighbours; ``None``: :func:`set_retriever` gives the retriever.
        neighbours: k.
        length: r; ``None`` for ``2 m``, the paper's.
        codes: how many codes a token can be.
        layers: of the encoder.
        heads: of all attention; ``None`` for one of 64 each, at least one.

    Raises:
        ValueError: sizes below 1, or heads that do not divide the width.
    """

    causal = True
    streaming = True
    reads_codes = "any"

    def __init__(
        self,
        chunk: int,
        dim: int,
        index: str | None = None,
        neighbours: int = 2,
        length: int | None = None,
        codes: int = 256,
        layers: int = 2,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        length = 2 * chunk if length is None else length
        heads = max(1, dim // 64) if heads is None else heads
        for name, n in (
            ("chunk", chunk),
            ("neighbours", neighbours),
            ("length", length),
            ("codes", codes),
            ("layers", layers),
            ("heads", heads),
        ):
            if n < 1:
                raise ValueError(f"retro: {name} must be at least 1, got {n}")
        if dim % heads:
            raise ValueError(f"retro: {heads} heads do not divide a width of {dim}")
        self.chunk, self.neighbours, self.length, self.codes, self.heads = chunk, neighbours, length, codes, heads
        self.index = index
        self.retriever: Any = None
        self.encoder = Encoder(dim, codes, length, layers, heads)
        self.norm_chunk, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.place = nn.Parameter(0.02 * torch.randn(chunk, dim))
        self.query, self.out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)

    def retrieve(self, chunks: Tensor) -> Tensor:
        """Neighbours of complete chunks: int64 ``(N, m)`` to ``(N, k, r)``, by the retriever.

        Raises:
            ValueError: there is no retriever, its answer is of another shape, or has codes that are none.
        """
        if self.retriever is None:
            if self.index is None:
                raise ValueError(
                    "{retro: ...} has nothing to retrieve from: name a folder that `mmlong knn neighbours` made (index: FOLDER), or call mmlong.backbone.retro.set_retriever(model, retriever)"
                )
            # Here, since it is the only thing in a backbone that opens a file.
            from mmlong.retrieval.neighbours import Neighbours

            self.retriever = Neighbours(self.index)
        found = self.retriever(chunks.cpu(), self.training)
        due = (len(chunks), self.neighbours, self.length)
        if found.shape != due or found.dtype != torch.int64:
            raise ValueError(
                f"the retriever gave {found.dtype} {tuple(found.shape)}; {{retro: {self.chunk}, neighbours: {self.neighbours}, length: {self.length}}} needs int64 {due}"
            )
        if found.numel() and (int(found.min()) < -1 or int(found.max()) >= self.codes):
            raise ValueError(
                f"the retriever gave tokens {int(found.min())} .. {int(found.max())}, where codes is {self.codes}"
            )
        return found.to(chunks.device)

    def forward(self, x: Tensor, state: State = None, layout: Layout | None = None) -> tuple[Tensor, State]:
        """``(B, L, D)`` to ``(B, L, D)``, and the state."""
        (B, L, D), m, device = x.shape, self.chunk, x.device
        wide = self.neighbours * self.length
        tokens = codes_of("retro", layout)[..., None]
        place = Place.of(state, B)
        if state is None:
            tail, read = x.new_zeros(B, m - 1, D), tokens.new_zeros(B, m - 1, 1)
            near, found = tokens.new_full((B, wide), -1), x.new_zeros(B, wide, D)
        else:
            tail, read, near, found = state["tail"], state["read"], state["near"], state["found"]
        index = document_index(place.each(device), L, layout)
        # By position, a chunk of activations is read from the position after its tokens' first m on: where the next begins.
        chunks = begun_at(index % m == 0, layout)
        G = chunks.count
        window = chunks.first[..., None] + torch.arange(m, device=device)
        rows = torch.arange(B, device=device)[:, None, None]
        real = index.gather(1, chunks.first) > 0
        if chunks.layout is not None and chunks.layout.lengths is not None:
            real = real & (torch.arange(G, device=device) < chunks.layout.lengths[:, None])
        row, number = real.nonzero(as_tuple=True)
        nears, encoded = tokens.new_full((B, G, wide), -1), found.new_zeros(B, G, wide, D)
        if len(row):
            asked = torch.cat([read, tokens], 1)[rows, window][row, number][..., 0]
            answer = self.retrieve(asked)
            nears = nears.index_put((row, number), answer.flatten(1))
            own = torch.cat([tail.to(x.dtype), x], 1)[rows, window][row, number]
            code = self.encoder(answer, self.norm_chunk(own))
            encoded = encoded.to(code.dtype).index_put((row, number), code)
        known, there = torch.cat([found[:, None].to(encoded.dtype), encoded], 1), torch.cat([near[:, None], nears], 1)
        y = x + self.read(x, known, there >= 0, chunks.index + 1, index % m, layout)
        last = (chunks.index[:, -1] + 1)[:, None]
        after = {
            "tail": tail_after(x, tail, layout),
            "read": tail_after(tokens, read, layout),
            "near": there[rows[:, 0], last][:, 0],
            "found": known[rows[:, 0], last][:, 0].to(found.dtype),
        }
        return y, {**after, **place.after(x, layout, m)}

    def read(
        self, x: Tensor, known: Tensor, there: Tensor, which: Tensor, place: Tensor, layout: Layout | None
    ) -> Tensor:
        """What is added to the tokens: of ``known (B, U, S, D)`` each reads its chunk's."""
        valid = None if layout is None else layout.valid(x.shape[1])
        if valid is not None:
            which = torch.where(valid, which, -1)
        q = to_heads(self.query(self.norm(x) + self.place[place].to(x.dtype)), self.heads)
        k, v = (t.unflatten(-1, (self.heads, -1)).transpose(2, 3) for t in self.key_value(known).chunk(2, -1))
        found = chunked_cross_attention(q, k, v, there, which, place, self.chunk)
        y = self.out(from_heads(found).to(self.out.weight.dtype)).to(x.dtype)
        if torch.is_grad_enabled():
            # Zeros, and not nothing: the same parameters have a gradient whatever was found here.
            y = y + 0 * torch.stack([p.sum() for p in self.parameters()]).sum().to(y.dtype)
        return y


class Encoder(nn.Module):
    """Neighbours as vectors, each for itself, conditioned on the chunk that they were found for.

    Args:
        dim: width D.
        codes: how many codes a token can be.
        length: r.
        layers: how many.
        heads: of all attention.
    """

    def __init__(self, dim: int, codes: int, length: int, layers: int, heads: int) -> None:
        super().__init__()
        self.value = nn.Embedding(codes, dim)
        self.place = nn.Parameter(0.02 * torch.randn(length, dim))
        self.layers = nn.ModuleList(EncoderLayer(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, near: Tensor, chunk: Tensor) -> Tensor:
        """Tokens ``(N, k, r)``, -1 for none, and activations ``(N, m, D)`` to ``(N, k r, D)``, zero where there is no token."""
        (N, k, r), there = near.shape, (near >= 0).flatten(0, 1)
        some = there.any(1)
        at = some.nonzero()[:, 0]
        if len(at) == 0:
            return chunk.new_zeros(N, k * r, chunk.shape[2])
        there = there[at]
        h = self.value(near.flatten(0, 1)[at].clamp_min(0)) + self.place
        own = chunk[torch.div(at, k, rounding_mode="floor")]
        for layer in self.layers:
            h = layer(h, there, own)
        h = torch.where(there[..., None], self.norm(h), 0)
        return h.new_zeros(N * k, r, h.shape[2]).index_put((at,), h).view(N, k * r, -1)


class EncoderLayer(nn.Module):
    """Self-attention, attention to the chunk, and SwiGLU."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.among, self.to_chunk = Attend(dim, heads), Attend(dim, heads)
        self.ffn = SwiGLU(dim, 8 / 3)

    def forward(self, h: Tensor, there: Tensor, chunk: Tensor) -> Tensor:
        """``(n, r, D)``, bool ``(n, r)`` and ``(n, m, D)`` to ``(n, r, D)``."""
        normed = self.norms[0](h)
        h = h + self.among(normed, normed, there)
        h = h + self.to_chunk(self.norms[1](h), chunk)
        return h + self.ffn(self.norms[2](h))


class Attend(nn.Module):
    """Attention of one set to another.

    Args:
        dim: width of both.
        heads: H.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, of: Tensor, there: Tensor | None = None) -> Tensor:
        """``(n, L, D)`` over ``(n, S, D)``, of which those count that are ``there``, bool ``(n, S)``, at least one of each row."""
        k, v = (to_heads(t, self.heads) for t in self.key_value(of).chunk(2, -1))
        mask = None if there is None else there[:, None, None]
        q = to_heads(self.query(x), self.heads)
        return self.out(from_heads(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
