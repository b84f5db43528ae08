"""Faults on purpose: real training processes are killed, signalled, starved of disk, fed bad numbers; their files are damaged.

`harness` is the reusable part. Reduced counts run with the default and slow suites; `pytest --campaign tests/faults` runs all.
"""
