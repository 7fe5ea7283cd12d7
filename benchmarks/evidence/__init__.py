"""Published samplers, repeated: recorded runs of public code, its variants and defects, for tests and benchmarks.

- :mod:`.golden` repeats the recorded runs of ``tests/data/golden.json.gz`` with the solvers of the library.
- :mod:`.entries` reads schedule, grid and options of a recorded run.
- :mod:`.upstream` has variants of solvers that compute exactly as public code does.
- :mod:`.published` has formulas with defects, as published.

Scripts in ``benchmarks/`` import this package directly; pytest finds it by its setting ``pythonpath``.
"""
