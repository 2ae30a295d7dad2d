"""The files a program can be written as, how each is made and how it is run.

- ``torch``: a program of ``torch.export``, ``NAME.pt2``; run by torch in Python, on any machine.
- ``aot``: the same compiled by AOTInductor (``torch._inductor.aoti_compile_and_package``), ``NAME.pt2``; run by torch in Python or C++ without tracing or Python overhead, on machines
  like the one that compiled it. It takes a C++ compiler, and about a minute a program.
- ``onnx``: ``NAME.onnx``, run by ONNX Runtime and others. The extra ``mmlong[onnx]``. ONNX Runtime (1.32) does not run FFTs of an unknown length, so a ``hyena`` of any length is refused
  when its outputs are compared; a generator's ``sample`` is of ``torch`` in the folders of all formats.

All are programs, and whoever loads one runs it: load only what you trust. An AOTInductor package is machine code. torch evaluates the sizes and conditions that are written in a ``.pt2`` of
``torch.export``, and falls back to unpickling whatever is there that is not plain tensors; :func:`load_program` refuses a file that holds any pickle but plain tensors, so that
nothing is unpickled, but that does not make a stranger's program safe to run.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import re
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from mmlong.export.programs import Bounds, Program, Size, axes

FORMATS = ("torch", "aot", "onnx")

Run = Callable[..., tuple[Tensor, ...]]


class ExportError(RuntimeError):
    """A model cannot be exported so, or a file cannot be run; the message says why and what to do."""


def written_as(program: Program, form: str) -> str:
    """The format that a program really gets: one that is not portable is of ``torch`` in every folder."""
    return form if program.portable else "torch"


def suffix(form: str) -> str:
    """Of a program's file."""
    return ".onnx" if form == "onnx" else ".pt2"


def require_format(form: str) -> None:
    """Raise :class:`ExportError` unless programs can be written in this format here, saying what is missing."""
    if form not in FORMATS:
        raise ExportError(f"unknown format {form!r}; known: {', '.join(FORMATS)}")
    if form == "onnx":
        _onnx_packages(("onnx", "onnxscript", "onnxruntime"))
    if form == "aot":
        compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        if shutil.which(compiler) is None:
            raise ExportError(
                f"format aot compiles C++ and there is no compiler {compiler!r} here: install one, name one in CXX, or use format torch"
            )


def _onnx_packages(names: Sequence[str]) -> None:
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ExportError(f"format onnx needs {', '.join(missing)}, not installed: pip install 'mmlong[onnx]'")


def trace(program: Program, batch: Bounds, size: Size, sizes: Sequence[Size], shapes: Sequence[Sequence[Any]]) -> ExportedProgram:  # fmt: skip
    """A program of ``torch.export``, general in its batch and length.

    Args:
        program: what to trace.
        batch: sizes of the batch.
        size: of the example that is traced.
        sizes: of two examples that differ in all that may, by which it is known what each axis of an input is.
        shapes: of the inputs in those.

    Raises:
        ExportError: something in the model cannot be traced, or not for every size; with torch's reason.
    """
    given = program.example(size)
    known: dict[str, Any] = {} if batch.fixed else {"batch": Dim("batch", min=batch.least, max=batch.most)}
    if program.length is not None and not program.length.fixed:
        known["length"] = Dim("length", min=program.length.least, max=program.length.most)
        for k in range(2, 65):
            known[f"{k} * length"] = k * known["length"]
    dynamic: list[dict[int, Any]] = []
    for each in zip(*shapes, strict=True):
        words = axes(each, sizes, program.slots)
        dynamic.append({i: known.get(w, Dim.AUTO) for i, w in enumerate(words) if isinstance(w, str)})
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.export.export(
                _Positional(program.module, len(given)), given, dynamic_shapes={"given": tuple(dynamic)}, strict=False,
                # Where torch cannot prove a condition on the sizes for all of them, it is checked when the program runs.
                prefer_deferred_runtime_asserts_over_guards=True,
            )  # fmt: skip
    except Exception as error:
        raise ExportError(f"{program.name} cannot be traced by torch.export: {first_line(error)}") from error
    return found


