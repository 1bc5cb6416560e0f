"""Text to tokens to batches; no module but `substreams` imports torch.

The order: filetypes, sources, decompress, jobs, records, tables, documents, sample, tokenizer,
sentencepiece_tokenizer, word_tokenizer, byte_tokenizer, token_table, tokenizer_choice, tokenizer_training, word_keys,
word_table, known_words, bpe_kernels, tokenizer_rules, encoder, stream_format, stream, stream_writer, adopt, ring,
substreams.
"""
