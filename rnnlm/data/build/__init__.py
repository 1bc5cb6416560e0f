"""Corpus to streams, in parallel: the same bytes for any number of workers and kills.

The order: units, external_sort, executor, shared_tasks, status, assemble, build.
"""
