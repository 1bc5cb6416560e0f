"""rnnlm: train recurrent language models on large corpora, on any number of GPUs, resumable to the bit.

Import what you need from the module that owns it, for example ``from rnnlm.stream import TokenStream``.
The modules, each importing only from those before it: config, lock, corpus, tokenizer, words, encoder, stream,
foreign, units, spill, workers, assemble, build, substreams, cells, loss, model, optim, health, evaluate, generate,
disk, tensorfile, untrusted, checkpoint, saving, claim, interrupts, processes, score, metrics, learner, trainer.
"""

__version__ = "0.1.0"
