"""Does a run that is killed at random moments end where an undisturbed one does, to the bit?

``python -m mmlong.experiments.resume --kills 20 --ranks 1 --workers 2``
"""
