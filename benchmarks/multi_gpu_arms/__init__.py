"""The parts of `benchmarks.multi_gpu`, each a process of its own that prints Markdown and last a line of JSON."""
