"""docs/ is true of what it speaks of: its Python runs, its commands are read by the real parsers, and what it names is there. No Sphinx is needed."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mmlong.cli import COMMANDS, main
from mmlong.cli.recipes import packaged
from mmlong.mixers import MIXERS, list_mixers

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
ELSEWHERE = {
    "docs/new_modality.md": "tests/plugins/test_new_modality_page.py",
    "docs/your_data.md": "tests/plugins/test_your_data_page.py",
}
"""Pages whose Python needs their commands, and the tests that run both."""

_FENCE = re.compile(r"^(`{3,})([^\n`]*)\n(.*?)^\1$", re.M | re.S)
_INDENTED = re.compile(r"(?:^    .*\n?|^\n(?=    ))+", re.M)
_INLINE = re.compile(r"`mmlong ([^`]+)`")


@dataclass(frozen=True)
class Block:
    """A block of a page: its language (empty for none), what is in it, and the line of the page on which that begins."""

    page: str
    language: str
    text: str
    line: int

    @property
    def where(self) -> str:
        """Page and line."""
        return f"{self.page}:{self.line}"


def name(page: Path) -> str:
    """A page's name within the checkout."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text("utf-8")
    return [
        Block(name(page), found[2].strip(), found[3], text.count("\n", 0, found.start(3)) + 1)
        for found in _FENCE.finditer(text)
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks, line for line."""
    return _FENCE.sub(lambda found: "\n" * found[0].count("\n"), page.read_text("utf-8"))


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(where, words behind ``mmlong``) of every command in a block, fenced or indented."""
    text = prose(page)
    indented = [
        Block(name(page), "", found[0], text.count("\n", 0, found.start()) + 1) for found in _INDENTED.finditer(text)
    ]
    found = []
    for block in [*blocks(page), *indented]:
        if block.language not in ("", "bash", "console"):
            continue
        for number, line in enumerate(block.text.splitlines()):
            words = shlex.split(line, comments=True) if line.lstrip().startswith("mmlong ") else []
            if words:
                found.append((f"{block.page}:{block.line + number}", words[1:]))
    return found


def inline_commands(page: Path) -> list[str]:
    """What stands behind ``mmlong`` in the code within a page's sentences."""
    return _INLINE.findall(prose(page))


WITH_CODE = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
COMMAND_LINES = [command for page in [*PAGES, README] for command in commands(page)]


@pytest.mark.parametrize("page", [page for page in WITH_CODE if name(page) not in ELSEWHERE], ids=name)
def test_code_runs_as_it_stands(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page one after another, in one namespace and a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MIXERS, "_entries", {mixer: MIXERS[mixer] for mixer in list_mixers()})
    namespace = {"__name__": page.stem}
    for block in blocks(page):
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)


def test_code_that_runs_elsewhere_does() -> None:
    for page, test in ELSEWHERE.items():
        assert ROOT / page in WITH_CODE
        assert Path(page).name in (ROOT / test).read_text("utf-8")
    assert len(WITH_CODE) >= 10


STOPS = (
    "mmlong.cli.engine.Engine", "mmlong.cli.estimate.Recipe", "mmlong.cli.bench._build", "mmlong.cli.build.parse",
    "mmlong.cli.bench_speed._measured",
)  # fmt: skip
"""Where work begins in the commands that read keys of a recipe beside their own options; the others begin behind `parse_args`."""


class Reached(Exception):  # noqa: N818
    """A command was read to its end, and would now begin to work."""


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands stop when all their words have been understood."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *given: Any, **options: Any) -> argparse.Namespace:
        raise Reached(parse(self, *given, **options))

    def reached(*given: Any, **options: Any) -> None:
        raise Reached(given)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    for where in STOPS:
        monkeypatch.setattr(where, reached)
    monkeypatch.setattr("mmlong.cli.bench._consumed", lambda run: 1.0)
    understood = importlib.import_module("mmlong.cli.knn")._parse
    monkeypatch.setattr("mmlong.cli.knn._parse", lambda *given: reached(understood(*given)))


def written_on(page: Path) -> set[str]:
    """Recipes that a page does not find but makes: YAML files that it shows, and those of `mmlong new-modality`."""
    made = set(re.findall(r"`(\w+\.yaml)`", prose(page)))
    for _, words in commands(page):
        if words[0] == "new-modality":
            made |= {f"{words[1]}/waves", f"{words[1]}/waves.debug"}
    return made


