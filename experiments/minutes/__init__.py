"""mmlong's recipes against what people would pick instead, at equal CPU minutes on the same split.

``python -m mmlong.experiments.minutes genome/binding200 text/news --minutes 12 --seeds 0 1 2 --json found.json --markdown found.md``
"""
