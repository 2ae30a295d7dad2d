"""Models by whatever names them: a folder, a run, a recipe's newest run, or a repository of the Hugging Face hub; and from here to the hub.

What lies on the hub is what lies in a folder: ``config.json``, ``model.safetensors`` and a model card, ``README.md``. Nothing else is fetched, and nothing that is fetched is executed.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from mmlong.models.card import CARD, model_card
from mmlong.models.model import Model
from mmlong.models.saving import CONFIG_FILE, WEIGHTS_FILE, load_model, save_model
from mmlong.runs import is_packaged_recipe, model_folder

HUB = "hub:"
FETCHED = [CONFIG_FILE, WEIGHTS_FILE, CARD]
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def load(
    what: str | Path,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    runs: str | Path = "runs",
    token: str | bool | None = None,
) -> Model:
    """A trained model, in evaluation mode.

    Args:
        what: a folder that :func:`save_pretrained` or a run left; else a recipe's name, whose newest run that is over is taken; else ``owner/name`` on the hub. ``hub:owner/name`` is the
            hub's whatever lies here.
        revision: branch, tag or commit on the hub.
        device: where to.
        runs: where run folders are.
        token: of the hub, for a repository that is not public; ``None``: what the hub's own command saved.

    Raises:
        FileNotFoundError: nothing of that name is here or on the hub, the hub cannot be reached, or there is no model in what was found.
        ValueError: the model is damaged, or a revision of what does not lie on the hub.
    """
    folder = None if str(what).startswith(HUB) else model_folder(what, runs)
    if folder is None:
        folder = _fetch(what, revision, token, Path(runs))
    elif revision is not None:
        raise ValueError(f"revision is of a repository on the hub, and {what} is {folder}: write {HUB}owner/name")
    return load_model(folder, device).eval()


def _fetch(what: str | Path, revision: str | None, token: str | bool | None, runs: Path) -> Path:
    repo = str(what).removeprefix(HUB)
    here = f"{what}: no such folder, and no finished run of a recipe of this name under {runs}/"
    if not _REPO.fullmatch(repo):
        raise FileNotFoundError(f"{here}; on the hub a model is owner/name")
    if not str(what).startswith(HUB) and is_packaged_recipe(repo):
        # A stranger's repository of the same name is not what was meant.
        raise FileNotFoundError(f"{here}; train one with `mmlong fit -c {repo}`")
    import huggingface_hub
    from huggingface_hub import errors

    here = "on the hub" if str(what).startswith(HUB) else f"{here}; and on the hub"
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=FETCHED, token=token))
    except errors.GatedRepoError as error:
        raise FileNotFoundError(f"{here} {repo} asks for consent and a token first: {_line(error)}") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{here} there is no {repo}, or it is not public and needs a token") from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{here} {repo} has no revision {revision!r}") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"{here} {repo} could not be fetched: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def save_pretrained(
    model: Model, folder: str | Path, run: str | Path | None = None, license: str | None = None
) -> None:
    """Write ``config.json``, ``model.safetensors`` and a model card, ``README.md``.

    Args:
        model: the model.
        folder: made if needed.
        run: the folder of the run that trained it, from which the card is written. Without it a card that is there already stays as it is.
        license: of the weights, as the hub abbreviates it (``apache-2.0``), if you give them one.

    Raises:
        FileNotFoundError: there is no such run.
    """
    text = model_card(model, run, license)
    save_model(model, folder)
    card = Path(folder) / CARD
    if run is not None or not card.is_file():
        card.write_text(text, encoding="utf-8")


def push_to_hub(
    model: Model,
    repo_id: str,
    *,
    run: str | Path | None = None,
    license: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Put a model on the hub: the three files of :func:`save_pretrained`, in a repository that is made if there is none.

    Args:
        model: the model.
        repo_id: ``owner/name``.
        run, license: see :func:`save_pretrained`. Without a run a card that is there already stays as it is.
        revision: branch; made if needed.
        private: a new repository is not public; ``None``: as the owner has it by default.
        token: see :func:`load`.
        message: of the commit.
        create_pr: propose it in place of committing.

    Returns:
        address of the commit.

    Raises:
        ValueError: ``repo_id`` is no name of a repository.
        huggingface_hub.errors.HfHubHTTPError: what the hub says no to.
    """
    repo = repo_id.removeprefix(HUB)
    if not _REPO.fullmatch(repo):
        raise ValueError(f"a repository on the hub is owner/name, got {repo_id!r}")
    import huggingface_hub

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, run, license)
        api = huggingface_hub.HfApi(token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo, branch=revision, exist_ok=True)
        keep = run is None and api.file_exists(repo, CARD, revision=revision)
        files = [name for name in FETCHED if name != CARD or not keep]
        commit: Any = api.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, allow_patterns=files, create_pr=create_pr,
            commit_message=message or "Model of mmlong",
        )  # fmt: skip
    return str(commit.pr_url if create_pr else commit.commit_url)
