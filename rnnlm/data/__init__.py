"""Text to tokens to batches; no module but `substreams` imports torch.

The order: sources, decompress, jobs, records, parquet, documents, tokenizer, sentencepiece_tokenizer, word_tokenizer,
byte_tokenizer, tokenizer_training, kernels, word_keys, word_table, words, bpe_kernels, tokenizer_rules,
sentencepiece_words, encoder, stream_format, stream, stream_writer, adopt, ring, substreams.
"""
