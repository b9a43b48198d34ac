"""Train, resume and use the ProtTrans protein language models on supercomputers."""

__version__ = "0.1.0"
