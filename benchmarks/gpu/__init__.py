"""What the benchmarks on a GPU share: sizes, work, timing, the physical limit, cases, peers and tables."""
