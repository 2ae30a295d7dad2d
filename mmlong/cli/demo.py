"""``mmlong demo RUN``: a page on this machine to try a model. What it does is in :mod:`mmlong.cli.trying`; this is its gradio face."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmlong.cli.errors import CommandError
from mmlong.cli.runs import saved_model

EPILOG = """\
examples:
  mmlong demo image/cells256                      drop a photograph, see what the model says of it
  mmlong demo text/stdlib_ar --port 7861          write a beginning, see it go on

RUN is a run folder, a folder of a saved model, or a recipe's name (its newest run). The page is served to this machine alone (127.0.0.1); Ctrl-C ends it. It
takes the extra mmlong[demo].
"""


def run_demo(argv: list[str]) -> int:
    """Run ``mmlong demo`` until it is interrupted.

    Raises:
        CommandError: gradio is not installed, there is no such model, or nothing can be tried with it.
    """
    parser = argparse.ArgumentParser(
        prog="mmlong demo", description="A page on this machine to try a model.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--port", type=int, default=7860, help="default 7860")
    parser.add_argument("--runs", default="runs", help="where run folders are (default: runs)")
    args = parser.parse_args(argv)
    model, folder = saved_model(args.run, Path(args.runs))
    # Before gradio is imported: it would report its use to its makers.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise CommandError(
            f"demo needs gradio, not installed ({error}): pip install 'mmlong[demo]'", status=1
        ) from error
    page = build_page(gradio, model, folder)
    try:
        page.queue().launch(
            server_name="127.0.0.1", server_port=args.port, share=False, prevent_thread_lock=True, quiet=True,
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        )  # fmt: skip
    except OSError as error:
        raise CommandError(f"--port {args.port}: {error}", status=1) from error
    print(f"{folder}: http://127.0.0.1:{args.port}  (Ctrl-C ends it)", flush=True)
    try:
        page.block_thread()
    finally:
        page.close()
    return 0


def build_page(gradio: Any, model: Any, folder: Path) -> Any:
    """The page of a model.

    Raises:
        CommandError: nothing can be tried with it.
    """
    from mmlong.cli.trying import predicts
    from mmlong.models import AutoregressiveModel

    with gradio.Blocks(title=f"mmlong: {folder.name}", analytics_enabled=False) as page:
        gradio.Markdown(f"# mmlong\n\n`{folder}`: {model.num_parameters():,} parameters, reads {model.modality.kind}")
        if isinstance(model, AutoregressiveModel):
            _continue(gradio, model)
        elif predicts(model):
            _predict(gradio, model)
        else:
            raise CommandError(
                f"{folder} holds a model of kind {model.config.get('kind', 'plain')!r} with head {model.config['head']['name']!r}: it neither says something of a file nor goes on from one", status=1,
            )  # fmt: skip
    return page


def _predict(gradio: Any, model: Any) -> None:
    from mmlong.cli.trying import class_names, predict_file
    from mmlong.datamodules.errors import DataError

    names = class_names(model)

    def answer(path: str | None, fits: bool) -> tuple[Any, str]:
        if path is None:
            return None, "Drop a file."
        try:
            convert: dict[str, Any] = {"resample": fits, "mono": fits, "fit": "crop" if fits else None}
            said = predict_file(model, Path(path), names, **convert)
        except (DataError, ValueError) as error:
            raise gradio.Error(str(error)) from error
        cut = ", the beginning of the file" if said.cut else ""
        values = said.values if said.chances else {"label": "; ".join(f"{k} {v:.4g}" for k, v in said.values.items())}
        return values, f"{said.tokens:,} {model.modality.unit}s read{cut}"

    file = gradio.File(label="A file", type="filepath")
    fits = gradio.Checkbox(
        label="Fit a picture of another size (cropped), a sound of another rate or of several channels, to the model",
        visible=model.modality.kind in ("image", "audio"),
    )
    label, told = gradio.Label(label="What the model says", num_top_classes=10), gradio.Markdown()
    file.change(answer, [file, fits], [label, told], api_name="predict")


def _continue(gradio: Any, model: Any) -> None:
    from mmlong.cli.trying import as_picture, as_sound, as_text, go_on, prompt_tokens
    from mmlong.datamodules.errors import DataError
    from mmlong.heads import Sampling

    kind, whole = model.modality.kind, model.modality.tokens_per_sample()
    written = kind in ("text", "genome")
    shown = {"image": as_picture, "audio": lambda raw: (int(model.modality.rate), as_sound(raw))}.get(kind, as_text)

    def drawn(given: str | None, length: float, temperature: float, top_p: float, seed: float) -> Iterator[Any]:
        try:
            prompt = (
                prompt_tokens(model, given or "")
                if written
                else prompt_tokens(model, path=Path(given) if given else None)
            )
            sampling = Sampling(temperature, top_p=None if top_p >= 1 else top_p)
            # A sound is sent whole each time, so seldom.
            every = 8 if written else max(int(length if whole is None else whole) // 16, 1)
            for raw in go_on(model, prompt, int(length) if whole is None else whole, sampling, int(seed), every):
                yield shown(raw)
        except (DataError, ValueError) as error:
            raise gradio.Error(str(error)) from error

    given = (
        gradio.Textbox(label="Beginning", lines=4)
        if written
        else gradio.File(label="Beginning: a file", type="filepath")
    )
    with gradio.Row():
        length = gradio.Slider(1, 8192, 512, step=1, label="New tokens", visible=whole is None)
        temperature = gradio.Slider(0, 2, 1, step=0.05, label="Temperature; 0: always the likeliest")
        top_p = gradio.Slider(0.05, 1, 1, step=0.05, label="Top p")
        seed = gradio.Number(0, precision=0, label="Seed")
    with gradio.Row():
        begin, stop = gradio.Button("Go on", variant="primary"), gradio.Button("Stop")
    parts = {"image": lambda: gradio.Image(label="Picture"), "audio": lambda: gradio.Audio(label="Sound")}
    out = parts.get(kind, lambda: gradio.Textbox(label="Continuation", lines=16))()
    event = begin.click(drawn, [given, length, temperature, top_p, seed], out, api_name="go_on")
    stop.click(None, cancels=[event])