@pytest.mark.usefixtures("read_only")
@pytest.mark.parametrize(("where", "words"), COMMAND_LINES, ids=[where for where, _ in COMMAND_LINES])
def test_commands_are_understood(
    where: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Command, options, keys and recipes exist: the real parser takes all of it."""
    known = set(packaged())
    for word in words:
        if re.fullmatch(rf"({'|'.join({recipe.partition('/')[0] for recipe in known})})/\w+(\.debug)?", word):
            assert word in known, f"{where}: there is no recipe {word}"
    assert words[0] in COMMANDS, where
    if words[0] in ("mixers", "doctor", "recipes") and len(words) == 1:
        return  # its parser has nothing to refuse
    monkeypatch.chdir(tmp_path)
    for made in written_on(ROOT / where.partition(":")[0]) & set(words):
        place = words.index(made)
        if made.endswith(".yaml"):
            Path(made).write_text(shown(ROOT / where.partition(":")[0], made), "utf-8")
        elif made.endswith(".debug"):
            words = words[: place - 1] + words[place + 1 :]
        else:  # the recipe that `mmlong new-modality` would write
            words = [*words[:place], str(template(tmp_path)), *words[place + 1 :]]
    with pytest.raises(Reached):
        raise AssertionError(f"{where}: {main(words)}: {capsys.readouterr().err}")


def shown(page: Path, file: str) -> str:
    """The content of a YAML file that a page shows: the block behind its first mention."""
    text = page.read_text("utf-8")
    found = re.search(rf"`{re.escape(file)}`.*?^```yaml\n(.*?)^```$", text, re.M | re.S)
    assert found, f"{page} does not show {file}"
    return found[1]


def template(folder: Path) -> Path:
    """The recipe that `mmlong new-modality` writes, which is in no package here."""
    (folder / "waves.yaml").write_text(
        "data: {class_path: mmlong.datamodules.arrays.ArrayDataModule}\n"
        "model: {class_path: mmlong.tasks.ClassifyTask, init_args: {modality: {name: sonar}}}\n"
    )
    return folder / "waves.yaml"


def test_a_wrong_command_would_be_told(capsys: pytest.CaptureFixture[str], read_only: None) -> None:
    """The net has no hole: options, keys and recipes that do not exist do not pass."""
    assert main(["fit", "-c", "image/cells256", "--model.optim.learning_rate", "1"]) == 2
    assert main(["fit", "-c", "image/cells257"]) == 2
    with pytest.raises(SystemExit):
        main(["generate", "text/stdlib_ar", "--lenght", "5"])
    assert "image/cells256" in capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_exist(page: Path) -> None:
    """Commands within sentences, files of the checkout, dotted names."""
    text = prose(page)
    for command in inline_commands(page):
        assert command.split()[0] in {*COMMANDS, "COMMAND", "..."}, command
    for file in re.findall(r"`((?:mmlong|datamodules|experiments|tests|configs)/[\w/]+\.(?:py|md|yaml))`", text):
        assert (ROOT / file).is_file(), file
    for dotted in re.findall(r"(?<![\w./-])(mmlong(?:\.\w+)+)", text):
        if dotted not in ENTRY_POINTS:
            assert found(dotted), dotted


ENTRY_POINTS = ("mmlong.recipes",)
"""Names that are groups of entry points and no modules."""


def found(dotted: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    module, _, last = dotted.rpartition(".")
    if module and hasattr(importlib.import_module(module), last):
        return True
    return importlib.util.find_spec(dotted) is not None


def anchors(page: Path) -> set[str]:
    """What a link to a heading of a page is called."""
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#{1,3} (.+)$", prose(page), re.M)
    }


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]*)\)", prose(page)):
        if re.match(r"\w+://", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.is_file(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{page.name}: {target}"


@pytest.mark.parametrize("page", [page for page in PAGES if "{include}" in page.read_text("utf-8")], ids=name)
def test_included_parts_are_there(page: Path) -> None:
    """Both ends are found, once, in this order; and what lies between has no link that would lead nowhere from here."""
    for block in blocks(page):
        if not block.language.startswith("{include}"):
            continue
        source = (page.parent / block.language.split()[1]).read_text("utf-8")
        ends = dict(re.findall(r'^:([\w-]+): "(.*)"$', block.text, re.M))
        for end in ends.values():
            assert source.count(end) == 1, f"{block.where}: {end!r} is {source.count(end)} times there"
        part = source.partition(ends["start-after"])[2].partition(ends["end-before"])[0]
        assert source.index(ends["start-after"]) < source.index(ends["end-before"])
        assert part.strip()
        assert not re.findall(r"\]\((?!\w+://)", part), f"{block.where}: a relative link in what is included"


def test_every_page_is_in_a_table_of_contents() -> None:
    entries = set()
    for page in PAGES:
        for block in blocks(page):
            if block.language == "{toctree}":
                entries |= {
                    page.parent / f"{line}.md" for line in block.text.splitlines() if line and not line.startswith(":")
                }
    assert entries == set(PAGES) - {DOCS / "index.md"}


def test_the_api_has_every_package_that_says_what_is_public() -> None:
    documented = set(re.findall(r"automodule:: ([\w.]+)", "".join(page.read_text("utf-8") for page in PAGES)))
    public = {"mmlong"} | {
        f"mmlong.{init.parent.name}"
        for init in (ROOT / "mmlong").glob("*/__init__.py")
        if re.search(r"^__all__ =", init.read_text("utf-8"), re.M)
    }
    assert public <= documented
    for module in documented:
        assert importlib.import_module(module).__doc__
