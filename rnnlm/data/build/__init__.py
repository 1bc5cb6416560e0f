"""Corpus to streams, in parallel: the same bytes for any number of workers and kills.

The order: inputs, unit_file, units, external_sort, executor, assemble, build.
"""
