"""How Sphinx makes the pages of this folder: `pip install -e '.[docs]'`, then `python -m sphinx -W docs OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import mmlong

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "mmlong"
author = "the authors of mmlong"
version = release = mmlong.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_ext", "_build"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
highlight_language = "bash"  # blocks without a language are commands

napoleon_numpy_docstring = False
autodoc_typehints = "none"  # the docstrings give shapes and units, which types do not
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = f"mmlong {release}"
