"""Studies that developers run from a clone, as ``python -m benchmarks.aot``; results/ holds what was measured."""
