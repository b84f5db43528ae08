"""The paper's own experiments at small scale: `python -m benchmarks.paper FIGURE`."""
