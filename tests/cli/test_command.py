"""The command as a stranger meets it: help, wrong words, and what is said about them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmlong.cli.engine import plain

Call = Callable[..., tuple[int, str]]


def test_help_and_import_wait_for_no_heavy_library() -> None:
    heavy = "{'torch', 'lightning', 'numpy', 'matplotlib', 'jsonargparse'}"
    code = f"import sys, mmlong, mmlong.cli; mmlong.cli.main(['--help']); sys.exit(len({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "mmlong fit -c image/cells256" in done.stdout


def test_names_of_the_package_are_loaded_when_used() -> None:
    import mmlong

    assert mmlong.create_mixer("s4d", 16).dim == 16
    assert "mamba2" in mmlong.list_mixers("*mamba*")
    assert "pixel_pyramid" in mmlong.list_models()
    assert "create_model" in dir(mmlong)
    with pytest.raises(AttributeError, match="did you mean 'create_model'"):
        _ = mmlong.create_modl


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fitt"], "did you mean 'fit'"),
        (["fit"], "which recipe?"),
        (["fit", "image/mnist784"], "did you mean -c image/mnist784"),
        (["fit", "-c"], "-c needs the name or file"),
        (["fit", "-c", "image/mnist78"], "did you mean 'image/mnist784'"),
        (["fit", "-c", "image/mnist784", "--trainer.max_step", "4"], "did you mean 'trainer.max_steps'"),
        (["fit", "-c", "image/mnist784", "--max_steps=4"], "did you mean 'trainer.max_steps'"),
        (["fit", "-c", "image/mnist784", "--model.optm.lr=3"], "did you mean 'model.optim'"),
        (["fit", "-c", "image/mnist784", "--model.backbone.mixer=[s4d]"], "did you mean 'model.backbone.mixers'"),
        (["fit", "-c", "image/mnist784", "--model.init_args.backbone.dims=3"], "did you mean 'model.init_args.backbone.dim'"),
        (["fit", "-c", "image/mnist784", "--data.bach_size=3"], "did you mean 'data.batch_size'"),
        (["fit", "-c", "image/mnist784", "--model.optim.lr"], "needs a value"),
        (["fit", "-c", "image/mnist784", "--model.class_path", "mmlong.tasks.ClasifyTask"], "did you mean 'ClassifyTask'"),
        (["fit", "-c", "image/mnist784", "--trainer.max_steps", "abc"], "trainer.max_steps: Expected a int. Got value: abc"),
        (["fit", "-c", "image/mnist784", "--model.optim.lr", "abc"], "model.optim.lr: Expected a float. Got value: abc"),
        (["fit", "-c", "image/mnist784", "--model.optim.schedule", "cosin"], "Expected one of 'cosine'"),
        (["test", "-c", "image/mnist784"], "which weights?"),
        (["test", "-c", "image/mnist784", "--ckpt_path", "last"], "no run of image/mnist784"),
        (["test", "-c", "image/mnist784", "--ckpt_path", "https://there/a.ckpt"], "read from files only"),
        (["test", "-c", "image/mnist784", "--ckpt_path", "nowhere.ckpt"], "no such file or run folder"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_answered_in_a_line(
    words: list[str], said: str, mmlong: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, answer = mmlong(*words)
    assert status == 2
    assert said in answer
    assert len(answer.splitlines()) == 1, answer
    assert not list(tmp_path.glob("runs/*")), "a wrong command leaves no run folder"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--model.backbone.mixers=[hiena]", "unknown mixer 'hiena' (did you mean 'hyena'?)"),
        ("--model.head.name=clasify", "unknown head 'clasify' (did you mean 'classify'?)"),
        ("--data.label=kind", "label"),
        ("--data.dataset=nowhere", "is not a packed dataset"),
    ],
)
def test_a_part_that_cannot_be_built(override: str, said: str, mmlong: Call, recipe: str) -> None:
    status, answer = mmlong("fit", "-c", recipe, override)
    assert status == 1
    assert said in answer
    assert "Namespace" not in answer


def test_an_unknown_key_in_a_file(mmlong: Call, recipe: str) -> None:
    Path("more.yaml").write_text("trainer: {max_step: 3}\n")
    status, answer = mmlong("fit", "-c", recipe, "-c", "more.yaml")
    assert status == 2
    assert "unknown key 'trainer.max_step' in noise.yaml + more.yaml (did you mean 'trainer.max_steps'?)" in answer


def test_print_config_shows_the_merged_recipe(mmlong: Call, recipe: str) -> None:
    status, answer = mmlong("fit", "-c", recipe, "--model.backbone.mixers=[mamba2]", "--print_config")
    assert status == 0
    assert "- mamba2" in answer
    assert "max_steps: 8" in answer


def test_tables(mmlong: Call) -> None:
    status, answer = mmlong("mixers", "*mamba*")
    assert (status, "mamba2" in answer, "s4d" in answer) == (0, True, False)
    status, answer = mmlong("mixers", "mamba9")
    assert (status, "did you mean" in answer) == (1, True)
    status, answer = mmlong("doctor")
    assert status == 0
    for word in (
        "torch 2",
        "threads in use",
        "attention",
        "xformers",
        "mamba_ssm",
        'pip install "mmlong[causal-conv1d]"',
    ):
        assert word in answer
    mixers = answer.partition("what each mixer takes")[2].partition("backend")[0]
    lines, name = dict[str, str](), ""
    for line in mixers.splitlines()[2:]:
        name = line.split()[0] if line.strip() and not line.startswith(" ") else name
        lines[name] = lines.get(name, "") + line
    from mmlong.mixers import list_mixers

    assert {*list_mixers(), "op"} == set(lines), "a row a mixer"
    assert "attention: sdpa" in lines["attention"]
    assert "attention: tiled" in lines["local"] or "attention: blocks" in lines["local"]
    assert "linear_attention: portable" in lines["mamba2"]
    assert "short_conv: portable" in lines["hyena"]
    assert "torch" in lines["s4d"]
    status, answer = mmlong("recipes", "image/*")
    assert (status, "image/cells256 " in answer) == (0, True)
    status, answer = mmlong("fit", "--help")
    assert (status, "--ckpt_path" in answer) == (0, True)


def test_plain_leaves_an_ordinary_message_alone() -> None:
    assert plain("the backbone has 3 entries") == "the backbone has 3 entries"


def test_the_version_names_the_commit_of_a_checkout(mmlong: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmlong.measure.checkout.commit", lambda: "0123abc+")
    assert mmlong("--version") == (0, "mmlong 0.1.0 (0123abc+)\n")
    monkeypatch.setattr("mmlong.measure.checkout.commit", lambda: None)
    assert mmlong("--version") == (0, "mmlong 0.1.0\n")
