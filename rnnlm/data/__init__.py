"""Text to tokens to batches; no module but `substreams` imports torch.

The order: filetypes, sources, decompress, jobs, records, tables, documents, sample, tokenizer,
sentencepiece_tokenizer, word_tokenizer, byte_tokenizer, hugging_face_tokenizer, token_table, tokenizer_choice,
tokenizer_training, word_keys, word_table, known_words, words, bpe_kernels, tokenizer_rules, sentencepiece_words,
byte_level_kernels, byte_level_rules, hugging_face_words, encoder, stream_format, stream,
stream_sources, stream_writer, adopt, ring, substreams.
"""
