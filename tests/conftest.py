"""What all tests share: hypothesis on machines that are slow or busy, and the wheel of this checkout, built once for the tests that install it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is.
settings.register_profile("mmlong", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mmlong")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's file."""
    out = tmp_path_factory.mktemp("wheel")
    # A copy, so that no build folder appears in the checkout; without isolation, so that nothing is downloaded.
    source = out / "source"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pytest.importorskip("setuptools", "77", reason="building a wheel needs setuptools>=77")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))
