"""Parts of a layer of the encoder: linear layers, MLPs, norms, dropout, tables and their gradients."""