class _Positional(torch.nn.Module):
    """Any number of tensors in, a tuple of tensors out: one form for all programs."""

    def __init__(self, module: torch.nn.Module, count: int) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        found = self.module(*given)
        found = found if isinstance(found, tuple) else (found,)
        # An output that is an input as it came would be one tensor under two names.
        return tuple(t.clone() if any(t is g for g in given) else t for t in found)


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:600] if lines else type(error).__name__


def write_program(traced: ExportedProgram, program: Program, path: Path, form: str) -> None:
    """Write a traced program in a format.

    Raises:
        ExportError: the format cannot hold it, with the reason.
    """
    try:
        if form == "torch":
            torch.export.save(traced, path)
        elif form == "aot":
            with _quiet():
                torch._inductor.aoti_compile_and_package(traced, package_path=str(path))
        else:
            with _quiet():
                made: Any = torch.onnx.export(
                    traced, input_names=program.inputs, output_names=[f"{name}.after" if name in program.inputs else name for name in program.outputs],
                    dynamo=True, verbose=False,
                )  # fmt: skip
                made.save(path)
    except Exception as error:
        raise ExportError(f"{program.name} cannot be written in format {form}: {first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress that compilers print."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load_program(path: Path, form: str, inputs: Sequence[str]) -> Run:
    """A program from its file, as a function of tensors that gives a tuple of tensors. It is code: see the module's text.

    Args:
        path: the file.
        form: what it is written as.
        inputs: names of its inputs.

    Raises:
        ExportError: no such file, a damaged one, one that would be unpickled, or what runs it is missing.
    """
    if not path.is_file():
        raise ExportError(f"{path}: no such program")
    try:
        if form == "onnx":
            return _onnx_session(path, inputs)
        if form == "aot":
            package: Any = torch._inductor.aoti_load_package(str(path))
            return _tuple_of(package)
        refuse_pickles(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _tuple_of(torch.export.load(path).module())
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"{path} cannot be loaded: {first_line(error)}") from error


def _tuple_of(run: Any) -> Run:
    def call(*given: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(run(*given))

    return call


PARTS = re.compile(
    r"models/model\.json|data/(weights|constants)/((weight|tensor)_\d+|model_\w+_config\.json)|data/sample_inputs/model\.pt|"
    r"archive_format|archive_version|byteorder|\.data/\w+"
)
"""Files in a ``.pt2`` of ``torch.export`` with plain tensors and nothing else."""


def refuse_pickles(path: Path) -> None:
    """Raise :class:`ExportError` if torch would unpickle anything but plain tensors when it loads a program of ``torch.export``.

    torch reads weights and constants as bytes where they are plain tensors, and unpickles what is called an object; it unpickles sample inputs as plain
    tensors, and as anything if that fails.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
            odd = [name for name in names if not PARTS.fullmatch(name)]
            if odd or len(set(names)) < len(names) or "models/model.json" not in names:
                raise ExportError(
                    f"{path} is no program of torch.export with plain tensors alone ({odd[:1]}): export the model anew"
                )
            for whole, name in zip(archive.namelist(), names, strict=True):
                if name.endswith("_config.json"):
                    for what, meta in json.loads(archive.read(whole))["config"].items():
                        if meta["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", meta["path_name"]):
                            raise ExportError(
                                f"{path} holds a pickle ({what}), which is not loaded: export the model anew"
                            )
                if name.startswith("data/sample_inputs/"):
                    torch.load(io.BytesIO(archive.read(whole)), weights_only=True)
    except pickle.UnpicklingError as error:
        raise ExportError(
            f"{path} holds a pickle of more than tensors, which is not loaded: export the model anew"
        ) from error
    except (zipfile.BadZipFile, KeyError, ValueError, RuntimeError, OSError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"{path} is damaged: {first_line(error)}") from error


def _onnx_session(path: Path, inputs: Sequence[str]) -> Run:
    _onnx_packages(("onnxruntime",))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    asked = {port.name for port in session.get_inputs()}

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        fed = {name: t.contiguous().numpy() for name, t in zip(inputs, given, strict=True) if name in asked}
        return tuple(torch.from_numpy(array) for array in session.run(None, fed))

    return call
