"""The genome modality: letters to codes and back, the declared rules, both strands, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlong.layout import Layout
from mmlong.modalities import create_modality
from mmlong.modalities.genome import AMBIGUOUS, complement, complement_letters, reverse_complement

IUPAC = "ACGTNRYSWKMBDHV"


def letters(*rows: str) -> torch.Tensor:
    """Rows of letters as a padded batch; what pads is no nucleotide."""
    length = max(map(len, rows))
    return torch.tensor([list(row.ljust(length, "!").encode()) for row in rows], dtype=torch.uint8)


def lengths(*rows: str) -> torch.Tensor:
    return torch.tensor([len(row) for row in rows])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text("ACGTN", min_size=1, max_size=30), min_size=1, max_size=3))
def test_decode_is_the_exact_inverse(rows: list[str]) -> None:
    modality = create_modality("genome", 8)
    codes, layout = modality.encode(letters(*rows), lengths(*rows))
    assert codes.dtype == torch.int64
    layout.check(*codes.shape)
    back = modality.decode(codes, layout)
    assert back.dtype == torch.uint8
    for row, text in enumerate(rows):
        assert codes[row].tolist() == ["ACGTN".index(letter) for letter in text.ljust(codes.shape[1], "N")]
        assert bytes(back[row].tolist()).decode() == text.ljust(codes.shape[1], "N")
    assert modality.embed(codes, layout).shape == (*codes.shape, 8)


def test_the_declared_rules() -> None:
    plain = create_modality("genome", 8)
    assert (plain.unit, plain.codes, plain.levels, plain.channels) == ("nucleotide", 5, 5, 1)
    assert plain.encode(letters(IUPAC))[0][0].tolist() == [0, 1, 2, 3, *[4] * 11]
    assert plain.encode(letters("acgtnUury"))[0][0].tolist() == [0, 1, 2, 3, 4, 3, 3, 4, 4]
    keep = create_modality("genome", 8, soft_masked="keep")
    assert keep.codes == 10
    codes, layout = keep.encode(letters("ACGTNacgtn"))
    assert codes[0].tolist() == list(range(10))
    assert bytes(keep.decode(codes, layout)[0].tolist()) == b"ACGTNacgtn"
    assert keep.embed(codes).shape == (1, 10, 8)


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ({}, "ACGTAC-T", r"row 1, position 6: '-' is no nucleotide \(1 such letters in the batch\)"),
        ({}, "ACGLLCGT", r"row 1, position 3: 'L' is no nucleotide \(2 such"),
        ({}, "ACGT1CGT", r"position 4: '1' is no nucleotide"),
        ({}, "ACGT CGT", r"position 4: ' ' is no nucleotide"),
        ({"ambiguous": "error"}, "ACGTRCGT", r"row 1, position 4: 'R' is refused by ambiguous='error'"),
        ({"ambiguous": "error"}, "ACGTrCGT", r"'r' is refused by ambiguous='error'"),
        ({"soft_masked": "error"}, "ACGTaCGT", r"row 1, position 4: 'a' is refused by soft_masked='error'"),
    ],
)
def test_bad_letters_are_named(options: dict[str, str], text: str, message: str) -> None:
    modality = create_modality("genome", 8, **options)
    with pytest.raises(ValueError, match=message):
        modality.encode(letters("ACGTACGT", text))
    # The same letter in the padding is nobody's business.
    modality.encode(letters("ACGTACGT", text), torch.tensor([8, 3]))


def test_every_other_byte_is_refused() -> None:
    modality = create_modality("genome", 8)
    known = set(IUPAC + IUPAC.lower() + "Uu")
    for byte in range(256):
        raw = torch.tensor([[byte]], dtype=torch.uint8)
        if chr(byte) in known:
            modality.encode(raw)
        else:
            with pytest.raises(ValueError, match="is no nucleotide"):
                modality.encode(raw)
    assert set(AMBIGUOUS.decode()) | set("ACGTN") == set(IUPAC)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text("ACGTN", min_size=1, max_size=20), min_size=1, max_size=3))
def test_reverse_complement_within_lengths(rows: list[str]) -> None:
    modality = create_modality("genome", 8)
    codes, layout = modality.encode(letters(*rows), lengths(*rows))
    other = reverse_complement(codes, lengths(*rows))
    pairs = dict(zip("ACGTN", "TGCAN", strict=True))
    for row, text in enumerate(rows):
        expected = "".join(pairs[letter] for letter in reversed(text))
        assert bytes(modality.decode(other, layout)[row, : len(text)].tolist()).decode() == expected
        assert complement_letters(text.encode()).decode() == expected
    assert (other[~layout.valid(codes.shape[1])] == 4).all()
    assert reverse_complement(other, lengths(*rows)).equal(codes)


def test_complement_of_all_letters() -> None:
    # IUPAC: the complement of a set of bases is the set of their complements.
    sets = {
        "R": "AG",
        "Y": "CT",
        "S": "CG",
        "W": "AT",
        "K": "GT",
        "M": "AC",
        "B": "CGT",
        "D": "AGT",
        "H": "ACT",
        "V": "ACG",
    }
    pairs = dict(zip("ACGT", "TGCA", strict=True))
    for letter, bases in sets.items():
        other = complement_letters(letter.encode()).decode()
        assert set(sets[other]) == {pairs[base] for base in bases}
        assert complement_letters(letter.lower().encode()).decode() == other.lower()
    assert complement_letters(b"AUun") == b"naAT"
    keep = create_modality("genome", 8, soft_masked="keep")
    text = "ACGTNacgtn"
    expected = keep.encode(letters(complement_letters(text.encode()).decode()))[0]
    assert reverse_complement(keep.encode(letters(text))[0]).equal(expected)


def test_embedding_of_both_strands() -> None:
    modality = create_modality("genome", 8, reverse_complement=True)
    codes = torch.randint(5, (2, 11))
    here, there = modality.embed(codes).chunk(2, -1)
    assert modality.embed(complement(codes)).equal(torch.cat([there, here], -1))
    assert modality.embed(reverse_complement(codes)).equal(torch.cat([there, here], -1).flip(1))
    with pytest.raises(ValueError, match="dim must be even; got 7"):
        create_modality("genome", 7, reverse_complement=True)


def test_padding_changes_nothing() -> None:
    modality = create_modality("genome", 8)
    rows = ("ACGTTGCA", "ACG")
    codes, layout = modality.encode(letters(*rows), lengths(*rows))
    x = modality.embed(codes, layout)
    for row, text in enumerate(rows):
        assert modality.embed(modality.encode(letters(text))[0])[0].equal(x[row, : len(text)])
    resets = torch.zeros(2, 8, dtype=torch.bool)
    assert modality.encode(letters(*rows), lengths(*rows), resets)[1].resets is resets


def test_what_it_refuses() -> None:
    modality = create_modality("genome", 8)
    good = letters("ACGT")
    with pytest.raises(TypeError, match=r"uint8 \(B, T\) of ASCII letters, got torch.int64"):
        modality.encode(good.long())
    for bad in (good[0], good[None], good[:, :0]):
        with pytest.raises(ValueError, match="one ASCII letter a nucleotide"):
            modality.encode(bad)
    with pytest.raises(ValueError, match=r"layout.lengths has 2 rows, x has 1"):
        modality.encode(good, torch.tensor([4, 4]))
    with pytest.raises(ValueError, match=r"lengths must be 0 .. 4, got \[5\]"):
        modality.encode(good, torch.tensor([5]))
    with pytest.raises(ValueError, match=r"lengths must be int64"):
        modality.encode(good, torch.tensor([4.0]))
    with pytest.raises(ValueError, match=r"layout.resets is \(1, 3\)"):
        modality.encode(good, None, torch.zeros(1, 3, dtype=torch.bool))
    for codes in (torch.tensor([[5]]), torch.tensor([[-1]])):
        with pytest.raises(ValueError, match=r"codes must be 0 .. 4"):
            modality.decode(codes, Layout())
    for option in ("ambiguous", "soft_masked"):
        with pytest.raises(ValueError, match=rf"{option} is 'drop'; it can be"):
            create_modality("genome", 8, **{option: "drop"})
