"""Whether what pyproject.toml promises is true: wheel and sdist, every Python there is, the oldest and the newest of every dependency.

    python tests/environments.py                                  # every Python of the declared range that is found here
    python tests/environments.py --bounds lowest --python python3.11

Builds both once; then, for each Python and each of the two bounds, makes a fresh virtual environment, installs the wheel (the newest: also the sdist), and uses it in an empty folder: every module is imported, the
command trains, tests, packs, generates and exports, and mixers are held to a part of the contract. It fetches gigabytes (torch) and takes minutes an environment, so it is no part of `make test`; tests/test_environments.py
holds its own parts, and says so. Environments are removed when they have been used.

The lowest bounds are those written in pyproject.toml: of ``torch>=2.11`` exactly 2.11. Dependencies of dependencies are whatever pip takes beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
BOUNDS = ("lowest", "highest")
SMOKE = Path(__file__).with_name("smoke.py")
PAGE = ROOT / "docs" / "your_data.md"


@dataclass
class Result:
    """What came of one environment.

    Attributes:
        python: its version.
        bounds: lowest or highest.
        installed: version of each declared dependency.
        failed: the step that failed, and the end of what it said; empty if all is well.
        install_seconds, smoke_seconds: how long both took.
    """

    python: str
    bounds: str
    installed: dict[str, str]
    failed: str
    install_seconds: float
    smoke_seconds: float


def project() -> dict:
    """The table ``project`` of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lowest(dependencies: Iterable[str], python: str) -> list[str]:
    """Constraints that pin every dependency to the version that it is declared to work from.

    Args:
        dependencies: requirements, as in ``project.dependencies``.
        python: ``3.11``; requirements whose marker is for others are left out.

    Raises:
        ValueError: one has no lower bound, or two.
    """
    found = []
    for text in dependencies:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"python_version": python}):
            continue
        bounds = [spec.version for spec in requirement.specifier if spec.operator in (">=", "==", "~=")]
        if len(bounds) != 1:
            raise ValueError(f"{text!r} has {len(bounds)} lower bounds; it needs one to be tried with")
        found.append(f"{requirement.name}=={bounds[0]}")
    return found


def pythons(given: Sequence[str]) -> dict[str, Path]:
    """Version (``3.12``) to interpreter: those given, else all that lie on the path or are pyenv's, one each."""
    found: dict[str, Path] = {}
    if given:
        candidates = [Path(shutil.which(each) or each) for each in given]
    else:
        named = [f"python3.{minor}" for minor in range(8, 30)]
        candidates = [Path(path) for name in named if (path := shutil.which(name)) and "/shims/" not in path]
        home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
        candidates += sorted(home.glob("versions/*/bin/python"))
    for candidate in candidates:
        said = subprocess.run(
            [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True
        )
        if said.returncode == 0:
            found.setdefault(said.stdout.strip(), candidate)
    return dict(sorted(found.items(), key=lambda pair: [int(part) for part in pair[0].split(".")]))


def build(out: Path) -> tuple[Path, Path]:
    """Wheel and sdist of the checkout, from a copy of its files."""
    source = out / "source"
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)  # fmt: skip
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)], check=True, capture_output=True)  # fmt: skip
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def tried(python: Path, version: str, bounds: str, wheel: Path, sdist: Path, work: Path) -> Result:
    """Make an environment, use it, remove it."""
    result = Result(version, bounds, {}, "", 0.0, 0.0)
    folder = work / f"{version}-{bounds}"
    own = folder / "env" / "bin" / "python"
    away = folder / "away"
    away.mkdir(parents=True)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "MMLONG_DATA": str(folder / "data"), "PATH": f"{own.parent}{os.pathsep}{os.environ['PATH']}"}  # fmt: skip
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        variables.pop(name, None)

    def step(what: str, words: Sequence[str | Path]) -> str:
        print(f"  {version} {bounds}: {what}", flush=True)
        done = subprocess.run(list(map(str, words)), cwd=away, env=variables, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{what}: {(done.stdout + done.stderr).strip()[-3000:]}")
        return done.stdout

    begin = time.monotonic()
    try:
        step("venv", [python, "-m", "venv", folder / "env"])
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(lowest(project()["dependencies"], version)) if bounds == "lowest" else "")
        step("install the wheel", [own, "-m", "pip", "install", "-q", "--no-compile", "-c", constraints, wheel])
        step("pip check", [own, "-m", "pip", "check"])
        listed = json.loads(step("pip list", [own, "-m", "pip", "list", "--format", "json"]))
        declared = {canonical(Requirement(text).name) for text in project()["dependencies"]}
        result.installed = {each["name"]: each["version"] for each in listed if canonical(each["name"]) in declared}
        result.install_seconds = round(time.monotonic() - begin, 1)
        begin = time.monotonic()
        step("use", [own, "-P", SMOKE, "--page", PAGE])
        if bounds == "highest":
            step("install the sdist", [own, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", sdist])
            step("use it", [own, "-P", SMOKE])
        result.smoke_seconds = round(time.monotonic() - begin, 1)
    except RuntimeError as error:
        result.failed = str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def canonical(name: str) -> str:
    """A package's name as it compares."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 0 if every environment is well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="PYTHON",
        help="an interpreter; may be repeated (default: all found)",
    )
    parser.add_argument("--bounds", choices=(*BOUNDS, "both"), default="both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    args = parser.parse_args(argv)
    wanted = SpecifierSet(project()["requires-python"])
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="environments-") as work:
        wheel, sdist = build(Path(work))
        print(f"{wheel.name} and {sdist.name}; Python {wanted}")
        for version, python in pythons(args.python).items():
            if version not in wanted:
                print(f"  {version}: {python} is outside of the range and left out")
                continue
            for bounds in BOUNDS if args.bounds == "both" else (args.bounds,):
                results.append(tried(python, version, bounds, wheel, sdist, Path(work)))
                if args.json is not None:
                    args.json.write_text(json.dumps([asdict(each) for each in results], indent=2) + "\n")
                told(results[-1])
    return int(not results or any(each.failed for each in results))


def told(result: Result) -> None:
    """Print what came of an environment."""
    versions = ", ".join(f"{name} {version}" for name, version in result.installed.items())
    print(f"Python {result.python}, {result.bounds}: {'FAILED in ' + result.failed if result.failed else 'well'}")
    print(f"  {versions}\n  installed in {result.install_seconds} s, used in {result.smoke_seconds} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
