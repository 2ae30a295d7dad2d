"""What a person looks at: a run folder as one page of HTML that needs nothing else, and several runs held against each other.

:mod:`~mmlong.report.gather` reads a run folder; :mod:`~mmlong.report.page` and :mod:`~mmlong.report.compare` make pages of what it found. A page asks the network for nothing and runs no script: pictures and
sounds are in it, curves are SVG. ``mmlong report`` is the face.
"""

from __future__ import annotations

from mmlong.report.compare import comparison_page
from mmlong.report.gather import BadRunError, Run, gather
from mmlong.report.page import report_page

__all__ = ["BadRunError", "Run", "comparison_page", "gather", "report_page"]
