"""Low-rank adapters (LoRA, arXiv:2106.09685): their parameters, and their files in the form of peft."""
