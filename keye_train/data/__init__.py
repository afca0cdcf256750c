"""What the model reads: the chain from shards to packed tensors (steps 2 to 9 of ``keye_train.__init__``)."""
