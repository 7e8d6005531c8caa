"""What the benchmarks share: provenance, timing, statistics, detectors, tables."""
