"""Text to tokens to batches; no module but `substreams` imports torch.

The order: sources, decompress, jobs, records, parquet, documents, tokenizer, tokenizer_training, bpe_kernels, encoder,
stream_format, stream, stream_writer, adopt, ring, substreams.
"""
