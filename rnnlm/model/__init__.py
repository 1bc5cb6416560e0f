"""Tokens to loss: layers, head, and what a trained model does.

The order: precision, dropout, layers, heads, language_model, prompt, generate, evaluate.
"""
