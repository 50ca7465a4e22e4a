"""Benchmarks: systems x datasets x protocols, each cell an ordinary protocol folder, one table."""

BENCHMARK_FILE = "benchmark.json"
"""Marks the folder of a benchmark, and says what is in it."""
