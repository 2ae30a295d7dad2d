"""What sharing a model between modalities buys or costs at equal CPU minutes, and whether what one modality makes of another is what it should be.

``python -m mmlong.experiments.joint digits_words --source fsdd.tar --minutes 5 --json found.json``
"""
