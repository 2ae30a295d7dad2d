"""Loss against compute at five sizes and against context at five lengths, fitted, and the fit held against a sixth.

``python -m mmlong.experiments.scaling text genome --json found.json --plot found.png``
"""
