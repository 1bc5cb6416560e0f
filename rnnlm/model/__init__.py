"""Tokens to loss: layers, head, and what a trained model does.

The order: precision, random_bits, dropout_kernels, dropout_triton, dropout, layers, liger, cross_entropy_kernels,
cross_entropy, heads, adaptive, language_model, prompt, generate, evaluate.
"""
