"""What tools/benchmark_step.py is made of.

The order: presets, usual_loop, measuring, parts, floor, sides, comparison, table.
"""
