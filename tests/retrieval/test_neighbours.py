"""Neighbours of chunks against a search written out; whose chunks are never found; the command, and a model that retrieves from what it made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmlong.models import build_model
from mmlong.retrieval.folder import BadFolderError
from mmlong.retrieval.neighbours import Neighbours, build_neighbours, chunk_features, cut

Command = Callable[..., tuple[int, str]]
M = 8


def documents(seed: int = 0) -> list[Tensor]:
    """Few letters, so that much is alike; chunks that are in several documents."""
    draw = torch.Generator().manual_seed(seed)
    made = [torch.randint(97, 100, (1, n), generator=draw) for n in (70, 63, 8, 41, 5, 130)]
    made[3][0, 8:24] = made[0][0, 16:32]
    made[1][0, :8] = made[0][0, 16:24]
    return made


def built(folder: Path, **options: Any) -> Neighbours:
    build_neighbours(documents(), folder, {}, codes=256, m=M, dim=32, n=3, **options)
    return Neighbours(folder)


def test_features_are_hashed_grams() -> None:
    chunks = torch.randint(256, (5, 16), generator=torch.Generator().manual_seed(0))
    found = chunk_features(chunks, 64, 4)
    for chunk, feature in zip(chunks.tolist(), found, strict=True):
        want = torch.zeros(64)
        for i in range(13):
            number = 0
            for token in chunk[i : i + 4]:
                number = (number * 1_000_003 + token + 1) % (2**31 - 1)
            mixed = number * 2_654_435_761 % 2**32
            want[(mixed >> 8) % 64] += 1 if mixed >> 7 & 1 else -1
        torch.testing.assert_close(feature, want / want.norm())
    # Of large codes, too, nothing runs over.
    assert torch.isfinite(chunk_features(torch.full((1, 9), 2**31 - 2), 16, 3)).all()


def test_documents_are_cut_into_chunks() -> None:
    chunks, sizes = cut(torch.arange(1, 12), 4)
    assert chunks.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 0]]
    assert sizes.tolist() == [4, 4, 3]


@pytest.mark.parametrize("k", [2, 5])
def test_neighbours_are_the_nearest_of_other_documents(tmp_path: Path, k: int) -> None:
    made = built(tmp_path / "near", k=k)
    chunks = [(d, c) for d, one in enumerate(documents()) for c in one[0].split(M)]
    complete = [len(chunk) == M for _, chunk in chunks]
    assert len(made) == sum(complete)
    feature = [chunk_features(c[None], 32, 3).half().float()[0] if len(c) == M else None for _, c in chunks]
    for a, (_, chunk) in enumerate(chunks):
        if not complete[a]:
            assert made.near[a].tolist() == [-1] * k
            continue
        owners = {d for d, c in chunks if torch.equal(c, chunk)}
        distance = {
            b: float(((feature[a] - feature[b]) ** 2).sum())
            for b, (d, _) in enumerate(chunks)
            if complete[b] and d not in owners
        }
        found = made.near[a].tolist()
        assert all(chunks[b][0] not in owners for b in found)
        # Of those that are equally near any will do.
        due = sorted(distance.values())[:k]
        assert [distance[b] for b in found] == pytest.approx(due, abs=1e-6)


def test_what_a_retriever_gives(tmp_path: Path) -> None:
    made = built(tmp_path / "near")
    all_of_them = documents()
    asked = torch.stack([all_of_them[0][0, :8], all_of_them[5][0, 16:24], torch.full((8,), 99)])
    # In training: what was precomputed, each with what comes after it; nothing for what is not known.
    found = made(asked, True)
    assert found.shape == (3, 2, 16)
    assert (found[2] == -1).all()
    chunks = [(d, c) for d, one in enumerate(all_of_them) for c in one[0].split(M)]
    for row, place in ((0, 0), (1, next(n for n, (d, _) in enumerate(chunks) if d == 5) + 2)):
        for text, b in zip(found[row].tolist(), made.near[place].tolist(), strict=True):
            document, chunk = chunks[b]
            after = chunks[b + 1][1] if b + 1 < len(chunks) and chunks[b + 1][0] == document else torch.tensor([])
            want = [*chunk.tolist(), *after.tolist()]
            assert text == [int(t) for t in want] + [-1] * (16 - len(want))
    # Else: the nearest of all, which of what is indexed is itself.
    assert made(asked, False)[0, 0, :8].tolist() == asked[0].tolist()
    with pytest.raises(ValueError, match="chunks of 8 tokens"):
        made(asked[:, :4], False)


def test_in_training_no_text_of_its_own_document_is_given(tmp_path: Path) -> None:
    """Documents of tokens that no other has, but for one chunk: nothing that comes back for a chunk is of a document that has it."""
    letters = [torch.arange(0, 40)[None], torch.arange(40, 90)[None], torch.arange(90, 170)[None]]
    letters[1][0, 8:16] = letters[0][0, 8:16]
    build_neighbours(letters, tmp_path / "near", {}, codes=256, m=M, dim=32)
    made = Neighbours(tmp_path / "near")
    for document in letters:
        own = set(document[0].tolist()) - set(range(8, 16))
        for chunk in document[0].split(M):
            if len(chunk) == M:
                found = set(made(chunk[None], True).flatten().tolist()) - {-1}
                assert not found & own
    # A chunk that two have is given text of the third only.
    shared = set(made(letters[0][:, 8:16], True).flatten().tolist()) - {-1}
    assert shared <= set(range(90, 170))
    assert shared


def test_limits_and_what_is_refused(tmp_path: Path) -> None:
    made = built(tmp_path / "near", limit=100)
    assert made.sizes.sum() == 100
    for options, said in (({"m": 0}, "m must be"), ({"k": 0}, "k must be"), ({"m": 3, "n": 4}, "no grams of 4")):
        with pytest.raises(ValueError, match=said):
            build_neighbours(documents(), tmp_path / "other", {}, codes=256, **options)
    with pytest.raises(ValueError, match="not one chunk"):
        build_neighbours([torch.zeros(1, 5, dtype=torch.long)], tmp_path / "other", {}, codes=256)
    assert [path.name for path in tmp_path.iterdir()] == ["near"]
    np.zeros(3, np.int32).tofile(tmp_path / "near" / "sizes.bin")
    with pytest.raises(BadFolderError, match="cut short"):
        Neighbours(tmp_path / "near")


def test_the_command_and_a_model_that_retrieves_from_it(
    run: Path, texts: Path, tmp_path: Path, mmlong: Command
) -> None:
    from mmlong.datamodules.text import TextDataModule

    from mmlong.knn.documents import Documents

    near = tmp_path / "near"
    status, said = mmlong("knn", "neighbours", run, "--out", near, "--chunk", 8)
    assert status == 0, said
    assert "1 documents left out" in said
    made = Neighbours(near)
    # No document that is evaluated is in the index, a copy of one in training neither.
    modality = build_model(
        {"modality": {"name": "text"}, "backbone": {"dim": 8}, "head": {"name": "classify", "num_classes": 2}}
    ).modality
    data = TextDataModule(str(texts))
    indexed = {chunk.tobytes() for chunk, size in zip(made.tokens, made.sizes, strict=True) if size == 8}
    for split in ("val", "test"):
        held = Documents(data, split, modality)
        for n in range(len(held)):
            assert not any(c.numpy().astype(np.uint8).tobytes() in indexed for c in held.tokens(n)[0].split(8))
    # 100 + 137 + 174 + 211 tokens.
    assert made.sizes.sum() == 622
    model = build_model(
        {"kind": "autoregressive", "modality": {"name": "text"}, "head": {},
         "backbone": {"dim": 16, "parts": ["gru", {"retro": 8, "index": str(near)}]}}
    ).eval()  # fmt: skip
    tokens = Documents(data, "test", modality).tokens(0)
    with torch.no_grad():
        whole = model(tokens)[0]
        state, pieces = None, []
        for piece in tokens.split(13, 1):
            y, state = model(piece, state)
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    found = model.backbone.parts()[1].retriever
    assert found.search(tokens[:, :8]).min() >= 0
    status, said = mmlong("knn", "neighbours", run, "--out", near)
    assert status == 1
    assert "there already" in said
