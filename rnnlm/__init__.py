"""rnnlm: train recurrent language models on large corpora, on any number of GPUs, resumable to the bit.

Import what you need from the module that owns it, for example ``from rnnlm.data.stream import TokenStream``. The
folders, each importing only from those before it: this one (errors, hashing, machine, files, knob, texts, config,
faults, yaml_file, key_names, arguments, cli), data, data.build, model, checkpoint, train. Within a folder the order
stands in its ``__init__.py``.
"""

__version__ = "0.4.0"
