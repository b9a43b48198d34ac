"""What Elnaggar et al. 2021 (ProtTrans) contradicts itself in, where it concerns several of its models: each has it among its errata."""

UNIREF100 = "UniRef100 is given as 80 and as 88 billion residues; the 150 GB stated for it fit 80 billion (149.4 GiB, space-separated), not 88 (164 GiB)."
"""Of all that were trained on it."""
BFD = "The size of BFD is given as 527, 572 and 734 GB; 734 fits the space-separated text in GiB (736)."
"""Of all that were trained on it."""
HOROVOD = "The paper says that both of its libraries trained with Horovod; its table has this model on TPU cores, over which TensorFlow distributes by itself."
"""Of all that ran on TPUs."""
LMS = (
    "Large model support is described as nodes that swap, inserted into the graph: that is IBM's for TensorFlow, which ProtBert had. "
    "For torch, so for ProtTXL, it sits in the CUDA allocator and moves only what has no room, which also explains why figure 3 has their times "
    "go opposite ways."
)
"""Of the two families that figure 3 shows with it."""
