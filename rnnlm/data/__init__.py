"""Text to tokens to batches; no module but `substreams` imports torch.

The order: sources, decompress, jobs, records, parquet, documents, tokenizer, tokenizer_training, word_keys, word_table,
bpe_kernels, tokenizer_rules, encoder, stream_format, stream, stream_sources, stream_writer, adopt, ring, substreams.
"""
