"""Loading onto meshes: which part of every tensor a rank holds, and how it gets there.

torch.distributed shards and, where one rank reads for all, moves.
"""
