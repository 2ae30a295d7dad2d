"""What a part costs: seconds, memory and counted work, each measurement in a process of its own; the machinery of ``mmlong bench``.

A *job* is a dictionary of plain values, run by :mod:`mmlong.bench.job` in a fresh process (:func:`mmlong.bench.process.run_job`). :mod:`mmlong.bench.contest` makes the jobs of a sweep, the
sides of a comparison in turn, and rows of their results; :mod:`mmlong.bench.report` keeps, draws and reads rows. :mod:`mmlong.bench.peers` knows whom to compare with. This folder knows
mixers, backbone, models and tasks, and no files of data.
"""
