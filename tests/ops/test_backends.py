"""Which backend is taken, which is refused and in what words."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mmlong.ops.backends import Backend, BackendError, Backends, Request, cuda_package, describe, taken

CPU = Request("cpu", torch.float32, "causal")


def missing() -> tuple[bool, str]:
    return False, "needs nowhere, not installed: pip install 'mmlong[nowhere]'"


@pytest.fixture
def some(monkeypatch: pytest.MonkeyPatch) -> Backends:
    from mmlong.ops import backends

    monkeypatch.setattr(backends, "_OPS", {})
    op = Backends("toy")
    op.register(Backend("special", str, masks=frozenset({"causal", "odd"}), automatic=False))
    op.register(Backend("plain", str, masks=frozenset({"causal", "window"})))
    op.register(
        Backend(
            "gpu",
            str,
            devices=frozenset({"cuda", "cpu"}),
            dtypes=frozenset({torch.float32}),
            masks=frozenset({"causal"}),
            dropout=True,
            backward=frozenset({"cuda"}),
        )
    )
    op.register(Backend("absent", str, masks=frozenset({"causal"}), available=missing))
    return op


def test_auto_takes_the_first_that_can(some: Backends) -> None:
    assert some.choose(CPU).name == "plain"
    assert some.choose(Request("cpu", torch.float32, "causal", dropout=True)).name == "gpu"


def test_auto_takes_one_that_is_not_automatic_only_if_no_other_can(some: Backends) -> None:
    assert some.choose(Request("cpu", torch.float32, "odd")).name == "special"


def test_the_op_says_what_auto_tries_first(some: Backends) -> None:
    assert some.choose(CPU, order=("gpu", "plain")).name == "gpu"
    assert some.choose(Request("cpu", torch.float32, "causal", backward=True), order=("gpu", "plain")).name == "plain"


@pytest.mark.parametrize(
    ("name", "request_", "reason"),
    [
        ("absent", CPU, r"needs nowhere, not installed: pip install 'mmlong\[nowhere\]'"),
        ("plain", Request("cpu", torch.float32, "odd"), "no mask of the kind 'odd', only causal, window"),
        ("plain", Request("cpu", torch.float32, "causal", dropout=True), "cannot drop attention weights"),
        ("gpu", Request("mps", torch.float32, "causal"), "runs on cpu, cuda only, the tensors are on mps"),
        ("gpu", Request("cpu", torch.float64, "causal"), "takes float32, not float64"),
        (
            "gpu",
            Request("cpu", torch.float32, "causal", backward=True),
            "no gradient on cpu: use it under torch.no_grad",
        ),
    ],
)
def test_a_named_backend_that_cannot_is_an_error_with_the_reason(
    some: Backends, name: str, request_: Request, reason: str
) -> None:
    with pytest.raises(BackendError, match=f"toy: backend '{name}' .*{reason}"):
        some.choose(request_, name)


def test_unknown_and_taken_names(some: Backends) -> None:
    with pytest.raises(BackendError, match="toy has no backend 'palin'; it has: auto, special, plain, gpu, absent"):
        some.choose(CPU, "palin")
    with pytest.raises(ValueError, match="already has a backend 'plain'"):
        some.register(Backend("plain", str))


def test_none_can_names_every_reason(some: Backends) -> None:
    with pytest.raises(
        BackendError, match=r"no backend can do this: 'plain' has no mask.*'absent' has no mask.*'special'"
    ):
        some.choose(Request("cpu", torch.float32, "nothing"))


def test_describe(some: Backends) -> None:
    rows = {r["backend"]: r for r in describe("cpu")}
    assert list(rows) == ["special", "plain", "gpu", "absent"]
    assert (rows["plain"]["usable"], rows["absent"]["usable"]) == ("yes", "no")
    assert "nowhere" in rows["absent"]["reason"]
    assert "no gradient on cpu" in rows["gpu"]["reason"]
    assert {r["backend"]: r["usable"] for r in describe("mps")}["gpu"] == "no"


def test_what_was_taken_is_noted_only_inside(some: Backends) -> None:
    plain = Backends.choose
    some.register(Backend("portable", str))
    known = Backends.portable
    with pytest.raises(BackendError), taken() as found:
        some.choose(CPU)
        some.choose(CPU, "special")
        assert some.portable().name == "portable"
        some.choose(CPU, "absent")
    assert found == [("toy", "plain"), ("toy", "special"), ("toy", "portable")]
    assert (Backends.choose, Backends.portable) == (plain, known)


def test_cuda_package_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda_package(("no_such_package", "nor_this"), "xformers") == (
        False,
        "needs no_such_package or nor_this, not installed: pip install 'mmlong[xformers]'",
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_package(("torch", "no_such_package_at_all"), "x") == (
        False,
        "torch is installed, but torch sees no CUDA device",
    )


def test_optional_packages_are_not_imported_with_the_house() -> None:
    code = (
        "import sys, mmlong.mixers, mmlong.ops.backends as b; assert len(b.describe('cuda')) > 10;"
        "optional = ('xformers', 'mslk', 'fla', 'mamba_ssm', 'causal_conv1d', 'torch.nn.attention.varlen', 'transformers');"
        "print([m for m in optional if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_extra_that_is_named_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import re
    import tomllib
    from pathlib import Path

    import mmlong.mixers  # noqa: F401, it registers the backends of every op
    from mmlong.cli.tables import EXTRAS
    from mmlong.ops import backends

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    cuda_package.cache_clear()
    try:
        told = [b.available()[1] for op in backends._OPS.values() for b in op._known.values()]
    finally:
        cuda_package.cache_clear()
    named = {extra for reason in told for extra in re.findall(r"mmlong\[(.+?)\]", reason)}
    assert named == {"xformers", "gpu", "mamba-ssm", "causal-conv1d"}
    assert named <= set(EXTRAS) & set(project["optional-dependencies"])


def test_what_does_not_fit_is_refused_before_the_package_is_looked_for() -> None:
    def looked() -> tuple[bool, str]:
        raise AssertionError("looked for the package")

    backend = Backend("small", str, fits=lambda r: None if r.sizes["n"] < 5 else "takes n below 5", available=looked)
    assert backend.refusal(Request("cpu", torch.float32, sizes={"n": 7})) == "takes n below 5"
    with pytest.raises(AssertionError, match="looked"):
        backend.refusal(Request("cpu", torch.float32, sizes={"n": 4}))
