"""What a hierarchy buys against the flat backbone at equal CPU minutes: 65,536 pixels, one second of 44.1 kHz sound.

``python -m mmlong.experiments.hierarchy pixels sound percussion --minutes 12 --json found.json``
"""
