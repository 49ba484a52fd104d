"""Long work in blocks: in this process, in processes of this machine, on a Ray cluster, or as shards of a job array."""
