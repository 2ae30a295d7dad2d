"""An environment of its own for packages that are not mmlong's: everything is borrowed from here, and what is installed there stays there."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest


class Environment:
    """A fresh virtual environment and a folder to work in.

    Args:
        folder: where to make both.
    """

    def __init__(self, folder: Path) -> None:
        self.away = folder / "away"
        self.away.mkdir()
        venv.create(folder / "env", with_pip=False)
        self.bin = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
        self.site = site = next((folder / "env").rglob("site-packages"))
        # Not a plain path: the borrowed folder may have an editable mmlong, and .pth lines of its own are to be read.
        borrowed = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
        (site / "borrowed.pth").write_text("".join(f"import site; site.addsitedir({p!r})\n" for p in borrowed))
        for name, code in (
            ("mmlong", "import sys, mmlong.cli; sys.exit(mmlong.cli.main(sys.argv[1:]))"),
            ("pip", "import sys; from pip._internal.cli.main import main; sys.exit(main(sys.argv[1:]))"),
        ):
            script = self.bin / name
            script.write_text(f"#!{self.bin / 'python'}\n{code}\n")
            script.chmod(0o755)
        self.variables = {
            **os.environ, "OMP_NUM_THREADS": "1", "MMLONG_DATA": str(folder / "data"), "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            # A build without the network: with what is here, and nothing fetched.
            "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }  # fmt: skip
        for name in ("PYTHONPATH", "MMLONG_RUN_DIR", "PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST"):
            self.variables.pop(name, None)

    def bash(self, code: str) -> str:
        """What a script says; it must succeed."""
        return self._run(["bash", "-euo", "pipefail", "-c", code])

    def python(self, code: str) -> str:
        """What a program says; it must succeed."""
        return self._run([str(self.bin / "python"), "-c", code])

    def _run(self, words: list[str]) -> str:
        done = subprocess.run(words, cwd=self.away, env=self.variables, capture_output=True, text=True)
        assert done.returncode == 0, f"{words[-1]}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """See the class."""
    return Environment(tmp_path)
