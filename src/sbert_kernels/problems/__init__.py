"""The contract between operations and backends, one module an operation: the problem, its rules, and its result.

A problem is the validated tensors of one call and a frozen specification of everything else. An operation makes it, a
backend computes it, and neither needs to know the other.
"""
