"""Models by folder, run, recipe and hub id; the hub is a stand-in with its functions' signatures, since there is no network in tests."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

import mmlong
from mmlong.models import Model, build_model, save_model


def make(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return build_model({
        "modality": {"name": "text"}, "backbone": {"dim": 8, "depth": 1, "mixers": ["s4d"]},
        "head": {"name": "classify", "num_classes": 2},
    })  # fmt: skip


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(value.equal(theirs[key]) for key, value in ours.items())


def make_run(folder: Path, model: Model | None) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "step=1.ckpt").touch()
    (folder / "config.yaml").write_text("recipe: text/mine\n")
    if model is not None:
        save_model(model, folder)
    return folder


class Hub:
    """A hub of folders: what ``snapshot_download`` and ``HfApi`` would do with them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[dict[str, Any]] = []

    def folder(self, repo: str, revision: str | None) -> Path:
        return self.root / repo / (revision or "main")

    def snapshot_download(self, *args: Any, **options: Any) -> str:
        bound = inspect.signature(REAL_DOWNLOAD).bind(*args, **options).arguments
        self.asked.append(dict(bound))
        folder = self.folder(bound["repo_id"], bound.get("revision"))
        if not folder.parent.is_dir():
            raise errors.RepositoryNotFoundError("404\nlong story", response=RESPONSE)
        if not folder.is_dir():
            raise errors.RevisionNotFoundError("404", response=RESPONSE)
        snapshot = self.root / "snapshot"
        shutil.rmtree(snapshot, ignore_errors=True)
        snapshot.mkdir()
        for path in folder.iterdir():
            if path.name in bound["allow_patterns"]:
                shutil.copy(path, snapshot)
        return str(snapshot)

    # of HfApi

    def call(self, name: str, *args: Any, **options: Any) -> dict[str, Any]:
        return inspect.signature(getattr(REAL_API, name)).bind(None, *args, **options).arguments

    def create_repo(self, *args: Any, **options: Any) -> None:
        given = self.call("create_repo", *args, **options)
        self.asked.append(given)
        self.folder(given["repo_id"], None).mkdir(parents=True, exist_ok=given["exist_ok"])

    def create_branch(self, *args: Any, **options: Any) -> None:
        given = self.call("create_branch", *args, **options)
        shutil.copytree(self.folder(given["repo_id"], None), self.folder(given["repo_id"], given["branch"]))

    def file_exists(self, *args: Any, **options: Any) -> bool:
        given = self.call("file_exists", *args, **options)
        return (self.folder(given["repo_id"], given.get("revision")) / given["filename"]).is_file()

    def upload_folder(self, *args: Any, **options: Any) -> SimpleNamespace:
        given = self.call("upload_folder", *args, **options)
        self.asked.append(given)
        for path in Path(given["folder_path"]).iterdir():
            if path.name in given["allow_patterns"]:
                shutil.copy(path, self.folder(given["repo_id"], given.get("revision")))
        return SimpleNamespace(commit_url="http://hub/commit/1", pr_url="http://hub/discussions/1")


# All that the hub's errors look at, whatever library their responses are of.
RESPONSE: Any = SimpleNamespace(headers={}, request=None, status_code=404)
REAL_DOWNLOAD = huggingface_hub.snapshot_download
REAL_API = huggingface_hub.HfApi


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: hub)
    return hub


def test_a_folder_a_run_and_a_recipes_newest_run_that_is_over(hub: Hub) -> None:
    first, second = make(1), make(2)
    make_run(Path("runs/text/mine/20260101-000000"), make(0))
    make_run(Path("runs/text/mine/20260102-000000"), first)
    make_run(Path("runs/text/mine/20260103-000000"), None)  # not over yet
    second.save_pretrained("saved")
    assert same(mmlong.load("runs/text/mine/20260102-000000"), first)
    assert same(mmlong.load("text/mine"), first)
    assert same(mmlong.load(Path("saved")), second)
    assert not mmlong.load("saved").training
    assert same(mmlong.load("mine", runs="runs/text"), first)
    with pytest.raises(FileNotFoundError, match="20260103-000000 holds no saved model.*when its training is over"):
        mmlong.load("runs/text/mine/20260103-000000")
    with pytest.raises(ValueError, match="revision is of a repository on the hub, and saved is saved"):
        mmlong.load("saved", revision="v1")
    assert not hub.asked


