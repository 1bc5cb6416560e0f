"""Corpus to streams, in parallel: the same bytes for any number of workers and kills.

The order: inputs, unit_file, executor, shared_tasks, survey, status, units, encode, kept, external_sort, selections,
stream_tasks, position, assemble, build.
"""
