"""A trained model as programs that run without this library: ``torch.export``, an AOTInductor package, or ONNX.

export_model(model, folder)          write the programs, run them from their files and compare
exported = load(folder)              the same again, with inputs checked; or use the files with plain torch, see :mod:`mmlong.export.folder`
"""

from __future__ import annotations

from mmlong.export.folder import export_model
from mmlong.export.formats import FORMATS, ExportError
from mmlong.export.load import Generator, JointGenerator, Predictor, load
from mmlong.export.programs import Bounds

__all__ = ["FORMATS", "Bounds", "ExportError", "Generator", "JointGenerator", "Predictor", "export_model", "load"]