def test_there_and_back(hub: Hub) -> None:
    model = make(3)
    assert model.push_to_hub("me/it", private=True, message="first") == "http://hub/commit/1"
    assert hub.asked[0]["private"] is True
    assert hub.asked[1]["commit_message"] == "first"
    assert sorted(path.name for path in (hub.root / "me/it/main").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    (hub.root / "me/it/main/evil.pkl").touch()
    loaded = mmlong.load("me/it", token="secret")
    assert same(loaded, model)
    assert type(loaded) is Model
    assert hub.asked[-1] == {
        "repo_id": "me/it", "revision": None, "token": "secret",
        "allow_patterns": ["config.json", "model.safetensors", "README.md"],
    }  # fmt: skip
    assert not (hub.root / "snapshot/evil.pkl").exists()
    # Another revision, and a card that somebody wrote, which stays.
    (hub.root / "me/it/main/README.md").write_text("mine")
    other = make(4)
    other.push_to_hub("me/it", revision="v2")
    assert same(mmlong.load("me/it", revision="v2"), other)
    assert same(mmlong.load("hub:me/it"), model)
    assert (hub.root / "me/it/v2/README.md").read_text() == "mine"
    run = make_run(Path("run"), other)
    assert other.push_to_hub("me/it", run=run, create_pr=True) == "http://hub/discussions/1"
    assert "# text/mine" in (hub.root / "me/it/main/README.md").read_text()


def test_what_is_here_hides_the_hub_unless_it_is_named(hub: Hub) -> None:
    here, there = make(1), make(2)
    save_model(here, "me/it")
    there.push_to_hub("me/it")
    assert same(mmlong.load("me/it"), here)
    assert same(mmlong.load("hub:me/it"), there)


def test_what_is_nowhere(hub: Hub) -> None:
    with pytest.raises(FileNotFoundError, match="nothing: no such folder.*on the hub a model is owner/name"):
        mmlong.load("nothing")
    assert not hub.asked
    with pytest.raises(
        FileNotFoundError, match="me/it: no such folder.* under runs/; and on the hub there is no me/it"
    ):
        mmlong.load("me/it")
    with pytest.raises(FileNotFoundError, match="^on the hub there is no me/it"):
        mmlong.load("hub:me/it")
    make().push_to_hub("me/it")
    with pytest.raises(FileNotFoundError, match="on the hub me/it has no revision 'v9'"):
        mmlong.load("hub:me/it", revision="v9")
    (hub.root / "me/it/main/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        mmlong.load("me/it")
    with pytest.raises(ValueError, match="owner/name, got 'it'"):
        make().push_to_hub("it")


def test_a_recipes_name_never_goes_to_the_hub(hub: Hub) -> None:
    """Somebody else's repository of that name would not be what was meant."""
    make().push_to_hub("image/cells256")
    hub.asked.clear()
    with pytest.raises(FileNotFoundError, match="mmlong fit -c image/cells256"):
        mmlong.load("image/cells256")
    assert not hub.asked


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.LocalEntryNotFoundError("offline\nmore"), "could not be fetched: offline$"),
        (ConnectionError("no route"), "could not be fetched: no route"),
        (errors.GatedRepoError("ask first", response=RESPONSE),
         "asks for consent and a token"),
    ],
    ids=["offline", "network", "gated"],
)  # fmt: skip
def test_a_hub_that_does_not_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(FileNotFoundError, match=said):
        mmlong.load("hub:me/it")
